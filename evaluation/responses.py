"""Responses of a trained model for use (predict.py), with their distributions over digits: from the
model in this process, or from a server."""

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

import reward
from backend import parallel
from backend.sampler import Request, SamplingParams, make_sampler, seed_of
from evaluation.controls import DIGITS, digit_probabilities
from evaluation.digits import Reader, Written
from evaluation.threshold import Kind
from judging.client import Background
from judging.endpoint import ClientConfig
from judging.served import CompletionClient, ServedModel
from prompts import ATTRIBUTES, parse_self_eval, score_positions
from storage.progress import progress


class Drawn(NamedTuple):
    """One response of the model."""

    text: str
    digits: Sequence[Sequence[float]] | None  # (5, 10) probabilities

    def figures(self, below: int) -> dict:
        """The fields of a prediction that the response decides; `below`: see p_below there."""
        block = parse_self_eval(self.text)
        digits = expected = spread = p_below = None
        if self.digits is not None:
            p = np.asarray(self.digits)
            mean = p @ DIGITS  # (5,)
            variance = (p * (DIGITS - mean[:, None]) ** 2).sum(1)
            digits = tuple(map(tuple, p.round(6).tolist()))
            expected, spread = (tuple(x.round(4).tolist()) for x in (mean, np.sqrt(variance)))
            p_below = round(float(p[ATTRIBUTES.index("correctness"), :below].sum()), 6)
        scores = block.scores if block else None
        return {
            "answer": block.answer if block else None,
            "text": self.text,
            "scores": scores,
            "digits": digits,
            "expected": expected,
            "spread": spread,
            "expected_quality": round(reward.quality(expected or scores), 6) if block else None,
            "p_below": p_below,
        }

    def confidence(self, scores: Kind | None = None) -> float:
        """The quality that decides: of the expected scores or of the sampled ones (threshold.json
        says which); None: the prediction's expected quality. -1, the lowest, where there is
        none."""
        figures = self.figures(0)
        quality = figures["expected_quality"]
        if scores == "sampled" and quality is not None:
            quality = reward.quality(figures["scores"])
        without = quality is None or (scores == "expected" and self.digits is None)
        return -1.0 if without else quality


class InProcess:
    """The model in this process: sampled as in training, its distributions as in the evaluation."""

    def __init__(self, config, folder: Path, tokenizer, params: SamplingParams):
        """`config`: predict.PredictorConfig."""
        self.tokenizer, self.params = tokenizer, params
        self._stack = ExitStack()
        self._stack.enter_context(parallel.process_group())
        self.sampler = make_sampler(config, folder, tokenizer, config.dtype)
        loaded = getattr(self.sampler, "model", None)
        self.reader = Reader(folder, config.dtype, loaded)

    def draw(self, requests: Sequence[Request]) -> list[Drawn]:
        """In the order of the requests, of which those of one prompt are contiguous."""
        if not self.sampler.seed_per_rollout:
            one = seed_of([request.seed for request in requests])
            requests = [request._replace(seed=one) for request in requests]
        samples = self.sampler.sample(requests, self.params)
        bar = progress(samples, desc="answers", total=len(requests), leave=False)
        found = {(s.request.prompt_id, s.request.sample): s for s in bar}
        ordered = [found[request.prompt_id, request.sample] for request in requests]
        positions = [score_positions(s.response_ids, self.tokenizer) for s in ordered]
        readable = [k for k, at in enumerate(positions) if at]
        logp = self.reader.own(
            [Written(requests[k].prompt_ids, ordered[k].response_ids, positions[k])
             for k in readable]
        )  # fmt: skip
        digits = {k: digit_probabilities(x) for k, x in zip(readable, logp, strict=True)}
        return [Drawn(s.text, digits.get(k)) for k, s in enumerate(ordered)]

    def close(self) -> None:
        self.sampler.close()
        self._stack.close()


class Served:
    """The model at --url."""

    def __init__(self, config, params: SamplingParams):
        """As InProcess. Raises ValueError or ServedError."""
        client = ClientConfig(concurrency=config.concurrency, timeout=600.0)
        server = ServedModel(config.url, config.key_variable, client)
        self.params, self.loop = params, Background()
        self.client = CompletionClient(server, config.served_name)
        self.loop.submit(self.client.find_name()).result()

    def draw(self, requests: Sequence[Request]) -> list[Drawn]:
        """In the order of the requests. Raises ServedError."""
        futures = [self.loop.submit(self._one(request)) for request in requests]
        try:
            return [f.result() for f in progress(futures, desc="answers", leave=False)]
        finally:
            for future in futures:
                future.cancel()

    async def _one(self, r: Request) -> Drawn:
        sampling = dataclasses.asdict(self.params)
        got = await self.client.complete(r.prompt_ids, sampling, r.seed)
        return Drawn(got.text, got.digits)

    def close(self) -> None:
        """Does nothing: the server goes on."""
