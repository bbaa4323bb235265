"""The paper's tables (Sec. 4) from results, as text, Markdown and rows for the page.

Each figure has a 95 % interval: over prompts within one evaluation, over evaluations (Student's t)
where there are several (intervals.py). Only well-formed responses enter scores (Sec. 4.1), so the
well-formed rate stands first. The paper's figures stand beside ours only where judge, template and
benchmark are the paper's.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation import intervals, metrics
from evaluation.controls import calibrations, qualities
from evaluation.intervals import Interval
from evaluation.results import Cell, Evaluation
from prompts import ATTRIBUTES
from storage.record import Rollout
from storage.run_folder import file_name

# The paper's figures (GPT-5.4), where they are known: (benchmark, model, figure).
PAPER = {
    ("helpsteer2", "base", "quality"): 0.644, ("helpsteer2", "rlcr", "quality"): 0.662,
    ("helpsteer2", "see", "quality"): 0.704, ("helpsteer2", "base", "calibration"): 0.632,
    ("helpsteer2", "rlcr", "calibration"): 0.675, ("helpsteer2", "see", "calibration"): 0.731,
    ("helpsteer2", "rlcr", "quality win-rate"): 0.570,
    ("helpsteer2", "see", "quality win-rate"): 0.671,
    ("helpsteer2", "rlcr", "calibration win-rate"): 0.617,
    ("helpsteer2", "see", "calibration win-rate"): 0.700,
    ("helpsteer2", "base", "top-5"): 0.7707, ("helpsteer2", "see", "top-5"): 0.8776,
    ("alpaca_eval", "rlcr", "response win-rate"): 0.534,
    ("alpaca_eval", "see", "response win-rate"): 0.592, ("alpaca_eval", "see", "top-5"): 0.9078,
    ("arena_hard", "rlcr", "response win-rate"): 0.502,
    ("arena_hard", "see", "response win-rate"): 0.518,
    ("wildbench", "rlcr", "response win-rate"): 0.537,
    ("wildbench", "see", "response win-rate"): 0.581,
    ("wildbench", "base", "calibration"): 0.5040, ("wildbench", "rlcr", "calibration"): 0.5414,
    ("wildbench", "see", "calibration"): 0.6088,
}  # fmt: skip


@dataclass
class Table:
    title: str
    note: str
    head: list[str]
    rows: list[list[str]]

    def text(self) -> str:
        widths = [
            max(len(row[c]) for row in (self.head, *self.rows)) for c in range(len(self.head))
        ]
        lines = ["  ".join(f"{x:<{w}}" for x, w in zip(row, widths, strict=True)).rstrip()
                 for row in (self.head, *self.rows)]  # fmt: skip
        return "\n".join([self.title, self.note, "", *lines])

    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        body = "\n".join(
            "| " + " | ".join(x.replace("|", r"\|") for x in row) + " |" for row in lines
        )
        return f"### {self.title}\n\n{self.note}\n\n{body}"


Values = tuple[Sequence[float], Sequence[str]]  # per response, and their prompts
Statistic = Callable[[np.ndarray, Sequence], float | None]  # see intervals.of_statistic


def over(evaluations: Sequence[Evaluation], values: Callable[[Evaluation], Values]) -> Interval:
    """Of a mean over responses."""
    found = [values(e) for e in evaluations]
    if len(found) == 1:
        return intervals.over_prompts(*found[0])
    return intervals.over_seeds([float(np.mean(v)) for v, _ in found if len(v)])


def show(x: Interval | float | None, paper: float | None = None) -> str:
    """0.731 [0.702, 0.760], and the paper's figure in brackets."""
    if isinstance(x, Interval):
        text = "-" if x.mean is None else f"{x.mean:.3f}"
        if x.low is not None and x.high is not None:
            text += f" [{x.low:.3f}, {x.high:.3f}]"
    else:
        text = "-" if x is None else f"{x:.3f}"
    return text if paper is None else f"{text} (paper {paper:.3f})"


def settings(c: Cell) -> dict:
    """What figures in one table must share."""
    names = ("judge", "template", "few_shot", "samples", "limit", "prompt_tokens", "dtype",
             "use_references", "drop_duplicates")  # fmt: skip
    return {k: c.config[k] for k in names} | {"gamma": c.gamma} | c.config["sampling"]


# --------------------------------------------------------------------------------------------------
# Tables of the paper

MAIN: dict[str, Callable[[Cell], Values]] = {
    "well-formed": lambda c: (
        [float(r.self_scores is not None) for r in c.rollouts], [r.prompt_id for r in c.rollouts]
    ),
    "quality": lambda c: (qualities(c.j), c.prompts),
    "calibration": lambda c: (c.calibration, c.prompts),
    "MAE": lambda c: (np.abs(c.s - c.j).mean(1), c.prompts),
}  # fmt: skip


class Tables:
    """All tables over one or more evaluations of the same models and benchmarks."""

    def __init__(self, evaluations: Sequence[Evaluation], models: Sequence[str] = ()):
        """`models`: which of them, in this order, the base first; () all. Raises ValueError if the
        evaluations do not have the same cells or settings."""
        self.evaluations = list(evaluations)
        self.first = self.evaluations[0]
        keys = set(self.first.cells)
        for e in self.evaluations[1:]:
            if set(e.cells) != keys:
                raise ValueError(
                    f"{e.folder} and {self.first.folder} hold other models or benchmarks: "
                    f"{sorted(set(e.cells) ^ keys)}; give evaluations of the same ones"
                )
        self.benchmarks = list(dict.fromkeys(b for b, _ in self.first.cells))
        there = list(dict.fromkeys(m for _, m in self.first.cells))
        if unknown := set(models) - set(there):
            raise ValueError(f"no results of model {min(unknown)}; there are {', '.join(there)}")
        self.models = list(models) or there
        self.base = self.models[0]
        cells = [c for e in evaluations for c in e.cells.values()]
        self.settings = settings(cells[0])
        for name, value in self.settings.items():
            if any(settings(c)[name] != value for c in cells):
                raise ValueError(
                    f"the results differ in {name}, and such are not mixed; give evaluations of "
                    "one setting, and those of others with --beside"
                )
        self.judge = self.settings["judge"]
        known = {"template": "paper", "few_shot": "paper-like", "limit": 0, "gamma": 2.0,
                 "use_references": True, "drop_duplicates": False}  # fmt: skip
        self.papers_setting = bool(
            re.fullmatch(r"gpt-5\.4(-\d{4}-\d\d-\d\d)?", self.judge)
        ) and all(self.settings[k] == v for k, v in known.items())
        for e in evaluations:
            if lacking := [key for key in self.each() if key not in e.cells]:
                raise ValueError(
                    f"{e.folder}: no answers of model {lacking[0][1]} to {lacking[0][0]}; finish "
                    "evaluate.py, or choose models with --models"
                )

    def each(self) -> Iterator[tuple[str, str]]:
        return ((b, m) for b in self.benchmarks for m in self.models)

    def paper(self, benchmark: str, model: str, figure: str) -> float | None:
        return PAPER.get((benchmark, model, figure)) if self.papers_setting else None

    def mean(self, b: str, m: str, of: Callable[[Cell], Values]) -> Interval:
        return over(self.evaluations, lambda e: of(e[b, m]))

    def ratio(self, b: str, m: str, of: Callable[[Cell], tuple[Sequence, Sequence]]) -> Interval:
        """Of sum / sum, both given by prompt."""
        found = [of(e[b, m]) for e in self.evaluations]
        if len(found) == 1:
            return intervals.ratio(*found[0])
        return intervals.over_seeds([sum(x) / sum(y) for x, y in found if sum(y)])

    def statistic(
        self, b: str, m: str, of: Callable[[Evaluation], tuple[Statistic, Sequence]]
    ) -> Interval:
        """Of any other figure: how it is computed of a choice of things, given by their indices and
        what stands for their prompts; and the prompts of all these things."""
        found = [of(e) for e in self.evaluations]
        if len(found) == 1:
            return intervals.of_statistic(*found[0])
        values = [figure(np.arange(len(units)), units) for figure, units in found if len(units)]
        return intervals.over_seeds([x for x in values if x is not None])

    def all(self) -> list[Table]:
        found = [
            self.main_table(),
            self.win_rates(),
            self.cross_judges(),
            self.top_5(),
            self.attributes("calibration"),
            self.attributes("mean absolute error"),
        ]
        return [t for t in found if t.rows]

    def main_table(self) -> Table:
        return Table(
            "Tables 1 and 2: quality and calibration",
            f"Judge {self.judge}; {self.decoding()}; well-formed responses only. "
            + self.near_duplicates(),
            ["benchmark", "model", *MAIN],
            [
                [b, m, *(show(self.mean(b, m, of), self.paper(b, m, name))
                         for name, of in MAIN.items())]
                for b, m in self.each()
            ],
        )  # fmt: skip

    def near_duplicates(self) -> str:
        done = "left out" if self.settings["drop_duplicates"] else "kept"
        found = [(b, self.first[b, self.base].summary.get("near_duplicates"))
                 for b in self.benchmarks]  # fmt: skip
        return (
            "Prompts that are nearly a training prompt or a few-shot example ("
            + done
            + "): "
            + (", ".join(f"{b} {'not counted' if n is None else n}" for b, n in found) + ".")
        )

    def decoding(self) -> str:
        t = self.settings["temperature"]
        how = "greedy decoding" if t == 0 else f"sampled at temperature {t:g}"
        return f"{how}, {self.settings['samples']} sample(s) per prompt"

    def win_rates(self) -> Table:
        """Against the base: of recorded scores sample by sample, and of the pairwise referee."""

        def score(b: str, m: str, figure: Callable[[Cell], np.ndarray]) -> Interval:
            def values(e: Evaluation) -> Values:
                ours, theirs = e[b, m], e[b, self.base]
                other = dict(zip(theirs.keys, figure(theirs), strict=True))
                both = [(k[0], x, other[k])
                        for k, x in zip(ours.keys, figure(ours), strict=True)
                        if k in other]  # fmt: skip
                return [(np.sign(x - y) + 1) / 2 for _, x, y in both], [p for p, _, _ in both]

            return over(self.evaluations, values)

        def response(b: str, m: str) -> tuple[str, str, str]:
            if not any(e[b, m].preferences for e in self.evaluations):
                return "-", "-", "-"
            rate = self.mean(b, m, lambda c: ([(x["result"] + 1) / 2 for x in c.preferences],
                                              [x["prompt_id"] for x in c.preferences]))  # fmt: skip
            bias = self.mean(b, m, lambda c: (
                [(x["shown_first"] - x["shown_second"]) / 2 for x in c.preferences],
                [x["prompt_id"] for x in c.preferences],
            ))  # fmt: skip
            adjusted = self.statistic(b, m, lambda e: length_adjusted(e[b, m]))
            return (show(rate, self.paper(b, m, "response win-rate")), show(adjusted), show(bias))

        return Table(
            f"Win-rates against {self.base}",
            "(wins + ties / 2) / n over samples that both answered well-formed. The referee is "
            "asked in both orders; a disagreement is a tie. Length-adjusted: at equal length, "
            "without LC AlpacaEval's term for difficulty. Order bias: win-rate when shown first "
            "minus when shown second.",
            ["benchmark", "model", "quality", "calibration", "responses", "length-adjusted",
             "order bias"],
            [
                [b, m, show(score(b, m, lambda c: qualities(c.j)),
                            self.paper(b, m, "quality win-rate")),
                 show(score(b, m, lambda c: c.calibration),
                      self.paper(b, m, "calibration win-rate")), *response(b, m)]
                for b, m in self.each() if m != self.base
            ],
        )  # fmt: skip

    def cross_judges(self) -> Table:
        """Table 3: the same answers by held-out judges."""

        def by(cell: Cell, judge: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
            lines = cell.judged.get(judge, [])
            given = {(x["prompt_id"], x["sample"]): x["scores"] for x in lines}
            at = [i for i, k in enumerate(cell.keys) if k in given]
            scores = np.array([given[cell.keys[i]] for i in at]).reshape(-1, 5)
            return cell.s[at], scores, [cell.prompts[i] for i in at]

        def row(b: str, m: str, judge: str) -> list[str]:
            def quality(c: Cell) -> Values:
                _, j, prompts = by(c, judge)
                return qualities(j), prompts

            def calibration(c: Cell) -> Values:
                s, j, prompts = by(c, judge)
                return calibrations(s, j, c.gamma), prompts

            return [b, judge, m, show(self.mean(b, m, quality)), show(self.mean(b, m, calibration))]

        return Table(
            "Table 3: held-out judges",
            f"The same answers; {self.judge} is the judge of the other tables.",
            ["benchmark", "judge", "model", "quality", "calibration"],
            [
                row(b, m, judge)
                for b, m in self.each()
                for judge in sorted(self.first[b, m].judged)
                if judge != file_name(self.judge) and self.first[b, m].judged[judge]
            ],
        )

    def top_5(self) -> Table:
        """Table 4, beside one ranking of the digits for all responses."""

        def hits(c: Cell) -> Values:
            found = [(metrics.top_k_accuracy([x["own"]], [r.judge_scores]), r.prompt_id)
                     for r, x in own_digits(c)]  # fmt: skip
            return [v for v, _ in found], [p for _, p in found]

        def constant(e: Evaluation, c: Cell, fitted_on_window: bool) -> Values:
            scores = [(r.judge_scores, r.prompt_id) for r, _ in own_digits(c)]
            if fitted_on_window and not e.window:
                return [], []
            known = e.window.j.tolist() if fitted_on_window else [j for j, _ in scores]
            digits = metrics.frequent_digits(known)
            return [metrics.share_among(digits, j) for j, _ in scores], [p for _, p in scores]

        def constants(b: str, m: str) -> list[str]:
            return [show(over(self.evaluations, lambda e, on=on: constant(e, e[b, m], on)))
                    for on in (True, False)]  # fmt: skip

        return Table(
            "Table 4: top-5 accuracy",
            "Share of the judge's digits among the model's five most probable, on its own block; "
            "beside it what one ranking of the digits for all answers reaches, taken from the "
            "training window's judgements, or from those of these very answers.",
            ["benchmark", "model", "top-5", "window ranking", "test ranking"],
            [
                [b, m, show(self.mean(b, m, hits), self.paper(b, m, "top-5")), *constants(b, m)]
                for b, m in self.each()
                if own_digits(self.first[b, m])
            ],
        )

    def attributes(self, name: str) -> Table:
        """Figure 3's numbers, or the mean absolute errors."""

        def one(b: str, m: str, a: int) -> str:
            def values(c: Cell) -> Values:
                s, j = c.s[:, a : a + 1], c.j[:, a : a + 1]
                return (calibrations(s, j, c.gamma) if name == "calibration"
                        else np.abs(s - j)[:, 0]), c.prompts  # fmt: skip

            return show(self.mean(b, m, values))

        notes = {
            "calibration": "(1 - |s - j| / 9)^gamma of each attribute alone (Figure 3).",
            "mean absolute error": "|s - j|, in points of 0-9.",
        }
        return Table(
            f"By attribute: {name}",
            notes[name],
            ["benchmark", "model", *ATTRIBUTES],
            [[b, m, *(one(b, m, a) for a in range(5))] for b, m in self.each()],
        )


def length_adjusted(c: Cell) -> tuple[Statistic, Sequence]:
    result = np.array([x["result"] for x in c.preferences])
    longer = np.array([x["longer_by"] for x in c.preferences])
    return (
        lambda index, _: intervals.length_adjusted(result[index], longer[index]),
        [x["prompt_id"] for x in c.preferences],
    )


def own_digits(c: Cell) -> list[tuple[Rollout, dict]]:
    """The judged responses whose own digits were read, with the reading."""
    found = c.digits.get(c.model, {})
    return [(r, found[k]) for r, k in zip(c.valid, c.keys, strict=True)
            if k in found and found[k]["own"]]  # fmt: skip
