"""Rollout files and the stratified round-robin: .venv/bin/python -m pytest tests/test_buffer.py"""

import random
from collections import Counter

import pytest
from conftest import make_rollout

from buffer import select_stratified
from storage.files import drop_torn_line
from storage.record import append_rollout, read_rollouts


def test_a_rollout_round_trips(tmp_path, tokenizer):
    path = tmp_path / "r.jsonl"
    first = make_rollout(tokenizer, answer="naïve\u2028🦉")
    bad = make_rollout(tokenizer, sample=1, self_scores=None, score_positions=None, answer=None,
                       judge_scores=None, reward=-1.0)  # fmt: skip
    append_rollout(path, first)
    append_rollout(path, bad)
    assert read_rollouts(path) == [first, bad]


def test_the_later_of_two_lines_counts(tmp_path, tokenizer):
    path = tmp_path / "r.jsonl"
    for reward in (0.1, 0.9):
        append_rollout(path, make_rollout(tokenizer, reward=reward))
    assert [r.reward for r in read_rollouts(path)] == [0.9]


def test_a_torn_last_line_is_dropped_and_any_other_is_an_error(tmp_path, tokenizer):
    path = tmp_path / "r.jsonl"
    append_rollout(path, make_rollout(tokenizer))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="r.jsonl:2"):
        assert len(read_rollouts(path)) == 1
    with pytest.warns(UserWarning, match="cut short"):
        drop_torn_line(path)
    assert path.read_bytes() == whole
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(ValueError, match="r.jsonl:1: not a rollout"):
        read_rollouts(path)


def test_fewer_rows_than_asked_for_are_all_taken_without_the_limit():
    assert sorted(select_stratified([(5,) * 5] * 6, ["p"] * 6, 6, 2, seed=0)) == list(range(6))


def test_rare_scores_are_drawn_first():
    # 96 rows in the middle bin of every attribute, one row low and one high in one attribute.
    scores = [(4, 4, 4, 4, 4)] * 96 + [(0, 4, 4, 4, 4), (4, 9, 4, 4, 4)]
    ids = [f"p{i}" for i in range(98)]
    for seed in range(20):
        drawn = select_stratified(scores, ids, 8, 4, seed)
        # 7 non-empty cells: 5 middle ones and the two rare ones, all visited in the first pass.
        assert {96, 97} <= set(drawn[:7]) and len(set(drawn)) == 8


def test_bins_are_pairs_of_scores():
    # Scores 0 and 1 share a cell, 2 has one of its own: 7 non-empty cells, so a first pass of 7
    # draws always takes row 2 and one of rows 0 and 1, and both only by the odd draw from a cell
    # that they share with the other 100 rows.
    scores = [(0, 9, 9, 9, 9), (1, 9, 9, 9, 9), (2, 9, 9, 9, 9)] + [(9, 9, 9, 9, 9)] * 100
    ids = [f"p{i}" for i in range(103)]
    both = 0
    for seed in range(50):
        drawn = set(select_stratified(scores, ids, 7, 4, seed))
        assert 2 in drawn and drawn & {0, 1}
        both += {0, 1} <= drawn
    assert both <= 10


def test_limits_hold_and_nothing_is_left_that_could_be_drawn():
    rng = random.Random(3)
    scores = [tuple(rng.randrange(10) for _ in range(5)) for _ in range(300)]
    ids = [f"p{rng.randrange(40)}" for _ in range(300)]
    drawn = select_stratified(scores, ids, 250, 4, seed=1)
    per_prompt = Counter(ids[i] for i in drawn)
    assert len(drawn) == len(set(drawn)) and max(per_prompt.values()) == 4
    # The grid emptied first: every row that was not drawn is over its prompt's limit.
    assert len(drawn) < 250
    assert all(per_prompt[ids[i]] == 4 for i in set(range(300)) - set(drawn))


def test_cells_are_shuffled_on_each_pass():
    """A row with equal scores is in five cells of one bin. So a pass over the 25 cells draws five
    rows of each bin, and only the order of the cells says in which order the bins come."""
    scores = [(bin * 2,) * 5 for bin in range(5) for _ in range(60)]
    drawn = select_stratified(scores, [f"p{i}" for i in range(300)], 75, 4, seed=0)
    bins = [scores[i][0] // 2 for i in drawn]
    passes = [tuple(bins[k : k + 25]) for k in (0, 25, 50)]
    assert all(Counter(order) == dict.fromkeys(range(5), 5) for order in passes)
    assert len(set(passes)) == 3


def test_selection_is_a_function_of_its_seed():
    scores = [(i % 10,) * 5 for i in range(100)]
    ids = [f"p{i % 30}" for i in range(100)]
    one = select_stratified(scores, ids, 40, 4, 7)
    assert one == select_stratified(scores, ids, 40, 4, 7)
    assert one != select_stratified(scores, ids, 40, 4, 8)


def test_selection_refuses_bad_rows():
    with pytest.raises(ValueError, match="2 score vectors for 1"):
        select_stratified([(1,) * 5] * 2, ["p"], 1, 4, 0)
    with pytest.raises(ValueError, match="0-9"):
        select_stratified([(1, 1, 1, 1, 10)], ["p"], 1, 4, 0)
