"""Is it self-evaluation? Tables of the controls in controls.py; none of them is in the paper."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from evaluation import controls, intervals, metrics
from evaluation.controls import Ordering, calibrations
from evaluation.intervals import NOTHING, Difference
from evaluation.paper_tables import calibration, preferences, quality
from evaluation.results import Cell, Key
from evaluation.table import Column, Results, Table, Values, mean, measure, ratio, rows, statistic


def window_constant(c: Cell) -> Values:
    """Calibration of the score vector that is best on the training window's judgements."""
    if not c.window:
        return [], []
    return calibrations(c.window.constant, c.j, c.gamma), c.prompts


COMPARISONS = "Comparisons"
PRIMARY = "calibration - the best constant's"
Side = Callable[[Cell], Values]


def compared(results: Results, model: str) -> dict[str, tuple[Side, Side]]:
    """What is compared of a model: ours - theirs."""
    base = results.base
    pairs: dict[str, tuple[Side, Side]] = {
        PRIMARY: (calibration, window_constant),
        "pairs of a prompt ordered right - half": (
            lambda c: orderings(c, lambda o: o.right),
            lambda c: orderings(c, lambda o: o.pairs / 2),
        ),
    }
    for other in results.models[: results.models.index(model)]:
        pairs[f"calibration - {other}'s"] = (calibration, by_model(other, calibration))
        pairs[f"quality - {other}'s"] = (quality, by_model(other, quality))
    if model != base:
        pairs[f"on {base}'s answers: calibration of its scores - {base}'s"] = (
            lambda c: calibration(c.of(base).rescored(model)),
            lambda c: calibration(c.of(base).rescored(base)),
        )
        pairs["response win-rate - half"] = (
            lambda c: preferences(c, lambda x: (x["result"] + 1) / 2),
            lambda c: preferences(c, lambda x: 0.5),
        )
    return pairs


def by_model(model: str, values: Side) -> Side:
    """Another model's values."""
    return lambda c: values(c.of(model))


def orderings(c: Cell, value: Callable[[Ordering], float]) -> Values:
    """One value for each prompt with answers that the judge tells apart."""
    by_prompt = dict(zip(dict.fromkeys(c.prompts), c.within, strict=True))
    compared = {prompt: value(o) for prompt, o in by_prompt.items() if o.pairs}
    return list(compared.values()), list(compared)


def comparisons(results: Results) -> Table:
    """The primary endpoint, and all other comparisons corrected together."""
    primary = (results.benchmarks[0], results.models[-1], PRIMARY)
    differences = {
        (b, m, name): difference(cells, *sides)
        for b, m, cells in results.each()
        for name, sides in compared(results, m).items()
    }
    first = {primary: differences.pop(primary)}
    others = {key: d for key, d in differences.items() if d.interval.mean is not None}
    corrected = intervals.holm({key: d.p for key, d in others.items()}) | {primary: "primary"}
    return Table.of(
        COMPARISONS,
        "Primary endpoint, of the first benchmark and the last model: calibration on held-out "
        "prompts minus that of the best constant of the training window. All others are corrected "
        "together (Holm). Prompts are paired; the p-value is of a permutation test over prompts, "
        "or of a t test over evaluations where there are several.",
        [
            {"benchmark": key[0], "model": key[1], "difference": key[2], "mean": d.interval,
             "p": d.p, "corrected p": corrected[key]}
            for key, d in (first | others).items()
        ],
    )  # fmt: skip


def significant(row: Mapping) -> bool:
    """Whether a row of `comparisons` has a p-value below 0.05, corrected unless it is the primary
    endpoint's."""
    p = row["p"] if row["corrected p"] == "primary" else row["corrected p"]
    return p is not None and p < 0.05


def differ_from_base(comparisons: Table, base: str) -> set[tuple[str, str, str]]:
    """(benchmark, model, "quality" or "calibration") of the figures that differ from the base's."""
    return {
        (row["benchmark"], row["model"], header)
        for row in comparisons.frame.to_dict("records")
        for header in ("quality", "calibration")
        if row["difference"] == f"{header} - {base}'s" and significant(row)
    }


def difference(cells: list[Cell], ours: Side, theirs: Side) -> Difference:
    """Paired by prompt within one evaluation, by evaluation where there are several."""
    runs = [(by_prompt(*ours(cell)), by_prompt(*theirs(cell))) for cell in cells]
    if len(runs) == 1:
        return intervals.paired(*runs[0])
    values = [list(intervals.differences(*sides).values()) for sides in runs]
    if not all(values):
        return Difference(NOTHING, None)
    return intervals.paired_seeds(list(map(np.mean, values)), [0.0] * len(values))


def by_prompt(values: Sequence[float], prompts: Sequence[str]) -> dict[str, list[float]]:
    grouped: dict[str, list[float]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        grouped.setdefault(prompt, []).append(float(value))
    return grouped


def predicted(predict: Callable[[Cell], np.ndarray | None]) -> Column:
    """Calibration of predicted scores in place of the model's. `predict`: of a cell (N, 5), NaN
    where nothing is predicted, or one vector (5,) for all, or None."""

    def values(c: Cell) -> Values:
        scores = predict(c) if c.valid else None
        if scores is None:
            return [], []
        scores = np.broadcast_to(np.asarray(scores, float), c.j.shape)
        some = ~np.isnan(scores).any(1)
        return calibrations(scores[some], c.j[some], c.gamma), c.prompts[some]

    return mean(values)


def recalibrated(c: Cell, base: str, fit: Callable) -> np.ndarray | None:
    """The base model's scores for these answers, corrected by a fit on those for the window's."""
    indices, scores = c.match(c.scores_by(base))
    if not c.window or len(indices) < len(c.valid) or not len(c.window.fit[0]):
        return None
    return fit(*c.window.fit, np.array(scores))


def surface(c: Cell) -> np.ndarray | None:
    if not c.window:
        return None
    texts = [r.answer for r in c.window.rollouts]
    return controls.surface(texts, c.window.j, [r.answer for r in c.valid])


def references(c: Cell) -> np.ndarray:
    """The mean human label of the prompt's reference responses."""
    means = {p: controls.digits(np.mean(labels, axis=0)) for p, labels in c.references.items()}
    return np.array([means.get(prompt, [np.nan] * 5) for prompt in c.prompts])


def repeats(c: Cell) -> dict[Key, list[float]]:
    """By answer: calibration of the judge's repeats against each other."""
    return {
        key: metrics.leave_one_out_calibration(draws, c.gamma)
        for key, draws in c.draws.items()
        if len(draws) > 1
    }


def ceiling(c: Cell) -> Values:
    pairs = [(value, prompt) for (prompt, _), values in repeats(c).items() for value in values]
    return [value for value, _ in pairs], [prompt for _, prompt in pairs]


def skill(c: Cell) -> tuple[Callable, Sequence]:
    """On the answers that were judged repeatedly."""
    by_answer = repeats(c)
    values = [by_answer.get(key, []) for key in c.keys]
    counts, sums = np.array(list(map(len, values)), int), np.array(list(map(sum, values)), float)
    constant, _ = window_constant(c)

    def figure(indices: np.ndarray) -> float | None:
        indices = indices[counts[indices] > 0]
        if not c.window or not len(indices):
            return None
        top = sums[indices].sum() / counts[indices].sum()
        return controls.skill(c.calibration[indices].mean(), constant[indices].mean(), top)

    return figure, c.prompts


def predictors(results: Results) -> Table:
    base = results.base
    columns = {
        "its scores": mean(calibration),
        "most probable": mean(lambda c: calibration(c.rescored(c.model))),
        "window constant": mean(window_constant),
        "test constant": predicted(lambda c: metrics.best_constant(c.j.tolist(), c.gamma)),
        "shuffled": statistic(lambda c: (c.shuffled.across, range(len(c.shuffled.sums)))),
        "within": ratio(lambda c: (np.diag(c.shuffled.sums), np.diag(c.shuffled.counts))),
        "offset": predicted(lambda c: recalibrated(c, base, controls.offset)),
        "isotonic": predicted(lambda c: recalibrated(c, base, controls.isotonic)),
        "surface": predicted(surface),
        "other samples": predicted(lambda c: controls.other_samples(c.j, c.prompts)),
        "references": predicted(references),
        "ceiling": mean(ceiling),
        "skill": statistic(skill),
    }
    return Table.of(
        "Calibration beside predictors that know less",
        "Most probable: the digits it finds most probable, not those it sampled. Window constant: "
        "the best one vector on the training window's judgements. Test constant: "
        "on these very answers. Shuffled: the model's scores against other answers, across and "
        f"within prompts. Offset, isotonic: {base}'s scores for these answers, recalibrated on "
        "the window. Surface: length and form, fitted on the window. Other samples: the judge's "
        "mean for the prompt's other answers. References: the mean human label of the prompt's "
        "reference responses. Ceiling: the judge against itself. Skill: "
        "(calibration - window constant) / (ceiling - window constant).",
        rows(results, columns),
        higher=("its scores", "most probable", "skill"),
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


def discrimination(results: Results) -> Table:
    """Does the model tell answers to the same prompt apart, or only prompts?"""

    def taus(c: Cell) -> Values:
        values = [o.tau for o in c.within if o.tau is not None]
        return values, range(len(values))

    def between(name: str) -> Column:
        """A field of the ordering of the prompts' means."""

        def prepare(c: Cell) -> tuple[Callable, Sequence]:
            own, judge = (controls.prompt_means(x, c.prompts) for x in (c.own_quality, c.quality))
            return lambda i: getattr(controls.ordering(own[i], judge[i]), name), range(len(own))

        return statistic(prepare)

    columns = {
        "pairs": lambda cells: sum(o.pairs for cell in cells for o in cell.within),
        "within: accuracy": ratio(
            lambda c: ([o.right for o in c.within], [o.pairs for o in c.within])
        ),
        "within: tau": mean(taus),
        "between: accuracy": between("accuracy"),
        "between: tau": between("tau"),
    }
    return Table.of(
        "Telling answers apart, by quality",
        "Pairs of answers that the judge tells apart: share that the model orders alike (its ties "
        "count half; 0.5 is chance), and Kendall's tau-b; within prompts, and between the prompts' "
        "means.",
        rows(results, columns, lambda c: c.valid),
        higher=[header for header in columns if header != "pairs"],
    )


def choice_of_responses(results: Results) -> Table:
    """What the choice of responses makes of calibration."""

    def well_formed_for_all(c: Cell) -> Values:
        common = set.intersection(*(set(c.of(m).keys) for m in results.models))
        indices, _ = c.match(dict.fromkeys(common))
        return c.calibration[indices], c.prompts[indices]

    def malformed_as_0(c: Cell) -> Values:
        values = dict(zip(c.keys, c.calibration, strict=True))
        keys = [(r.prompt_id, r.sample) for r in c.rollouts]
        return [values.get(key, 0.0) for key in keys], [prompt for prompt, _ in keys]

    def forced_block(c: Cell) -> Values:
        """Every answer that is judged, with the scores read after it."""
        judged = {key: draws[0] for key, draws in c.draws.items()}
        judged |= dict(zip(c.keys, c.j, strict=True))
        scores = c.scores_by(c.model)
        keys = [key for key in judged if key in scores]
        s, j = (np.array([x[key] for key in keys], int).reshape(-1, 5) for x in (scores, judged))
        return calibrations(s, j, c.gamma), [prompt for prompt, _ in keys]

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
        "Well-formed ones (the paper's); those that all models answered well-formed; malformed "
        "ones counted as 0; all answers, with a block put after each and its digits read (most "
        "probable, not sampled). Answers read: for the forced block, which leaves out empty "
        "answers, and malformed ones that were not judged.",
        rows(results, columns),
        higher=[header for header in columns if header != "answers read"],
    )


TABLES = (comparisons, predictors, answers_by_scorers, discrimination, choice_of_responses)
