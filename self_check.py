"""cycle.py --self_check: does this machine do what the tests on CPU have shown?

    python cycle.py --self_check
    torchrun --nproc_per_node 4 cycle.py --self_check

A small random model takes RL and distillation steps with this machine's kernels, sampler and
options, and each result is compared with what is promised. Prints one page that can be pasted into
a report, and writes nothing else. Seconds on CPU with --sampler transformers; 99 s on an H200, most
of them vLLM's start; on a GPU attention without a mask and peak memory are checked too. Ends with
status 1 if something is not as promised.
"""

import contextlib
import dataclasses
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import sft_masked
from backend import footprint, packing, parallel
from backend.model_folder import model_size
from backend.packing import Row, share_out
from backend.policy import PolicyConfig, load_model, load_policy
from backend.sampler import Request, choose_sampler, make_sampler
from config import Config
from grpo import (
    GAP_ALARM,
    KL_ALARM,
    group_advantages,
    make_optimizer,
    reference_logps,
    response_row,
    rl_step,
)
from miniature.base_model import make_tokenizer
from miniature.world import draw_prompt
from prompts import parse_self_eval, policy_prompt, render_response, score_positions
from storage.logbook import environment
from storage.record import Rollout

CHECKS = "start shards prefixes attention rl_steps distillation resume".split()
PROMPTS, ROLLOUTS = 4, 4
NEEDS_GPU = "not run: needs a GPU and --policy.dtype bfloat16"


class Found(NamedTuple):
    """One line of the page. good: None where it was not run."""

    name: str
    good: bool | None
    said: str


def main(config: Config) -> None:
    """Run all checks; SystemExit with status 1 if one fails."""
    started, found = time.monotonic(), []
    with parallel.process_group(), contextlib.ExitStack() as stack:
        folder = None
        if parallel.rank() == 0:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            _write_model(folder / "small", _SMALL)
        folder = parallel.gather([folder])[0]
        parallel.barrier()
        steps = Steps(config, folder / "small")
        try:
            for name in CHECKS:
                found += _said(getattr(steps, name))
            found += _said(memory, config, folder / "large")
            parallel.barrier()
        finally:
            if steps.sampler:
                steps.sampler.close()  # last: vLLM ends the process group with itself
    parallel.print0(page(found, time.monotonic() - started))
    if any(line.good is False for line in found):
        raise SystemExit(1)


def page(found: Sequence[Found], seconds: float) -> str:
    e = environment(parallel.world_size())
    versions = ", ".join(f"{name} {v}" for name, v in e["versions"].items() if v)
    changed = ", with uncommitted changes" if e["uncommitted_changes"] else ""
    text = (
        f"Self-check at commit {e['commit']}{changed}, {e['started']}\n"
        f"{e['device']}, {e['ranks']} rank(s), Python {e['python']}, CUDA {torch.version.cuda}\n"
        f"{versions}\n\n"
    )
    mark = {True: "ok", False: "NOT AS PROMISED", None: "-"}
    for line in found:
        text += f"{mark[line.good]:16} {line.name:52} {line.said}\n"
    failed, skipped = (sum(line.good is x for line in found) for x in (False, None))
    return text + (
        f"\n{len(found) - failed - skipped} as promised, {failed} not, {skipped} not run; "
        f"{seconds:.0f} s"
    )


def _said(check: Callable[..., list[Found]], *args) -> list[Found]:
    """The check's lines, or one that says how it ended."""
    try:
        return check(*args)
    except Exception as error:  # the page must come out whatever a machine does
        return [Found(check.__name__.replace("_", " "), False, _one_line(error))]


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _at_most(name: str, value: float, limit: float) -> Found:
    return Found(name, value <= limit, f"{value:.2g} (at most {limit:g})")


# --------------------------------------------------------------------------------------------------
# The model, which every check shares

_SMALL = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_hidden_layers=2)
# The paper's layers and vocabulary, two of 36.
_LARGE = dict(hidden_size=2560, intermediate_size=9728, num_attention_heads=32, num_hidden_layers=2)


def _write_model(folder: Path, sizes: dict, vocabulary: int = 512) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = Qwen3Config(
        **sizes, head_dim=128, num_key_value_heads=sizes["num_attention_heads"] // 4,
        vocab_size=vocabulary, max_position_embeddings=16384, tie_word_embeddings=True,
        initializer_range=0.05, eos_token_id=tokenizer.eos_token_id, dtype="bfloat16",
    )  # fmt: skip
    Qwen3ForCausalLM(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Steps:
    """Checks on the small model, in order: each goes on with what the one before has left."""

    def __init__(self, config: Config, folder: Path):
        sampling = dataclasses.replace(config.sampling, max_tokens=40)
        engine = dataclasses.replace(config.engine, kv_cache_gb=0.1)
        self.config = dataclasses.replace(
            config, prompt_tokens=200, sampling=sampling, engine=engine, sample_rows=16,
            sampler=choose_sampler(config.sampler),
        )  # fmt: skip
        self.folder, self.tokenizer, self.sampler = folder, make_tokenizer(), None
        rng = random.Random(0)
        texts = [draw_prompt(rng) for _ in range(PROMPTS)]
        self.prompts = [
            tuple(self.tokenizer.encode(policy_prompt([{"role": "user", "content": t}], "bare")))
            for t in texts
        ]

    def start(self) -> list[Found]:
        """The sampler first, because vLLM measures free memory; the rest does without it."""
        config, started = self.config, time.monotonic()
        name = f"the {config.sampler} sampler starts"
        try:
            dtype = config.policy.dtype
            self.sampler = make_sampler(config, self.folder, self.tokenizer, dtype)
            found = Found(name, True, f"{time.monotonic() - started:.1f} s")
        except Exception as error:
            found = Found(name, False, _one_line(error))
        self.policy = load_policy(self.folder, config.policy)
        self.reference = load_policy(self.folder, config.policy, trainable=False)
        self.optimizer = make_optimizer(self.policy, config.grpo)
        return [found]

    def shards(self) -> list[Found]:
        whole = load_model(self.folder, torch.bfloat16).state_dict()
        differing = [
            name
            for name, tensor in self.policy.full_weights(torch.bfloat16)
            if not torch.equal(tensor.cpu(), whole[name])
        ]
        said = f"{len(differing)} of {len(whole)} tensors differ"
        return [Found("each rank's slices are the file's", not differing, said)]

    def prefixes(self) -> list[Found]:
        """Log-probabilities and gradients with and without a shared prefix, in fp32."""
        rows = [
            response_row(p, [(7 * i + 3 * k + j) % 100 for j in range(20 + 9 * k)])
            for i, p in enumerate(self.prompts)
            for k in range(ROLLOUTS)
        ]
        logps, gradients = [], []
        for shared in (True, False):
            options = PolicyConfig("float32", shared_prefix=shared, attn="auto")
            policy = load_policy(self.folder, options)
            groups = [i // ROLLOUTS for i in range(len(rows))]
            work, own = share_out(rows, groups, 300, shared), {}
            for batch in work.batches:
                out = policy(batch, 0.8)
                (out.logp + out.entropy).masked_fill(~batch.mask, 0).sum().backward()
                own |= {i: out.logp[b][batch.mask[b]].detach() for b, i in enumerate(batch.index)}
            logps.append(dict(parallel.gather([(i, x.cpu()) for i, x in own.items()])))
            gradients.append([parallel.full_tensor(p.grad) for p in policy.parameters()])
        logp = max((logps[0][i] - logps[1][i]).abs().max().item() for i in range(len(rows)))
        square = sum((a - b).square().sum() for a, b in zip(*gradients, strict=True))
        gap = (square / sum(b.square().sum() for b in gradients[1])).sqrt().item()
        return [
            _at_most("shared prefix against padded rows, fp32: logp", logp, 1e-4),
            _at_most("the same: gradients, |difference| / |gradient|", gap, 1e-4),
        ]

    def attention(self) -> list[Found]:
        """Without a mask (flash attention) and with one, against fp32, in a pack of three rows."""
        name, ranks = "attention without a mask, bf16 against fp32", parallel.world_size()
        if parallel.device().type == "cpu":
            return [Found(name, None, NEEDS_GPU)]
        rows = [
            Row((*range(300), *[k] * n), [False] * 300 + [True] * n)
            for k in range(ranks)
            for n in (1, 77, 200)
        ]
        groups = [i // 3 for i in range(len(rows))]
        [batch] = share_out(rows, groups, 10**6).batches  # one pack a rank
        generator = torch.Generator(batch.ids.device).manual_seed(0)
        tokens = batch.ids.shape[1]
        query, key, value, weight = (
            torch.randn(1, heads, tokens, 128, generator=generator, device=batch.ids.device)
            for heads in (8, 2, 2, 8)
        )

        def attend(dtype: torch.dtype, ends: bool) -> list[torch.Tensor]:
            inputs = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
            given = packing.attention_arguments(batch, 4, torch.bfloat16 if ends else torch.float32)
            if not ends:
                given["calls"] = packing.attention_calls(batch, 4, dtype)
            out, _ = packing.attend(None, *inputs, None, 128**-0.5, **given)  # (1, L, H, d)
            (out.float() * weight.transpose(1, 2)).sum().backward()
            return [out.detach().float(), *(x.grad.float() for x in inputs)]

        exact = attend(torch.float32, ends=False)
        errors = {
            ends: [((a - b).norm() / b.norm()).item()
                   for a, b in zip(attend(torch.bfloat16, ends), exact, strict=True)]
            for ends in (True, False)
        }  # fmt: skip
        good = all(a <= 2 * b + 1e-3 for a, b in zip(errors[True], errors[False], strict=True))
        said, masked = (" ".join(f"{e:.1e}" for e in errors[ends]) for ends in (True, False))
        said = f"output and gradients off by {said}; with a mask {masked}; at most twice as far"
        return [Found(name, good, said)]

    def rl_steps(self) -> list[Found]:
        """Hand-over, sampling, reference and update, twice: the second with changed weights."""
        config, found = self.config, []
        if self.sampler is None:
            return [Found("RL steps", None, "not run: there is no sampler")]
        grpo = dataclasses.replace(config.grpo, lr=5e-3)  # so that old weights would be noticed
        self.optimizer = make_optimizer(self.policy, grpo)
        for step in (1, 2):
            rollouts = self._sample(f"c1s{step - 1}")
            work, refs = self._reference_pass(rollouts)
            advantages = group_advantages(torch.tensor([r.reward for r in rollouts]), ROLLOUTS)
            figures = rl_step(
                self.policy, self.optimizer, work, rollouts, advantages, refs,
                config.sampling.temperature, grpo,
            )  # fmt: skip
            gap, kl = figures["logprob_gap"], figures["kl"]
            name = f"RL step {step}: sampler against trainer, nats a token"
            found.append(_at_most(name, gap, GAP_ALARM))
            if step == 1:
                limit = KL_ALARM[config.policy.dtype]
                found.append(_at_most("RL step 1: KL to a reference of equal weights", kl, limit))
                clipped = figures["clip_fraction"]
                found.append(Found("RL step 1: nothing is clipped", clipped == 0, f"{clipped}"))
            else:
                moved = f"KL {kl:.2g}, gradient norm {figures['grad_norm']:.2g}"
                found.append(Found("RL step 2: the policy has moved", kl > 0, moved))
        return found

    def _sample(self, version: str) -> list[Rollout]:
        """All ranks' rollouts of the prompts, with made-up rewards."""
        self.sampler.load_weights(self.policy, version)
        mine = range(parallel.rank(), PROMPTS, parallel.world_size())
        requests = [Request(f"{i}", k, self.prompts[i], 5) for i in mine for k in range(ROLLOUTS)]
        samples = self.sampler.sample(requests, self.config.sampling)
        rollouts = [self._rollout(s.request, s.response_ids, s.text, s.logp) for s in samples]
        self.sampler.sleep()
        return sorted(parallel.gather(rollouts), key=lambda r: r.key)

    def _rollout(self, request: Request, ids: Sequence[int], text: str, logp=None) -> Rollout:
        block = parse_self_eval(text)
        return Rollout(
            cycle=1, step=1, prompt_id=request.prompt_id, sample=request.sample, seed=request.seed,
            prompt_ids=request.prompt_ids, response_ids=tuple(ids), text=text,
            finish_reason="stop", answer=block and block.answer, self_scores=block and block.scores,
            score_positions=block and score_positions(ids, self.tokenizer),
            judge_scores=block and (9, 0, 5, 3, 7), judge_model=None, quality=None,
            calibration=None, reward=float(request.sample % 3), weight_version="",
            sampled_logp=logp,
        )  # fmt: skip

    def _reference_pass(self, rollouts: Sequence[Rollout]):
        policy = self.config.policy
        rows = [response_row(r.prompt_ids, r.response_ids) for r in rollouts]
        groups = [i // ROLLOUTS for i in range(len(rows))]
        work = share_out(rows, groups, 300, policy.shared_prefix)
        return work, reference_logps(self.reference, work.batches, self.config.sampling.temperature)

    def distillation(self) -> list[Found]:
        """Two updates on the same rows: the judge's digits become more probable."""
        config = dataclasses.replace(self.config.sft, lr=1e-3)
        text = render_response("yes.", (1, 2, 3, 4, 5))
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        rollouts = [
            self._rollout(Request(f"{i}", 0, p, 5), ids, text) for i, p in enumerate(self.prompts)
        ]
        rows = [sft_masked.distillation_row(r, self.tokenizer) for r in rollouts]
        optimizer = sft_masked.make_optimizer(self.policy, config)
        losses = [
            sft_masked.sft_step(
                self.policy, optimizer, sft_masked.Update(rows, config.lr), config,
                self.config.policy,
            )["loss"]
            for _ in range(3)
        ]  # fmt: skip
        said = ", ".join(f"{loss:.3f}" for loss in losses)
        good = losses[2] < losses[0]
        return [Found("distillation: loss of five tokens over three updates", good, said)]

    def resume(self) -> list[Found]:
        """State with AdamW's, saved and loaded into a policy from the file: bit by bit."""
        with tempfile.TemporaryDirectory() as own:
            folder = Path(parallel.gather([own])[0]) / "state"
            states = []
            for policy, optimizer in (
                (self.policy, self.optimizer),
                (load_policy(self.folder, self.config.policy), None),
            ):
                names = {p: name for name, p in policy.named_parameters()}
                optimizer = optimizer or make_optimizer(policy, self.config.grpo)
                tensors = {name: p.detach() for p, name in names.items()}
                tensors |= parallel.optimizer_tensors(optimizer, names)
                states.append(tensors)
            parallel.save_state(folder, states[0], {"cycle": 1})
            parallel.load_state(folder, states[1])
            parallel.barrier()
        saved, loaded = ([getattr(t, "to_local", lambda t=t: t)() for t in state.values()]
                         for state in states)  # fmt: skip
        differing = sum(not torch.equal(a, b) for a, b in zip(saved, loaded, strict=True))
        differing = parallel.all_sum({"tensors": differing})["tensors"]
        said = f"{differing:.0f} of {len(states[0])} tensors differ"
        return [Found("state saved and loaded", differing == 0, said)]


def memory(config: Config, folder: Path) -> list[Found]:
    """Peak of two RL steps with the paper's layers, vocabulary and longest rows, two of 36 layers,
    against the formula, which is within a tenth of the trace (tests/test_footprint.py)."""
    name = "peak memory of an RL step against the formula"
    if not torch.cuda.is_available() or config.policy.dtype != "bfloat16":
        return [Found(name, None, NEEDS_GPU)]
    if parallel.rank() == 0:
        _write_model(folder, _LARGE, vocabulary=151_936)
    parallel.barrier()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    policy = load_policy(folder, config.policy)
    reference = load_policy(folder, config.policy, trainable=False)
    optimizer = make_optimizer(policy, config.grpo)
    lengths, prompts = (8192, 4096), 2 * parallel.world_size()
    rows = [response_row(range(4096), [k] * n) for k in range(prompts) for n in lengths]
    rollouts = [
        Rollout(1, 1, f"{k}", i, 0, tuple(range(4096)), (k,) * n, "", "length", None, None, None,
                None, None, float(i), None, None, "")
        for k in range(prompts) for i, n in enumerate(lengths)
    ]  # fmt: skip
    advantages = group_advantages(torch.tensor([r.reward for r in rollouts]), 2)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        work = share_out(rows, [i // 2 for i in range(len(rows))], 16_384)
        refs = reference_logps(reference, work.batches, 0.8)
        rl_step(policy, optimizer, work, rollouts, advantages, refs, 0.8, config.grpo)
    peak = torch.cuda.max_memory_allocated() - before
    held = torch.cuda.max_memory_reserved() / torch.cuda.max_memory_allocated()
    same = dataclasses.replace(config, prompt_tokens=4096, rollouts=2)
    ranks, size = parallel.world_size(), model_size(folder)
    formula = sum(footprint.training(same, size, ranks, True, 16_384).values())
    said = (
        f"{peak / 1e9:.2f} GB, formula {formula / 1e9:.2f} (a tenth either way); the allocator "
        f"holds {held:.2f} times what is used"
    )
    return [Found(name, 0.9 < formula / peak < 1.1, said)]
