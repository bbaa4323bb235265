"""Sampling rollouts (Sec. 3.1; App. A: temperature 0.8, top-p 0.9, top-k 25, stop after the block).

Every sampler has the same two methods:

    load_weights(policy, version)   copy the policy's weights in; collective over ranks
    sample(requests, params)        yield each rollout as it finishes, to be judged meanwhile

`TransformersSampler` is the plain one: a Hugging Face model of its own (ranks finish at different
times, so it cannot run on sharded weights) and a decoding loop. The prompt of a group is read once,
and a finished row leaves the batch.

Shapes: B live rows, T tokens so far (left-padded), K kept tokens, V vocabulary.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

import parallel
from policy import Policy
from prompts import CLOSE, decode


@dataclass(frozen=True)
class SamplingParams:
    temperature: float = 0.8
    """Sampling temperature; the loss uses it too. 0 is greedy, for evaluation only (Table 5)."""
    top_p: float = 0.9
    """Smallest probability mass that is kept (Table 5)."""
    top_k: int = 25
    """Most tokens that are kept (Table 5); 0 keeps all."""
    max_tokens: int = 8192
    """Longest response, in tokens (Table 5)."""


class Request(NamedTuple):
    """One rollout to be sampled; the requests of one prompt stand together."""

    prompt_id: str
    sample: int
    prompt_ids: Sequence[int]
    seed: int


class Sample(NamedTuple):
    """One finished rollout."""

    request: Request
    response_ids: tuple[int, ...]  # stop text and end-of-sequence token included
    text: str  # the tokenizer's decoding of response_ids
    finish_reason: Literal["stop", "length"]
    logp: tuple[float, ...]  # per sampled token, of the untruncated distribution at temperature 1
    weight_version: str


def seed_of(*parts: object) -> int:
    """A seed from its parts, the same in every process and on every machine."""
    return zlib.crc32(repr(parts).encode())


class TransformersSampler:
    """Hugging Face model + decoding loop. Reproducible for the same requests, weights and thread
    count."""

    seed_per_rollout = False  # the whole call has one seed: all requests must carry the same

    def __init__(self, model: PreTrainedModel, tokenizer, batch_rows: int):
        """`model` is this sampler's own; `batch_rows` is the most rollouts that are sampled at
        once."""
        self.model = model.to(parallel.device()).requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.batch_rows = batch_rows
        self.weight_version = "as loaded"
        eos = model.generation_config.eos_token_id
        self.eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}

    def load_weights(self, policy: Policy, version: str = "handed over") -> None:
        """Overwrite every weight with the policy's. Collective: all ranks call it together."""
        own = dict(self.model.named_parameters())
        for name, tensor in policy.full_weights(self.model.dtype):
            own.pop(name).copy_(tensor)
        if own:
            raise RuntimeError(f"the policy gave no weights for {', '.join(own)}")
        self.weight_version = version

    @torch.inference_mode()
    def sample(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Sample]:
        """Finished rollouts, in the order in which they finish."""
        if len({r.seed for r in requests}) > 1:
            raise ValueError("this sampler has one seed per call; give all requests the same")
        generator = torch.Generator(self.model.device)
        generator.manual_seed(requests[0].seed if requests else 0)
        # Groups of similar length share a batch, so that little of it is padding.
        groups = [list(group) for _, group in groupby(requests, key=lambda r: r.prompt_id)]
        groups.sort(key=lambda group: len(group[0].prompt_ids), reverse=True)
        ordered = [r for group in groups for r in group]
        for start in range(0, len(ordered), self.batch_rows):
            yield from self._batch(ordered[start : start + self.batch_rows], params, generator)

    def _batch(
        self, requests: Sequence[Request], params: SamplingParams, generator
    ) -> Iterator[Sample]:
        device = self.model.device
        logits, cache, attended = self._read_prompts(requests)  # (B, V), -, (B, T)
        live = list(range(len(requests)))  # row of the batch -> request
        ids: list[list[int]] = [[] for _ in requests]
        logps: list[list[float]] = [[] for _ in requests]
        while live:
            tokens = _draw(logits, params, generator)  # (B,)
            logp = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]  # (B,)
            for i, token, value in zip(live, tokens.tolist(), logp.tolist(), strict=True):
                ids[i].append(token)
                logps[i].append(value)
            reasons = [self._finish_reason(ids[i], params) for i in live]
            for i, reason in zip(live, reasons, strict=True):
                if reason:
                    text = decode(self.tokenizer, ids[i])
                    yield Sample(
                        requests[i],
                        tuple(ids[i]),
                        text,
                        reason,
                        tuple(logps[i]),
                        self.weight_version,
                    )
            stay = [b for b, reason in enumerate(reasons) if reason is None]
            if not stay:
                return
            if len(stay) < len(live):
                keep = torch.tensor(stay, device=device)
                cache.batch_select_indices(keep)
                tokens, attended, live = tokens[keep], attended[keep], [live[b] for b in stay]
            attended = torch.cat([attended, attended.new_ones(len(live), 1)], dim=1)  # (B, T + 1)
            logits = (
                self.model(
                    input_ids=tokens[:, None],
                    attention_mask=attended,
                    position_ids=attended.sum(1, keepdim=True)
                    - 1,  # (B, 1): padding does not count
                    past_key_values=cache,
                )
                .logits[:, -1]
                .float()
            )  # (B, V)

    def _read_prompts(
        self, requests: Sequence[Request]
    ) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
        """Read each prompt once, left-padded, then repeat its cache row for the rollouts that share
        it."""
        device = self.model.device
        first = [
            i for i, r in enumerate(requests) if i == 0 or r.prompt_id != requests[i - 1].prompt_id
        ]
        width = max(len(requests[i].prompt_ids) for i in first)
        padded = [
            [0] * (width - len(requests[i].prompt_ids)) + list(requests[i].prompt_ids)
            for i in first
        ]
        real = [
            [0] * (width - len(requests[i].prompt_ids)) + [1] * len(requests[i].prompt_ids)
            for i in first
        ]
        attended = torch.tensor(real, device=device)
        cache = DynamicCache(config=self.model.config)
        logits = (
            self.model(
                input_ids=torch.tensor(padded, device=device),
                attention_mask=attended,
                position_ids=(attended.cumsum(1) - 1).clamp(min=0),
                past_key_values=cache,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
        )
        counts = [b - a for a, b in zip(first, [*first[1:], len(requests)], strict=True)]
        rows = torch.arange(len(first), device=device).repeat_interleave(
            torch.tensor(counts, device=device)
        )  # (B,)
        cache.batch_select_indices(rows)
        return logits[rows], cache, attended[rows]

    def _finish_reason(self, ids: Sequence[int], params: SamplingParams) -> str | None:
        """As vLLM: the stop text ends a response wherever in a token it ends, and is kept."""
        if ids[-1] in self.eos or CLOSE in decode(self.tokenizer, ids[-len(CLOSE) - 1 :]):
            return "stop"
        return "length" if len(ids) >= params.max_tokens else None


def _draw(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> torch.Tensor:
    """(B, V) fp32 logits -> (B,) token ids: temperature, then top-k, then top-p of what is left, as
    vLLM does."""
    if params.temperature == 0:
        return logits.argmax(-1)
    kept, tokens = (logits / params.temperature).topk(
        params.top_k or logits.shape[1]
    )  # (B, K), largest first
    probs = kept.softmax(-1)  # (B, K)
    mass_before = probs.cumsum(-1) - probs  # (B, K)
    probs = probs.masked_fill(mass_before >= params.top_p, 0)
    choice = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
    return tokens.gather(1, choice)[:, 0]
