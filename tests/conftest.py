"""Fixtures: a process group of one, tokenizers and tiny models made on the spot, a fake judge.

Run all tests: make test. One file: .venv/bin/python -m pytest tests/test_grpo.py
"""

import fcntl
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_judge import FakeJudge
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

import prompts
from backend import parallel
from storage.record import Rollout

ROOT = Path(__file__).parent.parent
EOS = "<|end|>"
REQUESTS = [f"Say something about {thing}." for thing in
            ("rain", "tea", "cats", "maps", "salt", "wind", "bread", "moss", "clay", "owls", "ink",
             "snow")]  # fmt: skip
ANSWERS = ("It is fine.", "It is old and good.", "Well, it is what it is.")

os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_configure():
    """All tests run on CPU, on a machine with a GPU too; the one that needs it takes it itself."""
    os.environ.setdefault("GPU_OF_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


# First, so that no worker is left alone with one of them at the end.
LONG = "test_cycle test_tiny test_vllm test_footprint test_evaluate test_faults test_gpu".split()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session", autouse=True)
def group():
    """A process group of one rank, for code that reduces over ranks."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    with parallel.process_group():
        yield


def make_tokenizer(digits: str = "alone", vocab_size: int = 700) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer. digits: "alone", one token each; "merged", glued to others."""
    text = [prompts.policy_prompt([{"role": "user", "content": r}], "short") for r in REQUESTS]
    text += [prompts.render_response(a, (d,) * 5) for a in ANSWERS for d in range(10)]
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=digits == "alone")
    if digits == "alone":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex("[0-9]"), "isolated"), byte_level]
        )
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


def make_model(kind: str, vocab_size: int, tied: bool = True, seed: int = 0, keys: int = 1):
    """A random model of two layers, two heads to each of `keys` keys; heads of 32, the smallest
    that vLLM knows on CPU."""
    torch.manual_seed(seed)
    common = dict(
        vocab_size=vocab_size, hidden_size=64 * keys, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2 * keys, num_key_value_heads=keys, max_position_embeddings=1024,
        tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        initializer_range=0.1,
    )  # fmt: skip
    classes = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "olmo2": (Olmo2Config, Olmo2ForCausalLM),
        "olmo3": (Olmo3Config, Olmo3ForCausalLM),
        "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
        "phi3": (Phi3Config, Phi3ForCausalLM),
    }
    config, model = classes[kind]
    extra = {
        "llama": {"head_dim": 32},
        "qwen3": {"head_dim": 32},
        "mistral": {"head_dim": 32, "sliding_window": None},
        # A window as long as the longest row; the last layer looks back on all.
        "olmo3": {"sliding_window": 1024, "layer_types": ["sliding_attention", "full_attention"]},
        # One layer with rotary positions and one without.
        "smollm3": {"no_rope_layers": [1, 0]},
    }.get(kind, {})
    return model(config(**common, **extra))


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory, tokenizer):
    """folder(kind, tied): a random tiny model as a Hugging Face folder."""
    made = {}

    def folder(kind: str = "llama", tied: bool = True) -> Path:
        if (kind, tied) not in made:
            made[kind, tied] = path = tmp_path_factory.mktemp(f"{kind}_{tied}")
            make_model(kind, len(tokenizer), tied, keys=2).save_pretrained(path)
            tokenizer.save_pretrained(path)
        return made[kind, tied]

    return folder


def make_parrot(path: Path, tokenizer) -> None:
    """Write a tiny model that has learnt to answer in a few words, with a block of random
    scores."""
    rng = random.Random(0)
    model = make_model("qwen3", len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(220):
        rows = []
        for _ in range(8):
            conversation = [{"role": "user", "content": rng.choice(REQUESTS)}]
            prompt = tokenizer.encode(prompts.policy_prompt(conversation, "short"))
            scores = [rng.randrange(10) for _ in range(5)]
            response = tokenizer.encode(prompts.render_response(rng.choice(ANSWERS), scores))
            rows.append((prompt, response))
        width = max(len(p) + len(r) for p, r in rows)
        ids = torch.zeros(8, width, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for b, (p, r) in enumerate(rows):
            ids[b, : len(p) + len(r)] = torch.tensor(p + r)
            labels[b, len(p) : len(p) + len(r)] = torch.tensor(r)
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.fixture(scope="session")
def parrot_folder(request, tmp_path_factory, tokenizer):
    """Training it takes a while, so pytest's cache keeps it until a source of it changes."""
    sources = [(ROOT / name).read_bytes() for name in ("tests/conftest.py", "prompts.py")]
    recipe = hashlib.sha256(b"".join(sources) + torch.__version__.encode()).hexdigest()[:16]
    kept = request.config.cache.mkdir("parrot") / recipe
    with open(kept.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker makes it, the others wait
        if not kept.exists():
            path = kept.with_suffix(".tmp")
            make_parrot(path, tokenizer)
            path.rename(kept)
    return Path(shutil.copytree(kept, tmp_path_factory.mktemp("parrot") / "model"))


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": r}) + "\n" for r in REQUESTS))
    return path


@pytest.fixture(scope="session")
def reference_file(tmp_path_factory):
    """The same prompts in HelpSteer2's schema, each with one labelled response."""
    path = tmp_path_factory.mktemp("data") / "helpsteer2.jsonl"
    labels = dict.fromkeys(prompts.ATTRIBUTES, 3)
    rows = [{"prompt": r, "response": f"Human: {r}", **labels} for r in REQUESTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_rollout(tokenizer, answer="It is fine.", scores=(8, 8, 8, 1, 1), judge=(2, 3, 4, 5, 6),
                 reward=0.5, sample=0, prompt="Say something.", **changes) -> Rollout:  # fmt: skip
    """A well-formed rollout that was tokenised from its text."""
    text = prompts.render_response(answer, scores)
    response = tuple(tokenizer.encode(text, add_special_tokens=False))
    fields = dict(
        cycle=1, step=1, prompt_id=prompt, sample=sample, seed=0,
        prompt_ids=tuple(tokenizer.encode(prompt, add_special_tokens=False)),
        response_ids=response, text=text, finish_reason="stop", answer=answer, self_scores=scores,
        score_positions=prompts.score_positions(response, tokenizer), judge_scores=judge,
        judge_model="test", reward=reward, quality=0.5, calibration=0.5, weight_version="c1s0",
    )  # fmt: skip
    return Rollout(**(fields | changes))


# --------------------------------------------------------------------------------------------------
# A judge server on loopback


@pytest.fixture
def fake_judge(monkeypatch):
    judge = FakeJudge()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-for-tests")
    monkeypatch.setenv("OPENAI_BASE_URL", judge.url)
    yield judge
    judge.server.shutdown()


# --------------------------------------------------------------------------------------------------
# Several ranks


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def start_ranks(ranks: int, script: list[str], cwd: Path, **env: str) -> list[subprocess.Popen]:
    """Start `python script...` once per rank with torchrun's variables."""
    port = free_port()
    started = []
    for rank in range(ranks):
        variables = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        started.append(
            subprocess.Popen(
                [sys.executable, *script],
                cwd=cwd,
                env={**os.environ, **variables, **env},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )  # fmt: skip
        )
    return started


def finish(processes: list[subprocess.Popen], timeout: float = 240) -> str:
    """Wait for all ranks; their output, and an assertion that all ended well."""
    output = "".join(p.communicate(timeout=timeout)[0] for p in processes)
    assert [p.returncode for p in processes] == [0] * len(processes), output[-4000:]
    return output


def small_args(model: Path, data: Path, preset: str = "small", **options: object) -> list[str]:
    """Command line of a tiny run: 2 cycles of 2 steps of 4 prompts x 4 rollouts."""
    values = {
        "model": model, "data": data, "name": "tiny", "judge": "heuristic",
        "sampler": "transformers", "cycles": 2,
        "window": 8, "batch": 4, "rl_steps": 2, "rollouts": 4, "prompt_tokens": 700,
        "sampling.max_tokens": 120, "grpo.lr": 1e-3, "sft.lr": 1e-3, "sft.batch": 8,
        "policy.dtype": "float32", "policy.micro_batch_tokens": 2048,
    } | options  # fmt: skip
    args = [str(ROOT / "cycle.py"), "--preset", preset, "--template", "short"]
    return args + [word for k, v in values.items() for word in (f"--{k}", str(v))]
