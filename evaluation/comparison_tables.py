"""What is compared: the primary endpoint, all other comparisons, and whether quality is kept. None
of these tables is in the paper. A comparison is the difference of two means of the other tables,
paired by prompt, on the prompts that both have, and weighed as there."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from evaluation import intervals
from evaluation.control_tables import (
    last_constant,
    pairs_right,
    prompt_only,
    surface,
    window_constant,
)
from evaluation.intervals import Estimate, Spread
from evaluation.paper_tables import calibration, preferences, quality, top_5_hits, window_ranking
from evaluation.results import Cell
from evaluation.table import (
    Figure,
    Results,
    Table,
    Values,
    estimates,
    same_prompts,
)

Side = Callable[[Cell], Values]
Comparison = Callable[[Cell], Estimate | None]
RIVALS = {
    "the best constant of the first cycle": window_constant,
    "the best constant of the last cycle": last_constant,
    "a prediction from the prompt alone": prompt_only,
}
PRIMARY, COMPARISONS = "Primary endpoint", "Comparisons"
TOGETHER = "all three"
MARGIN = 0.02  # of quality, where evaluate.py was not told another


def paired(ours: Side, theirs: Side) -> Comparison:
    return lambda c: intervals.difference(ours(c), theirs(c))


def minus_half(figure: Comparison) -> Comparison:
    def centred(c: Cell) -> Estimate | None:
        found = figure(c)
        return found and found._replace(value=found.value - 0.5)

    return centred


class Found(NamedTuple):
    """A comparison over evaluations."""

    figure: Figure
    spread: Spread | None  # None where it is not there for all evaluations
    by_prompt: float | None  # standard deviation of the differences

    @property
    def p(self) -> float | None:
        return self.spread and self.spread.p()


def found(cells: list[Cell], comparison: Comparison) -> Found:
    parts = estimates(comparison, cells)
    if isinstance(parts, str) or not parts:
        return Found(parts or None, None, None)
    same = same_prompts(cells)
    spread = intervals.spread(parts, same)
    return Found(intervals.interval(parts, same), spread, intervals.paired_spread(parts))


# --------------------------------------------------------------------------------------------------
# The primary endpoint


def primary_p(results: Results, benchmark: str, model: str) -> float | None:
    """The largest p-value against the three rivals, all of which must be beaten; None where one of
    them is missing. A rival that is better than the model counts as p = 1."""
    worst = 0.0
    for rival in RIVALS.values():
        apart = found(results.cells(benchmark, model), paired(calibration, rival))
        if apart.p is None:
            return None
        worst = max(worst, apart.p if apart.spread.mean > 0 else 1.0)
    return worst


def primary_endpoint(results: Results) -> Table:
    (benchmark, model), declared = results.primary()
    looks = {(benchmark, model): "primary endpoint" if declared else "not declared: a second look"}
    for later in results.second_looks():
        looks.setdefault(later, "a second look")
    rows = []
    for (b, m), what in looks.items():
        cells = results.cells(b, m)
        if not any(c.window for c in cells):
            continue
        first = {"benchmark": b, "model": m}
        for name, rival in RIVALS.items():
            apart = found(cells, paired(calibration, rival))
            rows.append(first | {"calibration minus that of": name, "difference": apart.figure,
                                 "p": apart.p, "this is": what})  # fmt: skip
        rows.append(first | {"calibration minus that of": TOGETHER, "difference": None,
                             "p": primary_p(results, b, m), "this is": what})  # fmt: skip
    return Table.of(
        PRIMARY,
        "Calibration minus that of three predictors that know less, all of which must be beaten: "
        "the p-value is the largest of the three, and 1 where a predictor is ahead. Benchmark and "
        "model were declared when evaluate.py was first run (--primary; by default the first "
        "benchmark and the last model); any other choice is a second look. The constants are the "
        "best on the training run's first and last cycle; the prompt alone is ridge regression on "
        f"{results.base}'s last hidden state of the prompt, fitted on the last cycle.",
        rows,
    )


# --------------------------------------------------------------------------------------------------
# All other comparisons


def compared(results: Results, model: str) -> dict[str, Comparison]:
    """What is compared of a model: ours - theirs."""
    pairs = {f"calibration - {name}": paired(calibration, side) for name, side in RIVALS.items()}
    pairs |= {
        "calibration - a fit on length and form": paired(calibration, surface),
        "top-5 - the window's ranking": paired(top_5_hits, window_ranking),
        "share of a prompt's pairs ordered right - half": minus_half(
            lambda c: intervals.ratio(*pairs_right(c))
        ),
    }
    other = results.reference
    if model == other:
        return pairs
    pairs |= {
        f"calibration - {other}'s": paired(calibration, lambda c: calibration(c.of(other))),
        f"quality - {other}'s": paired(quality, lambda c: quality(c.of(other))),
        f"on {other}'s answers: calibration of its scores - {other}'s": paired(
            lambda c: calibration(c.of(other).rescored(model)),
            lambda c: calibration(c.of(other).rescored(other)),
        ),
    }
    if other == results.base:
        pairs["response win-rate - half"] = minus_half(
            lambda c: intervals.mean(*preferences(c, lambda x: (x["result"] + 1) / 2))
        )
    return pairs


def family(results: Results) -> Iterator[tuple[str, str, str, Found]]:
    """(benchmark, model, name, what was found) of all comparisons that there are results for,
    without those of the primary endpoint."""
    primary, _ = results.primary()
    for b in results.benchmarks:
        for m in results.compared():
            cells = results.cells(b, m)
            for name, comparison in compared(results, m).items():
                if (b, m) == primary and name.removeprefix("calibration - ") in RIVALS:
                    continue
                apart = found(cells, comparison)
                if apart.figure is not None:
                    yield b, m, name, apart


def comparisons(results: Results) -> Table:
    """Corrected together."""
    rows = list(family(results))
    corrected = intervals.after_primary(
        primary_p(results, *results.primary()[0]), {k: row[3].p for k, row in enumerate(rows)}
    )
    return Table.of(
        COMPARISONS,
        "Paired by prompt, on the prompts that both have; as in the other tables each response "
        f"counts the same. {results.reference} is the reference (--against). The p-value is "
        "two-sided, from the same standard error and degrees of freedom as the interval. Corrected "
        "by Holm over all rows, and never below the primary endpoint's p-value where it has one: "
        "primary endpoint and rows together err in 5 % at most. Earlier checkpoints of a run are "
        "compared if --models names them.",
        [
            {"benchmark": b, "model": m, "difference": name, "mean": apart.figure,
             "p": apart.p, "corrected p": corrected[k]}
            for k, (b, m, name, apart) in enumerate(rows)
        ],
    )  # fmt: skip


def significant(row: Mapping) -> bool:
    """Whether a row of `comparisons` has a corrected p-value below 0.05."""
    p = row["corrected p"]
    return p is not None and p < 0.05


def differ_from_base(comparisons: Table, base: str) -> set[tuple[str, str, str]]:
    """(benchmark, model, "quality" or "calibration") of the figures that differ from the base's."""
    return {
        (row["benchmark"], row["model"], header)
        for row in comparisons.frame.to_dict("records")
        for header in ("quality", "calibration")
        if row["difference"] == f"{header} - {base}'s" and significant(row)
    }


def quality_kept(results: Results) -> Table:
    """Sec. 4.3: "SEE never trades quality for calibration"."""
    other, margin = results.reference, results.declared("margin", MARGIN)
    rows = []
    for b in results.benchmarks:
        for m in results.compared():
            cells = results.cells(b, m)
            apart = found(cells, paired(quality, lambda c: quality(c.of(other))))
            if m == other or apart.spread is None:
                continue
            sd, low = apart.by_prompt, apart.figure.low
            needed = sd and intervals.prompts_needed(sd, margin)
            rows.append({
                "benchmark": b, "model": m, f"quality - {other}'s": apart.figure,
                "not worse": None if low is None else "yes" if low > -margin else "not shown",
                "p": apart.spread.p_above(-margin), "sd by prompt": sd,
                f"prompts for {margin:g}": needed,
            })  # fmt: skip
    return Table.of(
        "Is quality kept?",
        f"Not worse: the interval's lower end is above -{margin:g}, a margin that was named before "
        "(evaluate.py --margin); p: one-sided, against a loss of the margin or more. Prompts: how "
        f"many would find a difference of {margin:g} in four of five evaluations, at the spread "
        "seen here.",
        rows,
    )


TABLES = (primary_endpoint, comparisons, quality_kept)
