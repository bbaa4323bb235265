"""The metrics of Sec. 4.1 as pure functions of scores.

Only well-formed responses enter quality, calibration and the errors (Sec. 4.1, Metrics), so the
well-formed rate stands beside each of them: a model that answers only what it finds easy would look
good without it.

`rows` below are (prompt_id, self_scores | None, judge_scores | None) per response; None self-scores
are a malformed response, None judge scores of a well-formed one that the judge refused it."""

import warnings
from collections.abc import Callable, Sequence
from itertools import combinations
from statistics import fmean, median_high, median_low
from typing import NamedTuple

import numpy as np
import pandas as pd
import statsmodels.api as sm
from statsmodels.tools.sm_exceptions import PerfectSeparationWarning

import reward
from evaluation.intervals import Estimate, Interval, over_prompts
from evaluation.predictors import best_constant
from prompts import ATTRIBUTES, Scores

Row = tuple[str, Scores | None, Scores | None]
OVERLAP = 0.1  # of the pairs at least have our answer longer, and as many shorter


def summarise(rows: Sequence[Row]) -> dict[str, Interval]:
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
        [s is not None for _, s, _ in rows], [prompt for prompt, _, _ in rows], proportion=True
    )
    # A predictor that knows nothing of the response: the judge's median on these same responses.
    constant = [median_low(scores) for scores in zip(*(j for _, _, j in valid), strict=True)]
    table = {
        "well_formed": well_formed._replace(n=len(rows)),
        "quality": over_valid(lambda s, j: reward.quality(j)),
        "calibration": over_valid(lambda s, j: reward.calibration(s, j)),
        "calibration/constant": over_valid(lambda s, j: reward.calibration(constant, j)),
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
            over_prompts(errors == 0, prompts, proportion=True),
            over_prompts(errors <= 1, prompts, proportion=True),
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


def agreement_with(draws: Sequence[Scores], others: int) -> float:
    """How well the medians of `others` of a judge's scores for one answer predict another one: mean
    calibration over all ways to choose them. The two medians of an even number count half each."""
    values = []
    for k, left_out in enumerate(draws):
        rest = [*draws[:k], *draws[k + 1 :]]
        for chosen in combinations(rest, others):
            for middle in (median_low, median_high):
                medians = [middle(scores) for scores in zip(*chosen, strict=True)]
                values.append(reward.calibration(medians, left_out))
    return fmean(values)


def ceiling(draws: Sequence[Scores]) -> float | None:
    """What somebody reaches who knows the judge's own medians for an answer, but not its next
    score: agreement with the medians of more and more of its scores, continued to infinitely many.

    The error of the median of m scores, m odd, falls about as 1 / (m + 1); so the two largest odd
    numbers of others give the limit. bench/coverage.py compares it with judges whose medians are
    known. None for fewer than four scores. One answer's value is no bound; the mean over answers
    estimates it."""
    if len(draws) < 4:
        return None
    most = (len(draws) - 2) // 2 * 2 + 1  # the largest odd number of others
    fewer, more = (agreement_with(draws, m) for m in (most - 2, most))
    return ((most + 1) * more - (most - 1) * fewer) / 2


def repeated_agreement(
    prompts: Sequence[str],
    draws: Sequence[Sequence[Scores]],
) -> dict[str, Interval]:
    """How well a judge's scores can be predicted: by the median of its other scores for the same
    answer (leave-one-out agreement), by another single score, by the best constant, and by its own
    medians (the ceiling). prompts, draws: per answer its prompt's id and the judge's scores."""
    constant = best_constant([scores for row in draws for scores in row])
    tops = [(ceiling(row), p) for p, row in zip(prompts, draws, strict=True)]
    tops = [(value, prompt) for value, prompt in tops if value is not None]
    return {
        "median of the others": over_prompts(
            [agreement_with(row, len(row) - 1) for row in draws], prompts
        ),
        "another score": over_prompts([agreement_with(row, 1) for row in draws], prompts),
        "best constant": over_prompts(
            [fmean(reward.calibration(constant, j) for j in row) for row in draws], prompts
        ),
        "ceiling": over_prompts([value for value, _ in tops], [prompt for _, prompt in tops]),
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
        "win-rate": over_prompts((result + 1) / 2, prompts, proportion=True),
        "first_order": over_prompts((first + 1) / 2, prompts, proportion=True),
        "ties": over_prompts(result == 0, prompts, proportion=True),
        "order_bias": over_prompts((first - second) / 2, prompts),
        "disagreement": over_prompts(first != second, prompts, proportion=True),
    }


def length_adjusted(
    results: Sequence[int], length_differences: Sequence[float], prompts: Sequence
) -> Estimate | None:
    """The win-rate at equal lengths, on the logit scale: theta of
    logit P(win) = theta + phi tanh(d / sd(d)), where d is the difference in characters. This is LC
    AlpacaEval's form without its term for a prompt's difficulty and without its penalty, so the
    figure is not LC AlpacaEval's. results: 1 win, 0 tie, -1 loss.

    None where fewer than a tenth of the pairs are on one side of d = 0: the figure would be an
    extrapolation, whose size the form alone decides. (LC AlpacaEval adds judgements of models that
    were told to be short or long; we have none.) None too where all results are alike or lengths
    explain them all."""
    won = (np.asarray(results, float) + 1) / 2
    d = np.asarray(length_differences, float)
    if len(d) < 3 or won.std() == 0 or min((d > 0).mean(), (d < 0).mean()) < OVERLAP:
        return None
    x = sm.add_constant(np.tanh(d / d.std()), has_constant="add")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PerfectSeparationWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            fit = sm.GLM(won, x, family=sm.families.Binomial()).fit()
        except PerfectSeparationWarning:
            return None
    # What a response does to theta, to first order: its score times the inverse information.
    pull = (x * fit.resid_response[:, None]) @ fit.normalized_cov_params[0]
    prompt_of, unique = pd.factorize(np.asarray(prompts, object))
    pulls = np.bincount(prompt_of, pull, len(unique)) * len(unique)
    return Estimate(float(fit.params[0]), pulls, unique)
