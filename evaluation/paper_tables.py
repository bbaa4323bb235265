"""The paper's tables (Sec. 4).

Only well-formed responses enter the scores (Sec. 4.1), so the well-formed rate stands first. The
paper's figures stand beside ours only where judge, template and benchmark are the paper's.
"""

from collections.abc import Callable

import numpy as np

from evaluation import intervals, metrics
from evaluation.intervals import Estimate
from evaluation.results import Cell
from evaluation.table import Column, Results, Table, Values, mean, measure, rows, share, statistic
from judge import offline_judge
from prompts import ATTRIBUTES
from storage.run_folder import file_name

# The paper's figures (GPT-5.4), where they are known: (benchmark, model, column) -> figure.
PAPER_MAIN = {
    ("helpsteer2", "base", "quality"): 0.644, ("helpsteer2", "base", "calibration"): 0.632,
    ("helpsteer2", "rlcr", "quality"): 0.662, ("helpsteer2", "rlcr", "calibration"): 0.675,
    ("helpsteer2", "see", "quality"): 0.704, ("helpsteer2", "see", "calibration"): 0.731,
    ("wildbench", "base", "calibration"): 0.5040, ("wildbench", "rlcr", "calibration"): 0.5414,
    ("wildbench", "see", "calibration"): 0.6088,
}  # fmt: skip
PAPER_WIN_RATES = {
    ("helpsteer2", "rlcr", "quality"): 0.570, ("helpsteer2", "rlcr", "calibration"): 0.617,
    ("helpsteer2", "see", "quality"): 0.671, ("helpsteer2", "see", "calibration"): 0.700,
    ("alpaca_eval", "rlcr", "first order"): 0.534, ("alpaca_eval", "see", "first order"): 0.592,
    ("arena_hard", "rlcr", "first order"): 0.502, ("arena_hard", "see", "first order"): 0.518,
    ("wildbench", "rlcr", "first order"): 0.537, ("wildbench", "see", "first order"): 0.581,
}  # fmt: skip
PAPER_TOP_5 = {
    ("helpsteer2", "base", "top-5"): 0.7707, ("helpsteer2", "see", "top-5"): 0.8776,
    ("alpaca_eval", "see", "top-5"): 0.9078,
}  # fmt: skip


def well_formed(c: Cell) -> Values:
    return [r.self_scores is not None for r in c.rollouts], [r.prompt_id for r in c.rollouts]


def quality(c: Cell) -> Values:
    return c.quality, c.prompts


def calibration(c: Cell) -> Values:
    return c.calibration, c.prompts


MAIN = {
    "well-formed": share(well_formed),
    "quality": mean(quality),
    "calibration": mean(calibration),
    "MAE": mean(lambda c: (np.abs(c.s - c.j).mean(1), c.prompts)),
}


def main_table(results: Results) -> Table:
    setting = results.settings
    temperature = setting["temperature"]
    decoding = f"sampled at temperature {temperature:g}" if temperature else "greedy decoding"
    summaries = {b: results.cells(b, results.base)[0].summary for b in results.benchmarks}
    duplicates = [f"{b} {x.get('near_duplicates', 'not counted')}" for b, x in summaries.items()]
    return Table.of(
        "Tables 1 and 2: quality and calibration",
        f"Judge {results.judge}; {decoding}, {setting['samples']} sample(s) per prompt; "
        "well-formed responses only. Prompts that are nearly a training prompt or a few-shot "
        f"example ({'left out' if setting['drop_duplicates'] else 'kept'}): "
        f"{', '.join(duplicates)}.",
        rows(results, MAIN, paper=PAPER_MAIN),
        higher=("well-formed", "quality", "calibration"),
        lower=("MAE",),
    )


def win_rates(results: Results) -> Table:
    """Against the base: by recorded scores, sample by sample, and by the pairwise referee."""

    def by_scores(scores: Callable[[Cell], np.ndarray]) -> Column:
        def values(c: Cell) -> Values:
            base = c.of(results.base)
            indices, theirs = c.match(dict(zip(base.keys, scores(base), strict=True)))
            return (np.sign(scores(c)[indices] - theirs) + 1) / 2, c.prompts[indices]

        return share(values)

    columns = {
        "quality": by_scores(lambda c: c.quality),
        "calibration": by_scores(lambda c: c.calibration),
        "responses": share(lambda c: preferences(c, lambda x: (x["result"] + 1) / 2)),
        "first order": share(lambda c: preferences(c, lambda x: (x["shown_first"] + 1) / 2)),
        "length-adjusted": statistic(length_adjusted, intervals.LOGIT),
        "order bias": mean(order_bias),
    }
    return Table.of(
        f"Win-rates against {results.base}",
        "(wins + ties / 2) / n over samples that both answered well-formed. The referee is "
        "asked in both orders; a disagreement is a tie. First order: with the model's answer "
        "shown first; the paper asks in one order. Length-adjusted: at equal length, without LC "
        "AlpacaEval's term for difficulty; - where our answers are nearly always the longer ones, "
        "or the shorter ones. Order bias: win-rate when shown first minus when shown "
        "second (an offline judge has none).",
        rows(results, columns, lambda c: c.model != results.base, PAPER_WIN_RATES),
        higher=("quality", "calibration", "responses", "first order", "length-adjusted"),
    )


def preferences(c: Cell, value: Callable[[dict], float]) -> Values:
    """`value`: of a line of preferences.jsonl."""
    return [value(x) for x in c.preferences], [x["prompt_id"] for x in c.preferences]


def order_bias(c: Cell) -> Values:
    if offline_judge(c.config["judge"]):  # compares scores and is shown no order
        return [], []
    return preferences(c, lambda x: (x["shown_first"] - x["shown_second"]) / 2)


def length_adjusted(c: Cell) -> Estimate | None:
    result, prompts = preferences(c, lambda x: x["result"])
    return metrics.length_adjusted(result, [x["longer_by"] for x in c.preferences], prompts)


def held_out_judges(results: Results) -> Table:
    """The same answers by other judges."""

    def columns(judge: str) -> dict[str, Column]:
        return {
            "quality": mean(lambda c: quality(c.rejudged(judge))),
            "calibration": mean(lambda c: calibration(c.rejudged(judge))),
        }

    return Table.of(
        "Table 3: held-out judges",
        f"The same answers; {results.judge} is the judge of the other tables.",
        [
            {"benchmark": b, "judge": judge, "model": m} | measure(columns(judge), cells)
            for b, m, cells in results.each()
            for judge, lines in sorted(cells[0].judged.items())
            if lines and judge != file_name(results.judge)
        ],
        higher=("quality", "calibration"),
    )


def top_5_hits(c: Cell) -> Values:
    indices, logp = c.log_probabilities("own")
    return metrics.top_k_hits(logp, c.j[indices]).mean(1), c.prompts[indices]


def ranking(c: Cell, judge: np.ndarray) -> Values:
    """Top-5 accuracy of the ranking that is best for the judge's scores `judge` (n, 5)."""
    indices, _ = c.log_probabilities("own")
    digits = metrics.frequent_digits(judge.tolist())
    return [metrics.share_among(digits, j) for j in c.j[indices].tolist()], c.prompts[indices]


def window_ranking(c: Cell) -> Values:
    return ranking(c, c.window.j) if c.window else ([], [])


def top_5(results: Results) -> Table:
    """Top-5 accuracy, and what one ranking of the digits for all responses reaches."""
    return Table.of(
        "Table 4: top-5 accuracy",
        "Share of the judge's digits among the model's five most probable, on its own block; "
        "beside it what one ranking of the digits for all answers reaches, taken from the "
        "training window's judgements, or from those of these very answers.",
        rows(
            results,
            {
                "top-5": mean(top_5_hits),
                "window ranking": mean(window_ranking),
                "test ranking": mean(lambda c: ranking(c, c.j[c.log_probabilities("own")[0]])),
            },
            lambda c: c.log_probabilities("own")[0],
            PAPER_TOP_5,
        ),
        higher=("top-5",),
    )


def by_attribute(values: Callable[[Cell], np.ndarray]) -> dict[str, Column]:
    """`values`: of a cell (N, 5), one number per response and attribute."""
    return {
        attribute: mean(lambda c, a=a: (values(c)[:, a], c.prompts))
        for a, attribute in enumerate(ATTRIBUTES)
    }


def calibration_by_attribute(results: Results) -> Table:
    return Table.of(
        "By attribute: calibration",
        "(1 - |s - j| / 9)^2 of each attribute alone (Figure 3).",
        rows(results, by_attribute(lambda c: c.attribute_calibration)),
        higher=ATTRIBUTES,
    )


def error_by_attribute(results: Results) -> Table:
    return Table.of(
        "By attribute: mean absolute error",
        "|s - j|, in points of 0-9.",
        rows(results, by_attribute(lambda c: np.abs(c.s - c.j))),
        lower=ATTRIBUTES,
    )


TABLES = (
    main_table, win_rates, held_out_judges, top_5, calibration_by_attribute, error_by_attribute
)  # fmt: skip
