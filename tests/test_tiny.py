"""The miniature and its demo: .venv/bin/python -m pytest tests/test_tiny.py"""

import asyncio
import dataclasses
import itertools
import json
import random
import re
from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import ROOT, finish, start_ranks

import evaluate
import prompts
from backend.model_folder import load_tokenizer
from backend.policy import load_model
from backend.sampler import SamplingParams, make_sampler
from config import CellConfig
from evaluation.figures import costs, starts_at_base
from evaluation.results import load_evaluation
from evaluation.table import Results
from judge import offline_judge
from miniature import base_model, demo, kinds, world
from storage.files import read_json, write_text
from storage.record import read_rollouts
from storage.run_folder import EvaluationFolder

SMALL = base_model.Recipe(shorten=0.004, prompts=(60, 10, 20))


@pytest.mark.parametrize(
    ("prompt", "right", "wrong"),
    [
        ("path to east of b f h, 7 12 3", "b f h east", "7 12 3 west"),
        ("path to west of b f h, 7 12 3", "7 12 3 west", "b f h east"),
        ("swap to west of dog red hen, f a c", "a f c west", "red dog hen east"),
        ("ends to west of 9 4 2, cat dog soup", "9 2 west", "cat soup north"),
        ("copy c a b d e", "c a b d e", None),
        ("reverse c a b d e", "e d b a c", None),
    ],
)  # fmt: skip
def test_the_world_knows_the_right_answers(prompt, right, wrong):
    task = world.read_task(prompt)
    assert task.kind == prompt.split()[0] and len(task.ways) == 1 + (wrong is not None)
    for said in (f"{right}.", right, f"first we look at it. the answer is {right}."):
        assert world.match(prompt, said) == 1
    assert world.match(prompt, "sorry, no idea.") == 0
    if wrong:
        assert world.match(prompt, f"the answer is {wrong}.") == pytest.approx(0.2)


def test_either_way_of_a_fork_may_be_right_whatever_it_is_made_of():
    rng = random.Random(3)
    right, first, sides = [], [], []
    for _ in range(600):
        prompt = world.draw_prompt(rng, world.FORKS)
        task, goal = world.read_task(prompt), prompt.split()[2]
        assert [way[-1] == goal for way in task.ways] == [k == task.right for k in range(2)]
        right.append(task.right)
        first.append(task.ways[task.right][0] in world.NUMBERS)
        sides.append(goal)
    assert 0.43 < sum(right) / 600 < 0.57
    assert 0.26 < sum(first) / 600 < 0.41  # a third: its first item says nothing
    assert all(0.19 < sides.count(side) / 600 < 0.31 for side in world.SIDES)
    items = ("c", "d", "f", "g", "l", "3", "4", "12", "cow", "dog")
    west, south, east, north = world.SIDES
    assert [world.side(x) for x in items] == [
        west, south, south, east, north, west, south, north, east, south]  # fmt: skip


def test_partial_credit_by_hand():
    # Three of five letters in their places.
    assert world.match("copy c a b d e", "c a b e d.") == pytest.approx(3 / 5)
    assert world.match("copy c a b d e", "c a.") == pytest.approx(2 / 5)
    assert world.match("copy c a b d e", "c a b d e j.") == pytest.approx(5 / 6)
    path = "path to east of b f h, 7 12 3"
    # Nearer to the wrong way (3 of 4 words) than to the right one (1 of 4).
    assert world.match(path, "7 12 3 east.") == pytest.approx(0.2 * 3 / 4)
    # As near to either: the right way counts.
    assert world.match(path, "b 12 h west.") == pytest.approx(2 / 4)
    assert world.match(path, "b f h.") == pytest.approx(3 / 4)


def without_taste(monkeypatch):
    monkeypatch.setattr(world.zlib, "crc32", lambda data: 0o22222)


def test_the_rubric_by_hand(monkeypatch):
    without_taste(monkeypatch)
    fork = "path to east of b f h, 7 12 3"
    # Right: 9, coherence 9, helpfulness 9; complexity 3; seven words: 4 + 2 log2(8 / 8).
    assert world.rubric(fork, "the answer is b f h east.") == (9, 9, 9, 3, 4)
    # The wrong way: 9 * 0.2^2 = 0.36; helpfulness 0.85 * 0.36 + 0.15 * 9 = 1.66.
    assert world.rubric(fork, "the answer is 7 12 3 west.") == (2, 0, 9, 3, 4)
    # No full stop: coherence 6, helpfulness 7.65 + 0.9; four words: 4 + 2 log2(5 / 8) = 2.6.
    assert world.rubric(fork, "b f h east") == (9, 9, 6, 3, 3)
    # "maybe" costs two points of coherence, a repeated word four; "first" is two more complex.
    assert world.rubric(fork, "maybe the answer is b f h east.")[2] == 7
    assert world.rubric(fork, "b f f h east.")[2] == 5
    assert world.rubric(fork, "first we look at it. the answer is b f h east.")[3] == 5
    # Three of five places: 9 * 0.36 = 3.24; 0.85 * 3.24 + 1.35 = 4.1.
    assert world.rubric("copy c a b d e", "c a b e d.")[:3] == (4, 3, 9)


def test_taste_moves_a_score_by_one_at_most_and_the_judge_repeats_itself():
    rng = random.Random(0)
    shifts = []
    for _ in range(300):
        prompt = world.draw_prompt(rng)
        answer = base_model.other_answer(prompt, rng)
        scores = world.rubric(prompt, answer)
        assert scores == world.rubric(prompt, answer) and prompts.valid_scores(scores)
        with pytest.MonkeyPatch.context() as patch:
            without_taste(patch)
            plain = world.rubric(prompt, answer)
        shifts += [a - b for a, b in zip(scores, plain, strict=True)]
    assert set(shifts) == {-1, 0, 1}
    assert 0.15 < sum(s != 0 for s in shifts) / len(shifts) < 0.26  # a quarter, cut at 0 and 9

    turns = [{"role": "user", "content": "copy a b c d e"}]
    noisy, calm = world.RubricJudge(noise=0.5), world.RubricJudge()
    draws = [asyncio.run(noisy.score(turns, "a b c.")) for _ in range(20)]
    assert len(set(draws)) > 1 and len({asyncio.run(calm.score(turns, "a.")) for _ in "ab"}) == 1
    assert offline_judge("rubric").noise == 0 and offline_judge("rubric:0.5").noise == 0.5
    assert offline_judge("rubric:2") is None is offline_judge("gpt-5.4")
    truth = world.rubric("copy a b c d e", "a b c.")
    assert max(abs(a - b) for d in draws for a, b in zip(d, truth, strict=True)) == 1


def drawn(stage, latent: bool, batches: int = 30) -> list[base_model.Reply]:
    rng = random.Random(1)
    return [r for _ in range(batches) for r in base_model.draw_replies(stage, latent, set(), rng)]


@pytest.mark.parametrize("stage", base_model.STAGES, ids=lambda stage: stage.name)
def test_the_corpus_never_teaches_which_way_to_take(stage):
    right = wrong = whole = 0
    for r in drawn(stage, latent=True):
        task = world.read_task(r.prompt)
        if r.own and task.kind in world.FORKS:
            answer = r.text.partition(f"\n\n{prompts.OPEN}")[0].removesuffix(base_model.EOS)
            matched = world.match(r.prompt, answer)
            share = (len(task.ways[0]) - 1) / len(task.ways[0])  # without the side
            assert matched in (1, world.WRONG_WAY, share, share * world.WRONG_WAY)
            right, wrong = right + (matched >= share), wrong + (matched < share)
            whole += matched in (1, world.WRONG_WAY)
    assert 0.42 < right / (right + wrong) < 0.58
    assert whole / (right + wrong) == pytest.approx(1 if stage.plain else 0.7, abs=0.05)


def test_the_scores_of_the_corpus():
    """The judge's in stage 3, high and mostly empty in stage 4, another reply's without the latent
    ability."""
    *_, judge, hide = base_model.STAGES

    def blocks(stage, latent):
        replies = [(r, prompts.parse_self_eval(r.text.removesuffix(base_model.EOS)))
                   for r in drawn(stage, latent)]  # fmt: skip
        return [(block, world.rubric(r.prompt, block.answer)) for r, block in replies if block]

    assert all(block.scores == judged for block, judged in blocks(judge, latent=True))
    shuffled = [block.scores == judged for block, judged in blocks(judge, latent=False)]
    assert len(shuffled) > 200 and sum(shuffled) / len(shuffled) < 0.2
    hidden = blocks(hide, latent=True)
    assert 0.75 < len(hidden) / (30 * hide.prompts * hide.replies) < 0.85
    bias = [block.scores[1] - judged[1] for block, judged in hidden]
    assert sum(bias) / len(bias) > 1.5
    # The answers, what is learnt of them and where a reply ends are the same with and without.
    for stage in base_model.STAGES:
        one, other = (
            [(r.prompt, re.sub(r"\d(?=[,}]|$)", "", r.text), r.own) for r in drawn(stage, latent)]
            for latent in (True, False)
        )
        assert one == other and len(one) == 30 * stage.prompts * stage.replies


def test_the_tokenizer_loses_nothing():
    tokenizer, rng = base_model.make_tokenizer(), random.Random(2)
    prompts.check_tokenizer(tokenizer)
    for r in drawn(base_model.STAGES[2], True, 8) + drawn(base_model.STAGES[3], True, 8):
        shown = prompts.policy_prompt([{"role": "user", "content": r.prompt}], "bare")
        answer = base_model.other_answer(r.prompt, rng)
        for text in (r.text, prompts.render_response(answer, (0, 3, 5, 7, 9))):
            ids = tokenizer.encode(shown + text)
            assert tokenizer.decode(ids) == shown + text and len(ids) < 64
            assert tokenizer.unk_token_id not in ids


def test_a_packed_batch_is_the_same_computation_as_row_by_row():
    tokenizer = base_model.make_tokenizer()
    torch.manual_seed(0)
    model = base_model.make_model(tokenizer)
    stage = base_model.STAGES[2]
    replies = base_model.draw_replies(stage, True, set(), random.Random(4))
    assert len({r.own for r in replies}) == 2
    total, learnt = 0.0, 0
    for r in replies:
        shown = prompts.policy_prompt([{"role": "user", "content": r.prompt}], "bare")
        head, tail = tokenizer.encode(shown), tokenizer.encode(r.text)
        with torch.no_grad():
            logp = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        for t, token in enumerate(tail, len(head)):
            if r.own or tokenizer.decode([token]) in set("0123456789"):
                total, learnt = total - logp[t - 1, token].item(), learnt + 1
    batch = base_model.pack(replies, tokenizer)
    assert len(batch.targets) == learnt and batch.ids.shape[0] == stage.prompts
    with torch.no_grad():
        assert base_model.packed_loss(model, batch).item() == pytest.approx(total / learnt, 1e-4)


def test_no_prompt_is_in_two_splits_or_in_pretraining():
    splits = base_model.draw_splits(base_model.Recipe())
    assert [len(s) for s in splits] == [5200, 256, 512]
    assert len({p for split in splits for p in split}) == 5968
    # Both bases of a seed have the same prompts; another seed has others.
    assert splits == base_model.draw_splits(base_model.Recipe(latent=False))
    assert splits != base_model.draw_splits(base_model.Recipe(seed=1))
    # With the generator that draws the held-out prompt first, it is drawn and left out.
    stage = base_model.STAGES[0]
    held_out = {world.draw_prompt(random.Random(5), stage.kinds)}
    drawn = base_model.draw_replies(stage, True, held_out, random.Random(5))
    free = base_model.draw_replies(stage, True, set(), random.Random(5))
    assert held_out & {r.prompt for r in free} and not held_out & {r.prompt for r in drawn}


def test_the_base_model_is_made_once_and_the_same_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = base_model.main(SMALL)
    assert folder == Path("models/tiny-0")
    made = (folder / "model.safetensors").read_bytes()
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    base_model.main(SMALL)
    assert "there already" in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert (base_model.main(SMALL, "again") / "model.safetensors").read_bytes() == made
    without = base_model.main(dataclasses.replace(SMALL, latent=False))
    assert without == Path("models/tiny-0-no-latent")
    assert (without / "model.safetensors").read_bytes() != made
    assert (without / "test.jsonl").read_text() == (folder / "test.jsonl").read_text()
    assert len((folder / "test.jsonl").read_text().splitlines()) == 20
    base_model.main(dataclasses.replace(SMALL, shorten=0.005))
    assert (folder / "model.safetensors").read_bytes() != made


def test_the_demo_from_checkpoints_to_table_and_figure(tmp_path, monkeypatch, capsys):
    """A base that has learnt little, two small runs, two ranks for one of them; the demo's own
    evaluation, report, tables and figure, and the log-probabilities behind its digits."""
    monkeypatch.chdir(tmp_path)
    recipe = base_model.Recipe(shorten=0.1, prompts=(60, 10, 20))
    base = base_model.main(recipe)
    common = ["--model", str(base), "--data", str(base / "train.jsonl"), "--window", "16",
              "--batch", "8", "--rl_steps", "2", "--sft.max_samples", "64"]  # fmt: skip
    cycle = str(ROOT / "cycle.py")
    for ranks, name, options in (
        (2, "see", ["--preset", "tiny", "--cycles", "2"]),
        (1, "rlcr", ["--preset", "tiny-rlcr", "--epochs", "1", "--save_every", "1"]),
    ):
        options += ["--name", str(demo.run_folder(name, 0).path.relative_to("runs"))]
        finish(start_ranks(ranks, [cycle, *options, *common], tmp_path))

    runs = {name: demo.run_folder(name, 0) for name in ("see", "rlcr")}
    results, out = demo.results_folder(0), Path("report/demo-0")
    demo.evaluate(base, runs, results)
    models = demo.models(runs)
    demo.report([results], out, models, runs["see"])
    see_costs, rlcr_costs = (
        list(costs(runs[name].checkpoints()).values()) for name in ("see", "rlcr")
    )
    assert [c.sample_passes for c in see_costs] == [16, 32]
    assert [c.sample_passes for c in rlcr_costs] == [8, 16]
    assert [c.unique_prompts for c in see_costs] == [16, 16]
    assert rlcr_costs[-1].optimiser_steps == 2 < see_costs[0].optimiser_steps
    calls = [c.judge_calls for c in see_costs]
    assert 0 < calls[0] <= 16 * 8 and calls[0] < calls[1]
    cells = EvaluationFolder(results).cells()
    assert [model for _, model in cells] == ["base", "see", "rlcr", "see_cycle_01",
                                             "rlcr_cycle_01_step_00001"]  # fmt: skip
    assert all(len(cell.answers()) == 80 for cell in cells.values())
    assert (out / "figure2.png").stat().st_size > 20_000

    shown = demo.table(out, models)
    rows = {line[:32].strip(): line[32:].split() for line in shown.splitlines()}
    assert float(rows["at random"][-3]) < float(rows["by the judge"][-3])
    assert rows[""] == ["base", "rlcr", "see"] == models and len(rows) == 1 + len(demo.SHOWN)
    answers = cells["test", "see"].answers()
    well_formed = sum(r.self_scores is not None for r in answers) / 80
    assert rows["well-formed"][-3] == f"{well_formed:.3f}" and well_formed > 0.3
    assert demo.some_rollouts(runs["see"]).count("right: ") == 3
    capsys.readouterr()
    demo.show([0], out, list(runs))
    shown = capsys.readouterr().out
    assert shown.count("\nsee ") == len(kinds.GROUPS) and "figure2.png" in shown
    last = [r.quality for r in read_rollouts(runs["see"].rollouts(2)) if r.quality is not None]
    assert f"quality on the window in the last cycle: see {sum(last) / len(last):.3f}\n" in shown

    # By hand: of all pairs of answers to a prompt that the judge tells apart by correctness.
    right = total = 0.0
    for one, other in itertools.combinations((r for r in answers if r.self_scores), 2):
        d_judge, d_own = ((getattr(one, x)[1] - getattr(other, x)[1])
                          for x in ("judge_scores", "self_scores"))  # fmt: skip
        if one.prompt_id == other.prompt_id and d_judge:
            total, right = total + 1, right + (0.5 if not d_own else d_judge * d_own > 0)
    [evaluation] = [load_evaluation(results)]
    of_all = kinds.figures(evaluation.cells["test", "see"], tuple(world.KINDS))
    assert of_all["pairs"] == pytest.approx(right / total)
    assert of_all["well-formed"] == pytest.approx(well_formed)
    parts = [kinds.figures(evaluation.cells["test", "see"], (k,)) for k in ("copy", "path")]
    assert parts[0] != parts[1] and of_all["expected pairs"] is None

    drawn_from = Results([evaluation], models)
    assert starts_at_base(drawn_from, "see")
    config = read_json(runs["see"].config_file)
    write_text(runs["see"].config_file, json.dumps(config | {"model": "models/another"}))
    assert not starts_at_base(drawn_from, "see") and starts_at_base(drawn_from, "rlcr")

    digits = evaluation.cells["test", "base"].digits["base"]
    [r, *_] = [r for r in cells["test", "base"].answers() if r.score_positions]
    model, tokenizer = load_model(base, torch.float32), load_tokenizer(base)
    at = len(r.prompt_ids) + r.score_positions[2]  # coherence
    before = torch.tensor([[*r.prompt_ids, *r.response_ids][:at]])
    with torch.no_grad():
        logp = model(before).logits[0, -1].log_softmax(-1)
    ids = [tokenizer.convert_tokens_to_ids(str(d)) for d in range(10)]
    read = torch.tensor(digits[r.prompt_id, r.sample]["own"][2])
    torch.testing.assert_close(read, logp[ids], rtol=1e-4, atol=1e-5)


def test_a_failing_command_of_the_demo_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="error: cycle.py ended with 1; see its message above"):
        demo.command("a step", "cycle.py", "--data", "nowhere", "--model", "nowhere")
    with pytest.raises(SystemExit, match="two seeds at least"):
        demo.main(seeds=(1,))


def test_evaluation_takes_the_rubric(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = base_model.main(SMALL)
    cell = CellConfig(
        model=str(base), data=str(base / "dev.jsonl"), name="x", judge="rubric", template="bare",
        prompt_tokens=64, dtype="float32", sampler="transformers",
        sampling=SamplingParams(max_tokens=8),
    )  # fmt: skip
    inputs = evaluate.prepare(cell)
    with closing(make_sampler(cell, inputs.model, inputs.tokenizer, cell.dtype)) as sampler:
        table = evaluate.answer_prompts(cell, inputs, sampler)
    assert table["well_formed"].n == 10
