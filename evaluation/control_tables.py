"""Is it self-evaluation? Tables of the controls in predictors.py and controls.py; none is in the
paper."""

from collections.abc import Callable

import numpy as np

from evaluation import controls, intervals, metrics, predictors
from evaluation.intervals import Estimate
from evaluation.paper_tables import calibration
from evaluation.predictors import calibrations
from evaluation.results import Cell, Key
from evaluation.table import Column, Results, Table, Values, mean, measure, ratio, rows, statistic

# --------------------------------------------------------------------------------------------------
# Predictors that know less


def predicted(c: Cell, scores: np.ndarray | None) -> Values:
    """Calibration of predicted scores in place of the model's: (N, 5), NaN where nothing is
    predicted, or one vector (5,) for all, or None."""
    if scores is None or not c.valid:
        return [], []
    scores = np.broadcast_to(np.asarray(scores, float), c.j.shape)
    some = ~np.isnan(scores).any(1)
    return calibrations(scores[some], c.j[some]), c.prompts[some]


def window_constant(c: Cell) -> Values:
    return predicted(c, c.window and c.window.constant)


def last_constant(c: Cell) -> Values:
    return predicted(c, c.window and c.window.last_constant)


def prompt_only(c: Cell) -> Values:
    """On the prompts whose hidden states are on file."""
    fit = c.window and c.window.prompt_only
    ids = [p for p in dict.fromkeys(c.prompts) if p in c.prompt_states]
    if not fit or not ids:
        return [], []
    scores = dict(zip(ids, fit.predict(np.array([c.prompt_states[p] for p in ids])), strict=True))
    nothing = np.full(5, np.nan)
    return predicted(c, np.array([scores.get(p, nothing) for p in c.prompts]))


def surface(c: Cell) -> Values:
    if not c.window or not c.valid:
        return [], []
    return predicted(c, c.surface_scores)


def recalibrated(c: Cell, base: str, fit: Callable) -> Values:
    """The base model's scores for these answers, corrected by a fit on those for the window's."""
    indices, scores = c.match(c.scores_by(base))
    if not c.window or not len(c.window.fit[0]) or not indices:
        return [], []
    corrected = np.full(c.j.shape, np.nan)
    corrected[indices] = fit(*c.window.fit, np.array(scores))
    return predicted(c, corrected)


def references(c: Cell) -> Values:
    """The median human label of the prompt's reference responses."""
    medians = {p: predictors.digits(np.median(x, axis=0)) for p, x in c.references.items()}
    nothing = [np.nan] * 5
    return predicted(c, np.array([medians.get(p, nothing) for p in c.prompts]).reshape(-1, 5))


def repeats(c: Cell, figure: Callable) -> dict[Key, float]:
    """By answer that was judged repeatedly: a figure of the judge's scores, where it has one."""
    found = {key: figure(draws) for key, draws in c.draws.items() if len(draws) > 1}
    return {key: value for key, value in found.items() if value is not None}


def of_repeats(figure: Callable) -> Callable[[Cell], Values]:
    def values(c: Cell) -> Values:
        found = repeats(c, figure)
        return list(found.values()), [prompt for prompt, _ in found]

    return values


def leave_one_out(draws: list) -> float:
    return metrics.agreement_with(draws, len(draws) - 1)


def skill(c: Cell) -> Estimate | None:
    """Share of the way from the best constant to the ceiling, on the answers that have one."""
    indices, tops = c.match(repeats(c, metrics.ceiling))
    if not c.window or not indices:
        return None
    constant = calibrations(c.window.constant, c.j[indices])
    columns = np.stack([c.calibration[indices], constant, tops], axis=1)

    def share(sums: np.ndarray) -> np.ndarray:
        own, fixed, top = np.moveaxis(sums, -1, 0)
        return np.where(top > fixed, (own - fixed) / (top - fixed), np.nan)

    return intervals.of_sums(share, columns, c.prompts[indices])


def across_prompts(c: Cell) -> Estimate | None:
    """The model's scores against answers to other prompts."""
    pairs = np.stack([c.shuffled.sums, c.shuffled.counts])
    return intervals.of_pairs(lambda x: x[..., 0] / x[..., 1], pairs, c.shuffled.prompts)


def predictors_table(results: Results) -> Table:
    base = results.base
    columns = {
        "its scores": mean(calibration),
        "most probable": mean(lambda c: calibration(c.rescored(c.model))),
        "uniform guess": mean(lambda c: (predictors.uniform_guess(c.j), c.prompts)),
        "window constant": mean(window_constant),
        "last constant": mean(last_constant),
        "test constant": mean(
            lambda c: predicted(c, predictors.best_constant(c.j) if c.valid else None)
        ),
        "prompt only": mean(prompt_only),
        "shuffled": statistic(across_prompts),
        "within": ratio(
            lambda c: (np.diag(c.shuffled.sums), np.diag(c.shuffled.counts), c.shuffled.prompts)
        ),
        "offset": mean(lambda c: recalibrated(c, base, predictors.offset)),
        "rising curve": mean(lambda c: recalibrated(c, base, predictors.rising)),
        "surface": mean(surface),
        "other samples": mean(lambda c: predicted(c, predictors.other_samples(c.j, c.prompts))),
        "references": mean(references),
    }
    return Table.of(
        "Calibration beside predictors that know less",
        "Most probable: the digits it finds most probable, not those it sampled. Uniform guess: "
        "five random digits. Window and last constant: the best one vector on the training run's "
        "first and last cycle's judgements. Test constant: on these very answers. Prompt only: "
        f"ridge regression on {base}'s last hidden state of the prompt. Shuffled: the model's "
        "scores against other answers, across and within prompts. Offset, rising curve: "
        f"{base}'s scores for these answers, recalibrated on the window by their median. Surface: "
        "length and form, a median fit on the window. Other samples: the judge's median for the "
        "prompt's other answers. References: the median human label of the prompt's reference "
        "responses.",
        rows(results, columns),
        higher=("its scores", "most probable"),
    )


def ceiling(results: Results) -> Table:
    """How well the judge's scores can be predicted at all."""
    repeated = of_repeats(metrics.ceiling)

    def on_the_same(values: Callable[[Cell], np.ndarray]) -> Column:
        def kept(c: Cell) -> Values:
            indices, _ = c.match(repeats(c, leave_one_out))
            return values(c)[indices], c.prompts[indices]

        return mean(kept)

    columns = {
        "its scores": on_the_same(lambda c: c.calibration),
        "another judgement": mean(of_repeats(lambda draws: metrics.agreement_with(draws, 1))),
        "leave-one-out agreement": mean(of_repeats(leave_one_out)),
        "ceiling": mean(repeated),
        "skill": statistic(skill),
    }
    return Table.of(
        "The judge against itself",
        "On the answers that were judged repeatedly (evaluate.py --repeat). Calibration of another "
        "judgement of the same answer, of the median of all others (leave-one-out agreement, which "
        "is no ceiling: the median of a few judgements is noisy), and of the judge's own median, "
        "by extrapolation to infinitely many judgements (needs four). Skill: (calibration - window "
        "constant) / (ceiling - window constant).",
        rows(results, columns, lambda c: any(len(draws) > 1 for draws in c.draws.values())),
        higher=("its scores", "skill"),
    )


def answers_by_scorers(results: Results) -> Table:
    """Calibration of every model's scores for every model's answers."""
    columns = {
        f"scored by {m}": mean(lambda c, m=m: calibration(c.rescored(m))) for m in results.models
    }
    return Table.of(
        "Answers by one model, scores by another: calibration",
        "Each scorer's most probable digits, one after the other, after stored answers. A gain is "
        f"self-evaluation as far as {results.base}'s answers show it too; a gain that they do not "
        "show came from the answers.",
        [
            {"benchmark": b, "answers by": m} | measure(columns, cells)
            for b, m, cells in results.each()
            if any(cells[0].digits.values())
        ],
        higher=columns,
    )


def pairs_right(c: Cell) -> tuple[list, list, list]:
    """Pairs of a prompt's answers ordered right, pairs that the judge tells apart, prompts."""
    found = c.within
    return [o.right for o in found.values()], [o.pairs for o in found.values()], list(found)


def discrimination(results: Results) -> Table:
    """Does the model tell answers to the same prompt apart, or only prompts?"""

    def taus(c: Cell) -> Values:
        known = {prompt: o.tau for prompt, o in c.within.items() if o.tau is not None}
        return list(known.values()), list(known)

    def constant(cells: list[Cell]) -> int:
        """Prompts that the judge's scores of its answers tell apart, but not the model's."""
        found = (o for c in cells for o in c.within.values())
        return sum(o.pairs > 0 and o.tau is None for o in found)

    def between(figure: Callable[[np.ndarray], np.ndarray]) -> Column:
        """Of the prompts' means."""

        def prepare(c: Cell) -> Estimate | None:
            own, judge = (controls.prompt_means(x, c.prompts) for x in (c.own_quality, c.quality))
            ids = list(dict.fromkeys(c.prompts))
            return intervals.of_pairs(figure, controls.pair_sums(own, judge), ids)

        return statistic(prepare)

    columns = {
        "pairs": lambda cells: sum(o.pairs for cell in cells for o in cell.within.values()),
        "within: accuracy": ratio(pairs_right),
        "within: tau": mean(taus),
        "prompts without a tau": constant,
        "between: accuracy": between(controls.accuracy),
        "between: tau": between(controls.tau_b),
    }
    return Table.of(
        "Telling answers apart, by quality",
        "Pairs of answers that the judge tells apart: share that the model orders alike (its ties "
        "count half; 0.5 is chance), and Kendall's tau-b; within prompts, and between the prompts' "
        "means. Where the model gives all answers to a prompt the same quality, there is no tau: "
        "these prompts are counted, and are in the accuracy.",
        rows(results, columns, lambda c: c.valid),
        higher=[header for header in columns if ":" in header],
    )


def choice_of_responses(results: Results) -> Table:
    """What the choice of responses makes of calibration."""
    in_all = [m for m in results.models if m not in results.in_some()]

    def well_formed_for_all(c: Cell) -> Values:
        common = set.intersection(*(set(c.of(m).keys) for m in in_all))
        indices, _ = c.match(dict.fromkeys(common))
        return c.calibration[indices], c.prompts[indices]

    def malformed_as_0(c: Cell) -> Values:
        values = dict(zip(c.keys, c.calibration, strict=True))
        counted = (r for r in c.rollouts if r.self_scores is None or r.judge_scores is not None)
        keys = [(r.prompt_id, r.sample) for r in counted]
        return [values.get(key, 0.0) for key in keys], [prompt for prompt, _ in keys]

    def forced_block(c: Cell) -> Values:
        """Every answer that is judged, with the scores read after it."""
        judged = {key: draws[0] for key, draws in c.draws.items()}
        judged |= dict(zip(c.keys, c.j, strict=True))
        scores = c.scores_by(c.model)
        keys = [key for key in judged if key in scores]
        s, j = (np.array([x[key] for key in keys], int).reshape(-1, 5) for x in (scores, judged))
        return calibrations(s, j), [prompt for prompt, _ in keys]

    def answers_read(cells: list[Cell]) -> str:
        n = sum(len(forced_block(cell)[0]) for cell in cells)
        return f"{n:,} of {sum(len(cell.rollouts) for cell in cells):,}"

    columns = {
        "well-formed": mean(calibration),
        "well-formed for all": mean(well_formed_for_all),
        "malformed = 0": mean(malformed_as_0),
        "forced block": mean(forced_block),
        "answers read": answers_read,
    }
    return Table.of(
        "Calibration by choice of responses",
        "Well-formed ones (the paper's); those that all models of every evaluation answered "
        "well-formed; malformed "
        "ones counted as 0; all answers, with a block put after each and its digits read (most "
        "probable, not sampled). Answers read: for the forced block, which leaves out empty "
        "answers, and malformed ones that were not judged.",
        rows(results, columns),
        higher=[header for header in columns if header != "answers read"],
    )


TABLES = (predictors_table, ceiling, answers_by_scorers, discrimination, choice_of_responses)
