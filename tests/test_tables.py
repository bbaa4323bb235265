"""Tables of evaluations made up in memory, by hand: .venv/bin/python -m pytest
tests/test_tables.py"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

import report
from evaluation import (
    comparison_tables,
    control_tables,
    efficiency,
    error_tables,
    intervals,
    use_tables,
)
from evaluation.intervals import Estimate
from evaluation.results import Cell, Evaluation, Window
from evaluation.table import Results, mean
from storage.data import Prompt
from storage.record import Rollout, answer_id

PROMPTS = [f"p{k}" for k in range(12)]
CONFIG = {
    "judge": "judge", "template": "paper", "few_shot": "varied", "samples": 1, "limit": 0,
    "prompt_tokens": 9, "dtype": "float32", "use_references": True, "drop_duplicates": False,
    "reward": {"gamma": 2.0}, "sampling": {"temperature": 0.8}, "training_run": "", "seed": 1,
    "sampler": "transformers", "endpoint": {}, "data": "nowhere.jsonl", "model": "m",
}  # fmt: skip


def rollout(prompt: str, own, judge, sample: int = 0, answer: str = "An answer.") -> Rollout:
    return Rollout(
        cycle=1, step=1, prompt_id=prompt, sample=sample, seed=0, prompt_ids=(1,),
        response_ids=(hash((answer, own, judge)) % 999,), text=answer, finish_reason="stop",
        answer=answer, self_scores=own, score_positions=None, judge_scores=judge,
        judge_model="judge", reward=None, quality=None, calibration=None, weight_version="v",
    )  # fmt: skip


def evaluation(name: str, cells: dict, prompts=PROMPTS, **known) -> Evaluation:
    """cells: (benchmark, model) -> per prompt (own, judge) or None, or (rows, changes of the
    configuration)."""
    made = {}
    for key, rows in cells.items():
        rows, changes = rows if isinstance(rows, tuple) else (rows, {})
        answers = [rollout(p, *(x or (None, None))) for p, x in zip(prompts, rows, strict=False)]
        made[key] = Cell(*key, CONFIG | changes, answers)
    e = Evaluation(Path(name), made, known.pop("window", None), {}, **known)
    for cell in made.values():
        cell.evaluation = e
    return e


def all_five(*digits: int) -> list[tuple]:
    """The same digit in all attributes."""
    return [(d,) * 5 for d in digits]


def pairs(own, judge) -> list[tuple]:
    return list(zip(all_five(*own), all_five(*judge), strict=True))


def records(table) -> list[dict]:
    return table.strings().to_dict("records")


JUDGE = [2, 3, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3]
RIGHT, EIGHTS = pairs(JUDGE, JUDGE), pairs([8] * 12, JUDGE)
WRONG = pairs([9 - j for j in JUDGE], JUDGE)


def window(states=(), **rows) -> Window:
    def rollouts(judge):
        return [rollout(f"w{k}", (5,) * 5, (d,) * 5) for k, d in enumerate(judge)]

    first, last = rows.get("first", [4] * 12), rows.get("last", [5] * 12)
    return Window(rollouts(first), rollouts(last), {}, dict(states))


def test_the_metric_has_the_papers_exponent_whatever_the_reward_had():
    """Error 3 of 9: (2 / 3)^2."""
    e = evaluation("a", {("one", "base"): (pairs([5] * 12, [2] * 12), {"reward": {"gamma": 1.0}})})
    cell = e.cells["one", "base"]
    assert cell.calibration == pytest.approx([4 / 9] * 12)
    assert cell.attribute_calibration[0] == pytest.approx([4 / 9] * 5)


# --------------------------------------------------------------------------------------------------
# Uses


def test_what_is_sent_at_equal_judge_budget():
    """The judge's scores are 0, ..., 8 and again 0, 1, 2. One model knows them, one says their
    opposite; a quarter are three answers. The longest answer is the best, the others are alike."""
    judge = [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2]
    e = evaluation("a", {
        ("one", "base"): pairs([9 - j for j in judge], judge), ("one", "see"): pairs(judge, judge)
    })  # fmt: skip
    cell = e.cells["one", "see"]
    cell.rollouts[8] = dataclasses.replace(cell.rollouts[8], answer="A longer answer.")
    rows = {
        (r["model"], r["sent"]): r for r in use_tables.sent(Results([e])).frame.to_dict("records")
    }
    best, mean, worst = (8 + 7 + 6) / 27, sum(judge) / 12 / 9, (0 + 0 + 1) / 27
    top, low = rows["see", "25%"], rows["base", "25%"]
    assert math.isclose(top["self-evaluation"].mean, best)
    assert math.isclose(low["self-evaluation"].mean, worst)
    assert math.isclose(low["oracle"].mean, best)
    for name in ("random", "best constant"):
        assert math.isclose(top[name].mean, mean)
        np.testing.assert_allclose(top[name], rows["see", "75%"][name])
    assert math.isclose(top["gain"].mean, best - mean) and math.isclose(
        low["gain"].mean, worst - mean
    )
    # The 8, and two of the eleven others.
    others = (sum(judge) - 8) / 11
    assert math.isclose(top["longest first"].mean, (8 + 2 * others) / 27)
    assert math.isclose(top["shortest first"].mean, others / 9)
    half = (8 + 7 + 6 + 5 + 4 + 3) / 54
    assert math.isclose(rows["see", "50%"]["self-evaluation"].mean, half)


# --------------------------------------------------------------------------------------------------
# What may stand together


def refused(message: str, *evaluations, **options) -> None:
    with pytest.raises(ValueError, match=message):
        Results(evaluations, **options)


def test_what_is_not_mixed():
    key = ("one", "base")
    first = evaluation("a", {key: EIGHTS})
    refused("same answers", first, evaluation("b", {key: EIGHTS}))
    refused(
        "a and b|b and a", first, evaluation("b", {key: EIGHTS[::-1]}, PROMPTS[:6] + list("qrstuv"))
    )
    own = evaluation("c", {key: EIGHTS}, [f"q{k}" for k in range(12)])
    for fine in ([first, own], [first, evaluation("d", {key: RIGHT})]):
        Results(fine)
    both = {key: EIGHTS, ("one", "see"): (RIGHT, {"seed": 2})}
    refused("one/see and one/base differ in seed", evaluation("e", both))
    Results([evaluation("e", both)], models=("base",))  # the other one is not shown
    other = {key: EIGHTS, ("one", "see"): (RIGHT, {"data": "other.jsonl"})}
    refused("other prompt files as one", evaluation("f", other))
    refused("no results of model none", first, against="none")


def test_a_model_that_not_every_seed_has():
    """Its rows are of the two evaluations that have it; all others are of the three."""
    evaluations = [
        evaluation(
            name,
            {("one", "base"): EIGHTS, ("one", "see"): pairs([k] * 12, JUDGE)}
            | ({("one", "rare"): pairs([9 - k] * 12, JUDGE)} if k != 0 else {}),
            [f"{name}{p}" for p in PROMPTS],
            models=["base", *["rare"][: k != 0], "see"],
        )
        for k, name in enumerate("abc")
    ]
    results = Results(evaluations)
    assert results.models == ["base", "see", "rare"] and results.in_some() == {"rare": 2}
    assert "Models that not all 3 evaluations have: rare in 2." in results.note()
    tables = {t.title: records(t) for t in report.make_tables(results)}
    main = {r["model"]: r for r in tables["Tables 1 and 2: quality and calibration"]}
    by_hand = np.mean([[(1 - abs(s - j) / 9) ** 2 for j in JUDGE] for s in (8, 7)])
    assert main["rare"]["calibration"].startswith(f"{by_hand:.3f}")
    assert main["rare"]["calibration"].endswith("(n 2)")
    assert main["see"]["calibration"].endswith("(n 3)")
    found = {(r["model"], r["difference"]) for r in tables["Comparisons"]}
    assert ("rare", "calibration - base's") in found
    for needed in ({"against": "rare"}, {"models": ("rare", "see")}):
        refused("a: no answers of model rare to one", *evaluations, **needed)


def test_a_seed_that_lacks_a_figure_is_named():
    cells = {("one", "base"): EIGHTS}
    a, b = evaluation("a", cells), evaluation("b", {("one", "base"): RIGHT})
    a.cells["one", "base"].preferences = [{"prompt_id": "p0", "result": 1}]
    column = mean(lambda c: ([1.0] * len(c.preferences), [x["prompt_id"] for x in c.preferences]))
    assert column([a.cells["one", "base"], b.cells["one", "base"]]) == "in 1 of 2 only"


def test_what_the_base_answers_once_is_one_evaluation():
    """Three seeds that share the base's answers: its figure is as certain as one evaluation's, and
    a comparison within it is not tested over seeds."""
    evaluations = [
        evaluation(name, {("one", "base"): EIGHTS, ("one", "see"): pairs([k] * 12, JUDGE)},
                   window=window())
        for k, name in enumerate("abc")
    ]  # fmt: skip
    results = Results(evaluations)
    base = results.cells("one", "base")
    figure = mean(lambda c: (c.calibration, c.prompts))
    assert figure(base) == figure(base[:1])
    rows = {
        (r["model"], r["difference"]): r for r in records(comparison_tables.comparisons(results))
    }
    name = "calibration - the best constant of the first cycle"
    assert rows["base", name]["p"] == "-" and rows["see", "calibration - base's"]["p"] != "-"


# --------------------------------------------------------------------------------------------------
# The primary endpoint


def primary(e: Evaluation, **options) -> list[dict]:
    return records(comparison_tables.primary_endpoint(Results([e], **options)))


def test_the_primary_endpoint_is_what_was_declared():
    cells = {
        (b, m): RIGHT if m == "see" else EIGHTS for b in ("two", "one") for m in ("base", "see")
    }
    declared = {"benchmarks": ["two", "one"], "primary": ["one", "base"], "margin": 0.02}
    rows = primary(evaluation("a", cells, window=window(), declared=declared))
    assert {(r["benchmark"], r["model"], r["this is"]) for r in rows} == {
        ("one", "base", "primary endpoint")
    }
    later = declared | {"later": [["two", "see"]]}
    rows = primary(evaluation("a", cells, window=window(), declared=later), models=("base", "see"))
    assert {(r["benchmark"], r["model"]) for r in rows if r["this is"] == "a second look"} == {
        ("two", "see")
    }
    rows = primary(evaluation("a", cells, window=window()))
    assert {(r["benchmark"], r["model"]) for r in rows} == {("two", "see")}
    assert {r["this is"] for r in rows} == {"not declared: a second look"}


def test_a_constant_does_not_win_the_primary_endpoint():
    """Judgements rise from 3s to mostly 5s in training. A "model" that always says 5 beats the
    first cycle's constant, and not the last cycle's, which it is."""
    judge = [5, 5, 5, 5, 5, 5, 4, 6, 5, 6, 4, 5]
    fives = pairs([5] * 12, judge)
    states = {f"w{k}": np.array([k % 2]) for k in range(12)}
    e = evaluation(
        "a",
        {("one", "base"): pairs([4] * 12, judge), ("one", "see"): fives},
        window=window(states, first=[3] * 12),
        declared={"primary": ["one", "see"]},
    )
    e.cells["one", "see"].prompt_states = {p: np.array([0]) for p in PROMPTS}
    first, last, alone, together = primary(e)
    assert first["p"] == "<0.001" and first["difference"] != "-"
    assert last["difference"].startswith("0.000") and last["p"] == "-"
    assert alone["difference"].startswith("0.000")
    assert together["p"] == "-"  # and nothing that could be called significant
    # One that knows its answers beats all three, and the largest p counts.
    e = evaluation(
        "a",
        {("one", "base"): fives, ("one", "see"): pairs(judge, judge)},
        window=window(states, first=[3] * 12),
        declared={"primary": ["one", "see"]},
    )
    e.cells["one", "see"].prompt_states = {p: np.array([0]) for p in PROMPTS}
    *rivals, together = primary(e)
    found = comparison_tables.primary_p(Results([e]), "one", "see")
    by_hand = intervals.spread(
        [
            intervals.difference(
                ([1.0] * 12, PROMPTS), ([(1 - abs(5 - j) / 9) ** 2 for j in judge], PROMPTS)
            )
        ],
        True,
    ).p()
    assert found == pytest.approx(by_hand) and together["p"] == f"{by_hand:.3f}"
    # Where a rival is ahead, p is 1.
    e = evaluation(
        "a",
        {("one", "base"): fives, ("one", "see"): pairs([9 - j for j in judge], judge)},
        window=window(states, first=[3] * 12),
    )
    e.cells["one", "see"].prompt_states = {p: np.array([0]) for p in PROMPTS}
    assert comparison_tables.primary_p(Results([e]), "one", "see") == 1.0


def test_the_family_is_what_was_asked_for():
    """Against one reference, each model once; earlier checkpoints of a run only by name."""
    paths = {"base": "m"} | {m: f"runs/{run}" for m, run in (
        ("rlcr", "r/checkpoints/cycle_01"), ("c1", "s/checkpoints/cycle_01"),
        ("see", "s/checkpoints/cycle_02"),
    )}  # fmt: skip
    cells = {("one", m): (pairs([k] * 12, JUDGE), {"model": path})
             for k, (m, path) in enumerate(paths.items())}  # fmt: skip
    e = evaluation("a", cells)

    def compared(**options) -> set:
        rows = records(comparison_tables.comparisons(Results([e], **options)))
        return {(r["model"], r["difference"]) for r in rows if r["difference"].startswith("cal")}

    assert compared() == {("rlcr", "calibration - base's"), ("see", "calibration - base's")}
    assert compared(models=("base", "c1")) == {("c1", "calibration - base's")}
    assert compared(against="rlcr") == {("base", "calibration - rlcr's"),
                                        ("see", "calibration - rlcr's")}  # fmt: skip


def test_quality_is_kept_within_a_margin_named_before():
    """The judge gives SEE one point of nine less in half of the answers: 0.0556 on average."""
    lower = [(s, (j[0] - k % 2,) * 5) for k, (s, j) in enumerate(RIGHT)]
    cells = {("one", "base"): RIGHT, ("one", "see"): lower}

    def row(margin: float) -> dict:
        e = evaluation("a", cells, declared={"margin": margin})
        [found] = records(comparison_tables.quality_kept(Results([e])))
        return found

    assert row(0.02)["quality - base's"].startswith("-0.056")
    assert row(0.02)["not worse"] == "not shown" and row(0.2)["not worse"] == "yes"
    # Standard deviation of 0 and 1/9 in halves, n - 1: (1/18) sqrt(12/11).
    sd = math.sqrt(12 / 11) / 18
    assert row(0.02)["sd by prompt"] == f"{sd:.3f}"
    assert row(0.02)["prompts for 0.02"] == str(intervals.prompts_needed(sd))


# --------------------------------------------------------------------------------------------------
# Predictors and orderings


def test_the_windows_base_scores_are_of_prompt_and_answer():
    """Two prompts have the same answer, word for word, and the base scores them differently."""
    twins = [
        rollout("a", None, (1,) * 5, answer="Yes."),
        rollout("b", None, (9,) * 5, answer="Yes."),
    ]
    twins = [dataclasses.replace(r, response_ids=(7,)) for r in twins]
    base = {("a", answer_id(twins[0])): (2,) * 5, ("b", answer_id(twins[1])): (8,) * 5}
    s, j = Window(twins, twins, base, {}).fit
    assert s[:, 0].tolist() == [2, 8] and j[:, 0].tolist() == [1, 9]


def test_one_unreadable_line_costs_one_answer():
    e = evaluation("a", {("one", "base"): EIGHTS}, window=window())
    e.window.base = {(r.prompt_id, answer_id(r)): (8,) * 5 for r in e.window.rollouts}
    cell = e.cells["one", "base"]
    cell.digits = {"base": {(p, 0): {"scores": (8,) * 5 if p != "p0" else None} for p in PROMPTS}}
    [row] = records(control_tables.predictors_table(Results([e])))
    # Offset 8 -> 4, on the eleven answers other than p0's, which was judged 2.
    expected = sum((1 - abs(4 - j) / 9) ** 2 for j in JUDGE[1:]) / 11
    assert row["offset"].startswith(f"{expected:.3f}") and row["offset"].endswith("(n 11)")
    assert row["n"] == "12"


def test_a_prompt_without_a_tau_is_counted():
    """Of ten prompts with two answers the model orders one right and is constant on nine: tau is 1
    on the one, and accuracy (1 + 9 / 2) / 10."""
    rows = []
    for k in range(10):
        own = (4, 6) if k == 0 else (5, 5)
        rows += [rollout(f"p{k}", (own[i],) * 5, ((3, 7)[i],) * 5, sample=i) for i in range(2)]
    e = evaluation("a", {("one", "base"): []})
    e.cells["one", "base"].rollouts = rows
    [row] = records(control_tables.discrimination(Results([e])))
    assert row["within: tau"] == "1.000 [-] (n 1)" and row["prompts without a tau"] == "9"
    assert row["within: accuracy"].startswith("0.550")


def test_a_refused_answer_counts_in_the_well_formed_rate_alone():
    e = evaluation("a", {("one", "base"): EIGHTS})
    cell = e.cells["one", "base"]
    cell.rollouts.append(
        dataclasses.replace(rollout("q", (8,) * 5, None), refused="I cannot judge this.")
    )
    [row] = records(control_tables.choice_of_responses(Results([e])))
    assert row["malformed = 0"] == row["well-formed"]


def test_judges_that_agree_and_categories():
    e = evaluation("a", {("one", "base"): EIGHTS})
    cell = e.cells["one", "base"]
    cell.judged = {"other": [{"prompt_id": r.prompt_id, "sample": 0, "scores": r.judge_scores}
                             for r in cell.rollouts]}  # fmt: skip
    [row] = records(error_tables.judges(Results([e])))
    assert row["judges"] == "judge, other" and row["helpfulness"].startswith("1.000")
    assert not len(error_tables.by_category(Results([e])).frame)
    turn = ({"role": "user", "content": "?"},)
    e.files["nowhere.jsonl"] = [
        Prompt(p, turn, category="long" if k % 2 else "short") for k, p in enumerate(PROMPTS)
    ]
    del cell.data
    cell.__dict__.pop("categories", None)
    short, long = reversed(records(error_tables.by_category(Results([e]))))
    assert (short["category"], long["category"]) == ("short", "long")
    expected = sum(1 - abs(8 - j) / 9 for j in JUDGE[::2]) / 6
    assert short["MAE"].startswith(f"{9 * (1 - expected):.3f}")


# --------------------------------------------------------------------------------------------------
# Figure 2 in numbers


def test_the_mean_height_of_a_curve():
    """Values 0, 1, 1 at costs 0, 10, 30: up to 30 (5 + 20) / 30; up to 20 (5 + 10) / 20."""
    for end, height in ((30, 25 / 30), (20, 15 / 20), (10, 0.5)):
        assert efficiency.heights([0, 10, 30], end) @ [0, 1, 1] == pytest.approx(height)
    assert efficiency.heights([0, 10, 30], 20) @ [0, 1, 3] == pytest.approx((5 + 15) / 20)
    a, b = (
        Estimate(v, np.array([1.0, -1.0]), np.array(["x", y])) for v, y in ((1.0, "y"), (3.0, "z"))
    )
    both = efficiency.weighted([a, b], [0.5, 0.5])
    assert both.value == 2 and dict(zip(both.prompts, both.pulls, strict=True)) == (
        {"x": 1.0, "y": -0.5, "z": -0.5}
    )


def test_where_a_curve_first_reaches_a_target():
    curves = np.array([[0.0, 0.4, 0.2, 0.8]] * 4)
    got = efficiency.first_reached([0, 10, 20, 30], curves, np.array([0.3, 0.6, 0.9, 0.0]))
    # On the first stretch; after the dip, on the last, 2/3 of the way; never; at once.
    assert got == pytest.approx([7.5, 20 + 10 * 0.4 / 0.6, np.inf, 0.0])


def curve(name: str, *own: int) -> dict:
    """A run's checkpoints: the model says these digits where the judge says 5."""
    return {
        ("one", f"{name}{k}"): (
            pairs([d] * 12, [5] * 12),
            {"model": f"runs/{name}/checkpoints/{k}"},
        )
        for k, d in enumerate(own, 1)
    }


def test_cost_to_parity_with_the_other_run(monkeypatch):
    """Errors of the base 4; of SEE 2 after 100 passes, 0 after 200; of RLCR 1 after 1,000. SEE is
    as good as RLCR's end, (8/9)^2, between its checkpoints."""
    cells = {("one", "base"): pairs([9] * 12, [5] * 12)} | curve("see", 7, 5) | curve("rlcr", 6)
    results = Results([evaluation("a", cells)])
    cost = efficiency.Costs
    monkeypatch.setattr(efficiency, "costs_of_models", lambda _: {
        "see": {"see1": cost(100, 50, 10, 40), "see2": cost(200, 100, 20, 40)},
        "rlcr": {"rlcr1": cost(1000, 400, 10, 800)},
    })  # fmt: skip
    rows = records(efficiency.efficiency(results))
    see = next(r for r in rows if (r["metric"], r["run"]) == ("calibration", "see"))
    share = ((8 / 9) ** 2 - (7 / 9) ** 2) / (1 - (7 / 9) ** 2)
    passes, calls = 1000 / (100 + 100 * share), 400 / (50 + 50 * share)
    assert see["sample-passes"] == f"{passes:.2g} [{passes:.2g}, {passes:.2g}]"  # no prompt differs
    assert see["judge calls"].startswith(f"{calls:.2g} ")
    assert see["optimiser steps"].startswith(f"{10 / (10 + 10 * share):.2g} ")
    assert see["unique prompts"] == "20" and see["reaches the end of"] == "rlcr"
    rlcr = next(r for r in rows if (r["metric"], r["run"]) == ("calibration", "rlcr"))
    assert (
        rlcr["sample-passes"] == "<0.2 [<0.2, <0.2]"
    )  # it never gets there: censored, not dropped
    height = ((25 + 49) / 2 * 100 + (49 + 81) / 2 * 100) / 200 / 81
    assert see["mean height"].startswith(f"{height:.3f}")


def test_several_runs_are_not_dropped_where_they_do_not_get_there():
    assert efficiency.over_runs([10.0, 0.0, 8.0], 2.0) == "8 (<2 to 10; 1 of 3 never)"
    assert efficiency.over_runs([0.0, 0.0, 8.0], 2.0) == "<2 (<2 to 8; 2 of 3 never)"
    assert efficiency.times(np.array([np.inf, 3.0, 4.0]), 2.0, False) == "at once [-]"
