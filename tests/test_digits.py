"""The ten-digit distributions against plain forward passes: .venv/bin/python -m pytest
tests/test_digits.py"""

import pytest
import torch
from conftest import make_rollout

import prompts
from backend.policy import load_model
from evaluation.digits import Question, Reader

ANSWERS = ("It is fine.", "It is old and good, and it is what it is.", "Well.")
PROMPTS = ("Say something.", "Say something about rain and tea and cats.", "Say?")
JUDGE = (3, 1, 4, 1, 5)


@pytest.fixture(scope="module", params=[("llama", True), ("qwen3", False)])
def reader(request, random_folder):
    folder = random_folder(*request.param)
    found = Reader(folder, "float32")
    found.plain = load_model(folder, torch.float32).eval()
    return found


def plain(reader, prompt_ids, response_ids):
    """(5, 10) by one forward pass of one row, without cache or padding."""
    positions = prompts.score_positions(response_ids, reader.tokenizer)
    with torch.no_grad():
        logits = reader.plain(input_ids=torch.tensor([[*prompt_ids, *response_ids]])).logits[0]
    logp = logits.log_softmax(-1)
    return [
        [logp[len(prompt_ids) + p - 1, i].item()
         for i in prompts.digit_ids(response_ids[p], reader.tokenizer)]
        for p in positions
    ]  # fmt: skip


def laid(reader, answer, scores):
    text = prompts.render_response(answer, scores)
    return reader.tokenizer.encode(text, add_special_tokens=False)


def test_own_digits(reader, tokenizer):
    rollouts = [make_rollout(tokenizer, a, (8, 2, 0, 9, 5), prompt=p)
                for a, p in zip(ANSWERS, PROMPTS, strict=True)]  # fmt: skip
    got = reader.own(rollouts)
    for r, rows in zip(rollouts, got, strict=True):
        assert torch.tensor(rows).allclose(
            torch.tensor(plain(reader, r.prompt_ids, r.response_ids)), atol=1e-4
        )


def test_free_and_judge_digits_of_any_answer(reader):
    questions = [
        Question(tuple(reader.tokenizer.encode(p)), a, JUDGE if k else None)
        for k, (a, p) in enumerate(zip(ANSWERS, PROMPTS, strict=True))
    ]
    for q, got in zip(questions, reader.read(questions), strict=True):
        # Free: the digits found so far, whatever stands behind them, then the next position.
        scores = [0] * 5
        for k in range(5):
            rows = plain(reader, q.prompt_ids, laid(reader, q.answer, scores))
            assert got.free[k] == pytest.approx(rows[k], abs=1e-4)
            scores[k] = max(range(10), key=lambda d: rows[k][d])
        assert got.scores == tuple(scores)
        if q.judge is None:
            assert got.judge is None
        else:
            rows = plain(reader, q.prompt_ids, laid(reader, q.answer, q.judge))
            assert torch.tensor(got.judge).allclose(torch.tensor(rows), atol=1e-4)


def test_a_rows_reading_does_not_depend_on_its_neighbours(reader):
    questions = [Question(tuple(reader.tokenizer.encode(PROMPTS[k % 3])), ANSWERS[k % 3], JUDGE)
                 for k in range(40)]  # fmt: skip
    together, alone = reader.read(questions), reader.read(questions[:1])[0]
    assert torch.tensor(together[0].free).allclose(torch.tensor(alone.free), atol=1e-4)
    assert torch.tensor(together[39].judge).allclose(torch.tensor(together[0].judge), atol=1e-4)
    assert reader.read([]) == []


def test_shared_digits_have_no_reading(random_folder, monkeypatch):
    reader = Reader(random_folder("llama", True), "float32")
    monkeypatch.setattr("evaluation.digits.score_positions", lambda ids, tokenizer: None)
    assert reader.read([Question((5, 6), "It is.", JUDGE)]) == [None]
