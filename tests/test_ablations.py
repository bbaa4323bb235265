"""The variants of the method: .venv/bin/python -m pytest tests/test_ablations.py"""

import ast
import json
import runpy
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, finish, make_rollout, small_args, start_ranks

import cycle
import prompts
import reward
import rollout
from backend import sampler
from config import parse
from storage.run_folder import RunFolder

VARIANTS = sorted(p.stem for p in (ROOT / "ablations").glob("*.py") if p.stem != "__init__")
# Fields that a variant sets; all others replace functions.
FIELDS = {
    "gamma_1": {"reward.gamma": 1.0},
    "no_calibration_reward": {"reward.w_calibration": 0.0},
    "rl_alone": {"distil": False},
    "no_prompt_limit": {"sft.per_prompt_limit": 1_000_000},
    "kl_to_base": {"reference": "base"},
    "no_kl": {"grpo.kl_coef": 0.0},
    "no_entropy_bonus": {"grpo.entropy_coef": 0.0},
    "token_mean": {"grpo.loss_mean": "token"},
    "batch_48": {"batch": 48, "epochs": 4, "cycles": 5},
    "window_40": {"window": 40, "epochs": 5},
    "window_80": {"window": 80, "epochs": 2},
    "window_320": {"window": 320},
    "rollouts_4": {"rollouts": 4},
    "rollouts_16": {"rollouts": 16},
    "bf16_parameters": {"policy.parameters": "bfloat16"},
    "few_shot_varied": {"few_shot": "varied"},
    "no_latent": {"model": "models/tiny-0-no-latent"},
}

MODULES = (cycle, reward, rollout, prompts, sampler)  # in which variants replace something


@pytest.fixture
def load(monkeypatch):
    """Loads a variant without running it: (its names, the options that it passes on)."""
    for module in MODULES:  # what a variant replaces is put back
        for name, value in list(vars(module).items()):
            if not name.startswith("__"):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(cycle.Run, "select", cycle.Run.select)

    def load(name: str) -> tuple[dict, tuple]:
        options = []
        cycle.main = lambda options=(): found.append(options)
        found = options
        names = runpy.run_module(f"ablations.{name}", run_name="__main__")
        [passed_on] = found
        return names, tuple(passed_on)

    return load


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_short_and_says_what_it_tests(name):
    text = (ROOT / "ablations" / f"{name}.py").read_text()
    said = " ".join(ast.get_docstring(ast.parse(text)).split())
    assert any(place in said for place in ("Sec. ", "Table ", "App. ", "authors"))
    code = text.partition('"""\n\n')[2]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 20


@pytest.mark.parametrize("name", FIELDS)
def test_a_variant_of_options_differs_from_the_method_in_these(load, name):
    _, options = load(name)
    paper, variant = parse([]), parse([*options])
    for path, value in FIELDS[name].items():
        *section, field = path.split(".")
        owner = getattr(variant, section[0]) if section else variant
        assert getattr(owner, field) == value
        restored = {field: getattr(getattr(paper, section[0]) if section else paper, field)}
        owner = replace(owner, **restored)
        variant = replace(variant, **{section[0]: owner}) if section else owner
    assert variant == paper


@pytest.mark.parametrize("name", ["window_40", "window_80", "window_320", "batch_48"])
def test_windows_and_batches_are_compared_at_equal_sample_passes(load, name):
    config = parse([*load(name)[1]])
    assert config.cycles * config.rl_steps * config.batch == 2400


def test_every_variant_sets_options_or_replaces_something(load):
    for name in VARIANTS:
        before = {owner: dict(vars(owner)) for owner in (*MODULES, cycle.Run)}
        _, options = load(name)
        replaced = [
            key
            for owner, names in before.items()
            for key, value in names.items()
            if key != "main" and vars(owner)[key] is not value
        ]
        assert bool(options) != bool(replaced), name
        assert (name in FIELDS) == bool(options), name


def test_rewards_by_hand(load):
    """Errors 3, 0, 0, 4, 0: squares 9 + 16, MAE 7/5; of the first three MAE 1. Quality 2/3."""
    self_scores, judge = (9, 6, 6, 4, 1), (6, 6, 6, 0, 1)
    weights = dict(w_quality=0.7, w_calibration=0.3, gamma=2.0, penalty=-1.0)
    quality = 0.7 * 2 / 3
    brier = load("brier")[0]["brier_reward"](self_scores, judge, **weights)
    assert brier == pytest.approx(quality + 0.3 * (1 - 25 / 5 / 81))
    assert reward.reward is not brier and reward.reward(None, None, **weights) == -1


def test_calibration_of_three_by_hand(load):
    weights = dict(w_quality=0.7, w_calibration=0.3, gamma=2.0, penalty=-1.0)
    load("evaluative_calibration")
    got = reward.reward((9, 6, 6, 4, 1), (6, 6, 6, 0, 1), **weights)
    assert got == pytest.approx(0.7 * 2 / 3 + 0.3 * (8 / 9) ** 2)
    assert reward.reward(None, None, **weights) == -1


def test_advantages_without_the_deviation_by_hand(load):
    load("no_std")
    nan = float("nan")
    got = cycle.group_advantages(torch.tensor([1.0, 2.0, 6.0, 4.0, nan, 0.0]), 3)
    assert got.tolist() == [-2, -1, 3, 2, 0, -2]


def test_rows_of_the_whole_response_and_of_new_tokens(load, tokenizer):
    rollout = make_rollout(tokenizer)
    masked = cycle.distillation_row(rollout, tokenizer)
    load("no_mask")
    whole = cycle.distillation_row(rollout, tokenizer)
    n = len(rollout.prompt_ids)
    assert whole.ids == masked.ids and sum(masked.mask) == 5
    assert whole.mask == [False] * n + [True] * len(rollout.response_ids)


def test_rows_tokenised_anew(load, tokenizer):
    """The same row where the sampled ids are the tokenizer's own; another where they are not."""
    rollout = make_rollout(tokenizer)
    sampled = cycle.distillation_row(rollout, tokenizer)
    apart = [i for c in "It" for i in tokenizer.encode(c, add_special_tokens=False)]
    rest = tokenizer.encode(rollout.text.removeprefix("It"), add_special_tokens=False)
    other = replace(rollout, response_ids=(*apart, *rest))
    assert tokenizer.decode(other.response_ids) == rollout.text
    assert other.response_ids != rollout.response_ids
    load("retokenised")
    row = cycle.distillation_row(rollout, tokenizer)
    assert (row.ids, row.mask) == (sampled.ids, sampled.mask)
    assert cycle.distillation_row(other, tokenizer).ids == sampled.ids


def test_no_latent_goes_on_from_the_base_that_is_given(load, monkeypatch):
    for given in (["--model", "m"], ["--model=m"]):
        monkeypatch.setattr("sys.argv", ["see", "--seed", "1", *given])
        assert load("no_latent")[1] == ("--model", "m-no-latent")


def test_a_rationale_is_asked_for_and_is_no_part_of_the_answer(load, tokenizer):
    conversation = [{"role": "user", "content": "Why?"}]
    without = prompts.policy_prompt(conversation)
    load("rationale")
    asked = prompts.policy_prompt(conversation)
    assert without.count("In short:") == 0 and asked.count("In short:") == 1 + 6
    assert asked.count("[SELF_EVAL]") == without.count("[SELF_EVAL]")
    text = prompts.render_response("It is.\n\nIn short: brief.", (8, 7, 6, 5, 4))
    assert rollout.parse_self_eval(text) == ("It is.", (8, 7, 6, 5, 4))
    for answer in ("It is.", "It is.\n\nIn short: ", "\n\nIn short: brief."):
        assert rollout.parse_self_eval(prompts.render_response(answer, (8,) * 5)) is None
    assert rollout.parse_self_eval("It is.\n\nIn short: brief.") is None
    ids = tokenizer.encode(text)
    digits = [tokenizer.decode([ids[k]]).strip() for k in prompts.score_positions(ids, tokenizer)]
    assert digits == ["8", "7", "6", "5", "4"]
    prompts.check_tokenizer(tokenizer)


def test_scores_first(load, tokenizer):
    """Form, template, positions; the method's own form is malformed, and so is a cut answer."""
    load("scores_first")
    asked = prompts.policy_prompt([{"role": "user", "content": "Why?"}])
    assert asked.count("[END]") == 6 + 3 and asked.count("[/SELF_EVAL]") == 6 + 1
    assert asked.index("Answer the latest") < asked.index("But first write exactly one")
    scores = (8, 7, 6, 5, 4)
    block = prompts.render_self_eval(scores)
    text = prompts.render_response("It is 3.", scores)
    assert text == f"{block}\n\nIt is 3.\n[END]"
    assert rollout.parse_self_eval(text) == ("It is 3.", scores)
    for other in (f"It is 3.\n\n{block}", f"{block}\n\nIt is 3.", f"{block}\n[END]", f"{text} x",
                  f"x {text}", f"{block}{text}", text.replace("3", "[END]")):  # fmt: skip
        assert rollout.parse_self_eval(other) is None, other
    ids = tokenizer.encode(text)
    digits = [tokenizer.decode([ids[k]]).strip() for k in prompts.score_positions(ids, tokenizer)]
    assert digits == ["8", "7", "6", "5", "4"] and sampler.CLOSE == "[END]"
    prompts.check_tokenizer(tokenizer)
    masked = cycle.distillation_row(make_rollout(tokenizer), tokenizer)
    assert sum(masked.mask) == 5


def test_selections_by_hand(load, tokenizer):
    errors = [0, 3, 1, 2, 9, 8]
    buffer = [
        make_rollout(
            tokenizer, scores=(9,) * 5, judge=(9 - e,) * 5, sample=k, prompt="p" * (k // 3)
        )
        for k, e in enumerate(errors)
    ]

    class FakeRun:
        config = parse(["--sft.max_samples", "4", "--sft.per_prompt_limit", "2"])

    load("largest_mae")
    chosen = cycle.Run.select(FakeRun(), buffer, 1)
    # The 2 is its prompt's third.
    assert [9 - r.judge_scores[0] for r in chosen] == [9, 8, 3, 1]


def test_a_random_draw_does_not_look_at_scores(load):
    load("random_selection")
    draw = cycle.select_stratified
    first = draw([(9,) * 5] * 50, ["p"] * 50, 10, 4, 1)
    assert (
        first == draw([(0,) * 5] * 50, ["p"] * 50, 10, 4, 1) != draw([()] * 50, [""] * 50, 10, 4, 2)
    )
    assert len(set(first)) == 10 and sorted(draw([()] * 3, [""] * 3, 10, 4, 1)) == [0, 1, 2]


RUN_EACH = """
import runpy, sys
import cycle

script, args, variants = sys.argv[0], sys.argv[1:-1], sys.argv[-1].split(",")
method, select = dict(vars(cycle)), cycle.Run.select
for name in variants:
    vars(cycle).update(method)
    cycle.Run.select = select
    sys.argv = [script, *args, "--name", name]
    runpy.run_module("ablations." + name, run_name="__main__")
"""


def test_small_runs_of_the_variants_that_change_the_loop(
    tmp_path, parrot_folder, random_folder, tokenizer
):
    labels = dict(helpfulness=3, correctness=4, coherence=4, complexity=1, verbosity=0)
    rows = [
        {"prompt": f"Question {k}?", "response": f"Answer {n}.", **labels}
        for k in range(8)
        for n in range(2)
    ]
    data = tmp_path / "labelled.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = small_args(parrot_folder, data)[1:]
    names = ["distil_alone", "distil_first", "soft_targets", "human_labels"]
    finish(start_ranks(1, ["-c", RUN_EACH, *args, ",".join(names)], tmp_path, PYTHONPATH=str(ROOT)))
    runs = {name: RunFolder(tmp_path / "runs" / name) for name in names}
    lines = {name: run.metrics() for name, run in runs.items()}

    def steps(name: str, cycle: int, phase: str) -> list[dict]:
        return [m for m in lines[name] if (m["cycle"], m["phase"]) == (cycle, phase)]

    # Without an RL step the policy of the second cycle's first step is the base, distilled.
    assert all("grad_norm" not in m for c in (1, 2) for m in steps("distil_alone", c, "rl"))
    assert steps("distil_alone", 1, "sft") and steps("distil_alone", 2, "sft")
    assert all("grad_norm" not in m for m in steps("distil_first", 1, "rl"))
    assert all("grad_norm" in m for m in steps("distil_first", 2, "rl"))
    assert steps("distil_first", 1, "sft") and not steps("distil_first", 2, "sft")
    [first, _] = [m for m in lines["soft_targets"] if m["phase"] == "cycle"]
    assert first["selected"] == 4 * min(first["buffered"], 400 // 4)
    [first, _] = [m for m in lines["human_labels"] if m["phase"] == "cycle"]
    assert first["selected"] == 8 * 2  # a prompt's two responses
