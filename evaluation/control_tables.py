"""Is it self-evaluation? The tables that stand beside the paper's; what each control is stands in
controls.py. None of them is in the paper."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from evaluation import controls, intervals, metrics
from evaluation.controls import calibrations, qualities
from evaluation.intervals import Difference, Interval
from evaluation.results import Cell, Evaluation, Key
from evaluation.tables import Statistic, Table, Tables, Values, over, show
from prompts import Scores

FIGURES = {"calibration": lambda c: c.calibration, "quality": lambda c: qualities(c.j)}


def all_tables(t: Tables) -> list[Table]:
    """Those for which there are results."""
    found = [primary(t), predictors(t), swap(t), discrimination(t), formats(t)]
    return [table for table in found if table.rows]


# --------------------------------------------------------------------------------------------------
# Against what knows less


def window_constant(e: Evaluation, c: Cell) -> Scores | None:
    return e.window.constant if e.window else None


def primary(t: Tables) -> Table:
    """The primary endpoint, and all other comparisons corrected together."""
    main = (t.benchmarks[0], t.models[-1], "calibration - the best constant's")
    found: dict[tuple[str, str, str], Difference] = {}
    for b, m in t.each():
        found[b, m, "calibration - the best constant's"] = _difference(
            t, b, m, lambda e, c: _by_prompt(c.prompts, c.calibration), _constants
        )
        found[b, m, "pairs of a prompt ordered right - half"] = _difference(
            t, b, m, lambda e, c: _pairs(c, "right"), lambda e, c: _pairs(c, "half")
        )
        for other in t.models[: t.models.index(m)]:
            for name, of in FIGURES.items():
                found[b, m, f"{name} - {other}'s"] = _difference(
                    t, b, m, lambda e, c, of=of: _by_prompt(c.prompts, of(c)),
                    lambda e, c, of=of, o=other: _by_prompt(e[c.benchmark, o].prompts,
                                                            of(e[c.benchmark, o])),
                )  # fmt: skip
        if m == t.base:
            continue
        found[b, m, f"on {t.base}'s answers: calibration of its scores - {t.base}'s"] = _difference(
            t, b, m, lambda e, c: _read(e[c.benchmark, t.base], c.model),
            lambda e, c: _read(e[c.benchmark, t.base], t.base),
        )  # fmt: skip
        found[b, m, "response win-rate - half"] = _difference(
            t, b, m, lambda e, c: _won(c), lambda e, c: {p: [0.5] for p in _won(c)}
        )
    found = {key: d for key, d in found.items() if d.interval.mean is not None or key == main}
    corrected = intervals.holm({key: d.p for key, d in found.items() if key != main})
    rows = [[*main, *_shown(found.pop(main)), "primary"]]
    rows += [[*key, *_shown(d), f"{show(corrected[key])} (Holm)"] for key, d in found.items()]
    return Table(
        "Comparisons",
        "Primary endpoint, of the first benchmark and the last model: calibration on held-out "
        "prompts minus that of the best constant of the training window. All others are corrected "
        "together. Prompts are paired; the p-value is of a permutation test over prompts, or of a "
        "t test over evaluations where there are several.",
        ["benchmark", "model", "difference", "mean", "p", "corrected p"],
        rows,
    )


def _pairs(c: Cell, what: str) -> dict[str, list[float]]:
    """Of each prompt: pairs of its answers that the model orders as the judge does, or half of
    those that the judge tells apart."""
    by_prompt = zip(dict.fromkeys(c.prompts), c.within, strict=True)
    return {p: [o.right if what == "right" else o.pairs / 2] for p, o in by_prompt if o.pairs}


def _read(answers: Cell, scorer: str) -> dict[str, list[float]]:
    """Calibration of a scorer's most probable digits for another's answers."""
    return _by_prompt(*reversed(read_by(answers, scorer)))


def _won(c: Cell) -> dict[str, list[float]]:
    return _by_prompt([x["prompt_id"] for x in c.preferences],
                      [(x["result"] + 1) / 2 for x in c.preferences])  # fmt: skip


def _constants(e: Evaluation, c: Cell) -> dict[str, list[float]]:
    constant = window_constant(e, c)
    if constant is None:
        return {}
    return _by_prompt(c.prompts, calibrations(np.array(constant), c.j, c.gamma))


def _by_prompt(prompts: Sequence[str], values: Sequence[float]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        found.setdefault(prompt, []).append(float(value))
    return found


def _difference(t: Tables, b: str, m: str, ours: Callable, theirs: Callable) -> Difference:
    pairs = [(ours(e, e[b, m]), theirs(e, e[b, m])) for e in t.evaluations]
    if len(pairs) == 1:
        return intervals.paired(*pairs[0])
    each = [intervals.differences(x, y) for x, y in pairs]
    if not all(each):
        return Difference(Interval(None, None, None, 0), None)
    return intervals.paired_seeds([np.mean(list(x.values())) for x in each], [0.0] * len(each))


def _shown(d: Difference) -> tuple[str, str]:
    return show(d.interval), show(d.p)


def predictors(t: Tables) -> Table:
    """Calibration of predictors that know less, on the same answers."""

    def mean(b: str, m: str, predict: Callable[[Evaluation, Cell], np.ndarray | None]) -> Interval:
        def values(e: Evaluation) -> Values:
            c = e[b, m]
            predicted = predict(e, c)
            if predicted is None or not len(c.valid):
                return [], []
            predicted = np.broadcast_to(np.asarray(predicted, float), c.j.shape)
            known = ~np.isnan(predicted).any(1)
            found = calibrations(predicted[known], c.j[known], c.gamma)
            return found, [p for p, k in zip(c.prompts, known, strict=True) if k]

        return over(t.evaluations, values)

    def recalibrated(fit: Callable) -> Callable:
        """The base model's scores for these answers, through a fit on those for the window's."""

        def predict(e: Evaluation, c: Cell) -> np.ndarray | None:
            read = c.digits.get(t.base, {})
            if not e.window or not all(k in read and read[k]["scores"] for k in c.keys):
                return None
            scores = np.array([read[k]["scores"] for k in c.keys]).reshape(-1, 5)
            known = e.window.fit
            return fit(*known, scores) if len(scores) and len(known[0]) else None

        return predict

    def surface(e: Evaluation, c: Cell) -> np.ndarray | None:
        if not e.window or not c.valid:
            return None
        texts = [r.answer for r in e.window.rollouts]
        return controls.surface(texts, e.window.j, [r.answer for r in c.valid])

    def references(e: Evaluation, c: Cell) -> np.ndarray | None:
        """The mean human label of the prompt's reference responses."""
        found = [c.references.get(p) for p in c.prompts]
        nothing = [np.nan] * 5
        if not any(found):
            return None
        return np.array([controls.digits(np.mean(x, axis=0)) if x else nothing for x in found])

    def row(b: str, m: str) -> list[str]:
        return [
            b, m, show(mean(b, m, lambda e, c: c.s)), show(t.mean(b, m, lambda c: read_by(c, m))),
            show(mean(b, m, window_constant)),
            show(mean(b, m, lambda e, c: metrics.best_constant(c.j.tolist(), c.gamma) if c.valid
                      else None)),
            show(t.statistic(b, m, lambda e: (
                lambda chosen, _: e[b, m].shuffled.across(chosen),
                range(len(e[b, m].shuffled.sums)),
            ))),
            show(t.ratio(b, m, lambda c: (np.diag(c.shuffled.sums), np.diag(c.shuffled.counts)))),
            show(mean(b, m, recalibrated(controls.offset))),
            show(mean(b, m, recalibrated(controls.isotonic))),
            show(mean(b, m, surface)),
            show(mean(b, m, lambda e, c: controls.other_samples(c.j, c.prompts) if c.valid
                      else None)),
            show(mean(b, m, references)),
            show(t.mean(b, m, ceiling)), show(t.statistic(b, m, lambda e: skill(e, e[b, m]))),
        ]  # fmt: skip

    return Table(
        "Calibration beside predictors that know less",
        "Most probable: the digits it finds most probable, not those it sampled. Window constant: "
        "the best one vector on the training window's judgements. Test constant: "
        "on these very answers. Shuffled: the model's scores against other answers, across and "
        f"within prompts. Offset, isotonic: {t.base}'s scores for these answers, recalibrated on "
        "the window. Surface: length and form, fitted on the window. Other samples: the judge's "
        "mean for the prompt's other answers. References: the mean human label of the prompt's "
        "reference responses. Ceiling: the judge against itself. Skill: "
        "(calibration - window constant) / (ceiling - window constant).",
        ["benchmark", "model", "its scores", "most probable", "window constant", "test constant",
         "shuffled", "within", "offset", "isotonic", "surface", "other samples", "references",
         "ceiling", "skill"],
        [row(b, m) for b, m in t.each()],
    )  # fmt: skip


def ceiling(c: Cell) -> Values:
    """Calibration of the judge's repeats against each other (metrics.foretold)."""
    found = [(x, k[0]) for k, d in c.draws.items() if len(d) > 1
             for x in metrics.foretold(d, c.gamma)]  # fmt: skip
    return [x for x, _ in found], [prompt for _, prompt in found]


def skill(e: Evaluation, c: Cell) -> tuple[Statistic, Sequence]:
    constant = window_constant(e, c)
    if constant is None:
        return lambda *_: None, c.prompts
    fixed = calibrations(np.array(constant), c.j, c.gamma)
    repeats = [metrics.foretold(d, c.gamma) if len(d) > 1 else []
               for d in (c.draws.get(k, []) for k in c.keys)]  # fmt: skip
    tops, counts = np.array([(sum(x), len(x)) for x in repeats]).reshape(-1, 2).T

    def value(index: np.ndarray, _: Sequence) -> float | None:
        if not (count := counts[index].sum()):
            return None
        index = index[counts[index] > 0]  # all three on the answers that were judged repeatedly
        own, top = c.calibration[index].mean(), tops[index].sum() / count
        return controls.skill(own, fixed[index].mean(), top)

    return value, c.prompts


# --------------------------------------------------------------------------------------------------
# Whose scores are they?


def read_by(c: Cell, scorer: str) -> Values:
    """Calibration of a scorer's most probable digits behind this cell's answers."""
    read = c.digits.get(scorer, {})
    at = [i for i, k in enumerate(c.keys) if k in read and read[k]["scores"]]
    s = np.array([read[c.keys[i]]["scores"] for i in at]).reshape(-1, 5)
    return calibrations(s, c.j[at], c.gamma), [c.prompts[i] for i in at]


def swap(t: Tables) -> Table:
    """The answer x scorer swap: calibration of every model's scores for every model's answers."""

    def cell(b: str, answers: str, scorer: str) -> Interval:
        return t.mean(b, answers, lambda c: read_by(c, scorer))

    return Table(
        "Answers by one model, scores by another: calibration",
        "Each scorer's most probable digits, one after the other, behind stored answers. A gain is "
        f"self-evaluation as far as it is there on {t.base}'s answers too; a gain that is not came "
        "from the answers.",
        ["benchmark", "answers by", *(f"scored by {m}" for m in t.models)],
        [
            [b, a, *(show(cell(b, a, s)) for s in t.models)]
            for b, a in t.each()
            if any(t.first[b, a].digits.values())
        ],
    )


def discrimination(t: Tables) -> Table:
    """Does it tell answers to the same prompt apart, or only prompts?"""

    def taus(c: Cell) -> Values:
        known = [o.tau for o in c.within if o.tau is not None]
        return known, list(map(str, range(len(known))))

    def between(e: Evaluation, b: str, m: str, name: str) -> tuple[Statistic, Sequence]:
        """Of the prompts' means."""
        c = e[b, m]
        own, judge = (controls.prompt_means(qualities(x), c.prompts) for x in (c.s, c.j))
        return lambda i, _: getattr(controls.ordering(own[i], judge[i]), name), range(len(own))

    def row(b: str, m: str) -> list[str]:
        accuracy = t.ratio(
            b, m, lambda c: ([o.right for o in c.within], [o.pairs for o in c.within])
        )
        pairs = sum(o.pairs for e in t.evaluations for o in e[b, m].within)
        figures = [accuracy, t.mean(b, m, taus)]
        figures += [t.statistic(b, m, partial(between, b=b, m=m, name=name))
                    for name in ("accuracy", "tau")]  # fmt: skip
        return [b, m, f"{pairs:,}", *map(show, figures)]

    return Table(
        "Telling answers apart, by quality",
        "Pairs of answers that the judge tells apart: share that the model orders alike (its ties "
        "count half; 0.5 is chance), and Kendall's tau-b; within prompts, and between the prompts' "
        "means.",
        ["benchmark", "model", "pairs", "within: accuracy", "tau", "between: accuracy", "tau"],
        [row(b, m) for b, m in t.each() if t.first[b, m].valid],
    )


def formats(t: Tables) -> Table:
    """What the choice of responses makes of calibration."""

    def common(e: Evaluation, b: str) -> set[Key]:
        return set.intersection(*(set(e[b, m].keys) for m in t.models))

    def row(b: str, m: str) -> list[str]:
        def for_all(e: Evaluation) -> Values:
            c, keys = e[b, m], common(e, b)
            at = [i for i, k in enumerate(c.keys) if k in keys]
            return c.calibration[at], [c.prompts[i] for i in at]

        def zero(e: Evaluation) -> Values:
            c = e[b, m]
            known = dict(zip(c.keys, c.calibration, strict=True))
            return [known.get((r.prompt_id, r.sample), 0.0) for r in c.rollouts], [
                r.prompt_id for r in c.rollouts
            ]

        def forced(e: Evaluation) -> Values:
            """Every answer that is judged, with the scores read behind it."""
            c = e[b, m]
            judged = {k: d[0] for k, d in c.draws.items()}
            judged |= dict(zip(c.keys, (r.judge_scores for r in c.valid), strict=True))
            read = c.digits.get(m, {})
            keys = [k for k in judged if k in read and read[k]["scores"]]
            s, j = ([x[k] for k in keys] for x in ({k: read[k]["scores"] for k in keys}, judged))
            if not keys:
                return [], []
            return calibrations(np.array(s), np.array(j), c.gamma), [k[0] for k in keys]

        valid = t.mean(b, m, lambda c: (c.calibration, c.prompts))
        found = [over(t.evaluations, f) for f in (for_all, zero, forced)]
        used, there = (sum(len(of(e)) for e in t.evaluations)
                       for of in (lambda e: forced(e)[0], lambda e: e[b, m].rollouts))  # fmt: skip
        return [b, m, *map(show, (valid, *found)), f"{used:,} of {there:,}"]

    return Table(
        "Calibration by choice of responses",
        "Well-formed ones (the paper's); those that all models answered well-formed; malformed "
        "ones counted as 0; all answers, with a block put behind each and its digits read (most "
        "probable, not sampled). Answers read: those of the last; it lacks empty ones, and "
        "malformed ones where they were not judged.",
        ["benchmark", "model", "well-formed", "well-formed for all", "malformed = 0",
         "forced block", "answers read"],
        [row(b, m) for b, m in t.each()],
    )  # fmt: skip
