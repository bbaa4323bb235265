"""The metrics of Sec. 4.1 as pure functions of scores.

Only well-formed responses enter quality, calibration and the errors (Sec. 4.1, Metrics), so the
well-formed rate stands beside each of them: a model that answers only what it finds easy would look
good without it.

`rows` below are (prompt_id, self_scores | None, judge_scores | None) per response; None self-scores
are a malformed response, None judge scores of a well-formed one that the judge refused it."""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from statistics import fmean, median_low
from typing import NamedTuple

import numpy as np

import reward
from evaluation.intervals import Interval, over_prompts
from prompts import ATTRIBUTES, Scores

Row = tuple[str, Scores | None, Scores | None]


def summarise(rows: Sequence[Row], gamma: float = reward.RewardConfig.gamma) -> dict[str, Interval]:
    """well_formed over all responses; over the well-formed ones that were judged quality,
    calibration, mae, mae/<attribute>, and calibration/constant, what one score vector for all
    responses reaches.

    Intervals are over prompts, and n counts prompts. Only well_formed's n counts responses.
    """
    valid = [(prompt, s, j) for prompt, s, j in rows if s is not None and j is not None]
    prompts = [prompt for prompt, _, _ in valid]

    def over_valid(figure: Callable[[Scores, Scores], float]) -> Interval:
        return over_prompts([figure(s, j) for _, s, j in valid], prompts)

    well_formed = over_prompts(
        [s is not None for _, s, _ in rows], [prompt for prompt, _, _ in rows]
    )
    # A predictor that knows nothing of the response: the judge's median on these same responses.
    constant = [median_low(scores) for scores in zip(*(j for _, _, j in valid), strict=True)]
    table = {
        "well_formed": well_formed._replace(n=len(rows)),
        "quality": over_valid(lambda s, j: reward.quality(j)),
        "calibration": over_valid(lambda s, j: reward.calibration(s, j, gamma)),
        "calibration/constant": over_valid(lambda s, j: reward.calibration(constant, j, gamma)),
        "mae": over_valid(reward.mean_absolute_error),
    }
    for a, name in enumerate(ATTRIBUTES):
        table[f"mae/{name}"] = over_valid(lambda s, j, a=a: abs(s[a] - j[a]))
    return table


def render(table: dict[str, Interval]) -> str:
    """A line per figure: mean, interval, and how many prompts or responses it rests on."""
    units = {"well_formed": "responses"}
    return "\n".join(
        f"{name:<22}   {x.text(decimals=4):<25} n = {x.n} {units.get(name, 'prompts')}"
        for name, x in table.items()
    )


def best_constant(judge: Sequence[Scores], gamma: float = reward.RewardConfig.gamma) -> Scores:
    """The one vector whose calibration against all these judge scores is highest, found from the
    medians by changing one attribute at a time."""
    best = [median_low(scores) for scores in zip(*judge, strict=True)]

    def total(vector: Sequence[int]) -> float:
        return math.fsum(reward.calibration(vector, j, gamma) for j in judge)

    while True:
        tries = [[*best[:a], s, *best[a + 1 :]] for a in range(len(best)) for s in range(10)]
        better = max(tries, key=total)
        if total(better) <= total(best):
            return tuple(best)
        best = better


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's; None where one of the two does not vary."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if not len(x) or (x == x[0]).all() or (y == y[0]).all():
        return None
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def top_k_hits(logp: np.ndarray, judge: np.ndarray, k: int = 5) -> np.ndarray:
    """(N, 5, 10) log-probabilities of the ten digits, (N, 5) the judge's digits -> (N, 5): whether
    the judge's digit is among the k most probable (Sec. 4.5). Of equally probable digits the
    smaller one comes first."""
    logp = np.asarray(logp, float).reshape(-1, 5, 10)
    digit = np.asarray(judge, int).reshape(-1, 5, 1)
    own = np.take_along_axis(logp, digit, axis=-1)
    before = (logp > own) | ((logp == own) & (np.arange(10) < digit))
    return before.sum(-1) < k


def frequent_digits(judge: Sequence[Scores], k: int = 5) -> list[list[int]]:
    """Of each attribute the k digits that the judge gives most often, smaller ones first among
    equals: one ranking for all responses."""
    return [
        sorted(range(10), key=lambda digit, scores=scores: (-scores.count(digit), digit))[:k]
        for scores in zip(*judge, strict=True)
    ]


def share_among(digits: Sequence[Sequence[int]], scores: Scores) -> float:
    """Share of an answer's five scores that are among these digits of their attribute."""
    return sum(s in ten for s, ten in zip(scores, digits, strict=True)) / len(scores)


# --------------------------------------------------------------------------------------------------
# Judges against each other, against themselves, and as referees


class Agreement(NamedTuple):
    exact: Interval  # share of equal scores
    within_1: Interval
    mae: Interval  # points of 0-9


def agreement(pairs: Sequence[tuple[str, Scores, Scores]]) -> dict[str, Agreement]:
    """By attribute. pairs: (prompt id, one judge's scores, the other's) per answer."""
    prompts = [prompt for prompt, _, _ in pairs]
    table = {}
    for a, name in enumerate(ATTRIBUTES):
        errors = np.array([abs(x[a] - y[a]) for _, x, y in pairs])
        table[name] = Agreement(
            over_prompts(errors == 0, prompts),
            over_prompts(errors <= 1, prompts),
            over_prompts(errors, prompts),
        )
    return table


def self_agreement(
    prompts: Sequence[str], draws: Sequence[Sequence[Scores]]
) -> dict[str, Agreement]:
    """A judge's agreement with itself, over all pairs of its scores for the same answer. prompts,
    draws: per answer its prompt's id and the judge's scores."""
    return agreement(
        [(p, x, y) for p, d in zip(prompts, draws, strict=True) for x, y in combinations(d, 2)]
    )


def leave_one_out_calibration(
    draws: Sequence[Scores], gamma: float = reward.RewardConfig.gamma
) -> list[float]:
    """What somebody reaches who knows the judge but not its next score. Of k >= 2 scores for one
    answer each is left out once, and the (lower) medians of the others predict it."""
    values = []
    for k, left_out in enumerate(draws):
        others = [*draws[:k], *draws[k + 1 :]]
        medians = [median_low(scores) for scores in zip(*others, strict=True)]
        values.append(reward.calibration(medians, left_out, gamma))
    return values


def ceiling(
    prompts: Sequence[str],
    draws: Sequence[Sequence[Scores]],
    gamma: float = reward.RewardConfig.gamma,
) -> dict[str, Interval]:
    """How well a judge's scores can be predicted: by the median of its other scores for the same
    answer, by another single score, and by the best constant. prompts, draws: per answer its
    prompt's id and the judge's scores."""
    ids, by_median, by_one, by_constant = [], [], [], []
    constant = best_constant([scores for row in draws for scores in row], gamma)
    for prompt, row in zip(prompts, draws, strict=True):
        by_median += leave_one_out_calibration(row, gamma)
        for k, left_out in enumerate(row):
            others = [*row[:k], *row[k + 1 :]]
            ids.append(prompt)
            by_one.append(fmean(reward.calibration(other, left_out, gamma) for other in others))
            by_constant.append(reward.calibration(constant, left_out, gamma))
    return {
        "median of the others": over_prompts(by_median, ids),
        "another score": over_prompts(by_one, ids),
        "best constant": over_prompts(by_constant, ids),
    }


def render_agreement(table: dict[str, Agreement]) -> str:
    """A line per attribute; n counts prompts."""
    lines = [f"{'':<14} {'exact':>20} {'within 1':>20} {'MAE':>20}  n"]
    for name, row in table.items():
        cells = " ".join(f"{x.text():>20}" for x in row)
        lines.append(f"{name:<14} {cells}  {row.mae.n}")
    return "\n".join(lines)


def win_rate(
    prompts: Sequence[str], preferences: Sequence[tuple[int, int, int]]
) -> dict[str, Interval]:
    """The response win-rate (Sec. 4.1), (wins + ties / 2) / n, and what the order of showing did.

    preferences: (result, when shown first, when shown second) per pair of answers, each 1 for a
    win, -1 for a loss, 0 for a tie. first_order: win-rate when shown first (the paper asks in one
    order). order_bias: win-rate when shown first minus when shown second (0: the order does
    nothing). disagreement: share of pairs on which the two orders differ, which count as ties.
    """
    result, first, second = np.array(preferences).reshape(-1, 3).T
    return {
        "win-rate": over_prompts((result + 1) / 2, prompts),
        "first_order": over_prompts((first + 1) / 2, prompts),
        "ties": over_prompts(result == 0, prompts),
        "order_bias": over_prompts((first - second) / 2, prompts),
        "disagreement": over_prompts(first != second, prompts),
    }
