"""Further tables, none of them in the paper: what the scores know that was not trained, where their
error comes from, what moves them, what they are good for (Sec. 5), and the same models under other
settings. What each control is stands in controls.py."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from evaluation import controls
from evaluation.controls import qualities
from evaluation.results import Cell, Evaluation, Key
from evaluation.tables import MAIN, Statistic, Table, Tables, Values, own_digits, show
from prompts import ATTRIBUTES, EXAMPLES, FEW_SHOT

SHARE = 0.25  # of the answers, in escalation
LOW = 0.5  # AUROC and calibration error: does the model foretell a quality below this?


def all_tables(t: Tables, others: Sequence[Tables] = ()) -> list[Table]:
    """Those for which there are results. `others`: evaluations under other settings."""
    found = [
        untrained(t, "own"), untrained(t, "judge"), errors(t), sensitivity(t), uses(t),
        beside(t, others),
    ]  # fmt: skip
    return [table for table in found if table.rows]


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
        def stated(e: Evaluation) -> tuple[Statistic, Sequence]:
            logp, j, prompts = arrays(e[b, m])
            p, truth = controls.probability_below(logp, LOW), qualities(j) < LOW
            return lambda index, _: of(p[index], truth[index]), prompts

        return show(t.statistic(b, m, stated))

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
        def figure(of: Callable[[np.ndarray, np.ndarray], float | None]) -> str:
            def prepared(e: Evaluation) -> tuple[Statistic, Sequence]:
                s, j = (x[:, a : a + 1] for x in (e[b, m].s, e[b, m].j))
                return lambda i, _: of(s[i], j[i]), e[b, m].prompts

            return show(t.statistic(b, m, prepared))

        parts = [figure(lambda s, j, k=k: controls.error_split(s, j)[0][k]) for k in range(3)]
        return [b, m, ATTRIBUTES[a], *parts, figure(lambda s, j: controls.kappa(s, j)[0])]

    return Table(
        "Parts of the squared error, and quadratic kappa",
        "Bias: squared difference of the means. Spread: squared difference of the standard "
        "deviations. Rest: scores in the wrong order. The three add up to the mean squared error.",
        ["benchmark", "model", "attribute", "bias", "spread", "rest", "kappa"],
        [row(b, m, a) for b, m in t.each() if t.first[b, m].valid for a in range(5)],
    )


def copied(c: Cell) -> Values:
    """Which score vectors stand in a few-shot example."""
    shown = FEW_SHOT[c.config["few_shot"]][: EXAMPLES[c.config["template"]]]
    return controls.copied(c.s.tolist(), [x.scores for x in shown]), c.prompts


def sensitivity(t: Tables) -> Table:
    """What another answer, or half of one, does to the scores."""
    at = ATTRIBUTES.index("correctness")

    def change(b: str, m: str, kind: str) -> str:
        def values(c: Cell) -> Values:
            lines = [x for x in c.sensitivity if x["as_it_is"] and x[kind]]
            return [x[kind][at] - x["as_it_is"][at] for x in lines], [x["prompt_id"] for x in lines]

        return show(t.mean(b, m, values))

    return Table(
        "Does the score depend on the answer?",
        "Change of the model's correctness score when its answer is exchanged for another "
        "prompt's, and when its second half is cut off; both should be negative. Copied: share of "
        "score vectors that stand in a few-shot example.",
        ["benchmark", "model", "another prompt's answer", "half of the answer", "copied"],
        [
            [b, m, change(b, m, "another"), change(b, m, "cut"), show(t.mean(b, m, copied))]
            for b, m in t.each()
            if t.first[b, m].sensitivity
        ],
    )


# --------------------------------------------------------------------------------------------------
# What the scores are good for


def uses(t: Tables) -> Table:
    """Sec. 5 names these; each against chance and against knowing the judge."""

    def one(b: str, m: str, of: Callable[[Evaluation, Cell], tuple]) -> list[str]:
        """`of`: a use of a choice of responses, and the prompts of all."""

        def prepared(e: Evaluation, part: str) -> tuple[Statistic, Sequence]:
            use, prompts = of(e, e[b, m])
            return lambda index, _: getattr(use(index), part), prompts

        parts = controls.Use._fields
        return [show(t.statistic(b, m, partial(prepared, part=part))) for part in parts]

    def best(b: str, m: str) -> list[str]:
        def values(c: Cell, part: str) -> Values:
            found = controls.best_of_n(qualities(c.s), qualities(c.j), c.prompts)
            return [getattr(x, part) for x in found], list(map(str, range(len(found))))

        return [show(t.mean(b, m, partial(values, part=part))) for part in controls.Use._fields]

    def selective(e: Evaluation, c: Cell) -> tuple:
        own, judge = qualities(c.s), qualities(c.j)
        return lambda i: controls.selective_answering(own[i], judge[i]), c.prompts

    def escalated(e: Evaluation, c: Cell) -> tuple:
        """On the answers to prompts that the stronger model answered too."""
        theirs = e.stronger[c.benchmark]
        at = [i for i, p in enumerate(c.prompts) if p in theirs]
        own, judge = qualities(c.s)[at], qualities(c.j)[at]
        stronger = qualities(np.array([theirs[c.prompts[i]] for i in at]).reshape(-1, 5))
        prompts = [c.prompts[i] for i in at]
        return lambda i: controls.escalation(own[i], judge[i], stronger[i], SHARE), prompts

    rows = []
    for b, m in t.each():
        if not t.first[b, m].valid:
            continue
        n = t.first[b, m].config["samples"]
        if n > 1:
            rows.append([b, m, f"best of {n}: quality", *best(b, m)])
        rows.append([b, m, "selective answering: area under risk-coverage", *one(b, m, selective)])
        if all(e.stronger.get(b) for e in t.evaluations):
            use = f"{SHARE:.0%} escalated to the stronger model: quality"
            rows.append([b, m, use, *one(b, m, escalated)])
    return Table(
        "Uses",
        "Best of n: the judge's quality of the answer that the model rates best, higher is better. "
        "Selective answering: mean of 1 - quality over coverage, the best rated answered first; "
        "lower is better. Escalation: mean quality when the lowest rated answers are exchanged for "
        "a stronger model's, from a file.",
        ["benchmark", "model", "use", "by self-evaluation", "random", "oracle"],
        rows,
    )


# --------------------------------------------------------------------------------------------------
# Other settings


def beside(t: Tables, others: Sequence[Tables]) -> Table:
    """The same models decoded greedily, under other few-shot examples, ...: one column each."""
    differ = [k for k, v in t.settings.items() if any(o.settings[k] != v for o in others)]
    columns = [", ".join(f"{k} {x.settings[k]}" for k in differ) for x in (t, *others)]
    rows = []
    for b, m in t.each() if others else ():
        for name, of in (MAIN | {"copied": copied}).items():
            found = [show(x.mean(b, m, of)) if (b, m) in x.first.cells else "-"
                     for x in (t, *others)]  # fmt: skip
            rows.append([b, m, name, *found])
    return Table(
        "The same models under other settings",
        "Each column is an evaluation of its own. Copied: share of score vectors that stand in a "
        "few-shot example.",
        ["benchmark", "model", "", *columns],
        rows,
    )
