"""More tables that are not in the paper: what the scores know that was not trained, where their
error comes from, what changes them, what they are good for (Sec. 5), and the same models under
other settings. controls.py explains each figure."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from evaluation import controls
from evaluation.controls import Use, qualities
from evaluation.metrics import correlation
from evaluation.paper_tables import MAIN
from evaluation.results import Cell
from evaluation.table import Column, Results, Table, Values, mean, measure, rows, statistic
from prompts import ATTRIBUTES, EXAMPLES, FEW_SHOT

SHARE = 0.25  # of the answers goes to the stronger model
LOW = 0.5  # AUROC and ECE: does the model predict a quality below this?


def distributions(results: Results, before: str) -> Table:
    """`before`: whose digits stand before each score position, "own" or "judge"."""

    def per_position(value: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Column:
        """`value`: (n, 5, 10) log-probabilities, (n, 5) judge's scores -> (n, 5)."""

        def values(c: Cell) -> Values:
            indices, logp = c.log_probabilities(before)
            return value(logp, c.j[indices]).mean(1), c.prompts[indices]

        return mean(values)

    def low_quality(value: Callable[[np.ndarray, np.ndarray], float | None]) -> Column:
        """`value`: (n,) stated probability of a low quality, (n,) whether it is low -> figure."""

        def prepare(c: Cell) -> tuple[Callable, Sequence]:
            indices, logp = c.log_probabilities(before)
            p, low = controls.probability_below(logp, LOW), c.quality[indices] < LOW
            return lambda i: value(p[i], low[i]), c.prompts[indices]

        return statistic(prepare)

    note = (
        "Negative log-likelihood of the judge's digit (nats) and ranked probability score, both "
        f"per position, lower is better; whether a quality below {LOW} is predicted: area under "
        "the ROC curve and expected calibration error; mean absolute error of the expected score."
    )
    if before == "judge":
        note += " A position knows the judge's scores before it, which are related to its own."
    columns = {
        "NLL": per_position(controls.negative_log_likelihood),
        "RPS": per_position(controls.ranked_probability_score),
        "AUROC": low_quality(controls.auroc),
        "ECE": low_quality(controls.expected_calibration_error),
        "MAE of the expected score": per_position(
            lambda logp, j: np.abs(controls.expected_scores(logp) - j)
        ),
    }
    return Table.of(
        f"Ten-digit distributions, after the {'model' if before == 'own' else 'judge'}'s digits",
        note,
        rows(results, columns, lambda c: c.log_probabilities("own")[0]),
        higher=("AUROC",),
        lower=[header for header in columns if header != "AUROC"],
    )


def errors(results: Results) -> Table:
    """By attribute."""

    def columns(a: int) -> dict[str, Column]:
        def of_scores(value: Callable[[np.ndarray, np.ndarray], float | None]) -> Column:
            """`value`: (n, 1) the model's scores of this attribute, (n, 1) the judge's -> figure"""

            def prepare(c: Cell) -> tuple[Callable, Sequence]:
                s, j = c.s[:, [a]], c.j[:, [a]]
                return lambda i: value(s[i], j[i]), c.prompts

            return statistic(prepare)

        return {
            "self - judge": mean(lambda c: (c.s[:, a] - c.j[:, a], c.prompts)),
            "bias": of_scores(lambda s, j: controls.error_split(s, j)[0].bias),
            "spread": of_scores(lambda s, j: controls.error_split(s, j)[0].spread),
            "rest": of_scores(lambda s, j: controls.error_split(s, j)[0].rest),
            "kappa": of_scores(lambda s, j: controls.kappa(s, j)[0]),
            "correlation": of_scores(lambda s, j: correlation(s[:, 0], j[:, 0])),
        }

    return Table.of(
        "Parts of the squared error, and quadratic kappa",
        "Self - judge: mean of the model's score minus the judge's. Bias: its square. Spread: "
        "squared difference of the standard deviations. Rest: scores in the wrong order. Bias, "
        "spread and rest add up to the mean squared error. Correlation: Pearson's.",
        [
            {"benchmark": b, "model": m, "attribute": attribute} | measure(columns(a), cells)
            for b, m, cells in results.each()
            if cells[0].valid
            for a, attribute in enumerate(ATTRIBUTES)
        ],
        higher=("kappa", "correlation"),
        lower=("bias", "spread", "rest"),
    )


def copied(c: Cell) -> Values:
    """Which score vectors stand in a few-shot example."""
    examples = FEW_SHOT[c.config["few_shot"]][: EXAMPLES[c.config["template"]]]
    return controls.copied(c.s.tolist(), [x.scores for x in examples]), c.prompts


def sensitivity(results: Results) -> Table:
    """What another answer, or half of one, does to the scores."""
    correctness = ATTRIBUTES.index("correctness")

    def change(kind: str) -> Column:
        def values(c: Cell) -> Values:
            lines = [x for x in c.sensitivity if x["as_it_is"] and x[kind]]
            changes = [x[kind][correctness] - x["as_it_is"][correctness] for x in lines]
            return changes, [x["prompt_id"] for x in lines]

        return mean(values)

    columns = {
        "another prompt's answer": change("another"),
        "half of the answer": change("cut"),
        "copied": mean(copied),
    }
    return Table.of(
        "Does the score depend on the answer?",
        "Change of the model's correctness score when its answer is exchanged for another "
        "prompt's, and when its second half is cut off; both should be negative. Copied: share of "
        "score vectors that stand in a few-shot example.",
        rows(results, columns, lambda c: c.sensitivity),
        lower=("another prompt's answer", "half of the answer"),
    )


def best_of_n(field: str) -> Column:
    """`field`: of controls.Use, here and below."""

    def values(c: Cell) -> Values:
        uses = controls.best_of_n(c.own_quality, c.quality, c.prompts)
        return [getattr(use, field) for use in uses], range(len(uses))

    return mean(values)


def selective(field: str) -> Column:
    def use(c: Cell, i: np.ndarray) -> Use:
        return controls.selective_answering(c.own_quality[i], c.quality[i])

    return statistic(lambda c: (lambda i: getattr(use(c, i), field), c.prompts))


def escalated(field: str) -> Column:
    """On the answers to prompts that the stronger model answered too."""

    def prepare(c: Cell) -> tuple[Callable, Sequence]:
        both = np.array([prompt in c.stronger for prompt in c.prompts], bool)
        prompts, own, judge = c.prompts[both], c.own_quality[both], c.quality[both]
        stronger = qualities(np.array([c.stronger[p] for p in prompts]).reshape(-1, 5))

        def figure(i: np.ndarray) -> float:
            return getattr(controls.escalation(own[i], judge[i], stronger[i], SHARE), field)

        return figure, prompts

    return statistic(prepare)


def uses(results: Results) -> Table:
    """Sec. 5 names these. Each is shown beside chance and beside knowing the judge."""
    n = results.settings["samples"]
    uses = {
        f"best of {n}: quality": (best_of_n, lambda c: n > 1),
        "selective answering: area under risk-coverage": (selective, lambda c: True),
        f"{SHARE:.0%} escalated to the stronger model: quality": (escalated, lambda c: c.stronger),
    }
    headers = {"by self-evaluation": "by_self", "random": "random", "oracle": "oracle"}
    lacking = [
        f"{b} {counts['missing']:,} ({counts['empty']:,} answers are empty)"
        for b in results.benchmarks
        if (counts := results.cells(b, results.base)[0].summary.get("stronger"))
    ]
    return Table.of(
        "Uses",
        "Best of n: the judge's quality of the answer that the model rates best, higher is better. "
        "Selective answering: mean of 1 - quality over coverage, the best rated answered first; "
        "lower is better. Escalation: mean quality when the lowest rated answers are exchanged for "
        "a stronger model's, from a file"
        + (f"; prompts without one are left out: {', '.join(lacking)}." if lacking else "."),
        [
            {"benchmark": b, "model": m, "use": use}
            | measure({header: column(field) for header, field in headers.items()}, cells)
            for b, m, cells in results.each()
            if cells[0].valid
            for use, (column, possible) in uses.items()
            if all(map(possible, cells))
        ],
    )


def other_settings(results: Results, others: Sequence[Results]) -> Table:
    """The same models decoded greedily, under other few-shot examples, ...: one column each."""
    differ = [k for k, v in results.settings.items() if any(x.settings[k] != v for x in others)]
    columns = {}
    for group in (results, *others):
        header = ", ".join(f"{name} {group.settings[name]}" for name in differ)
        if not header or header in columns:  # the same settings again
            header = f"{header} {group.evaluations[0].folder}".strip()
        columns[header] = group
    metrics = MAIN | {"copied": mean(copied)}
    return Table.of(
        "The same models under other settings",
        "Each column is an evaluation of its own. Copied: share of score vectors that stand in a "
        "few-shot example.",
        [
            {"benchmark": b, "model": m, "metric": name}
            | {
                header: column(group.cells(b, m)) if (b, m) in group else None
                for header, group in columns.items()
            }
            for b, m, _ in results.each()
            if others
            for name, column in metrics.items()
        ],
    )


TABLES = (
    partial(distributions, before="own"), partial(distributions, before="judge"), errors,
    sensitivity, uses,
)  # fmt: skip
