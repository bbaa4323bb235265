"""evaluate.py --dry_run: the judges' calls, tokens and cost by stage, judge and cell, before
anything is loaded, sampled or asked."""

from collections.abc import Mapping
from typing import NamedTuple

from config import CellConfig, EvaluationConfig
from evaluation import comparison_tables
from evaluation.intervals import prompts_needed
from evaluation.results import load_evaluation
from evaluation.stages import held_out
from evaluation.table import Results, Table
from judge import judge_prices
from judging import estimate
from judging.estimate import Lengths, Questions
from storage.answers import Answers
from storage.data import Prompt

SPREAD = 0.17  # of a paired difference in quality by prompt: the miniature's (docs/miniature.md)


class Benchmark(NamedTuple):
    """What the questions about a benchmark's answers have in common."""

    tokenizer: object
    prompts: list[Prompt]
    scoring: Questions
    comparing: Questions
    lengths: Lengths  # of the answers

    def stronger(self, answers: Answers) -> Questions:
        """About answers whose texts are known."""
        tokens = [estimate.count(self.tokenizer, text) for text in answers.texts.values()]
        asked = self.scoring.tokens + estimate.mean(tokens)
        return self.scoring._replace(tokens=asked, answers=0)


class Part(NamedTuple):
    stage: str
    judge: str
    cell: CellConfig
    questions: Questions
    lengths: Lengths


def describe(
    config: EvaluationConfig,
    cells: Mapping[tuple[str, str], CellConfig],
    inputs: Mapping,
    stronger: Mapping[str, Answers],
    problems: list[str],
) -> str:
    """The plan as text. `cells`, `inputs` (plan.Inputs) by (model, benchmark)."""
    base = next(iter(cells))[0]
    shared = {b: read_benchmark(cells[m, b], inputs[m, b]) for m, b in cells if m == base}
    parts = [
        part
        for (model, b), cell in cells.items()
        for part in parts_of(config, model, cell, shared[b], stronger.get(b), base)
    ]
    rows = []
    for part in parts:
        likely = part.lengths.likely
        rows.append({
            "stage": part.stage, "judge": part.judge, "cell": part.cell.name,
            "calls": part.questions.calls,
            "M tokens in": f"{part.questions.tokens_in(likely) / 1e6:,.3f}",
            "cost": estimate.dollars(part.questions.cost(likely)),
        })  # fmt: skip
    table = Table.of(
        f"Dry run of {config.folder.path}; nothing was loaded, sampled, judged or written.",
        "Calls of the judges, at most: equal answers and what is on file are not asked again. "
        "Tokens and list prices with answers of the likely length. A malformed answer is judged "
        "in the stage judges and not in the stage answers.",
        rows,
    )
    lines = [table.text()] if rows else [table.title, "No judge is asked in these stages."]
    calls = sum(part.questions.calls for part in parts)
    asked = [(part.questions, part.lengths) for part in parts]
    sections = {
        f"In all, {calls:,} calls": estimate.by_length(asked) if asked else [],
        "Power": power(config, {b: len(found.prompts) for b, found in shared.items()}),
        "Limits": [f"{estimate.budget(config.client)}; each cell has its own"],
        "Obstacles": problems or ["none found"],
    }
    for title, body in sections.items():
        lines.append(f"\n{title}\n" + "\n".join(f"  {line}" for line in body))
    return "\n".join(lines)


def power(config: EvaluationConfig, prompts: Mapping[str, int]) -> list[str]:
    """How many prompts a difference in quality of the margin needs, beside how many there are, by
    the spread of what is on file under this name, or else of the miniature."""
    margin, lines, seen = config.margin, [], {}
    if config.folder.cells():
        results = Results([load_evaluation(config.folder.path)])
        for row in comparison_tables.quality_kept(results).frame.to_dict("records"):
            if sd := row["sd by prompt"]:
                seen[row["benchmark"]] = max(sd, seen.get(row["benchmark"], 0.0))
    for benchmark, n in prompts.items():
        sd = seen.get(benchmark, SPREAD)
        source = "seen here" if benchmark in seen else "as in the miniature"
        needed = prompts_needed(sd, margin)
        lines.append(
            f"{benchmark}: {n:,} prompts; a difference of {margin:g} is found in four of five "
            f"evaluations with {needed:,} (standard deviation by prompt {sd:.3f}, {source})"
        )
    return lines


def read_benchmark(cell: CellConfig, found) -> Benchmark:
    """`found`: plan.Inputs of one of its cells."""
    prompts, tokenizer = found.prompts, found.tokenizer
    return Benchmark(
        tokenizer,
        prompts,
        estimate.scoring(tokenizer, prompts, cell.use_references),
        estimate.comparing(tokenizer, prompts),
        estimate.answer_lengths(tokenizer, prompts, cell.sampling.max_tokens),
    )


def parts_of(
    config: EvaluationConfig,
    model: str,
    cell: CellConfig,
    shared: Benchmark,
    answers: Answers | None,
    base: str,
) -> list[Part]:
    """What is asked about one cell. `answers`: a stronger model's."""
    answered = len(shared.prompts) * cell.samples
    parts = []

    def ask(stage: str, judged: CellConfig, questions: Questions, calls: int) -> None:
        questions = questions._replace(calls=calls, prices=judge_prices(judged))
        if calls:
            parts.append(Part(stage, judged.judge, cell, questions, shared.lengths))

    if "answers" in config.stages:
        ask("answers", cell, shared.scoring, answered)
    if model not in config.main_models():
        return parts
    if "judges" in config.stages:
        if "answers" not in config.stages:
            malformed = sum(r.self_scores is None for r in cell.folder.answers())
            ask("judges: malformed", cell, shared.scoring, malformed)
        repeats = max(0, config.repeat - 1)  # the first is on file
        ask("judges: repeats", cell, shared.scoring, repeats * min(config.repeat_answers, answered))
        if answers and model == base:
            ask("judges: stronger", cell, shared.stronger(answers), len(answers.texts))
        for name in config.judges:
            ask("judges: held-out", held_out(cell, name), shared.scoring, answered)
    if "preferences" in config.stages and model != base:
        ask("preferences", cell, shared.comparing, 2 * answered)
    return parts
