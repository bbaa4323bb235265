"""What evaluate.py does with a cell's answers once they are judged: scores read from other models,
further judgements, preferences. Each writes lines of JSON that name the answer they are about and
the weights that were asked, and goes on where it was stopped."""

import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from backend import parallel
from config import CellConfig, EvaluationConfig
from evaluation.digits import Question, Reader, Reading
from evaluation.judgements import Answer, judge_again
from evaluation.prompt_states import read_states, write_states
from judge import ask_all, make_judge, prefer
from judging.client import Background
from judging.endpoint import Endpoint
from prompts import special_tokens
from storage.answers import Answers
from storage.data import Prompt
from storage.files import append_line, read_lines, write_text
from storage.progress import progress
from storage.record import Rollout, answer_id, answer_text
from storage.run_folder import CellFolder, RunFolder

CHUNK = 64  # answers between two writes: what a kill can cost


def line_about(r: Rollout, version: str, **values: object) -> dict:
    answer = {"prompt_id": r.prompt_id, "sample": r.sample, "answer_id": answer_id(r)}
    return answer | {"version": version} | values


# --------------------------------------------------------------------------------------------------
# What models would write at the score positions


def unread_chunks(
    path: Path, version: str, rollouts: Sequence[Rollout], label: str
) -> Iterator[tuple[Sequence[Rollout], set[tuple]]]:
    """This rank's chunks of answers that lack a line in the file under this version, and the keys
    of those answers. A chunk is read whole, so that a figure does not depend on a kill or on the
    number of ranks. Collective."""
    lines = [row for _, _, row in read_lines(path)] if path.exists() else []
    done = {(x["prompt_id"], x["sample"], x["answer_id"]) for x in lines if x["version"] == version}
    chunks = [rollouts[i : i + CHUNK] for i in range(0, len(rollouts), CHUNK)]
    unread = []
    for chunk in chunks[parallel.rank() :: parallel.world_size()]:
        lacking = {r.key for r in chunk if (r.prompt_id, r.sample, answer_id(r)) not in done}
        if lacking:
            unread.append((chunk, lacking))
    parallel.barrier()  # every rank has read the file before one writes
    yield from progress(unread, desc=label, total=len(unread), leave=False, rank=parallel.rank())
    parallel.barrier()


def read_digits(cell: CellFolder, scorer: str, reader: Reader, version: str) -> None:
    """What the scorer would write after each of the cell's answers; for its own answers also after
    the digits that it sampled (`own`)."""
    path = cell.digits_file(scorer)
    own_cell = cell.path.name == scorer
    special = special_tokens(reader.tokenizer)
    answered = [r for r in cell.answers() if answer_text(r, special)]
    for rows, lacking in unread_chunks(path, version, answered, f"{scorer} reads {cell}"):
        questions = [Question(r.prompt_ids, answer_text(r, special), r.judge_scores) for r in rows]
        blocks = [r for r in rows if own_cell and r.score_positions is not None]
        own = dict(zip((r.key for r in blocks), reader.own(blocks), strict=True))
        for r, reading in zip(rows, reader.read(questions), strict=True):
            values = reading._asdict() if reading else dict.fromkeys(Reading._fields)
            if r.key in lacking:
                append_line(path, line_about(r, version, **values, own=own.get(r.key)))


def read_training_window(path: Path, run: RunFolder, reader: Reader, version: str) -> None:
    """The base model's scores for the answers of a run's first cycle, on which it is
    recalibrated."""
    label = "the base reads the training window"
    for rows, lacking in unread_chunks(path, version, run.first_cycle(), label):
        readings = reader.read([Question(r.prompt_ids, r.answer) for r in rows])
        for r, reading in zip(rows, readings, strict=True):
            if r.key in lacking:
                append_line(path, line_about(r, version, scores=reading and reading.scores))


def read_prompt_states(
    path: Path, rollouts: Sequence[Rollout], reader: Reader, version: str
) -> None:
    """The base model's last hidden state of each answer's prompt, on which a predictor from the
    prompt alone is fitted (predictors.PromptOnly). Rank 0 reads them; collective."""
    prompts = {r.prompt_id: r.prompt_ids for r in rollouts}
    if parallel.rank() == 0:
        before, states = read_states(path)
        if before != version or not prompts.keys() <= states.keys():
            found = reader.states(list(prompts.values()))
            write_states(path, version, dict(zip(prompts, map(np.array, found), strict=True)))
    parallel.barrier()


def read_sensitivity(cell: CellFolder, reader: Reader, version: str) -> None:
    """The model's scores for its answer as it is, for another prompt's answer in its place, and for
    its first half."""
    path = cell.sensitivity_file
    rollouts = [r for r in cell.answers() if r.answer is not None]
    another = answers_of_others(rollouts)
    for rows, lacking in unread_chunks(path, version, rollouts, f"{cell}, exchanged and cut"):
        texts = {
            "as_it_is": [r.answer for r in rows],
            "another": [another[r.prompt_id] for r in rows],
            "cut": [r.answer[: (len(r.answer) + 1) // 2].strip() for r in rows],
        }
        readings = {}
        for kind, answers in texts.items():
            pairs = zip(rows, answers, strict=True)
            readings[kind] = reader.read([Question(r.prompt_ids, answer) for r, answer in pairs])
        for k, r in enumerate(rows):
            scores = {kind: found[k] and found[k].scores for kind, found in readings.items()}
            if len(another) < 2:
                scores["another"] = None  # there is no other prompt's answer
            if r.key in lacking:
                append_line(path, line_about(r, version, **scores))


def answers_of_others(rollouts: Sequence[Rollout]) -> dict[str, str]:
    """Prompt -> the first answer to another prompt. Which one is drawn: ids that a file gives may
    lie in the order of its subjects."""
    answers = {r.prompt_id: r.answer for r in sorted(rollouts, key=lambda r: -r.sample)}
    ids = sorted(answers)
    random.Random(0).shuffle(ids)
    return {p: answers[q] for p, q in zip(ids, ids[1:] + ids[:1], strict=True)}


# --------------------------------------------------------------------------------------------------
# Judges


def write_lines(path: Path, lines: Sequence[dict]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def held_out(cell: CellConfig, judge: str) -> CellConfig:
    """The cell under another judge, with the settings of the table in judging/endpoint.py instead
    of the cell's."""
    client = dataclasses.replace(cell.client, key_variable="", price_in=None, price_out=None)
    return dataclasses.replace(cell, judge=judge, endpoint=Endpoint(), client=client)


def judge_more(
    config: EvaluationConfig,
    cell: CellConfig,
    prompts: dict[str, Prompt],
    special: tuple[str, ...],
) -> None:
    """Malformed answers and repeats by the judge, all answers by the held-out judges. `special`:
    the tokenizer's special tokens. Raises JudgeError."""
    rollouts = cell.folder.answers()
    valid = [r for r in rollouts if r.judge_scores is not None]
    malformed = [r for r in rollouts if r.self_scores is None and answer_text(r, special)]
    drawn = random.Random(config.seed).sample(valid, min(config.repeat_answers, len(valid)))
    repeated = sorted(drawn, key=lambda r: r.key) if config.repeat > 1 else []
    work = [(cell, [(r, 1) for r in malformed] + [(r, config.repeat) for r in repeated])]
    work += [(held_out(cell, name), [(r, 1) for r in valid]) for name in config.judges]
    for judge_config, asked in work:
        judge = make_judge(judge_config, cell.folder.judge_cache)
        answers = [
            Answer.of(r, prompts[r.prompt_id], answer_text(r, special), cell.use_references)
            for r, _ in asked
        ]
        draws = judge_again(judge, answers, [repeat for _, repeat in asked])
        lines = [
            line_about(r, r.weight_version, draw=d, scores=s)
            for (r, _), scores in zip(asked, draws, strict=True)
            for d, s in enumerate(scores)
            if s is not None
        ]
        path = cell.folder.scores_file(judge_config.judge)
        write_lines(path, [*earlier_judgements(path, lines, rollouts), *lines])


def earlier_judgements(
    path: Path, lines: Sequence[dict], rollouts: Sequence[Rollout]
) -> list[dict]:
    """What an earlier call with other options has paid for: its lines about answers that are still
    the cell's, without those that `lines` has anew."""

    def key(x: dict) -> tuple:
        return x["prompt_id"], x["sample"], x["answer_id"], x["draw"]

    answers = {(r.prompt_id, r.sample, answer_id(r)) for r in rollouts}
    new = {key(x) for x in lines}
    before = [row for _, _, row in read_lines(path)] if path.exists() else []
    return [x for x in before if key(x) not in new and key(x)[:3] in answers]


def judge_stronger(
    path: Path, base: CellConfig, prompts: dict[str, Prompt], answers: Answers
) -> None:
    """A stronger model's answers by the judge, once each. Raises JudgeError."""
    base.folder.add_to_summary({"stronger": answers.counts()})
    judge = make_judge(base, base.folder.judge_cache)
    works = [
        Answer(prompts[p], prompts[p].references if base.use_references else (), text, None, None)
        for p, text in answers.texts.items()
    ]
    scores = judge_again(judge, works, [1] * len(works))
    lines = [
        {"prompt_id": p, "version": "", "scores": first}
        for p, [first] in zip(answers.texts, scores, strict=True)
        if first is not None
    ]
    write_lines(path, lines)


def compare_with_base(base: CellConfig, cell: CellConfig, prompts: dict[str, Prompt]) -> None:
    """The referee's choice between the base's answers and this model's. Raises JudgeError."""
    theirs = {(r.prompt_id, r.sample): r for r in base.folder.answers() if r.answer is not None}
    pairs = [
        (r, theirs[r.prompt_id, r.sample])
        for r in cell.folder.answers()
        if r.answer is not None and (r.prompt_id, r.sample) in theirs
    ]
    judge = make_judge(cell, cell.folder.judge_cache)
    works = [prefer(judge, prompts[r.prompt_id].conversation, r.answer, o.answer) for r, o in pairs]
    names = [f"prompt {r.prompt_id}, sample {r.sample}" for r, _ in pairs]
    asked = ask_all(works, f"{cell.name} against the base", names)
    preferences = Background().submit(asked).result()
    lines = [
        line_about(r, r.weight_version, **p._asdict(), longer_by=len(r.answer) - len(o.answer))
        for (r, o), p in zip(pairs, preferences, strict=True)
        if p is not None
    ]
    write_lines(cell.folder.preferences_file, lines)
