"""Not a test: what test_gpu.py runs in a process of its own, because a device cannot be taken back.

gpu_path.py MODEL_FOLDER TMP          {ranks: {options: {stage: figures}}, "faults": ...}
gpu_path.py MODEL_FOLDER TMP --real   {options: {stage: figures}} of this machine's GPU
"""

import inspect
import json
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import gpu_trace
import torch
from conftest import make_rollout

import grpo
import self_check
import sft_masked
from backend import packing, parallel, policy, sampler
from backend.model_folder import load_tokenizer
from backend.policy import PolicyConfig
from backend.sampler import SamplingParams
from config import PRESETS
from evaluation import digits
from evaluation.digits import Question

# Three responses to each of five prompts: the last of four ranks has a filler in its second round.
RL = (9, [6, 40, 20], 5)
STAGES = {
    "rl": lambda r, *_: r.rl_steps(*RL),
    "sft": lambda r, *_: r.sft_steps(9, [16, 20, 30, 18, 15] * 6),
    "hand-over": lambda r, *_: r.hand_over(),
    "sample": lambda r, tokenizer, _: sample(r, tokenizer),
    "digits": lambda r, tokenizer, _: read(r, tokenizer),
    "state": lambda r, _, tmp: state(r, tmp),
    "export": lambda r, _, tmp: r.export(tmp / f"export_{parallel.world_size()}"),
}
CONFIGS = {
    "shared": {},
    "padded": {"shared_prefix": False},
    "official": {"parameters": "bfloat16"},
    "fp32": {"dtype": "float32"},
    "kept": {"gradient_checkpointing": False},
}


def state(r, tmp: Path) -> None:
    """Before the first step, as in cycle.py's resume, and after it."""
    r.optimizer = grpo.make_optimizer(r.policy, grpo.GRPOConfig())
    r.save_and_restore(tmp, with_optimizer=False)
    r.save_and_restore(tmp, with_optimizer=True)
    r.rl_steps(*RL, steps=1)
    r.save_and_restore(tmp, with_optimizer=True)


def sample(r, tokenizer) -> None:
    samples = r.sample(tokenizer, SamplingParams(max_tokens=3), [[5, 6, 7], [8] * 5])
    assert sorted(len(s.response_ids) for s in samples) == [3] * 4


def read(r, tokenizer) -> None:
    rollouts = [make_rollout(tokenizer), make_rollout(tokenizer, "It is old and good.")]
    questions = [Question(x.prompt_ids, x.answer, (3, 1, 4, 1, 5)) for x in rollouts]
    readings = r.read_digits(questions, rollouts)
    assert all(len(x.free) == len(x.judge) == 5 for x in readings)


def path(folder: Path, tmp: Path, ranks: int, number: int, configs, real: bool = False) -> dict:
    tokenizer, found = load_tokenizer(folder), {}
    for name in configs:
        config = PolicyConfig(micro_batch_tokens=90, head_tokens=40, **CONFIGS[name])
        with gpu_trace.rank(folder, config, ranks, number, real) as r:
            for stage in STAGES if name == "shared" and not real else ("rl", "sft"):
                STAGES[stage](r, tokenizer, tmp)
            found[name] = {k: s._asdict() for k, s in r.stages.items()} | {"packs": r.packs}
    return found


def check_itself(folder: Path, tmp: Path) -> list:
    """self_check's parts that need a GPU. Numbers mean nothing here; that no device is mixed up and
    that the peak is the formula's do."""

    def config_only(path: Path, sizes: dict, vocabulary: int) -> None:
        path.mkdir()
        settings = sizes | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": vocabulary}
        settings |= {"model_type": "qwen3", "tie_word_embeddings": True}
        (path / "config.json").write_text(json.dumps(settings))

    config = PRESETS["paper"]
    with gpu_trace.rank(folder, config.policy, 4, 0) as r, ExitStack() as stack:
        for owner, name, value in (
            (self_check, "_write_model", config_only),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "empty_cache", lambda: None),
            (torch.cuda, "memory_allocated", lambda: r.gpu.now),
            (torch.cuda, "reset_peak_memory_stats", r.gpu.reset),
            (torch.cuda, "max_memory_allocated", lambda: r.gpu.peak),
            (torch.cuda, "max_memory_reserved", lambda: r.gpu.peak),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        return [
            *self_check.Steps(config, folder).attention(),
            *self_check.memory(config, tmp / "large"),
        ]


# What is changed in a function's source, and the stage that must notice.
FAULTS = {
    "ids on the CPU": (
        packing._batch,
        "torch.tensor(ids, device=device)",
        "torch.tensor(ids)",
        "rl",
    ),
    "ends on the CPU": (
        packing._batch,
        "dtype=torch.int32, device=device",
        "dtype=torch.int32",
        "rl",
    ),
    "mask on the CPU": (
        packing._batch,
        "here,\n        here",
        "here,\n        scored",
        "rl",
    ),
    "scored on the CPU": (
        packing._batch,
        "here,\n        here",
        "scored,\n        here",
        "rl",
    ),
    "targets on the CPU": (
        packing._batch,
        "torch.tensor(targets, dtype=torch.long, device=device)",
        "torch.tensor(targets)",
        "rl",
    ),
    "zeros on the CPU": (policy.Policy.forward, ", device=hidden.device", "", "rl"),
    "head's values on the CPU": (policy.HeadLogProbs.forward, ", device=hidden.device", "", "rl"),
    "rotary tables on the CPU": (policy.load_policy, ").to(parallel.device())", ")", "load"),
    "a shard on the CPU": (
        policy.load_policy,
        "policy.to_empty(device=parallel.device())",
        "policy.to_empty(device='cpu')",
        "load",
    ),
    "advantages on the CPU": (grpo.recorded_values, "x.to(parallel.device())", "x", "rl"),
    "AdamW's step on the CPU": (
        parallel.optimizer_tensors,
        "torch.zeros((), device=p.device)",
        "torch.zeros(())",
        "state",
    ),
    "sampler's mask on the CPU": (
        sampler.TransformersSampler._prefill,
        "torch.tensor(mask, device=device)",
        "torch.tensor(mask)",
        "sample",
    ),
    "sampler's model on the CPU": (
        sampler.TransformersSampler.__init__,
        "model.to(parallel.device())",
        "model",
        "sample",
    ),
    "digits' ids on the CPU": (digits.Reader._tensor, ", device=self.model.device", "", "digits"),
    "an export from the GPU": (
        policy.export,
        'tensor.to("cpu", copy=saver is not None)',
        "tensor",
        "export",
    ),
    "a wait in the RL loop": (
        grpo.rl_step,
        "loss.backward()",
        "loss.backward(); loss.item()",
        "rl",
    ),
    "values laid out by a mask": (
        policy.Policy.forward,
        "zeros.put(batch.scored_index, value)",
        "zeros.masked_scatter(batch.scored, value)",
        "rl",
    ),
    "an index on the CPU": (
        packing._batch,
        "torch.tensor(index_in_rows, dtype=torch.long, device=device)",
        "torch.tensor(index_in_rows)",
        "rl",
    ),
    "chosen tokens in the RL loop": (
        grpo._sum_where,
        "torch.where(mask, values, torch.zeros_like(values))",
        "values[mask]",
        "rl",
    ),
    "a list as an index in the RL loop": (
        grpo.rl_step,
        "known.advantages",
        "known.advantages[list(range(len(known.advantages)))]",
        "rl",
    ),
    "a copy in the SFT loop": (
        sft_masked.sft_step,
        "losses.append(loss.detach())",
        "losses.append(loss.detach().cpu())",
        "sft",
    ),
}


def changed(function, old: str, new: str):
    """The code of a function whose source has `new` in place of `old`."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{function.__qualname__} has {source.count(old)} x {old!r}"
    names: dict = {}
    code = compile(source.replace(old, new), inspect.getsourcefile(function), "exec")
    exec(code, function.__globals__, names)
    made = names[function.__name__]
    return getattr(made, "__func__", getattr(made, "__wrapped__", made)).__code__


def faults(folder: Path, tmp: Path) -> dict:
    tokenizer, said = load_tokenizer(folder), {}
    config = PolicyConfig(micro_batch_tokens=90, head_tokens=40)
    for name, (function, old, new, stage) in FAULTS.items():
        function = inspect.unwrap(function)
        code, function.__code__ = function.__code__, changed(function, old, new)
        try:
            with gpu_trace.rank(folder, config, 4, 0) as r:
                if stage == "rl":
                    r.rl_steps(*RL, steps=1)
                elif stage != "load":
                    STAGES[stage](r, tokenizer, tmp)
                said[name] = {k: s.waits for k, s in r.stages.items()}
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"[:200]
        finally:
            function.__code__ = code
    return said


if __name__ == "__main__":
    folder, tmp = map(Path, sys.argv[1:3])
    if "--real" in sys.argv:
        found = path(folder, tmp, 1, 0, CONFIGS, real=True)
    else:
        found = {
            "4": path(folder, tmp, 4, 3, CONFIGS),
            "1": path(folder, tmp, 1, 0, CONFIGS),
            "self_check": check_itself(folder, tmp),
            "faults": faults(folder, tmp),
        }
    print(json.dumps(found), flush=True)
