"""Has a model in use drifted from its evaluation? The judged answers of a log of predictions are
compared with those of an evaluation (watch.py).

The alarm is a sequential test, so it may be read after every answer. If the log's answers are drawn
like the evaluation's (exchangeable), the conformal p-value of each new answer among all before it
is uniform and independent of the earlier ones, whatever the distribution. Bets against that make a
test martingale, which exceeds 1 / a with probability a at most, over the whole log (Vovk, Petej,
Nouretdinov, Ahlberg, Carlsson and Gammerman, "Retrain or not retrain", 2021: the simple jumper).
p-values and martingale are MAPIE's.

1. Two figures are watched, calibration (Sec. 4.1) and the judge's quality, each at half of the
   stated probability of a false alarm. Both directions count: a log that is easier than the
   evaluation is no longer what the threshold was chosen on either.
2. The unit is the prompt: of the answers to one prompt the first counts, in both.
3. The order is that of the judgements, so that later ones are added at the end and change nothing
   before them. Ties are broken by seed.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mapie.exchangeability_testing import OnlineMartingaleTest

import reward
from evaluation.intervals import Interval, over_prompts
from evaluation.predictors import groups
from evaluation.results import Cell
from evaluation.table import Table
from judge import messages, parse_scores
from judging.ledger import OK, question_key, read_attempts
from judging.replies import unfenced
from prompts import ATTRIBUTES, JUDGE_SYSTEM, Scores, judge_user, transcript, valid_scores
from storage.data import Prompt
from storage.files import FileError, read_lines
from storage.predictions import Prediction, read_predictions
from storage.record import Rollout

LOG = "log"  # stands for the benchmark

# --------------------------------------------------------------------------------------------------
# The log and its judgements


Log = dict[str, Prediction]  # by id, in the order of the file


def read_log(path: Path) -> Log:
    """The lines of a file of predict.py; of several with one id the last, and not a last line that
    is being written. Raises FileError."""
    if not (found := read_predictions(path)):
        raise FileError(f"{path}: no prediction there yet; give the file that predict.py writes")
    return {p.id: p for p in found}


def answer_key(answer: str) -> str:
    """Tells answers to one prompt apart."""
    return hashlib.blake2b(answer.encode(), digest_size=6).hexdigest()


def read_judgements(path: Path, log: Log) -> dict[str, Scores]:
    """Scores by id, in the order of the file: lines with `id` and `scores` (and `answer_key`, if
    they are watch.py's), or a judge_cache.jsonl or file of judgements --export. What is about no
    well-formed answer of the log is left out; of several judgements the first counts. Raises
    FileError."""
    if not path.is_file():
        raise FileError(f"{path}: no such file; give judgements of the log's answers")
    known = {k: p for k, p in log.items() if p.scores and p.answer}
    first = next((row for _, _, row in read_lines(path)), {})
    found: dict[str, Scores] = {}
    if "scores" not in first:
        questions: dict[str, list[str]] = {}
        for k, p in known.items():
            asked = messages(JUDGE_SYSTEM, judge_user(p.conversation, p.answer))
            questions.setdefault(question_key(asked), []).append(k)
        for t in read_attempts(path):
            if "request" in t and (t["outcome"], t["form"], t["draw"]) == (OK, "scores", 0):
                for k in questions.get(question_key(t["request"]["messages"]), []):
                    found.setdefault(k, parse_scores(unfenced(t["reply"])))
        return found
    for number, _, row in read_lines(path, what="a judgement"):
        scores = row.get("scores")
        if "id" not in row or not isinstance(scores, list) or not valid_scores(scores):
            raise FileError(
                f"{path}:{number}: a judgement has an id and five scores 0-9; mend or delete this "
                "line"
            )
        p = known.get(str(row["id"]))
        if p and row.get("answer_key", answer_key(p.answer)) == answer_key(p.answer):
            found.setdefault(p.id, tuple(scores))
    return found


def judged_cell(log: Log, judgements: dict[str, Scores], reference: Cell, name: str) -> Cell:
    """The log as a cell: judged answers first, in the order of their judgements, then malformed
    ones. Answers to the same conversation are samples of one prompt. Answers that nobody judged are
    left out."""
    malformed = [k for k, p in log.items() if p.scores is None]
    of_text: dict[str, list[str]] = {}
    prompts: dict[str, Prompt] = {}
    rollouts = []
    for k in [*judgements, *malformed]:
        p, scores = log[k], judgements.get(k)
        same = of_text.setdefault(transcript(p.conversation), [])
        same.append(k)
        prompts.setdefault(same[0], Prompt(same[0], p.conversation))
        rollouts.append(
            Rollout(
                cycle=0,
                step=1,
                prompt_id=same[0],
                sample=len(same) - 1,
                seed=0,
                prompt_ids=(),
                response_ids=(),
                text=p.text,
                finish_reason="",
                answer=p.answer,
                self_scores=p.scores,
                score_positions=None,
                judge_scores=scores,
                judge_model=None,
                reward=None,
                quality=scores and reward.quality(scores),
                calibration=scores and reward.calibration(p.scores, scores),
                weight_version="",
            )  # fmt: skip
        )
    cell = Cell(LOG, name, reference.config, rollouts)
    cell.data = list(prompts.values())
    return cell


# --------------------------------------------------------------------------------------------------
# The sequential test


def evidence(reference: np.ndarray, log: np.ndarray, seed: int = 42) -> np.ndarray:
    """(T,) the test martingale after each of the log's T figures; it starts at 1. reference: (n,)
    the evaluation's, of which none is bet on."""
    test = OnlineMartingaleTest(random_state=seed)
    figures = np.concatenate([reference, log]).round(9)  # so that equal ones are equal
    for k in range(len(reference), len(figures)):
        p = test.compute_p_value(figures[k], figures[:k])
        test.update_simple_jumper_martingale(p)
    return np.array(test.martingale_value_history)


def first_alarm(values: np.ndarray, level: float) -> int | None:
    """Number, from 1, of the answer at which the evidence reaches 1 / level."""
    over = np.flatnonzero(values >= 1 / level)
    return int(over[0]) + 1 if len(over) else None


def first_of_each(cell: Cell) -> np.ndarray:
    """Indices into the judged answers of the first one to each prompt, in their order."""
    return np.array([g[0] for g in groups(cell.prompts)], int)


class Alarm(NamedTuple):
    """Of one watched figure."""

    values: np.ndarray  # (T,) evidence
    at: int | None  # number of the answer, from 1
    before: float  # mean in the evaluation
    after: float  # mean in the log


Watched = dict[str, np.ndarray]  # figure -> (n,) of independent answers, in their order


def watched(cell: Cell) -> Watched:
    first = first_of_each(cell)
    return {"calibration": cell.calibration[first], "quality": cell.quality[first]}


def alarms(reference: Watched, log: Watched, false_alarms: float, seed: int) -> dict[str, Alarm]:
    """By watched figure. false_alarms: probability that any is ever raised without drift."""
    found = {}
    for name, before in reference.items():
        values = evidence(before, log[name], seed)
        at = first_alarm(values, false_alarms / len(reference))
        found[name] = Alarm(values, at, float(before.mean()), float(log[name].mean()))
    return found


# --------------------------------------------------------------------------------------------------
# Chart and tables


def batches(values: np.ndarray, size: int) -> list[tuple[int, Interval]]:
    """(number of its last answer, mean) of each `size` figures in turn, the last batch shorter."""
    found = []
    for start in range(0, len(values), size):
        part = values[start : start + size]
        found.append((start + len(part), over_prompts(part, range(len(part)))))
    return found


def by_attribute(reference: Cell, log: Cell, seed: int) -> Table:
    """Errors, bias and the judge's own scores, in the evaluation and in the log."""
    then, now = first_of_each(reference), first_of_each(log)
    rows = []
    for a, attribute in enumerate(ATTRIBUTES):
        row = {"attribute": attribute}
        for cell, where in ((reference, "evaluation"), (log, LOG)):
            bias = (cell.s - cell.j)[:, a]
            row[f"error, {where}"] = over_prompts(np.abs(bias), cell.prompts)
            row[f"self - judge, {where}"] = over_prompts(bias, cell.prompts)
            row[f"judge, {where}"] = over_prompts(cell.j[:, a], cell.prompts)
        before, after = (reference.s - reference.j)[then, a], (log.s - log.j)[now, a]
        row["evidence"] = float(np.log10(evidence(before, after, seed).max()))
        rows.append(row)
    return Table.of(
        "By attribute",
        "Mean absolute error, the model's score minus the judge's, and the judge's score, in "
        "points of 0-9. Evidence: decimal logarithm of the largest value of the test martingale of "
        "self - judge, which tells where to look and raises no alarm.",
        rows,
    )


def by_decision(log: Cell, decisions: Sequence[str], bad_below: float) -> Table:
    """Quality of what was sent, retried and escalated. decisions: of each judged answer."""
    rows = []
    for decision in dict.fromkeys(sorted(decisions)):
        chosen = np.array([d == decision for d in decisions])
        quality, prompts = log.quality[chosen], log.prompts[chosen]
        bad = over_prompts(quality < bad_below, prompts, proportion=True)
        rows.append(
            {
                "decision": decision,
                "judged answers": int(chosen.sum()),
                "quality": over_prompts(quality, prompts),
                f"quality below {bad_below:g}": bad,
                "calibration": over_prompts(log.calibration[chosen], prompts),
            }
        )
    return Table.of(
        "By decision", "What became of the answers, as the judge sees them now.", rows,
        higher=("quality", "calibration"),
    )  # fmt: skip


def moved(reference: Cell, log: Cell, most: int = 20) -> Table:
    """The prompts whose calibration fell most: against the same conversation's in the evaluation
    where it is known, else against the evaluation's mean."""
    usual = float(reference.calibration.mean())
    ids: dict[str, str] = {text: k for k, text in reference.questions.items()}
    known = {reference.prompts[g[0]]: reference.calibration[g].mean()
             for g in groups(reference.prompts)}  # fmt: skip
    rows = []
    for g in groups(log.prompts):
        prompt = log.prompts[g[0]]
        before = known.get(ids.get(log.questions[prompt]))
        after = float(log.calibration[g].mean())
        rows.append(
            {
                "prompt": prompt,
                "begins": " ".join(log.questions[prompt].split())[:60],
                "own quality": float(log.own_quality[g].mean()),
                "judge's quality": float(log.quality[g].mean()),
                "calibration": after,
                "same prompt, evaluation": before if before is None else float(before),
                "change": after - (usual if before is None else float(before)),
            }
        )
    rows.sort(key=lambda row: row["change"])
    return Table.of(
        "Prompts that moved",
        f"The {most} prompts whose calibration fell most, against the same prompt's in the "
        f"evaluation, or against its mean ({usual:.3f}) where the prompt was not in it.",
        rows[:most],
    )
