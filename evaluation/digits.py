"""What a model would write at the five score positions: log-probabilities of the ten digits there.

    own      after the digits that it has sampled itself, on its own response as it stands: the
             paper's top-5 accuracy (Sec. 4.5)
    judge    after the judge's digits
    free     after its own most probable digits, one position after the other

`judge` and `free` can be read of any model on any answer, also on another model's and on one that
came without a block (App. B.1's block is put behind it): the answer x scorer swap and the forced
block. At temperature 1 and over the whole vocabulary, so that the ten need not add up to 1.

Shapes: B rows, 5 positions, 10 digits.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from backend import parallel
from backend.model_folder import load_tokenizer
from backend.policy import load_model
from prompts import Scores, digit_ids, render_response, score_positions
from storage.record import Rollout

ROWS = 32  # read at once


class Reading(NamedTuple):
    free: list[list[float]]  # (5, 10)
    scores: Scores  # the most probable digits, read one after the other
    judge: list[list[float]] | None  # (5, 10); None without judge scores


class Question(NamedTuple):
    """An answer behind its prompt, and the digits to read after."""

    prompt_ids: Sequence[int]
    answer: str
    judge: Scores | None = None


class Reader:
    """One whole model on this rank's device."""

    def __init__(self, folder: Path, dtype: str):
        self.model = load_model(folder, getattr(torch, dtype)).to(parallel.device()).eval()
        # fp32, because logits rounded to bf16 tie, and a tie would go to the smaller digit.
        self.head = self.model.lm_head.weight.float()  # (V, D)
        self.tokenizer = load_tokenizer(folder)

    @torch.inference_mode()
    def own(self, rollouts: Sequence[Rollout]) -> list[list[list[float]]]:
        """(B, 5, 10) of well-formed rollouts whose digits are tokens of their own."""
        found = {}
        for rows in _batches([len(r.prompt_ids) + len(r.response_ids) for r in rollouts]):
            ids = [[*rollouts[i].prompt_ids, *rollouts[i].response_ids] for i in rows]
            width = max(map(len, ids))
            padded = self._tensor([row + [0] * (width - len(row)) for row in ids])  # (B, T)
            # Causal attention: no real token sees the padding behind it.
            hidden = self.model.model(input_ids=padded, use_cache=False).last_hidden_state
            for b, i in enumerate(rows):
                r = rollouts[i]
                before = [len(r.prompt_ids) + p - 1 for p in r.score_positions]
                tens = [digit_ids(r.response_ids[p], self.tokenizer) for p in r.score_positions]
                found[i] = self._digits(hidden[b, before], tens)
        return [found[i] for i in range(len(rollouts))]

    @torch.inference_mode()
    def read(self, questions: Sequence[Question]) -> list[Reading | None]:
        """One reading per question; None where a digit would share its token."""
        laid = [self._lay(q) for q in questions]
        found: list[Reading | None] = [None] * len(questions)
        usable = [i for i, x in enumerate(laid) if x]
        for rows in _batches([len(laid[i][0]) for i in usable]):
            at = [usable[k] for k in rows]
            for i, reading in zip(at, self._read([questions[i] for i in at],
                                                 [laid[i] for i in at]), strict=True):  # fmt: skip
                found[i] = reading
        return found

    def _lay(self, q: Question) -> tuple[list[int], list[list[int]], list[tuple[int, ...]]] | None:
        """(tokens before the first digit, tokens between the digits, the ten ids of each digit)."""
        block = self.tokenizer.encode(render_response(q.answer, (5,) * 5), add_special_tokens=False)
        positions = score_positions(block, self.tokenizer)
        if positions is None:
            return None
        between = [block[a + 1 : b] for a, b in zip(positions, positions[1:], strict=False)]
        tens = [digit_ids(block[p], self.tokenizer) for p in positions]
        return [*q.prompt_ids, *block[: positions[0]]], between, tens

    def _read(self, questions: Sequence[Question], laid: Sequence[tuple]) -> list[Reading]:
        rows, between, tens = len(laid), laid[0][1], [x[2] for x in laid]
        if any(x[1] != between for x in laid):  # a block is tokenised alike behind any answer
            raise RuntimeError("the block's tokens depend on the answer before them")
        width = max(len(x[0]) for x in laid)
        ids = self._tensor([[0] * (width - len(x[0])) + x[0] for x in laid])  # (B, T), left-padded
        seen = self._tensor([[0] * (width - len(x[0])) + [1] * len(x[0]) for x in laid])  # (B, T)
        cache = DynamicCache()
        last = self._extend(ids, seen, cache)[:, -1]  # (B, D) before the first digit

        free, scores = [], []
        hidden, mask = last, seen
        for k in range(5):
            ten = [x[k] for x in tens]
            free.append(self._digits(hidden, ten))  # (B, 10)
            scores.append([row.index(max(row)) for row in free[-1]])
            if k < 4:
                chosen = [ten[b][scores[-1][b]] for b in range(rows)]
                more = self._tensor([[c, *between[k]] for c in chosen])
                mask = torch.cat([mask, torch.ones_like(more)], dim=1)
                hidden = self._extend(more, mask, cache)[:, -1]

        cache.crop(width - mask.shape[1])  # the digits' tokens, taken off again
        judges = [q.judge or (0,) * 5 for q in questions]
        more, before = [], [0]
        for b, digits in enumerate(judges):
            row = []
            for k in range(4):
                row += [tens[b][k][digits[k]], *between[k]]
                before += [len(row)] * (b == 0)
            more.append(row)
        mask = torch.cat([seen, torch.ones_like(self._tensor(more))], dim=1)
        after = self._extend(self._tensor(more), mask, cache)  # (B, t, D)
        hidden = torch.cat([last[:, None], after], dim=1)[:, before]  # (B, 5, D)
        return [
            Reading(
                [free[k][b] for k in range(5)],
                tuple(scores[k][b] for k in range(5)),
                self._digits(hidden[b], tens[b]) if questions[b].judge else None,
            )
            for b in range(rows)
        ]

    def _extend(self, ids: torch.Tensor, seen: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Hidden states (B, t, D) of new tokens behind what the cache holds; seen: (B, T + t)."""
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.model.model(
            input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # fmt: skip

    def _digits(self, hidden: torch.Tensor, tens: Sequence[Sequence[int]]) -> list[list[float]]:
        """hidden (n, D), the ten ids of each -> log-probabilities (n, 10)."""
        logp = F.linear(hidden.float(), self.head).log_softmax(-1)  # (n, V)
        return logp.gather(1, self._tensor(tens)).tolist()

    def _tensor(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self.model.device)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices, rows of similar length together."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + ROWS] for i in range(0, len(order), ROWS)]
