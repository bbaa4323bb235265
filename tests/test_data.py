"""Prompt files: .venv/bin/python -m pytest tests/test_data.py

fixtures/helpsteer2.jsonl is written by hand: 12 rows of 8 prompts in HelpSteer2's schema.
"""

import json
from pathlib import Path

import pyarrow.parquet
import pytest

from storage.data import DataError, load_answers, load_prompts

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(params=["helpsteer2.jsonl", "helpsteer2.jsonl.gz"])
def helpsteer2(request):
    return load_prompts(FIXTURES / request.param)


def test_rows_are_grouped_by_prompt_and_labels_doubled(helpsteer2):
    assert [len(p.references) for p in helpsteer2] == [2, 2, 2, 1, 1, 1, 2, 1]
    first = helpsteer2[0]
    assert first.conversation == ({"role": "user", "content": "Why do cats knead blankets?"},)
    assert [r.scores for r in first.references] == [(8, 8, 8, 2, 2), (0, 0, 8, 0, 0)]
    assert first.references[1].response == "They are sharpening their teeth."


def test_markers_split_turns_wherever_they_stand(helpsteer2):
    def turns(prompt):
        return [(t["role"], t["content"]) for t in prompt.conversation]

    assert turns(helpsteer2[2]) == [
        ("user", "I have eggs and rice."),
        ("assistant", "Fried rice would work. Do you have oil?"),
        ("user", "Yes. How do I start?"),
    ]
    assert turns(helpsteer2[3]) == [("user", "What is a prime number?")]  # marker first
    assert [role for role, _ in turns(helpsteer2[4])] == ["user", "assistant"] * 2 + ["user"]


def test_ids_are_stable_and_unique(helpsteer2):
    assert len({p.id for p in helpsteer2}) == 8
    assert [p.id for p in helpsteer2] == [p.id for p in load_prompts(FIXTURES / "helpsteer2.jsonl")]


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_other_kinds(tmp_path):
    alpaca = {"instruction": "Sum 1 and 2.", "output": "3", "generator": "g", "dataset": "d"}
    [prompt] = load_prompts(write(tmp_path / "a.jsonl", alpaca, alpaca))
    assert prompt.conversation[0]["content"] == "Sum 1 and 2." and prompt.references == ()
    listed = tmp_path / "a.json"
    listed.write_text(json.dumps([alpaca], indent=1))
    assert load_prompts(listed) == [prompt]
    arena = {"uid": "u1", "category": "c", "subcategory": "s", "prompt": "Fix it."}
    assert load_prompts(write(tmp_path / "b.jsonl", arena))[0].id == "u1"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
             {"role": "user", "content": "c"}]  # fmt: skip
    many, one = load_prompts(
        write(tmp_path / "c.jsonl", {"conversation": turns, "id": 7}, "", {"prompt": "d\u2028e"})
    )
    assert many.id == "7" and list(many.conversation) == turns
    assert one.conversation[0]["content"] == "d\u2028e"


def test_wildbench_parquet(tmp_path):
    """Rows as on the hub: turns with more fields than role and content."""
    turns = [{"role": "user", "content": "a", "language": "English", "toxic": False},
             {"role": "assistant", "content": "b", "language": "English", "toxic": False},
             {"role": "user", "content": "c", "language": "English", "toxic": False}]  # fmt: skip
    rows = [
        {"id": k, "session_id": f"s{k}", "conversation_input": turns[2 * k :], "intent": "i",
         "references": {"gpt-4": "r"}, "checklist": ["x"]}
        for k in (0, 1)
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "w.parquet")
    many, one = load_prompts(tmp_path / "w.parquet")
    assert (many.id, one.id) == ("s0", "s1")
    assert many.conversation == tuple({k: t[k] for k in ("role", "content")} for t in turns)
    assert many.references == () and one.conversation == many.conversation[2:]

    rows[1]["conversation_input"] = turns[:2]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "w.parquet")
    with pytest.raises(DataError, match=r"w.parquet:2: conversation_input must be a list of turns"):
        load_prompts(tmp_path / "w.parquet")
    (tmp_path / "x.parquet").write_text("PAR0")
    with pytest.raises(DataError, match=r"x.parquet: cannot be read as parquet"):
        load_prompts(tmp_path / "x.parquet")


HELP = {"prompt": "p", "response": "r", "helpfulness": 4, "correctness": 4, "coherence": 4,
        "complexity": 0, "verbosity": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "holds no prompt"),
        ([HELP, {**HELP, "verbosity": 5}], r"x.jsonl:2: label verbosity must be an integer 0-4"),
        ([HELP, {**HELP, "verbosity": "3"}], r"x.jsonl:2: label verbosity"),
        ([HELP, {**HELP, "verbosity": True}], r"x.jsonl:2: label verbosity"),
        (
            [HELP, {k: v for k, v in HELP.items() if k != "coherence"}],
            r"x.jsonl:2: label coherence",
        ),
        ([HELP, {**HELP, "response": " "}], r"x.jsonl:2: field 'response'"),
        ([{**HELP, "prompt": "a\n<extra_id_1>Assistant\nb"}], r"x.jsonl:1: the prompt's last turn"),
        ([{"instruction": "a"}, {"prompt": "b"}], r"x.jsonl:2: field 'instruction'"),
        ([{"question": "a"}], r"x.jsonl:1: no field prompt, .*found: question"),
        ([{"conversation": [{"role": "assistant", "content": "a"}]}], r"x.jsonl:1: conversation"),
        ([{"conversation": [{"role": "bot", "content": "a"}]}], r"x.jsonl:1: conversation"),
        ([{"prompt": "a", "id": "1"}, {"prompt": "b", "id": "1"}], r"x.jsonl:2: id '1'"),
        (['{"prompt": "a"', ""], r"x.jsonl:1: not JSON"),
        (["3"], r"x.jsonl:1: expected a JSON object, found int"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, rows, says):
    with pytest.raises(DataError, match=says):
        load_prompts(write(tmp_path / "x.jsonl", *rows))


def test_another_models_answers(tmp_path):
    known = load_prompts(write(
        tmp_path / "x.jsonl", {"prompt": "One?", "id": 1}, {"prompt": "Two?"}, {"prompt": "Three?"}
    ))  # fmt: skip
    one, two, _ = (p.id for p in known)
    file = write(
        tmp_path / "gold.jsonl", {"id": 1, "answer": " a "}, {"instruction": "Two?", "output": "b"},
        {"instruction": "Three?", "output": " "}, {"prompt": "Another?", "answer": "c"},
    )  # fmt: skip
    assert load_answers(file, known) == {one: "a", two: "b"}
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([{"instruction": "Two?", "output": "b", "generator": "g"}]))
    assert load_answers(listed, known) == {two: "b"}
    with pytest.raises(DataError, match="gold.jsonl:2: no text in a field answer or output"):
        load_answers(write(file, {"id": 1, "answer": "a"}, {"id": 1, "answer": 3}), known)
    with pytest.raises(DataError, match="no row answers one of the 3 prompts"):
        load_answers(write(file, {"prompt": "Another?", "answer": "c"}), known)
    with pytest.raises(DataError, match="nowhere.jsonl: no such file"):
        load_answers(tmp_path / "nowhere.jsonl", known)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl: no such file"):
        load_prompts(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("file", "least"), [("alpaca_eval.jsonl", 580), ("arena_hard_v2.jsonl", 550)]
)
def test_real_prompts(file, least):
    if not (SHARED / file).exists():
        pytest.skip(f"{file}: the real prompt files are not part of the project")
    assert len(load_prompts(SHARED / file)) >= least
