"""More tables that are not in the paper: what changes the scores, what they are good for (Sec. 5),
and the same models under other settings. controls.py explains each figure."""

from collections.abc import Callable, Sequence

import numpy as np

from evaluation import controls, intervals
from evaluation.intervals import Estimate
from evaluation.paper_tables import MAIN
from evaluation.predictors import qualities
from evaluation.results import Cell
from evaluation.table import Column, Results, Table, Values, mean, measure, rows, share, statistic
from prompts import ATTRIBUTES, EXAMPLES, FEW_SHOT

SHARE = 0.25  # of the answers goes to the stronger model
SENT = (0.25, 0.5, 0.75)  # of the answers is sent without the judge


def copied(c: Cell) -> Values:
    """Which score vectors stand in a few-shot example."""
    examples = FEW_SHOT[c.config["few_shot"]][: EXAMPLES[c.config["template"]]]
    return controls.copied(c.s.tolist(), [x.scores for x in examples]), c.prompts


def change(c: Cell, kind: str) -> Values:
    """Of the correctness score, when the answer is exchanged ("another") or cut off ("cut")."""
    lines = [x for x in c.sensitivity if x["as_it_is"] and x[kind]]
    k = ATTRIBUTES.index("correctness")
    return [x[kind][k] - x["as_it_is"][k] for x in lines], [x["prompt_id"] for x in lines]


def sensitivity(results: Results) -> Table:
    """What another answer, or half of one, does to the scores."""
    columns = {
        "another prompt's answer": mean(lambda c: change(c, "another")),
        "half of the answer": mean(lambda c: change(c, "cut")),
        "copied": share(copied),
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
        return [getattr(use, field) for use in uses], list(dict.fromkeys(c.prompts))

    return mean(values)


def selective(field: str) -> Column:
    def prepare(c: Cell) -> Estimate | None:
        loss = 1 - c.quality
        if field == "random":
            return intervals.mean(loss, c.prompts)
        confidence = c.own_quality if field == "by_self" else c.quality
        return intervals.of_weights(controls.risk_coverage(confidence, loss), c.prompts)

    return statistic(prepare)


def escalated(field: str) -> Column:
    """On the answers to prompts that the stronger model answered too."""

    def prepare(c: Cell) -> Estimate | None:
        both = np.array([prompt in c.stronger for prompt in c.prompts], bool)
        prompts, own, judge = c.prompts[both], c.own_quality[both], c.quality[both]
        gain = qualities(np.array([c.stronger[p] for p in prompts]).reshape(-1, 5)) - judge
        without = intervals.mean(judge, prompts)
        if field == "random":
            gained = intervals.mean(gain * SHARE, prompts)
        else:
            rating = own if field == "by_self" else -gain
            gained = intervals.of_weights(controls.escalation(rating, gain, SHARE), prompts)
        return without and Estimate(
            without.value + gained.value, without.pulls + gained.pulls, without.prompts
        )

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


def sent_by(
    rating: Callable[[Cell], Sequence[float]], share: float
) -> Callable[[Cell], Estimate | None]:
    """Mean quality of this share of the answers, those of the highest rating; random ones among
    equals."""

    def prepare(c: Cell) -> Estimate | None:
        # "Escalation" of the best rated, at the gain of their own quality.
        total = controls.escalation(-np.asarray(rating(c), float), c.quality, share)
        found = intervals.of_weights(total, c.prompts)
        return found and Estimate(found.value / share, found.pulls / share, found.prompts)

    return prepare


ORDERS = {
    "self-evaluation": lambda c: c.own_quality,
    "random": None,
    "best constant": lambda c: np.zeros(len(c.valid)),  # rates all answers alike
    "longest first": lambda c: [len(r.answer) for r in c.valid],
    "shortest first": lambda c: [-len(r.answer) for r in c.valid],
    "oracle": lambda c: c.quality,
}


def sent(results: Results) -> Table:
    """What an order of the answers is worth where the judge, or another reviewer, can see some of
    them only."""

    def column(name: str, share: float) -> Callable[[Cell], Estimate | None]:
        rating = ORDERS[name]
        if rating is None:
            return lambda c: intervals.mean(c.quality, c.prompts)
        return sent_by(rating, share)

    def gain(share: float) -> Column:
        own, random = column("self-evaluation", share), column("random", share)
        return statistic(lambda c: own(c) - random(c) if c.valid else None)

    return Table.of(
        "Sent at equal judge budget",
        "Mean quality of the answers that are sent without the judge, when a share of them is sent "
        "and the judge's budget goes to the others. Which are sent is decided by the model's own "
        "scores, by chance, by the best constant (which rates all alike, so chance decides), by "
        "the number of characters, or by knowing the judge (oracle). Gain: self-evaluation minus "
        "random.",
        [
            {"benchmark": b, "model": m, "sent": f"{share:.0%}"}
            | measure({name: statistic(column(name, share)) for name in ORDERS}, cells)
            | {"gain": gain(share)(cells)}
            for b, m, cells in results.each()
            if cells[0].valid
            for share in SENT
        ],
        higher=tuple(ORDERS),
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
    metrics = MAIN | {"copied": share(copied)}
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


TABLES = (sensitivity, uses, sent)
