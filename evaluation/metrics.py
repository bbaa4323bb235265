"""The metrics of Sec. 4.1 as pure functions of scores.

Only well-formed responses enter quality, calibration and the errors (Sec. 4.1, Metrics), so the
well-formed rate stands beside each of them: a model that answers only what it finds easy would look
good without it.

`rows` below are (prompt_id, self_scores | None, judge_scores | None) per response; None self-scores
are a malformed response."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from statistics import median_low
from typing import NamedTuple

import reward
from prompts import ATTRIBUTES, Scores

Row = tuple[str, Scores | None, Scores | None]


class Estimate(NamedTuple):
    mean: float | None  # None where nothing was measured
    se: float | None  # standard error; None with fewer than two prompts
    n: int  # responses


def clustered_mean(values: Sequence[float], prompt_ids: Sequence[str]) -> Estimate:
    """Mean over responses, with a standard error that treats the responses to one prompt as
    dependent.

    With P prompts and residual sums u_p = sum of (value - mean) over prompt p:
    se = sqrt(P / (P - 1) * sum_p u_p^2) / n.
    """
    n = len(values)
    if n == 0:
        return Estimate(None, None, 0)
    mean = math.fsum(values) / n
    residual: dict[str, float] = defaultdict(float)
    for value, prompt in zip(values, prompt_ids, strict=True):
        residual[prompt] += value - mean
    p = len(residual)
    se = math.sqrt(p / (p - 1) * math.fsum(u * u for u in residual.values())) / n if p > 1 else None
    return Estimate(mean, se, n)


def summarise(rows: Sequence[Row], gamma: float = reward.RewardConfig.gamma) -> dict[str, Estimate]:
    """well_formed over all responses, the rest over the well-formed: quality, calibration, mae,
    mae/<attribute>, and calibration/constant, what one vector for all responses would reach.

    Raises ValueError if a well-formed response has no judge scores.
    """
    valid = [(prompt, s, j) for prompt, s, j in rows if s is not None]
    if any(j is None for _, _, j in valid):
        raise ValueError("a well-formed response has no judge scores")
    prompts = [prompt for prompt, _, _ in valid]

    def over_valid(f) -> Estimate:
        return clustered_mean([f(s, j) for _, s, j in valid], prompts)

    # A predictor that knows nothing of the response: the judge's median on these same responses.
    constant = [median_low(scores) for scores in zip(*(j for _, _, j in valid), strict=True)]
    table = {
        "well_formed": clustered_mean(
            [float(s is not None) for _, s, _ in rows], [prompt for prompt, _, _ in rows]
        ),
        "quality": over_valid(lambda s, j: reward.quality(j)),
        "calibration": over_valid(lambda s, j: reward.calibration(s, j, gamma)),
        "calibration/constant": over_valid(lambda s, j: reward.calibration(constant, j, gamma)),
        "mae": over_valid(reward.mean_absolute_error),
    }
    for a, name in enumerate(ATTRIBUTES):
        table[f"mae/{name}"] = over_valid(lambda s, j, a=a: abs(s[a] - j[a]))
    return table


def render(table: dict[str, Estimate]) -> str:
    """A line per metric: mean, standard error, n."""

    def line(name: str, e: Estimate) -> str:
        mean, se = ("-" if x is None else f"{x:.4f}" for x in (e.mean, e.se))
        return f"{name:<22} {mean:>8} ± {se:<7} n = {e.n}"

    return "\n".join(line(name, estimate) for name, estimate in table.items())


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


def shuffled_calibration(
    valid: Sequence[tuple[Scores, Scores]], gamma: float = reward.RewardConfig.gamma
) -> float | None:
    """Mean calibration of each response's self-scores against every other response's judge scores:
    what the scores are worth if they knew nothing of their own response. None below two."""
    n = len(valid)
    if n < 2:
        return None
    pairs = ((s, j) for a, (s, _) in enumerate(valid) for b, (_, j) in enumerate(valid) if a != b)
    return math.fsum(reward.calibration(s, j, gamma) for s, j in pairs) / (n * (n - 1))


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's; None where one of the two does not vary."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return statistics.correlation(x, y)


def top_k_accuracy(
    logp: Sequence[Sequence[Sequence[float]]], judge: Sequence[Scores], k: int = 5
) -> float | None:
    """Share of the judge's digits that are among the k most probable of the ten digit tokens (Sec.
    4.5); of equal ones the smaller digit goes first. logp: per response five rows of ten
    log-probabilities."""
    hits = [
        sum((p, -other) > (row[digit], -digit) for other, p in enumerate(row)) < k
        for rows, scores in zip(logp, judge, strict=True)
        for row, digit in zip(rows, scores, strict=True)
    ]
    return sum(hits) / len(hits) if hits else None


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
    exact: Estimate  # share of equal scores
    within_1: Estimate
    mae: Estimate  # points of 0-9


def agreement(pairs: Sequence[tuple[str, Scores, Scores]]) -> dict[str, Agreement]:
    """By attribute, of (prompt_id, one's scores, the other's) per answer."""
    prompts = [prompt for prompt, _, _ in pairs]
    table = {}
    for a, name in enumerate(ATTRIBUTES):
        apart = [abs(x[a] - y[a]) for _, x, y in pairs]
        table[name] = Agreement(
            clustered_mean([float(d == 0) for d in apart], prompts),
            clustered_mean([float(d <= 1) for d in apart], prompts),
            clustered_mean(apart, prompts),
        )
    return table


def self_agreement(
    prompts: Sequence[str], draws: Sequence[Sequence[Scores]]
) -> dict[str, Agreement]:
    """Of a judge's several scores for the same answer, over all pairs of them."""
    return agreement(
        [(p, x, y) for p, d in zip(prompts, draws, strict=True) for x, y in combinations(d, 2)]
    )


def foretold(draws: Sequence[Scores], gamma: float = reward.RewardConfig.gamma) -> list[float]:
    """The calibration of one who knows the judge, but not its next score: of k >= 2 scores for one
    answer each is held out once and foretold by the (lower) medians of the others."""
    found = []
    for k, held_out in enumerate(draws):
        rest = [d for i, d in enumerate(draws) if i != k]
        medians = [median_low(scores) for scores in zip(*rest, strict=True)]
        found.append(reward.calibration(medians, held_out, gamma))
    return found


def ceiling(
    prompts: Sequence[str],
    draws: Sequence[Sequence[Scores]],
    gamma: float = reward.RewardConfig.gamma,
) -> dict[str, Estimate]:
    """`foretold` by the others' medians; beside it, what another single score and the best constant
    reach."""
    ids, others, one, fixed = [], [], [], []
    constant = best_constant([d for row in draws for d in row], gamma)
    for prompt, row in zip(prompts, draws, strict=True):
        others += foretold(row, gamma)
        for k, held_out in enumerate(row):
            rest = [d for i, d in enumerate(row) if i != k]
            ids.append(prompt)
            one.append(statistics.fmean(reward.calibration(d, held_out, gamma) for d in rest))
            fixed.append(reward.calibration(constant, held_out, gamma))
    return {
        "median of the others": clustered_mean(others, ids),
        "another score": clustered_mean(one, ids),
        "best constant": clustered_mean(fixed, ids),
    }


def render_agreement(table: dict[str, Agreement]) -> str:
    lines = [f"{'':<14} {'exact':>16} {'within 1':>16} {'MAE':>16}  n"]
    for name, row in table.items():
        shown = [f"{e.mean:.3f} ± {'-' if e.se is None else format(e.se, '.3f')}" for e in row]
        lines.append(f"{name:<14} " + " ".join(f"{x:>16}" for x in shown) + f"  {row.mae.n}")
    return "\n".join(lines)


def win_rate(
    prompts: Sequence[str], preferences: Sequence[tuple[int, int, int]]
) -> dict[str, Estimate]:
    """The response win-rate (Sec. 4.1): (wins + ties / 2) / n, and what the order of showing did.

    preferences: (result, when shown first, when shown second) per pair of answers, each 1 for a
    win, -1 for a loss, 0 for a tie. order_bias: win-rate when shown first minus when shown second
    (0: the order does nothing). disagreement: share of pairs on which the two orders differ, which
    count as ties.
    """
    return {
        "win-rate": clustered_mean([(r + 1) / 2 for r, _, _ in preferences], prompts),
        "ties": clustered_mean([float(r == 0) for r, _, _ in preferences], prompts),
        "order_bias": clustered_mean([(x - y) / 2 for _, x, y in preferences], prompts),
        "disagreement": clustered_mean([float(x != y) for _, x, y in preferences], prompts),
    }
