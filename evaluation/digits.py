"""A model's distributions over digits at the five score positions: log-probabilities of the ten
digits, given the block up to the position. They differ in the digits at the earlier positions:

    own      the digits that the model itself sampled, in its own response: for the paper's top-5
             accuracy (Sec. 4.5)
    judge    the judge's digits
    free     the model's most probable digits, chosen one position after the other

`judge` and `free` can be computed for any model on any answer, including another model's answer
(the answer x scorer swap) and an answer without a block (the forced block): the block of App. B.1
is appended to the answer. Temperature is 1 and the softmax is over the full vocabulary, so the ten
probabilities may sum to less than 1.

Shapes: B rows, T tokens, D hidden size, V vocabulary; 5 positions, 10 digits.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel

from backend import parallel
from backend.model_folder import load_tokenizer
from backend.policy import load_model
from prompts import Scores, digit_ids, render_response, score_positions
from storage.record import Rollout

# Of a batch, padding included: the keys and values of a 4B model's 32,768 tokens are 4.8 GB, and
# what it works with is about as much.
BATCH_TOKENS = 32_768


class Reading(NamedTuple):
    """A model's digit distributions for one answer."""

    free: list[list[float]]  # (5, 10) log-probabilities
    scores: Scores  # the most probable digits, chosen one position after the other
    judge: list[list[float]] | None  # (5, 10) log-probabilities; None without judge scores


class Question(NamedTuple):
    """An answer to score."""

    prompt_ids: Sequence[int]
    answer: str
    judge: Scores | None = None  # the judge's digits


class Written(NamedTuple):
    """A well-formed response with its prompt, as token ids."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    score_positions: Sequence[int]  # indices into response_ids


class Block(NamedTuple):
    """An answer's prompt and self-evaluation block as tokens, without the digits."""

    before: list[int]  # prompt, answer and block up to the first digit
    between: list[list[int]]  # the block's tokens between consecutive digits, 4 lists
    digit_ids: list[tuple[int, ...]]  # (5, 10) token ids of the digits 0-9 at each position


class Reader:
    """A full, unsharded model on this rank's device."""

    def __init__(self, folder: Path, dtype: str, model: PreTrainedModel | None = None):
        """`model`: the folder's, if it is loaded already."""
        model = model or load_model(folder, getattr(torch, dtype))
        self.model = model.to(parallel.device()).eval()
        # fp32, because logits rounded to bf16 can tie, and a tie would go to the smaller digit.
        self.head = self.model.lm_head.weight.float()  # (V, D)
        self.tokenizer = load_tokenizer(folder)

    @torch.inference_mode()
    def own(self, rollouts: Sequence[Rollout | Written]) -> list[list[list[float]]]:
        """Log-probabilities (B, 5, 10) after the sampled digits, for well-formed rollouts with
        score positions."""
        log_probs: dict[int, list[list[float]]] = {}  # index of the rollout -> (5, 10)
        for rows in _batches([len(r.prompt_ids) + len(r.response_ids) for r in rollouts]):
            ids = [[*rollouts[i].prompt_ids, *rollouts[i].response_ids] for i in rows]
            width = max(map(len, ids))
            padded = self._tensor([row + [0] * (width - len(row)) for row in ids])  # (B, T)
            # Causal attention: no real token attends to the padding after it.
            hidden = self.model.model(input_ids=padded, use_cache=False).last_hidden_state
            for b, i in enumerate(rows):
                r = rollouts[i]
                before = [len(r.prompt_ids) + p - 1 for p in r.score_positions]
                digits = [digit_ids(r.response_ids[p], self.tokenizer) for p in r.score_positions]
                log_probs[i] = self._digits(hidden[b, before], digits)
        return [log_probs[i] for i in range(len(rollouts))]

    @torch.inference_mode()
    def states(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """The last hidden state (D,) of each prompt's last token."""
        found: dict[int, list[float]] = {}
        for rows in _batches([len(ids) for ids in prompts]):
            width = max(len(prompts[i]) for i in rows)
            padded = self._tensor([[*prompts[i], *[0] * (width - len(prompts[i]))] for i in rows])
            # Causal attention: no real token attends to the padding after it.
            hidden = self.model.model(input_ids=padded, use_cache=False).last_hidden_state
            for b, i in enumerate(rows):
                found[i] = hidden[b, len(prompts[i]) - 1].float().tolist()
        return [found[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def read(self, questions: Sequence[Question]) -> list[Reading | None]:
        """One reading per question; None where a score digit would not be a single-digit token."""
        blocks = [self._tokenise(q) for q in questions]
        readings: list[Reading | None] = [None] * len(questions)
        usable = [i for i, block in enumerate(blocks) if block]
        for rows in _batches([len(blocks[i].before) for i in usable]):
            indices = [usable[k] for k in rows]
            batch = self._read([questions[i] for i in indices], [blocks[i] for i in indices])
            for i, reading in zip(indices, batch, strict=True):
                readings[i] = reading
        return readings

    def _tokenise(self, q: Question) -> Block | None:
        """None if a score digit would not be a single-digit token."""
        ids = self.tokenizer.encode(render_response(q.answer, (5,) * 5), add_special_tokens=False)
        positions = score_positions(ids, self.tokenizer)
        if positions is None:
            return None
        before = [*q.prompt_ids, *ids[: positions[0]]]
        between = [ids[a + 1 : b] for a, b in zip(positions, positions[1:], strict=False)]
        return Block(before, between, [digit_ids(ids[p], self.tokenizer) for p in positions])

    def _read(self, questions: Sequence[Question], blocks: Sequence[Block]) -> list[Reading]:
        """Readings of a batch; the prompts and answers are computed once for both kinds."""
        rows, between = len(blocks), blocks[0].between
        if any(block.between != between for block in blocks):
            raise RuntimeError("the tokens of the block depend on the answer before it")
        width = max(len(block.before) for block in blocks)
        padding = [width - len(block.before) for block in blocks]  # on the left
        ids = self._tensor(
            [[0] * n + block.before for n, block in zip(padding, blocks, strict=True)]
        )
        real = self._tensor([[0] * n + [1] * (width - n) for n in padding])  # (B, T), 0 at padding
        cache = DynamicCache()
        first = self._extend(ids, real, cache)[:, -1]  # (B, D), predicts the first digit

        # free: append the most probable digit and the tokens up to the next digit, four times.
        free, scores = [], []  # by position: log-probabilities (B, 10), digits (B,)
        hidden, mask = first, real
        for k in range(5):
            free.append(self._digits(hidden, [block.digit_ids[k] for block in blocks]))
            scores.append([row.index(max(row)) for row in free[-1]])
            if k < 4:
                new_ids = self._tensor(
                    [
                        [block.digit_ids[k][digit], *between[k]]
                        for block, digit in zip(blocks, scores[-1], strict=True)
                    ]
                )
                mask = torch.cat([mask, torch.ones_like(new_ids)], dim=1)
                hidden = self._extend(new_ids, mask, cache)[:, -1]

        # judge: remove these tokens from the cache, and append the judge's digits at once.
        cache.crop(width - mask.shape[1])
        block_rows = []
        for question, block in zip(questions, blocks, strict=True):
            digits = question.judge or (0,) * 5  # zeros are computed but not returned
            block_rows.append([])
            for k in range(4):
                block_rows[-1] += [block.digit_ids[k][digits[k]], *between[k]]
        predicting = [0]  # which of the hidden states below predict a digit
        for tokens in between:
            predicting.append(predicting[-1] + 1 + len(tokens))
        new_ids = self._tensor(block_rows)  # (B, t)
        mask = torch.cat([real, torch.ones_like(new_ids)], dim=1)
        after = self._extend(new_ids, mask, cache)  # (B, t, D)
        hidden = torch.cat([first[:, None], after], dim=1)[:, predicting]  # (B, 5, D)
        return [
            Reading(
                [free[k][b] for k in range(5)],
                tuple(scores[k][b] for k in range(5)),
                self._digits(hidden[b], blocks[b].digit_ids) if questions[b].judge else None,
            )
            for b in range(rows)
        ]

    def _extend(self, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Append `ids` (B, t) to the cache of T tokens and return their hidden states (B, t, D).
        `mask`: (B, T + t), 0 at padding."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.model.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # fmt: skip

    def _digits(self, hidden: torch.Tensor, digits: Sequence[Sequence[int]]) -> list[list[float]]:
        """hidden (n, D) and token ids of the ten digits for each (n, 10) -> log-probabilities
        (n, 10)."""
        logp = F.linear(hidden.float(), self.head).log_softmax(-1)  # (n, V)
        return logp.gather(1, self._tensor(digits)).tolist()

    def _tensor(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self.model.device)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of the rows of each batch, whose first is its longest; a row that is over
    BATCH_TOKENS alone has its own."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= BATCH_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
