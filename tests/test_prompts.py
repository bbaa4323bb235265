"""The block, the templates, the score tokens: .venv/bin/python -m pytest tests/test_prompts.py"""

import pytest
from conftest import make_tokenizer

import prompts
from prompts import parse_self_eval, render_response, render_self_eval, score_positions

BLOCK = (
    '[SELF_EVAL]\n{"helpfulness": 8, "correctness": 7, "coherence": 6, "complexity": 1, '
    '"verbosity": 0}\n[/SELF_EVAL]'
)


def test_render_is_the_papers_block():
    assert render_self_eval((8, 7, 6, 1, 0)) == BLOCK
    assert render_response("Hi.", (8, 7, 6, 1, 0)) == "Hi.\n\n" + BLOCK


@pytest.mark.parametrize("scores", [(8, 7, 6, 1), (8, 7, 6, 1, 10), (8, 7, 6, 1, -1),
                                    (8, 7, 6, 1, True), (8, 7, 6, 1, 2.0)])  # fmt: skip
def test_render_refuses_what_is_no_score(scores):
    with pytest.raises(ValueError, match="five integers 0-9"):
        render_self_eval(scores)


@pytest.mark.parametrize(
    "text",
    [
        f" An answer.\n\n{BLOCK}",
        f"An answer. {BLOCK}\n \n",
        "An answer." + BLOCK.replace(" ", ""),
        "An answer." + BLOCK.replace(": ", " :\t"),
    ],
)
def test_well_formed(text):
    assert parse_self_eval(text) == ("An answer.", (8, 7, 6, 1, 0))


MALFORMED = {
    "no block": "An answer.",
    "empty answer": BLOCK,
    "white answer": " \n" + BLOCK,
    "text after": f"A. {BLOCK} and more",
    "two blocks": f"A. {BLOCK}\n{BLOCK}",
    "second open tag": "A [SELF_EVAL] b. " + BLOCK,
    "second close tag": "A [/SELF_EVAL] b. " + BLOCK,
    "lower-case tags": "A. " + BLOCK.replace("SELF_EVAL", "self_eval"),
    "no close tag": "A. " + BLOCK.removesuffix("[/SELF_EVAL]"),
    "leading zero": "A. " + BLOCK.replace("8", "08"),
    "two digits": "A. " + BLOCK.replace("8", "10"),
    "float": "A. " + BLOCK.replace("8", "8.0"),
    "minus zero": "A. " + BLOCK.replace(": 0", ": -0"),
    "true": "A. " + BLOCK.replace("8", "true"),
    "string": "A. " + BLOCK.replace("8", '"8"'),
    "null": "A. " + BLOCK.replace("8", "null"),
    "other digit": "A. " + BLOCK.replace("8", "٨"),  # ARABIC-INDIC DIGIT EIGHT
    "missing key": "A. " + BLOCK.replace(', "verbosity": 0', ""),
    "extra key": "A. " + BLOCK.replace("}", ', "style": 3}'),
    "duplicate key": "A. " + BLOCK.replace("{", '{"helpfulness": 8, '),
    "other order": "A. " + BLOCK.replace("helpfulness", "x").replace("correctness", "helpfulness")
    .replace('"x"', '"correctness"'),
    "capital key": "A. " + BLOCK.replace("helpfulness", "Helpfulness"),
    "single quotes": "A. " + BLOCK.replace('"', "'"),
    "trailing comma": "A. " + BLOCK.replace("0}", "0,}"),
    "no-break space": "A. " + BLOCK.replace(": 8", ":\u00a08"),
    "fenced": "A. " + BLOCK.replace("[SELF_EVAL]\n", "[SELF_EVAL]\n```json\n"),
}  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_malformed(text):
    assert parse_self_eval(text) is None


@pytest.mark.parametrize(
    "answer", ["It is fine.", "9 of 10 [x]", "naïve café 🦉 漢字\n\n```\n8\n```"]
)
def test_score_positions_are_the_five_digits(tokenizer, answer):
    ids = tokenizer.encode(render_response(answer, (8, 7, 6, 1, 0)) + "\n")
    positions = score_positions(ids, tokenizer)
    assert [tokenizer.decode([ids[p]]) for p in positions] == ["8", "7", "6", "1", "0"]
    assert sorted(positions) == list(positions)


def test_score_positions_of_malformed_ids_are_none(tokenizer):
    ids = tokenizer.encode(render_response("Hi.", (8, 7, 6, 1, 0)))
    assert score_positions(ids[:-1], tokenizer) is None
    assert score_positions([*ids, tokenizer.eos_token_id], tokenizer) is None


def test_digit_ids_keep_the_form_of_the_token():
    class Spaced:
        """Digits with and without a space are different tokens."""

        pieces = [*"0123456789", *("Ġ" + d for d in "0123456789"), "x"]

        def convert_ids_to_tokens(self, i):
            return self.pieces[i]

        def convert_tokens_to_ids(self, piece):
            return self.pieces.index(piece) if piece in self.pieces else None

        def decode(self, ids, **_):
            return "".join(self.pieces[i] for i in ids).replace("Ġ", " ")

    assert prompts.digit_ids(3, Spaced()) == tuple(range(10))
    assert prompts.digit_ids(13, Spaced()) == tuple(range(10, 20))
    assert prompts.digit_ids(20, Spaced()) is None


def test_a_tokenizer_without_single_digits_is_named():
    merged = make_tokenizer("merged")
    merged.name_or_path = "some/model"
    text = render_response("Hi.", (8, 8, 8, 8, 8))
    assert any(len(t) > 1 and "8" in t for t in merged.tokenize(text))
    with pytest.raises(
        ValueError, match=r"tokenizer some/model \(TokenizersBackend\): .*one token"
    ):
        prompts.check_tokenizer(merged)
    assert score_positions(merged.encode(text), merged) is None


def test_prompt_ends_and_keeps_a_conversation_that_holds_placeholders():
    turns = [
        {"role": "user", "content": "What is {FEW_SHOT_EXAMPLES}?"},
        {"role": "assistant", "content": "A placeholder."},
        {"role": "user", "content": "And {REAL_CONVERSATION_TRANSCRIPT}?"},
    ]
    for template in prompts.TEMPLATES:
        text = prompts.policy_prompt(turns, template)
        assert text.endswith(
            "User: What is {FEW_SHOT_EXAMPLES}?\n\nAssistant: A placeholder.\n\n"
            "User: And {REAL_CONVERSATION_TRANSCRIPT}?\n\nFinal assistant output:\n"
        )


@pytest.mark.parametrize("name", prompts.FEW_SHOT)
def test_few_shot_sets(name):
    examples = prompts.FEW_SHOT[name]
    assert len(examples) == 6
    for e in examples:
        assert parse_self_eval(render_response(e.answer, e.scores)) == (e.answer, e.scores)
        shown = prompts.policy_prompt([{"role": "user", "content": "x"}], "paper", name)
        assert e.request in shown and e.answer in shown
    if name == "paper-like":  # the authors': 8/8/8 with complexity and verbosity 0-2
        assert all(e.scores[:3] == (8, 8, 8) and max(e.scores[3:]) <= 2 for e in examples)
    else:
        for a in range(3):
            assert (
                min(e.scores[a] for e in examples) <= 2 and max(e.scores[a] for e in examples) == 9
            )


def test_judge_prompt_shows_references_and_no_block():
    turns = [{"role": "user", "content": "Why?"}]
    plain = prompts.judge_user(turns, "Because.")
    assert plain.startswith("[User]\nWhy?\n\n[AI Assistant’s Response to Evaluate]\nBecause.\n\n")
    assert plain.endswith('{"helpfulness": <int>, "correctness": <int>, "coherence": <int>, '
                          '"complexity": <int>, "verbosity": <int>}')  # fmt: skip
    shown = prompts.judge_user(turns, "Because.", [("So.", (8, 6, 8, 2, 0))])
    assert "--- Reference Response 1 ---\nSo.\n" in shown
    assert 'resized 0-9): {"helpfulness": 8, "correctness": 6, "coherence": 8, ' in shown


def test_stray_labels_and_fences_are_seen():
    assert prompts.stray("All good.") == {"open_fence": False, "stray_label": False}
    assert prompts.stray("```py\nx = 1")["open_fence"]
    assert not prompts.stray("```py\nx = 1\n```")["open_fence"]
    assert prompts.stray("Fine.\nUser: and then?")["stray_label"]
