"""The block, the templates, the score tokens: .venv/bin/python -m pytest tests/test_prompts.py"""

import random

import pytest
from conftest import make_tokenizer

import prompts
from prompts import (
    parse_self_eval,
    render_response,
    render_self_eval,
    score_positions,
    why_malformed,
)

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


MALFORMED = {  # name -> (text, the reason that is given)
    "no block": ("An answer.", "no [SELF_EVAL]"),
    "empty answer": (BLOCK, "no answer before the block"),
    "white answer": (" \n" + BLOCK, "no answer before the block"),
    "text after": (f"A. {BLOCK} and more", "text after the block"),
    "two blocks": (f"A. {BLOCK}\n{BLOCK}", "more than one [SELF_EVAL]"),
    "second open tag": ("A [SELF_EVAL] b. " + BLOCK, "more than one [SELF_EVAL]"),
    "second close tag": ("A [/SELF_EVAL] b. " + BLOCK, "more than one [/SELF_EVAL]"),
    "tags the other way round": ("A [/SELF_EVAL] b [SELF_EVAL]", "[/SELF_EVAL] before [SELF_EVAL]"),
    "lower-case tags": ("A. " + BLOCK.replace("SELF_EVAL", "self_eval"), "no [SELF_EVAL]"),
    "no close tag": ("A. " + BLOCK.removesuffix("[/SELF_EVAL]"), "no [/SELF_EVAL]"),
    "leading zero": ("A. " + BLOCK.replace("8", "08"), "helpfulness is '08', not one digit 0-9"),
    "two digits": ("A. " + BLOCK.replace("1", "10"), "complexity is '10', not one digit 0-9"),
    "float": ("A. " + BLOCK.replace("8", "8.0"), "helpfulness is '8.0', not one digit 0-9"),
    "minus zero": ("A. " + BLOCK.replace(": 0", ": -0"), "verbosity is '-0', not one digit 0-9"),
    "true": ("A. " + BLOCK.replace("8", "true"), "helpfulness is 'true', not one digit 0-9"),
    "string": ("A. " + BLOCK.replace("8", '"8"'), "helpfulness is '\"8\"', not one digit 0-9"),
    "null": ("A. " + BLOCK.replace("8", "null"), "helpfulness is 'null', not one digit 0-9"),
    "no value": ("A. " + BLOCK.replace(" 8", ""), "helpfulness is '', not one digit 0-9"),
    "other digit": ("A. " + BLOCK.replace("8", "٨"),  # ARABIC-INDIC DIGIT EIGHT
                    "helpfulness is '٨', not one digit 0-9"),
    "missing key": ("A. " + BLOCK.replace(', "verbosity": 0', ""), "the block lacks verbosity"),
    "extra key": ("A. " + BLOCK.replace("}", ', "style": 3}'), "the block has another key, style"),
    "duplicate key": ("A. " + BLOCK.replace("{", '{"helpfulness": 8, '),
                      "the block's keys are not the five in their order, each once"),
    "other order": ("A. " + BLOCK.replace("helpfulness", "x").replace("correctness", "helpfulness")
                    .replace('"x"', '"correctness"'),
                    "the block's keys are not the five in their order, each once"),
    "escaped key": ("A. " + BLOCK.replace("helpf", "\\u0068elpf"),
                    "the block's keys are not the five in their order, each once"),
    "capital key": ("A. " + BLOCK.replace("helpf", "Helpf"), "the block lacks helpfulness"),
    "single quotes": ("A. " + BLOCK.replace('"', "'"), "the block holds no JSON object"),
    "trailing comma": ("A. " + BLOCK.replace("0}", "0,}"), "the block holds no JSON object"),
    "no-break space": ("A. " + BLOCK.replace(": 8", ":\u00a08"),
                       "helpfulness is '\\xa08', not one digit 0-9"),
    "fenced": ("A. " + BLOCK.replace("[SELF_EVAL]\n", "[SELF_EVAL]\n```json\n"),
               "the block holds no JSON object"),
    "a list": ("A. [SELF_EVAL][8, 7, 6, 1, 0][/SELF_EVAL]", "the block holds no JSON object"),
    "deep": (f"A. [SELF_EVAL]{'[' * 9999}[/SELF_EVAL]", "the block holds no JSON object"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_malformed(text, reason):
    assert parse_self_eval(text) is None
    assert why_malformed(text) == reason


def test_a_reason_is_given_for_exactly_the_malformed():
    """Over responses with a few random edits; both kinds occur."""
    rng = random.Random(0)
    pieces = [*"0189{}[],:\"' \n\t\u00a0\x1f", "[SELF_EVAL]", "[/SELF_EVAL]", "coherence", ""]
    found = {True: 0, False: 0}
    for _ in range(4000):
        text = f"A.\n\n{BLOCK}\n"
        for _ in range(rng.choice((1, 1, 2))):
            start = rng.randrange(len(text) + 1)
            text = text[:start] + rng.choice(pieces) + text[start + rng.choice((0, 0, 0, 1, 30)) :]
        malformed = parse_self_eval(text) is None
        assert (why_malformed(text) is not None) == malformed, text
        found[malformed] += 1
    assert min(found.values()) > 200


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
    if name == "paper-like":  # the authors', in their order
        assert ["".join(map(str, e.scores)) for e in examples] == [
            "88800", "88822", "88820", "88822", "88822", "88822"
        ]  # fmt: skip
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
