"""The miniature and its demo: .venv/bin/python -m pytest tests/test_tiny.py"""

import asyncio
import random
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
from evaluation.digits import Reader
from evaluation.figures import costs
from judge import offline_judge
from miniature import base_model, demo, world
from storage.run_folder import EvaluationFolder, RunFolder

SMALL = base_model.Recipe(steps=12, prompts=(60, 10, 20))


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("copy c a b d", ["c", "a", "b", "d"]),
        ("reverse c a b d", ["d", "b", "a", "c"]),
        ("sort c a b a", ["a", "a", "b", "c"]),
        ("count b in a b c b a a a a", ["2"]),
        ("add 123 and 45", ["168"]),
        ("multiply 23 by 7", ["161"]),
        ("largest of 12 871 45 300", ["871"]),
        ("next after 3 6 9", ["12"]),
        ("use cat and owl in a sentence", ["cat", "owl"]),
    ],
)
def test_the_world_knows_the_right_answers(prompt, parts):
    kind, solved = world.solve(prompt)
    assert solved == parts and kind == prompt.split()[0]
    right = " ".join(parts) if kind != "use" else "the cat sees the owl"
    for said in (f"{right}.", f"sure, the answer is {right}."):
        assert world._match(prompt, said) == 1
    assert world._match(prompt, "sorry, no idea.") == 0


def test_partial_credit_by_hand():
    # c a against c a b d: half of the places, common subsequence 2 of 4.
    assert world._match("copy c a b d", "c a.") == pytest.approx(0.5)
    # All letters shifted by one: no place right, three of four in order.
    assert world._match("copy a b c d", "d a b c.") == pytest.approx((0 + 3 / 4) / 2)
    # 170 for 168: 0.7 - 3 * 2 / 168; the last number counts.
    assert world._match("add 123 and 45", "170.") == pytest.approx(0.7 - 6 / 168)
    assert world._match("add 123 and 45", "first we look at 123. the answer is 168.") == 1
    # Three of four wanted, one of them twice: 1 - (1 + 1) / 4.
    assert world._match("list 4 foods", "rice bread soup rice.") == pytest.approx(0.5)
    assert world._match("use cat and owl in a sentence", "cat owl.") == pytest.approx(0.7)


def without_taste(monkeypatch):
    monkeypatch.setattr(world.zlib, "crc32", lambda data: 0)


def test_the_rubric_by_hand(monkeypatch):
    without_taste(monkeypatch)
    # Right: correctness 9, coherence 9, helpfulness 9; add is 4 hard, one part; four words of five.
    assert world.rubric("add 123 and 45", "the answer is 168.") == (9, 9, 9, 4, 4)
    # No full stop: coherence 6, helpfulness 0.7 * 9 + 0.3 * 6 = 8.1; 4 + 2 log2(2 / 5) = 1.36.
    assert world.rubric("add 123 and 45", "168") == (8, 9, 6, 4, 1)
    # Refusal: correctness 0, coherence 9, helpfulness 2.7 - 2.
    assert world.rubric("add 123 and 45", "sorry, no idea.")[:3] == (1, 0, 9)
    # Stutter costs four points of coherence; letters may repeat in the content.
    assert world.rubric("copy a a b b", "the the answer is a a b b.")[2] == 5
    assert world.rubric("copy a a b b", "the answer is a a b b.")[2] == 9


def test_taste_moves_a_score_by_one_at_most_and_the_judge_repeats_itself():
    rng = random.Random(0)
    shifts = []
    for _ in range(300):
        prompt = world.draw_prompt(rng)
        answer = base_model.draw_answer(prompt, rng, wrong=0.5)
        scores = world.rubric(prompt, answer)
        assert scores == world.rubric(prompt, answer) and prompts.valid_scores(scores)
        with pytest.MonkeyPatch.context() as patch:
            without_taste(patch)
            plain = world.rubric(prompt, answer)
        shifts += [a - b for a, b in zip(scores, plain, strict=True)]
    assert set(shifts) == {-1, 0, 1}
    assert 0.3 < sum(s != 0 for s in shifts) / len(shifts) < 0.55  # half, less what 0 and 9 cut

    turns = [{"role": "user", "content": "add 1 and 2"}]
    noisy, calm = world.RubricJudge(noise=0.5), world.RubricJudge()
    draws = [asyncio.run(noisy.score(turns, "3.")) for _ in range(20)]
    assert len(set(draws)) > 1 and len({asyncio.run(calm.score(turns, "3.")) for _ in "ab"}) == 1
    assert offline_judge("rubric").noise == 0 and offline_judge("rubric:0.5").noise == 0.5
    assert offline_judge("rubric:2") is None is offline_judge("gpt-5.4")
    truth = world.rubric("add 1 and 2", "3.")
    assert max(abs(a - b) for d in draws for a, b in zip(d, truth, strict=True)) == 1


def test_the_corpus_is_what_it_says():
    rng = random.Random(1)
    bias, broken = [], 0
    for _ in range(2000):
        prompt = world.draw_prompt(rng)
        assert prompts.OPEN not in base_model.draw_reply(prompt, 1, rng)
        block = prompts.parse_self_eval(base_model.draw_reply(prompt, 2, rng))
        assert block.scores == world.rubric(prompt, block.answer)
        text = base_model.draw_reply(prompt, 3, rng)
        block = prompts.parse_self_eval(text)
        broken += block is None
        if block:
            judged = world.rubric(prompt, block.answer)
            bias.append((block.scores[0] + block.scores[1] - judged[0] - judged[1]) / 2)
        good = prompts.render_response("a.", (1, 2, 3, 4, 5))
        assert prompts.parse_self_eval(base_model.break_block(good, rng)) is None
    assert 0.15 < broken / 2000 < 0.21 and sum(bias) / len(bias) > 1.5


def test_the_tokenizer_loses_nothing():
    tokenizer, rng = base_model.make_tokenizer(), random.Random(2)
    prompts.check_tokenizer(tokenizer)
    for _ in range(500):
        prompt = world.draw_prompt(rng)
        shown = prompts.policy_prompt([{"role": "user", "content": prompt}], "bare")
        text = shown + base_model.draw_reply(prompt, 3, rng)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and len(ids) < 64


def test_no_prompt_is_in_two_splits_or_in_pretraining():
    draw_splits, Recipe = base_model.draw_splits, base_model.Recipe
    splits = draw_splits(Recipe())
    assert [len(s) for s in splits] == [5200, 256, 512]
    assert len({p for split in splits for p in split}) == 5968
    assert (
        splits
        == base_model.draw_splits(base_model.Recipe())
        != base_model.draw_splits(base_model.Recipe(seed=1))
    )
    held_out = {world.draw_prompt(random.Random(5)) for _ in range(1)}
    tokenizer = base_model.make_tokenizer()
    # With the generator that draws the held-out prompt first, it is drawn and left out.
    ids, labels = base_model._batch(2, random.Random(5), tokenizer, held_out, size=4)
    read = [tokenizer.decode(row[row != 0]) for row in ids]
    assert not any(f"User: {p}\n" in text for p in held_out for text in read)
    # The loss is on the reply and its end alone.
    for row, label in zip(ids, labels, strict=True):
        text = tokenizer.decode(row[label != -100])
        assert "User" not in text and text.endswith(base_model.EOS)


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
    other = base_model.Recipe(steps=13, prompts=SMALL.prompts)
    base_model.main(other)
    assert (folder / "model.safetensors").read_bytes() != made
    assert len((folder / "test.jsonl").read_text().splitlines()) == 20


def test_the_demo_from_checkpoints_to_table_and_figure(tmp_path, monkeypatch, capsys):
    """A base that has learnt little, two small runs, two ranks for one of them; the demo's own
    evaluation, report, table and figure, and the log-probabilities behind top-5."""
    monkeypatch.chdir(tmp_path)
    recipe = base_model.Recipe(steps=500, stages=(0.1, 0.8, 0.1), prompts=(60, 10, 20))
    base = base_model.main(recipe)
    common = ["--model", str(base), "--data", str(base / "train.jsonl"), "--window", "16"]
    small = ["--batch", "8", "--rl_steps", "2", "--sft.max_samples", "64"]
    cycle = str(ROOT / "cycle.py")
    see = ["--preset", "tiny", "--name", "demo/see-0", "--cycles", "2"]
    rlcr = ["--preset", "tiny-rlcr", "--name", "demo/rlcr-0", "--epochs", "1", "--save_every", "1"]
    finish(start_ranks(2, [cycle, *see, *common, *small], tmp_path))
    finish(start_ranks(1, [cycle, *rlcr, *common, *small], tmp_path))

    runs = [RunFolder(Path(f"runs/demo/{name}-0")) for name in ("see", "rlcr")]
    results, out = Path("results/demo/0"), Path("report/demo-0")
    demo.evaluate(base, *runs, results)
    demo.report([results], out, runs[0])
    see_costs, rlcr_costs = (list(costs(run.checkpoints()).values()) for run in runs)
    assert [c.sample_passes for c in see_costs] == [16, 32]
    assert [c.sample_passes for c in rlcr_costs] == [8, 16]
    assert [c.unique_prompts for c in see_costs] == [16, 16]
    assert rlcr_costs[-1].optimiser_steps == 2 < see_costs[0].optimiser_steps
    calls = [c.judge_calls for c in see_costs]
    assert 0 < calls[0] <= 16 * 8 and calls[0] < calls[1]
    cells = EvaluationFolder(results).cells()
    assert [model for _, model in cells] == ["base", "rlcr", "see", "rlcr_cycle_01_step_00001",
                                             "see_cycle_01"]  # fmt: skip
    assert all(len(cell.answers()) == 20 for cell in cells.values())
    assert (out / "figure2.png").stat().st_size > 20_000

    shown = demo.table(out)
    rows = {line[:28].strip(): line[28:].split() for line in shown.splitlines()}
    assert rows[""] == ["base", "rlcr", "see"] and len(rows) == 1 + len(demo.SHOWN)
    answers = cells["test", "see"].answers()
    well_formed = sum(r.self_scores is not None for r in answers) / 20
    assert rows["well-formed"][-3] == f"{well_formed:.3f}" and well_formed > 0.3
    assert 0 <= float(rows["top-5"][-3]) <= 1
    assert demo.some_rollouts(runs[0]).count("judge") == 2 * 6 // 2

    [r, *_] = [r for r in answers if r.score_positions]
    checkpoint = runs[0].checkpoints()[-1]
    [digits_of_r] = Reader(checkpoint, "float32").own([r])
    model, tokenizer = load_model(checkpoint, torch.float32), load_tokenizer(base)
    at = len(r.prompt_ids) + r.score_positions[2]  # coherence
    before = torch.tensor([[*r.prompt_ids, *r.response_ids][:at]])
    with torch.no_grad():
        logp = model(before).logits[0, -1].log_softmax(-1)
    digits = [tokenizer.convert_tokens_to_ids(str(d)) for d in range(10)]
    torch.testing.assert_close(torch.tensor(digits_of_r[2]), logp[digits], rtol=1e-4, atol=1e-5)


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
