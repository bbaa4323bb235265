"""The threshold above which an answer is sent, chosen for a wished risk and not guessed.

An answer is sent when its confidence, the quality that the model expects of it, is at least the
threshold. The risk of what is sent is its mean judged quality (at least `target`), or the share of
bad answers in it, those of quality below `bad_below` (at most `target`). This risk need not fall
as the threshold rises, so the threshold is found by Learn-then-Test (Angelopoulos, Bates, Candes,
Jordan and Lei, "Learn then Test", 2021, arXiv 2110.01052): each threshold of a fixed grid is a null
hypothesis, "its risk is not kept", with a p-value from the Hoeffding-Bentkus inequality; those that
are rejected keep the risk, all together with probability 1 - delta over the draw of the prompts.

1. Thresholds are tested in an order that is learned from a quarter of the prompts, and on the other
   three quarters (split fixed-sequence testing). From the highest one down, the usual order, the
   first test would have a handful of answers and end the sequence.
2. Answers to one prompt are not independent, so one of each prompt, drawn by seed, is tested. The
   curve and `reached` are of all answers.
3. p-values and tests are MAPIE's. Its controllers are not used: they know no mean quality. For the
   share of bad answers the p-value is the exact binomial tail.

The promise is about prompts like those of the evaluation, answered by the same model with the same
settings, and about the same judge.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mapie.risk_control import control_fwer
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value

from evaluation import use_figures
from evaluation.controls import expected_scores
from evaluation.intervals import Interval, over_prompts
from evaluation.predictors import groups, qualities
from evaluation.results import Cell, load_one_cell
from evaluation.threshold import Kind, Measure, Threshold, Wish, wished

GRID = np.arange(101) / 100  # fixed beforehand, as the tests ask
LEARN = 0.25  # of the prompts, for the order


# --------------------------------------------------------------------------------------------------
# Learn then test


def losses(
    quality: np.ndarray, target: float, measure: Measure, bad_below: float
) -> tuple[np.ndarray, float]:
    """(losses in [0, 1], the mean that they may have at most)."""
    if measure == "quality":
        return 1 - quality, 1 - target
    return (quality < bad_below).astype(float), target


def p_values(conf: np.ndarray, loss: np.ndarray, most: float, binary: bool) -> np.ndarray:
    """(101,) p-values of "the mean loss of what is sent is above `most`", one for each threshold of
    GRID; 1 where nothing is sent. conf, loss: (N,) of independent answers, nan where malformed;
    given how many are sent, the losses of these are independent draws too."""
    sent = conf >= GRID[:, None]  # False for nan
    n = sent.sum(1)
    p = np.ones(len(GRID))
    some = n > 0
    risk = np.where(sent, loss, 0.0).sum(1)[some] / n[some]
    p[some] = compute_hoeffding_bentkus_p_value(risk, n[some], most, binary=binary)[:, 0]
    return np.minimum(p, 1.0)


def choose(
    confidences: Sequence[float],
    quality: Sequence[float],
    prompts: Sequence[str],
    target: float,
    measure: Measure,
    delta: float = 0.05,
    bad_below: float = 0.5,
    seed: int = 42,
) -> Threshold | None:
    """The lowest threshold whose risk is kept, None where none can be promised. One confidence,
    judged quality and prompt id for each answer; nan for a malformed one, which is never sent."""
    conf, quality = np.asarray(confidences, float), np.asarray(quality, float)
    loss, most = losses(quality, target, measure, bad_below)
    rng = np.random.default_rng(seed)
    one = np.array([rng.choice(g) for g in groups(prompts)], int)
    one = rng.permutation(one)
    learn, test = np.split(one, [round(LEARN * len(one))])
    binary = measure == "bad"
    order = np.argsort(p_values(conf[learn], loss[learn], most, binary), kind="stable")
    p = p_values(conf[test], loss[test], most, binary)
    kept = order[control_fwer(p[order], delta, "split_fixed_sequence")]
    if not len(kept):
        return None
    value = float(GRID[kept].min())
    sent = conf >= value
    reached = (quality if measure == "quality" else loss)[sent].mean()
    return Threshold(value, target, measure, bad_below, delta, len(one), float(sent.mean()),
                     float(reached))  # fmt: skip


# --------------------------------------------------------------------------------------------------
# From an evaluation


class Answers(NamedTuple):
    """All answers of an evaluation but those that the judge refused: M well-formed or not."""

    confidence: np.ndarray  # (M,) nan where there is none: malformed
    quality: np.ndarray  # (M,) judged; nan where malformed
    prompts: np.ndarray  # (M,) ids
    scores: Kind  # of which the confidence is the quality


def answers(cell: Cell) -> Answers:
    """The confidence is the quality of the expected scores if the model's digits were read: an
    answer whose digits could not be read has none then, and is not sent (nor by predict.py). Else
    it is that of the sampled scores."""
    indices, logp = cell.log_probabilities("own")
    conf = cell.own_quality
    if indices:
        conf = np.full(len(cell.valid), np.nan)
        conf[indices] = qualities(expected_scores(logp))
    malformed = [r.prompt_id for r in cell.rollouts if r.self_scores is None]
    none = np.full(len(malformed), np.nan)
    return Answers(
        np.concatenate([conf, none]),
        np.concatenate([cell.quality, none]),
        np.concatenate([cell.prompts, np.array(malformed, object)]),
        "expected" if indices else "sampled",
    )


@dataclass(frozen=True)
class Point:
    """Of the curve."""

    threshold: float
    coverage: float
    quality: Interval
    bad: Interval


def curve(given: Answers, bad_below: float) -> list[Point]:
    """What each threshold of GRID sends, as far as it sends anything else than the one before."""
    points, before = [], -1
    for threshold in GRID:
        sent = given.confidence >= threshold
        if sent.sum() not in (0, before):
            quality, prompts = given.quality[sent], given.prompts[sent]
            points.append(
                Point(
                    float(threshold),
                    float(sent.mean()),
                    over_prompts(quality, prompts),
                    over_prompts(quality < bad_below, prompts, proportion=True),
                )
            )
        before = sent.sum()
    return points


def calibrate(results: Path, wish: Wish, out: Path) -> str:
    """Choose the threshold on an evaluation, results/NAME/BENCHMARK/MODEL. Writes threshold.json
    and coverage_risk.png to the folder `out`; returns what was found, as text. Raises ValueError
    where no threshold can be promised; the picture is written all the same."""
    cell = load_one_cell(results)
    if not cell.valid:
        raise ValueError(f"{results}: no answer was judged there; finish evaluate.py first")
    given = answers(cell)
    points = curve(given, wish.bad_below)
    threshold = choose(
        given.confidence, given.quality, given.prompts, wish.target, wish.measure, wish.delta,
        wish.bad_below, wish.seed,
    )  # fmt: skip
    value = threshold and threshold.value
    chosen = [p for p in points if value is not None and p.threshold <= value]
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "coverage_risk.png"
    use_figures.coverage_risk(points, chosen[-1].coverage if chosen else None, wish, picture)
    if not threshold:
        raise ValueError(
            f"{results}: no threshold can promise "
            f"{wished(wish.measure, wish.target, wish.bad_below)} at {1 - wish.delta:.0%} on these "
            f"{len(set(given.prompts)):,} prompts; {picture} shows what there is; wish for less, "
            "or evaluate on more prompts"
        )
    point, file = chosen[-1], out / "threshold.json"
    replace(threshold, scores=given.scores, source=str(results)).save(file)
    refused = sum(r.refused is not None for r in cell.rollouts)
    return "\n".join(
        [
            f"{file}: send answers of confidence {value:.2f} or more",
            f"confidence   quality of the {given.scores} scores",
            f"promised     {threshold.promise()}, for prompts like these {threshold.n:,}",
            f"sent here    {point.coverage:.1%} of all answers",
            f"             mean quality {point.quality.text()}",
            f"             share with quality below {wish.bad_below:g}: {point.bad.text()}",
            f"picture      {picture}",
            *([f"left out     {refused:,} answers that the judge refused"] if refused else []),
        ]
    )
