"""What an export says about itself: .venv/bin/python -m pytest tests/test_model_card.py"""

import dataclasses
import json

import pytest
from huggingface_hub import ModelCard as HubCard

import evaluate
from config import PRESETS, CellConfig
from judging.endpoint import Endpoint
from judging.heuristic import HeuristicJudge
from storage import hub, model_card
from storage.data import Prompt
from storage.files import FileError
from storage.model_card import add_held_out, card_files, of_run, read_card

LICENCE = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\ntags: [a]\n---\n# Base\n"


class Asked:
    """A judge at an endpoint."""

    name, client = "some-judge", object()


@pytest.fixture
def card(tmp_path, tokenizer):
    (tmp_path / "README.md").write_text(LICENCE)
    config = dataclasses.replace(
        PRESETS["paper"], data=str(tmp_path / "secret" / "train.jsonl"),
        endpoint=Endpoint("http://10.1.2.3:8000/v1", temperature=0.3),
    )  # fmt: skip
    window = [Prompt(i, ({"role": "user", "content": f"Say {i}."},)) for i in "ab"]
    return of_run(config, tmp_path, (15, None), Asked(), window, tokenizer, (8, 8, 8, 2, 1))


def write(folder, card):
    folder.mkdir(exist_ok=True)
    for name, text in card_files(card).items():
        (folder / name).write_text(text)


FIGURES = {
    "judge": "some-judge", "prompts": 9,
    "metrics": {"quality": {"mean": 0.51239, "low": 0.4, "high": 0.6, "n": 9},
                "mae": {"mean": None, "low": None, "high": None, "n": 0}},
}  # fmt: skip


def test_an_export_says_how_it_was_trained(card, tmp_path):
    write(tmp_path / "out", card)
    assert read_card(tmp_path / "out") == card
    assert card.window == ["a", "b"] and len(card.tokens) == 2
    header = HubCard.load(tmp_path / "out" / "README.md").data
    assert (header.license, header.license_name, header.license_link) == (
        "other", "mine", "LICENSE"
    )  # fmt: skip
    assert header.base_model == "Qwen/Qwen3-4B-Base" and header.datasets is None
    text = (tmp_path / "out" / "README.md").read_text()
    assert "cycle 15" in text and "some-judge (use_references True, temperature 0.3" in text
    assert "User: {REQUEST}" in text and "None yet." in text
    both = text + (tmp_path / "out" / "self_eval.json").read_text()
    for private in ("10.1.2.3", "secret", str(tmp_path)):
        assert private not in both


def test_unlike_by_hand(card):
    """In common: {1, 2} and {1, 2, 3, 4} 2 / sqrt(8), {5, 6, 7, 8} and {4, 5, 6, 7, 8, 9} 4 /
    sqrt(24); so the nearest neighbours are 0.71, 0.71, 0.82, 0.82 alike."""
    card = dataclasses.replace(
        card, tokens=[[1, 2], [1, 2, 3, 4], [5, 6, 7, 8], [4, 5, 6, 7, 8, 9]]
    )
    assert card.unlike({1, 2, 3, 4}) == 0  # a prompt of the window
    assert card.unlike({1, 2, 3}) == 0  # 3 / sqrt(12) = 0.87
    assert card.unlike({1, 2, 10, 11}) == 0.5  # 2 / sqrt(8): no less than the least alike have
    assert card.unlike({1, 2, 3, 4, 10, 11, 12}) == 0.5  # 4 / sqrt(28) = 0.756
    far = card.unlike({1, 2, 10, 11, 12})  # 2 / sqrt(10) = 0.63
    assert far == 1 and model_card.is_far(far) and card.unlike(set()) == card.unlike({99}) == 1
    assert not model_card.is_far(0.99) and not model_card.is_far(None)
    assert dataclasses.replace(card, tokens=[]).unlike({1}) is None


def test_a_base_without_a_card_has_no_known_licence(tmp_path):
    assert hub.licence(tmp_path) == {"license": "unknown"}
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert hub.licence(tmp_path) == {"license": "unknown"}
    local = dataclasses.replace(PRESETS["paper"], model=str(tmp_path))
    card = of_run(local, tmp_path, (1, 10), HeuristicJudge(), [], None, None)
    assert card.base == tmp_path.name and card.unlike({1}) is None
    text = card_files(card)["README.md"]
    assert "base_model" not in text and "cycle 1, RL step 10" in text and "not known." in text


def test_held_out_figures_are_added_and_those_of_the_window_are_not(card, tmp_path):
    folder = tmp_path / "out"
    write(folder, card)
    add_held_out(folder, "seen", FIGURES, ["c", "b"])
    assert read_card(folder).held_out == {}
    add_held_out(folder, "new", FIGURES, ["c", "d"])
    assert read_card(folder).held_out == {"new": FIGURES}
    text = (folder / "README.md").read_text()
    assert "| new | some-judge | quality | 0.512 | 0.400 to 0.600 | 9 |" in text
    assert "mae" not in text
    add_held_out(tmp_path, "new", FIGURES, [])  # a model without self_eval.json
    assert (tmp_path / "README.md").read_text() == LICENCE


DAMAGE = {
    "not JSON": (lambda row: "{", "cannot be read as JSON"),
    "a field is missing": (lambda row: json.dumps({k: v for k, v in row.items() if k != "window"}),
                           "has no window; restore the file"),
    "template": (lambda row: json.dumps(row | {"template": "new"}), "template cannot be used"),
    "tokens": (lambda row: json.dumps(row | {"tokens": [[1], ["a"]]}), "tokens cannot be used"),
    "attributes": (lambda row: json.dumps(row | {"attributes": ["truth"]}), "scores truth from"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "says"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_told(card, tmp_path, damage, says):
    (tmp_path / "self_eval.json").write_text(damage(dataclasses.asdict(card)))
    with pytest.raises(FileError, match=f"self_eval.json: .*{says}"):
        read_card(tmp_path)


def test_an_evaluation_with_another_prompt_is_refused(
    card, random_folder, prompt_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = random_folder("qwen3", False)
    own = dataclasses.replace(
        card, template="short", prompt=model_card.prompt_text("short", "paper-like")
    )
    cell = CellConfig(
        model=str(folder), data=str(prompt_file), name="x", template="short", prompt_tokens=700,
        sampling=dataclasses.replace(CellConfig.__dataclass_fields__["sampling"].default_factory(),
                                     max_tokens=100),
    )  # fmt: skip
    try:
        write(folder, own)
        assert len(evaluate.prepare(cell).prompts) == 12
        with pytest.raises(ValueError, match="trained with --template short .*give --template sh"):
            evaluate.prepare(dataclasses.replace(cell, template="bare"))
        write(folder, dataclasses.replace(own, prompt="Something else."))
        with pytest.raises(ValueError, match="trained with another text of the template short"):
            evaluate.prepare(cell)
    finally:
        for name in (model_card.FILE, model_card.README):
            (folder / name).unlink()
