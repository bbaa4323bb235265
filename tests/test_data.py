"""Prompt files: .venv/bin/python -m pytest tests/test_data.py

fixtures/helpsteer2.jsonl is written by hand: 12 rows of 8 prompts in HelpSteer2's schema.
"""

import json
from pathlib import Path

import pyarrow.parquet
import pytest

from storage.answers import load_answers
from storage.data import DataError, Prompt, load_prompts

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


HELPSTEER2 = [
    {"role": "user", "content": "Eggs."}, {"role": "assistant", "content": "Fried?"},
    {"role": "user", "content": "Yes."},
]  # fmt: skip


def said(answer, *turns):
    return [*turns, {"role": "assistant", "content": answer}]


# Rows of real files in their own form; each answers one of the prompts below with "A.".
FORMS = {
    "AlpacaEval": {"instruction": "Two?", "output": "A.", "generator": "g"},
    "white space": {"instruction": " Two?\n", "output": " A.\n"},
    "more white space": {"instruction": "Caf\u00e9  au\nlait? ", "output": "A."},
    "Unicode form": {"instruction": "Cafe\u0301 au lait?", "output": "A."},
    "Arena-Hard v2.0": {
        "uid": "u1", "ans_id": "x", "model": "m",
        "messages": said({"answer": "A."}, {"role": "user", "content": "Fix it."}),
    },
    "Arena-Hard v0.1": {
        "question_id": "u1", "answer_id": "x", "model_id": "m",
        "choices": [{"index": 0, "turns": [{"content": "A.", "token_len": 2}]}],
    },
    "messages without id": {"messages": said("A.", {"role": "user", "content": "Two?"})},
    "WildBench": {"session_id": "s1", "chat_history": ["Hi."], "output": ["A."], "generator": "g"},
    "WildBench's turns": {"conversation_input": HELPSTEER2, "output": ["A."]},
    "HelpSteer2": {
        "prompt": "Eggs.\n<extra_id_1>Assistant\nFried?\n<extra_id_1>User\nYes.", "response": "A."
    },
    "a conversation": {"conversation": said("A.", *HELPSTEER2)},
    "id": {"id": 1, "answer": "A."},
}  # fmt: skip


@pytest.fixture
def known():
    """Six prompts; the first one's id is "1"."""
    texts = {"1": "One?", "two": "Two?", "cafe": "Caf\u00e9 au lait?", "u1": "Fix it.", "s1": "Hi."}
    single = [Prompt(i, ({"role": "user", "content": text},)) for i, text in texts.items()]
    return [*single, Prompt("eggs", tuple(HELPSTEER2))]


@pytest.mark.parametrize(("form", "prompt"), list(zip(
    FORMS, ("two", "two", "cafe", "cafe", "u1", "u1", "two", "s1", "eggs", "eggs", "eggs", "1"),
    strict=True,
)))  # fmt: skip
def test_another_models_answers_in_every_form(tmp_path, known, form, prompt):
    file = write(tmp_path / "gold.jsonl", FORMS[form])
    assert load_answers(file, known) == ({prompt: "A."}, 5, 0, 0, 0)
    (tmp_path / "list.json").write_text(json.dumps([FORMS[form]]))
    assert load_answers(tmp_path / "list.json", known).texts == {prompt: "A."}


def test_answers_are_counted_and_none_vanishes(tmp_path, known):
    file = write(
        tmp_path / "gold.jsonl", {"instruction": "Two?", "output": " "},
        {"uid": "u1", "output": "Fixed."}, {"instruction": "Two?", "output": "Later."},
        {"instruction": "Another?", "output": "c"}, {"id": "1", "prompt": "Else?", "answer": "d"},
    )  # fmt: skip
    found = load_answers(file, known)
    # Empty, and an answer; the later one does not count; the last row's id is another file's.
    assert found.texts == {"two": "", "u1": "Fixed."}
    assert found.counts() == {
        "answers": 2, "missing": 4, "empty": 1, "repeated": 1, "unmatched": 2
    }  # fmt: skip
    assert "answers to 2 of 6 prompts, 1 of them empty; 4 prompts lack one" in str(found)


@pytest.mark.parametrize(("row", "says"), [
    ({"id": 1, "answer": 3}, "gold.jsonl:2: no text in a field answer, output"),
    ({"id": 1, "output": []}, "gold.jsonl:2: no text in"),
    ({"uid": "u1", "messages": HELPSTEER2}, "gold.jsonl:2: no text in"),
    ({"uid": "u1", "choices": ["A."]}, "gold.jsonl:2: no text in"),
])  # fmt: skip
def test_rows_without_an_answer_are_named(tmp_path, known, row, says):
    with pytest.raises(DataError, match=says):
        load_answers(write(tmp_path / "gold.jsonl", FORMS["id"], row), known)


def test_files_without_answers_are_named(tmp_path, known):
    file = write(tmp_path / "gold.jsonl", {"prompt": "Another?", "answer": "c"})
    with pytest.raises(DataError, match="no row answers one of the 6 prompts"):
        load_answers(file, known)
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
