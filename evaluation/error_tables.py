"""More tables that are not in the paper: what the ten digits know that was not trained, where the
error of the scores comes from, whether judges agree, and figures by category of prompts.
controls.py explains each figure."""

from collections.abc import Callable
from functools import partial

import numpy as np

from evaluation import controls, intervals
from evaluation.controls import DIGITS
from evaluation.intervals import Estimate, Interval, Scale
from evaluation.paper_tables import MAIN
from evaluation.results import Cell, key_of
from evaluation.table import Column, Figure, Results, Table, Values, mean, measure, rows, statistic
from prompts import ATTRIBUTES
from storage.run_folder import file_name

FEWEST_FOR_ERROR = 60  # prompts for an interval of the calibration error
LOW = 0.5  # AUROC and calibration error: does the model predict a quality below this?


def distributions(results: Results, before: str) -> Table:
    """`before`: whose digits stand before each score position, "own" or "judge"."""

    def per_position(value: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Column:
        """`value`: (n, 5, 10) log-probabilities, (n, 5) judge's scores -> (n, 5)."""

        def values(c: Cell) -> Values:
            indices, logp = c.log_probabilities(before)
            return value(logp, c.j[indices]).mean(1), c.prompts[indices]

        return mean(values)

    def low_quality(c: Cell) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n,) stated probability of a low quality, whether it is low, prompts."""
        indices, logp = c.log_probabilities(before)
        low = c.quality[indices] < LOW
        return controls.probability_below(logp, LOW), low, c.prompts[indices]

    def auroc(c: Cell) -> Estimate | None:
        stated, low, prompts = low_quality(c)
        area = controls.auroc(stated, low)
        found = intervals.of_weights(lambda w: intervals.LOGIT.to(area(w)), prompts)
        few = min(low.sum(), (~low).sum()) < intervals.FEWEST  # then no interval
        return found and found._replace(pulls=found.pulls * (np.nan if few else 1))

    def too_high(c: Cell) -> Values:
        stated, low, prompts = low_quality(c)
        return stated - low, prompts

    def calibration_error(c: Cell) -> Estimate | None:
        stated, low, prompts = low_quality(c)
        bins = controls.calibration_bins(stated, low)
        found = intervals.of_sums(controls.calibration_error, bins, prompts, debias=True)
        few = found and len(found.prompts) < FEWEST_FOR_ERROR  # then no interval
        return found and found._replace(pulls=found.pulls * (np.nan if few else 1))

    def of_one_evaluation(column: Column) -> Column:
        """No interval for several evaluations: bench/coverage.py has not tried it."""

        def figure(cells: list[Cell]) -> Figure:
            found = column(cells)
            several = len(cells) > 1 and isinstance(found, Interval)
            return found._replace(low=None, high=None) if several else found

        return figure

    note = (
        "Negative log-likelihood of the judge's digit (nats) and ranked probability score, both "
        f"per position, lower is better; whether a quality below {LOW} is predicted: area under "
        "the ROC curve; stated - true, the mean stated probability minus the frequency; "
        "calibration error, the mean squared distance of the two in ten bins of equal size, "
        "without what chance adds (so it can be below 0, and 0 is calibrated); mean absolute error "
        "of the expected score."
    )
    if before == "judge":
        note += " A position knows the judge's scores before it, which are related to its own."
    columns = {
        "NLL": per_position(controls.negative_log_likelihood),
        "RPS": per_position(controls.ranked_probability_score),
        "AUROC": statistic(auroc, intervals.LOGIT),
        "stated - true": mean(too_high),
        "calibration error": of_one_evaluation(statistic(calibration_error)),
        "MAE of the expected score": per_position(
            lambda logp, j: np.abs(controls.expected_scores(logp) - j)
        ),
    }
    return Table.of(
        f"Ten-digit distributions, after the {'model' if before == 'own' else 'judge'}'s digits",
        note,
        rows(results, columns, lambda c: c.log_probabilities("own")[0]),
        higher=("AUROC",),
        lower=("NLL", "RPS", "calibration error", "MAE of the expected score"),
    )


def of_attribute(
    a: int, figure: Callable[[np.ndarray], np.ndarray], scale: Scale = intervals.PLAIN
) -> Column:
    """`figure`: of counts (..., 100), see controls.joint."""

    def prepare(c: Cell) -> Estimate | None:
        columns = controls.joint(c.s[:, a], c.j[:, a])
        return intervals.of_sums(lambda x: scale.to(figure(x)), columns, c.prompts)

    return statistic(prepare, scale)


def given_length(a: int) -> Column:
    def prepare(c: Cell) -> Estimate | None:
        length = [np.log1p(len(r.answer)) for r in c.valid]
        columns = controls.partial_columns(c.s[:, a], c.j[:, a], length)

        def figure(sums: np.ndarray) -> np.ndarray:
            return intervals.FISHER.to(controls.partial_correlation(sums))

        return intervals.of_sums(figure, columns, c.prompts)

    return statistic(prepare, intervals.FISHER)


def errors(results: Results) -> Table:
    """By attribute."""

    def columns(a: int) -> dict[str, Column]:
        return {
            "self - judge": mean(lambda c: (c.s[:, a] - c.j[:, a], c.prompts)),
            "spread, self / judge": of_attribute(a, controls.spread_ratio, intervals.LOG),
            "slope": of_attribute(a, controls.slope),
            "kappa": of_attribute(a, controls.kappa, intervals.FISHER),
            "correlation": of_attribute(a, controls.pearson, intervals.FISHER),
            "Spearman": of_attribute(a, controls.spearman, intervals.FISHER),
            "given length": given_length(a),
        }

    return Table.of(
        "Where the error comes from, by attribute",
        "Self - judge: mean of the model's score minus the judge's. Spread: standard deviation of "
        "the model's scores over that of the judge's. Slope: of the judge's score on the model's "
        "(1: each point means a point; near 0: the score says nothing). Kappa: quadratic. "
        "Correlation: Pearson's. Given length: partial correlation, given the logarithm of the "
        "answer's characters.",
        [
            {"benchmark": b, "model": m, "attribute": attribute} | measure(columns(a), cells)
            for b, m, cells in results.each()
            if cells[0].valid
            for a, attribute in enumerate(ATTRIBUTES)
        ],
        higher=("kappa", "correlation", "Spearman", "given length"),
    )


def judges(results: Results) -> Table:
    """Do the judge and the held-out judges agree?"""

    def alpha(a: int) -> Column:
        def prepare(c: Cell) -> Estimate | None:
            by_judge = [dict(zip(c.keys, c.j, strict=True))] + [
                {key_of(x): x["scores"] for x in lines}
                for judge, lines in sorted(c.judged.items())
                if lines and judge != file_name(results.judge)
            ]
            keys = [key for key in c.keys if all(key in scores for scores in by_judge)]
            if len(by_judge) < 2 or not keys:
                return None
            scores = np.array([[scores[key][a] for scores in by_judge] for key in keys])
            return intervals.of_sums(
                lambda sums: controls.krippendorff_alpha(sums, len(by_judge)),
                controls.alpha_columns(scores), [prompt for prompt, _ in keys],
            )  # fmt: skip

        return statistic(prepare)

    def others(c: Cell) -> list[str]:
        return sorted(j for j, lines in c.judged.items() if lines and j != file_name(results.judge))

    return Table.of(
        "Do the judges agree?",
        "Krippendorff's alpha (interval data) of all judges' scores for the same answers: 1 is "
        "full agreement, 0 that of chance.",
        [
            {"benchmark": b, "model": m, "judges": ", ".join([results.judge, *others(cells[0])])}
            | measure({name: alpha(a) for a, name in enumerate(ATTRIBUTES)}, cells)
            for b, m, cells in results.each()
            if others(cells[0])
        ],
    )


def by_category(results: Results) -> Table:
    """Where the prompt file says of which category a prompt is."""

    found = [
        {"benchmark": b, "category": category, "model": m}
        | measure(MAIN, [c.within_category(category) for c in results.cells(b, m)])
        for b in results.benchmarks
        for category in sorted(set(results.cells(b, results.base)[0].categories.values()))
        for m in results.models
    ]
    return Table.of(
        "By category of prompts",
        "As in Tables 1 and 2, for each category that the prompt file names.",
        found,
    )


def judged_where(c: Cell, a: int, score: int) -> Values:
    """The judge's scores of attribute `a` where the model gave `score`."""
    chosen = c.s[:, a] == score
    return c.j[chosen, a], c.prompts[chosen]


def reliability(results: Results) -> Table:
    """The reliability diagram in numbers."""
    columns = {str(score): score for score in DIGITS.tolist()}
    return Table.of(
        "Reliability: the judge's mean where the model says 0 to 9",
        "A calibrated model's column k has mean k. (This conditions on the model's score; "
        "Figure 4 conditions on the judge's.)",
        [
            {"benchmark": b, "model": m, "attribute": name}
            | {
                header: mean(lambda c, a=a, k=k: judged_where(c, a, k))(cells)
                for header, k in columns.items()
            }
            for b, m, cells in results.each()
            if cells[0].valid
            for a, name in enumerate(ATTRIBUTES)
        ],
    )


TABLES = (
    partial(distributions, before="own"), partial(distributions, before="judge"), errors,
    reliability, judges, by_category,
)  # fmt: skip
