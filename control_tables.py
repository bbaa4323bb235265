"""Is it self-evaluation? The tables that stand beside the paper's; what each control is stands in
controls.py. None of them is in the paper."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

import controls
import inference
import metrics
from controls import calibrations, qualities
from inference import Difference, Interval
from prompts import ATTRIBUTES, EXAMPLES, FEW_SHOT, Scores
from results import Cell, Evaluation, Key
from tables import Table, Tables, Values, over, own_digits, show

SHARE = 0.25  # of the prompts, in escalation
FIGURES = {"calibration": lambda c: c.calibration, "quality": lambda c: qualities(c.j)}
LOW = 0.5  # AUROC and calibration error: does the model foretell a quality below this?


def all_tables(t: Tables) -> list[Table]:
    """Those for which there are results."""
    found = [
        primary(t), predictors(t), swap(t), discrimination(t), formats(t), untrained(t, "own"),
        untrained(t, "judge"), errors(t), sensitivity(t), uses(t),
    ]  # fmt: skip
    return [table for table in found if table.rows]


# --------------------------------------------------------------------------------------------------
# Against what knows less


def window_constant(e: Evaluation, c: Cell) -> Scores | None:
    """The best constant on the training window's judgements."""
    return metrics.best_constant(e.window.j.tolist(), c.gamma) if e.window else None


def primary(t: Tables) -> Table:
    """The primary endpoint, and all other comparisons of models corrected together."""
    rows, others = [], {}
    for b, m in t.each():
        apart = _difference(t, b, m, lambda e, c: _by_prompt(c, c.calibration), _constants)
        rows.append([b, m, "its calibration - the best constant's", *_shown(apart), "primary"])
    for b, m in t.each():
        if m == t.base:
            continue
        for name, of in FIGURES.items():
            apart = _difference(
                t, b, m, lambda e, c, of=of: _by_prompt(c, of(c)),
                lambda e, c, of=of: _by_prompt(e[c.benchmark, t.base], of(e[c.benchmark, t.base])),
            )  # fmt: skip
            others[b, m, f"{name} - {t.base}'s"] = apart
    corrected = inference.holm({key: d.p for key, d in others.items()})
    for (b, m, what), d in others.items():
        rows.append([b, m, what, *_shown(d), f"{show(corrected[b, m, what])} (Holm)"])
    return Table(
        "Comparisons",
        "Primary endpoint: calibration on held-out prompts minus that of the best constant of the "
        "training window. Prompts are paired; the p-value is of a permutation test over prompts, "
        "or of a t test over evaluations where there are several.",
        ["benchmark", "model", "difference", "mean", "p", "corrected p"],
        rows,
    )


def _constants(e: Evaluation, c: Cell) -> dict[str, list[float]]:
    constant = window_constant(e, c)
    return {} if constant is None else _by_prompt(c, calibrations(np.array(constant), c.j, c.gamma))


def _by_prompt(c: Cell, values: np.ndarray) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for prompt, value in zip(c.prompts, values, strict=True):
        found.setdefault(prompt, []).append(float(value))
    return found


def _difference(t: Tables, b: str, m: str, ours: Callable, theirs: Callable) -> Difference:
    pairs = [(ours(e, e[b, m]), theirs(e, e[b, m])) for e in t.evaluations]
    if len(pairs) == 1:
        return inference.paired(*pairs[0])
    each = [inference.paired(x, y).interval.mean for x, y in pairs]
    if any(x is None for x in each):
        return Difference(Interval(None, None, None, 0), None)
    return inference.paired_seeds(each, [0.0] * len(each))


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
        """The base model's scores for these answers, through a fit on its window scores."""

        def predict(e: Evaluation, c: Cell) -> np.ndarray | None:
            read = c.digits.get(t.base, {})
            if not e.window or not all(k in read and read[k]["scores"] for k in c.keys):
                return None
            scores = np.array([read[k]["scores"] for k in c.keys]).reshape(-1, 5)
            return fit(e.window.s, e.window.j, scores) if len(scores) else None

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
        own = mean(b, m, lambda e, c: c.s)
        fixed = mean(b, m, window_constant)
        top = ceiling(t, b, m)
        reached = None
        if None not in (own.mean, fixed.mean, top):
            reached = controls.skill(own.mean, fixed.mean, top)
        return [
            b, m, show(own), show(fixed),
            show(mean(b, m, lambda e, c: metrics.best_constant(c.j.tolist(), c.gamma) if c.valid
                      else None)),
            show(shuffled(t, b, m, within=False)), show(shuffled(t, b, m, within=True)),
            show(mean(b, m, recalibrated(controls.offset))),
            show(mean(b, m, recalibrated(controls.isotonic))),
            show(mean(b, m, surface)),
            show(mean(b, m, lambda e, c: controls.other_samples(c.j, c.prompts) if c.valid
                      else None)),
            show(mean(b, m, references)),
            show(top), show(reached),
        ]  # fmt: skip

    return Table(
        "Calibration beside predictors that know less",
        "Window constant: the best one vector on the training window's judgements. Test constant: "
        "on these very answers. Shuffled: the model's scores against other answers, across and "
        f"within prompts. Offset, isotonic: {t.base}'s scores for these answers, recalibrated on "
        "the window. Surface: length and form, fitted on the window. Other samples: the judge's "
        "mean for the prompt's other answers. References: the mean human label of the prompt's "
        "reference responses. Ceiling: the judge against itself. Skill: "
        "(calibration - window constant) / (ceiling - window constant).",
        ["benchmark", "model", "its scores", "window constant", "test constant", "shuffled",
         "within", "offset", "isotonic", "surface", "other samples", "references", "ceiling",
         "skill"],
        [row(b, m) for b, m in t.each()],
    )  # fmt: skip


def shuffled(t: Tables, b: str, m: str, within: bool) -> Interval:
    found = [controls.shuffled(c.s, c.j, c.prompts, within, c.gamma)
             for c in (e[b, m] for e in t.evaluations)]  # fmt: skip
    return inference.over_seeds([x for x in found if x is not None])


def ceiling(t: Tables, b: str, m: str) -> float | None:
    """Calibration of the judge's repeats against each other (metrics.ceiling), mean over
    evaluations."""
    found = []
    for c in (e[b, m] for e in t.evaluations):
        repeated = {k: d for k, d in c.draws.items() if len(d) > 1}
        if repeated:
            table = metrics.ceiling([k[0] for k in repeated], list(repeated.values()), c.gamma)
            found.append(table["median of the others"].mean)
    return float(np.mean(found)) if found else None


# --------------------------------------------------------------------------------------------------
# Whose scores are they?


def swap(t: Tables) -> Table:
    """The answer x scorer swap: calibration of every model's scores for every model's answers."""

    def cell(b: str, answers: str, scorer: str) -> Interval:
        def values(c: Cell) -> Values:
            read = c.digits.get(scorer, {})
            at = [i for i, k in enumerate(c.keys) if k in read and read[k]["scores"]]
            s = np.array([read[c.keys[i]]["scores"] for i in at]).reshape(-1, 5)
            return calibrations(s, c.j[at], c.gamma), [c.prompts[i] for i in at]

        return t.mean(b, answers, values)

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

    def within(c: Cell) -> list[controls.Ordering]:
        return controls.within_prompts(qualities(c.s), qualities(c.j), c.prompts)

    def row(b: str, m: str) -> list[str]:
        found = [within(e[b, m]) for e in t.evaluations]
        if len(found) == 1:
            accuracy = inference.ratio([o.right for o in found[0]], [o.pairs for o in found[0]])
            known = [o.tau for o in found[0] if o.tau is not None]
            tau = inference.over_prompts(known, list(map(str, range(len(known)))))
        else:
            sums = [(sum(o.right for o in f), sum(o.pairs for o in f)) for f in found]
            accuracy = inference.over_seeds([right / pairs for right, pairs in sums if pairs])
            taus = [[o.tau for o in f if o.tau is not None] for f in found]
            tau = inference.over_seeds([float(np.mean(x)) for x in taus if x])

        pairs = f"{sum(o.pairs for f in found for o in f):,}"
        return [b, m, pairs, show(accuracy), show(tau), *map(show, between(b, m))]

    def between(b: str, m: str) -> list[Interval]:
        """Of the prompts' means: accuracy and tau."""
        means = [
            [controls.prompt_means(q, c.prompts) for q in (qualities(c.s), qualities(c.j))]
            for c in (e[b, m] for e in t.evaluations)
        ]

        def figure(name: str, own: np.ndarray, judge: np.ndarray) -> float | None:
            return getattr(controls.ordering(own, judge), name)

        if len(means) > 1:
            found = ([figure(name, *x) for x in means] for name in ("accuracy", "tau"))
            return [inference.over_seeds([x for x in f if x is not None]) for f in found]
        [(own, judge)] = means
        return [
            inference.of_statistic(
                lambda i, _, name=name: figure(name, own[i], judge[i]), range(len(own))
            )
            for name in ("accuracy", "tau")
        ]

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
        return [b, m, *map(show, (valid, *found)), f"{found[2].n}"]

    return Table(
        "Calibration by choice of responses",
        "Well-formed ones (the paper's); those that all models answered well-formed; malformed "
        "ones counted as 0; all answers, with a block put behind each and its digits read (most "
        "probable, not sampled).",
        ["benchmark", "model", "well-formed", "well-formed for all", "malformed = 0",
         "forced block", "units"],
        [row(b, m) for b, m in t.each()],
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# What nothing was trained on


def untrained(t: Tables, digits: str) -> Table:
    """`digits`: "own" or "judge", whose digits stand before each position."""

    def readings(c: Cell) -> dict[Key, list]:
        return {(r.prompt_id, r.sample): x[digits] for r, x in own_digits(c) if x[digits]}

    def arrays(c: Cell) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """(logp (n, 5, 10), judge's scores (n, 5), prompts)."""
        read = readings(c)
        at = [i for i, k in enumerate(c.keys) if k in read]
        logp = np.array([read[c.keys[i]] for i in at]).reshape(-1, 5, 10)
        return logp, c.j[at], [c.prompts[i] for i in at]

    def mean(b: str, m: str, of: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> str:
        def values(c: Cell) -> Values:
            logp, j, prompts = arrays(c)
            return of(logp, j).mean(1), prompts

        return show(t.mean(b, m, values))

    def low_quality(b: str, m: str, of: Callable) -> str:
        """Of the responses whose digits were read."""
        stated = {}  # of a cell: (N, 2) stated probability, and whether it was so; NaN: not read
        for c in (e[b, m] for e in t.evaluations):
            logp, j, _ = arrays(c)
            read = readings(c)
            known = np.array([k in read for k in c.keys], bool)
            stated[id(c)] = np.full((len(known), 2), np.nan)
            stated[id(c)][known] = np.stack(
                [controls.probability_below(logp, LOW), qualities(j) < LOW], 1
            )

        def value(c: Cell, index: np.ndarray, _: Sequence) -> float | None:
            found = stated[id(c)][index]
            found = found[~np.isnan(found[:, 0])]
            return of(found[:, 0], found[:, 1] > 0) if len(found) else None

        return show(t.statistic(b, m, value))

    def expected(logp: np.ndarray, j: np.ndarray) -> np.ndarray:
        return np.abs(controls.expected_scores(logp) - j)

    return Table(
        f"Ten-digit distributions, after the {'model' if digits == 'own' else 'judge'}'s digits",
        "Negative log-likelihood of the judge's digit (nats) and ranked probability score, both "
        f"per position, lower is better; whether a quality below {LOW} is foretold: area under the "
        "ROC curve and expected calibration error; mean absolute error of the expected score."
        + " A position knows the judge's scores before it, which tell of its own."
        * (digits == "judge"),
        ["benchmark", "model", "NLL", "RPS", "AUROC", "ECE", "MAE of the expected score"],
        [
            [b, m, mean(b, m, controls.negative_log_likelihood),
             mean(b, m, controls.ranked_probability_score), low_quality(b, m, controls.auroc),
             low_quality(b, m, controls.expected_calibration_error), mean(b, m, expected)]
            for b, m in t.each() if own_digits(t.first[b, m])
        ],
    )  # fmt: skip


def errors(t: Tables) -> Table:
    """Where the error comes from, by attribute."""

    def row(b: str, m: str, a: int) -> list[str]:
        cells = [c for c in (e[b, m] for e in t.evaluations) if c.valid]
        split = [controls.error_split(c.s, c.j)[a] for c in cells]
        parts = [show(inference.over_seeds([getattr(x, part) for x in split]))
                 for part in ("bias", "spread", "rest")]  # fmt: skip
        kappa = t.statistic(
            b, m, lambda c, i, _: controls.kappa(c.s[i, a : a + 1], c.j[i, a : a + 1])[0]
        )
        return [b, m, ATTRIBUTES[a], *parts, show(kappa)]

    return Table(
        "Parts of the squared error, and quadratic kappa",
        "Bias: squared difference of the means. Spread: squared difference of the standard "
        "deviations. Rest: scores in the wrong order. The three add up to the mean squared error.",
        ["benchmark", "model", "attribute", "bias", "spread", "rest", "kappa"],
        [row(b, m, a) for b, m in t.each() if t.first[b, m].valid for a in range(5)],
    )


def sensitivity(t: Tables) -> Table:
    """What another answer, or half of one, does to the scores."""
    at = ATTRIBUTES.index("correctness")

    def change(b: str, m: str, kind: str) -> str:
        def values(c: Cell) -> Values:
            lines = [x for x in c.sensitivity if x["as_it_is"] and x[kind]]
            return [x[kind][at] - x["as_it_is"][at] for x in lines], [x["prompt_id"] for x in lines]

        return show(t.mean(b, m, values))

    def copied(b: str, m: str) -> str:
        found = []
        for c in (e[b, m] for e in t.evaluations):
            shown = FEW_SHOT[c.config["few_shot"]][: EXAMPLES[c.config["template"]]]
            found.append(controls.copied(c.s.tolist(), [x.scores for x in shown]))
        return show(inference.over_seeds([x for x in found if x is not None]))

    return Table(
        "Does the score depend on the answer?",
        "Change of the model's correctness score when its answer is exchanged for another "
        "prompt's, and when its second half is cut off; both should be negative. Copied: share of "
        "score vectors that stand in a few-shot example.",
        ["benchmark", "model", "another prompt's answer", "half of the answer", "copied"],
        [
            [b, m, change(b, m, "another"), change(b, m, "cut"), copied(b, m)]
            for b, m in t.each()
            if t.first[b, m].sensitivity
        ],
    )


# --------------------------------------------------------------------------------------------------
# What the scores are good for


def uses(t: Tables) -> Table:
    """Sec. 5 names these; each against chance and against knowing the judge."""

    def one(b: str, m: str, of: Callable[..., controls.Use | None]) -> list[str]:
        def value(c: Cell, index: np.ndarray, units: Sequence, part: str) -> float | None:
            found = of(c, index, units)
            return found and getattr(found, part)

        return [show(t.statistic(b, m, partial(value, part=part))) for part in controls.Use._fields]

    def best(b: str, m: str) -> list[str]:
        def values(c: Cell, part: str) -> Values:
            found = controls.best_of_n(qualities(c.s), qualities(c.j), c.prompts)
            return [getattr(x, part) for x in found], list(map(str, range(len(found))))

        return [show(t.mean(b, m, partial(values, part=part))) for part in controls.Use._fields]

    def selective(c: Cell, index: np.ndarray, units: Sequence) -> controls.Use:
        return controls.selective_answering(qualities(c.s)[index], qualities(c.j)[index])

    def escalated(c: Cell, index: np.ndarray, units: Sequence) -> controls.Use | None:
        """On the answers that the stronger model answered well-formed too."""
        [e] = [e for e in t.evaluations if e[c.benchmark, c.model] is c]
        strong = e[c.benchmark, t.stronger]
        theirs = dict(zip(strong.keys, qualities(strong.j), strict=True))
        at = [i for i in index if c.keys[i] in theirs]
        if not at:
            return None
        stronger = [theirs[c.keys[i]] for i in at]
        return controls.escalation(qualities(c.s)[at], qualities(c.j)[at], stronger, SHARE)

    rows = []
    for b, m in t.each():
        if not t.first[b, m].valid:
            continue
        n = t.first[b, m].config["samples"]
        if n > 1:
            rows.append([b, m, f"best of {n}: quality", *best(b, m)])
        rows.append([b, m, "selective answering: area under risk-coverage", *one(b, m, selective)])
        if t.stronger and m != t.stronger:
            use = f"{SHARE:.0%} escalated to {t.stronger}: quality"
            rows.append([b, m, use, *one(b, m, escalated)])
    return Table(
        "Uses",
        "Best of n: the judge's quality of the answer that the model rates best, higher is better. "
        "Selective answering: mean of 1 - quality over coverage, the best rated answered first; "
        "lower is better. Escalation: mean quality when the lowest rated answers are exchanged for "
        "a stronger model's.",
        ["benchmark", "model", "use", "by self-evaluation", "random", "oracle"],
        rows,
    )
