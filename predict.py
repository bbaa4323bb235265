"""Use a trained model: for each prompt an answer, how good the model says it is, and what to do
with it.

    python predict.py runs/see "Why is the sky blue?"
    python predict.py runs/see --data prompts.jsonl --threshold 0.8 --samples 4 --out predicted/may
    cat prompts.jsonl | python predict.py runs/see > predictions.jsonl
    python predict.py DIR --url http://127.0.0.1:8000/v1 --data prompts.jsonl --out predicted/may
    python predict.py DIR --data prompts.jsonl --threshold 0.8 --out predicted/may --screen
    python predict.py --calibrate results/paper/helpsteer2/see --wish.target 0.1

As a library:

    from predict import Predictor
    model = Predictor("runs/see", threshold=0.8)
    print(model("Why is the sky blue?"))

The model folder's self_eval.json says with which prompt and sampling it was trained; anything else
is refused. Not in the paper, which only names such uses (Sec. 5):

1. The decision compares the expected quality (Eq. 1's quality of the means of the ten-digit
   distributions) with a threshold: `send` the first answer if it is as high; else, with --samples,
   `retry`: the one of several that the model rates best, if that is as high; else `escalate`.
   A threshold from --calibrate promises its risk for `send` alone: the best of several by the
   model's own scores is a choice in favour of its errors.
2. A prompt that has less in common with the training window than any prompt of the window has with
   the others (storage/model_card.py) is never sent: what was promised is about prompts like those.
   Of these about one in window + 1 is escalated for that reason alone.
3. Answers are drawn with a seed of their own, by prompt and sample, except with transformers, where
   prompts that are answered together share one: a file that is continued after a kill goes on, but
   not with the answers that an undisturbed launch would have given.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import tyro

from backend.launch import check_gpu
from backend.model_folder import check_model_folder, check_weights, load_tokenizer, weights_id
from backend.sampler import EngineConfig, Request, SamplingParams, choose_sampler, seed_of
from config import checkpoints
from evaluation.responses import Drawn, InProcess, Served
from evaluation.threshold import Kind, Threshold, Wish
from judging.endpoint import ClientConfig
from judging.served import ServedError, ServedModel
from prompts import Turn, check_tokenizer, prompt_ids
from storage import hub, model_card
from storage.data import Prompt, as_prompt, load_prompts
from storage.files import WriteError, write_text
from storage.lock import locked
from storage.logbook import check_same_config
from storage.options import Count, Options, in_range
from storage.predictions import (
    Prediction,
    append_prediction,
    read_predictions,
    render,
    screen,
    summary,
)
from storage.progress import progress
from storage.run_folder import PredictionFolder


@dataclass(frozen=True, kw_only=True)
class PredictorConfig(Options):
    """How prompts are answered and decided on."""

    threshold: str | float = ""
    """Expected quality, 0-1, from which on an answer is sent; a number, or a file that --calibrate
    wrote. Empty: no decision."""
    samples: Count = 1
    """Most answers to a prompt: below the threshold it is answered again, up to this number, and
    the best by the model's own scores counts. Without a threshold all are drawn."""
    below: in_range(int, "[1, 9]") = 5
    """p_below is the probability that the correctness digit is below this."""
    url: str = ""
    """URL of an OpenAI-compatible server that serves the folder, such as http://127.0.0.1:8000/v1;
    empty: the model is loaded here. The folder's tokenizer and self_eval.json are needed in both
    cases."""
    served_name: str = ""
    """The model's name at the server; empty: the only one that it lists."""
    key_variable: str = ""
    """Name of the environment variable that holds the server's key; empty: it needs none."""
    concurrency: Count = 32
    """Maximum number of requests to the server in flight."""
    template: Literal["paper", "short", "bare"] | None = None
    """Generation template, for a folder without self_eval.json; with one it must be the same."""
    few_shot: Literal["paper-like", "varied"] | None = None
    """Few-shot examples, for a folder without self_eval.json; with one they must be the same."""
    prompt_tokens: in_range(int | None, "[1, inf)") = None
    """Maximum prompt length, template included, in tokens; longer prompts are escalated. None: that
    of training, or of the paper."""
    max_tokens: in_range(int | None, "[1, inf)") = None
    """Maximum response length in tokens. None: that of training, or of the paper."""
    sampler: Literal["auto", "vllm", "transformers"] = "auto"
    """Without --url: vLLM, or a decoding loop with transformers; auto: vLLM if it is installed."""
    sample_rows: Count = 64
    """Prompts that are answered together: what a kill can cost."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the weights."""
    seed: in_range(int, "[0, 4294967000]") = 42
    """Seed for sampling."""
    engine: EngineConfig = field(default_factory=EngineConfig)

    @property
    def longest_row(self) -> int:
        return self.prompt_tokens + self.max_tokens


@dataclass(frozen=True)
class Settings:
    """What a prediction depends on, wherever it is made; of one file all have the same."""

    model: str
    template: str
    few_shot: str
    prompt_tokens: int
    sampling: SamplingParams
    threshold: float | None
    scores: Kind | None  # that the threshold is about; None for a number
    samples: int
    below: int
    seed: int


# --------------------------------------------------------------------------------------------------


class Predictor:
    """A trained model that answers and decides."""

    def __init__(self, model: str | Path, config: PredictorConfig | None = None, **options: object):
        """`model`: an exported folder, a run's folder (its newest checkpoint) or a hub id;
        `options`: the fields of PredictorConfig. The weights are loaded when they are first needed.
        Raises ValueError for all that can be found before that."""
        config = config or PredictorConfig(**options)
        self.name = checkpoints(str(model))[-1]
        self.folder = hub.model_folder(self.name)
        self.card = model_card.read_card(self.folder)
        self.config, self.params = _settings(config, self.folder, self.card)
        self.threshold, self.scores = read_threshold(self.config.threshold)
        if self.config.url:
            ServedModel(self.config.url, self.config.key_variable, ClientConfig())
            sampler = "transformers"
        else:
            sampler = choose_sampler(self.config.sampler)
        check_model_folder(self.folder, self.config.longest_row, sampler)
        c = self.config
        self.tokenizer = load_tokenizer(self.folder)
        check_tokenizer(self.tokenizer, c.template, c.few_shot)
        self.id = f"{Path(self.name).resolve().name}-{_identity(self.folder, self.card)}"
        self._source: InProcess | Served | None = None

    def __call__(self, prompt: str | Sequence[Turn] | Prompt) -> Prediction:
        """A request, a conversation or a prompt. Raises ValueError or ServedError."""
        return next(self.predict([prompt]))

    def predict(self, prompts: Iterable[str | Sequence[Turn] | Prompt]) -> Iterator[Prediction]:
        """Predictions in the order of the prompts. Raises ValueError or ServedError."""
        prompts = [as_prompt(p) for p in prompts]
        for start in range(0, len(prompts), self.config.sample_rows):
            yield from self._answer(prompts[start : start + self.config.sample_rows])

    def settings(self) -> "Settings":
        c = self.config
        return Settings(
            model=self.id,
            template=c.template,
            few_shot=c.few_shot,
            prompt_tokens=c.prompt_tokens,
            sampling=self.params,
            threshold=self.threshold,
            scores=self.scores,
            samples=c.samples,
            below=c.below,
            seed=c.seed,
        )

    def close(self) -> None:
        if self._source:
            self._source.close()
            self._source = None

    def _answer(self, prompts: Sequence[Prompt]) -> list[Prediction]:
        c = self.config
        ids = {p.id: prompt_ids(self.tokenizer, p.conversation, c.template, c.few_shot)
               for p in prompts}  # fmt: skip
        unlike = {p.id: self._unlike(p) for p in prompts}
        short = [p.id for p in prompts if len(ids[p.id]) <= c.prompt_tokens]
        drawn = self._draw(ids, short, range(1))
        again = [i for i in short if not self._is_decided(drawn[i], unlike[i])]
        if c.samples > 1:
            for i, more in self._draw(ids, again, range(1, c.samples)).items():
                drawn[i] += more
        return [self._prediction(p, drawn.get(p.id, []), unlike[p.id]) for p in prompts]

    def _draw(self, ids: dict, chosen: Sequence[str], samples: range) -> dict[str, list[Drawn]]:
        requests = [
            Request(i, k, ids[i], seed_of(self.config.seed, i, k)) for i in chosen for k in samples
        ]
        if not requests:
            return {}
        drawn = iter(self._loaded().draw(requests))
        return {i: [next(drawn) for _ in samples] for i in chosen}

    def _loaded(self) -> InProcess | Served:
        if self._source is None and self.config.url:
            self._source = Served(self.config, self.params)
        elif self._source is None:
            hub.fetch_weights(self.name)
            check_weights(self.folder)
            self._source = InProcess(self.config, self.folder, self.tokenizer, self.params)
        return self._source

    def _unlike(self, prompt: Prompt) -> float | None:
        if self.card is None:
            return None
        tokens = model_card.conversation_tokens(self.tokenizer, prompt.conversation)
        return self.card.unlike(tokens)

    def _is_decided(self, drawn: Sequence[Drawn], unlike: float | None) -> bool:
        """Whether further answers would change nothing."""
        return self.threshold is not None and (self._sends(drawn[0]) or model_card.is_far(unlike))

    def _sends(self, one: Drawn) -> bool:
        return one.confidence(self.scores) >= self.threshold

    def _prediction(
        self, prompt: Prompt, drawn: Sequence[Drawn], unlike: float | None
    ) -> Prediction:
        """`drawn`: the prompt's responses; none for a prompt that is too long."""
        if not drawn:
            none = dict.fromkeys(f.name for f in dataclasses.fields(Prediction))
            decision = None if self.threshold is None else "escalate"
            return Prediction(
                **none | self._about(prompt) | {"unlike": unlike, "decision": decision, "sample": 0}
            )
        confidences = [one.confidence(self.scores) for one in drawn]
        k = confidences.index(max(confidences))  # the first of equals
        best, decision = drawn[k], None
        if self.threshold is not None:
            sent = "send" if len(drawn) == 1 else "retry"
            accepted = self._sends(best) and not model_card.is_far(unlike)
            decision = sent if accepted else "escalate"
        return Prediction(
            **self._about(prompt),
            **best.figures(self.config.below),
            unlike=unlike,
            decision=decision,
            sample=k,
        )

    def _about(self, prompt: Prompt) -> dict:
        return {
            "id": prompt.id,
            "conversation": prompt.conversation,
            "model": self.id,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def _settings(config, folder: Path, card) -> tuple[PredictorConfig, SamplingParams]:
    """The options with the model's own in the place of what is not given. Raises ValueError."""
    if card is None and None in (config.template, config.few_shot):
        raise ValueError(
            f"model {folder} has no {model_card.FILE}: it is a base model or an older export; say "
            "--template and --few_shot as it was trained, or export it again"
        )
    template = config.template or card.template
    few_shot = config.few_shot or card.few_shot
    try:
        params = SamplingParams(**card.sampling) if card else SamplingParams()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / model_card.FILE}: sampling cannot be used ({error}); restore the file, or "
            "export the model again"
        ) from None
    if card:
        model_card.check_template(folder, card, template, few_shot)
    if config.max_tokens:
        params = dataclasses.replace(params, max_tokens=config.max_tokens)
    prompt_tokens = config.prompt_tokens or (card.prompt_tokens if card else 4096)
    config = dataclasses.replace(
        config, template=template, few_shot=few_shot, prompt_tokens=prompt_tokens,
        max_tokens=params.max_tokens,
    )  # fmt: skip
    return config, params


def _identity(folder: Path, card) -> str:
    """A hash of what the export says about itself; of the weight files without that."""
    if card is None:
        return weights_id(folder)[:8]
    said = dataclasses.asdict(dataclasses.replace(card, held_out={}))  # which evaluate.py adds to
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=4).hexdigest()


def read_threshold(value: str | float) -> tuple[float | None, Kind | None]:
    """(threshold, the scores that it is about) of a number, of a file that --calibrate wrote, or of
    "". Raises ValueError."""
    if value == "":
        return None, None
    try:
        number = float(value)
    except ValueError:
        if not Path(value).is_file():
            raise ValueError(
                f"--threshold {value}: neither a number nor a file; give a quality of 0-1, or the "
                "file that --calibrate wrote"
            ) from None
        found = Threshold.load(Path(value))
        return found.value, found.scores
    if not 0 <= number <= 1:
        raise ValueError(f"--threshold {value}: must give a quality in [0, 1], not {number}")
    return number, None


# --------------------------------------------------------------------------------------------------
# The command


@dataclass(frozen=True, kw_only=True)
class Command(PredictorConfig):
    """Answer prompts, score the answers, decide on them."""

    model: Annotated[str, tyro.conf.Positional] = ""
    """An exported folder, a run's folder (its newest checkpoint) or a hub id."""
    prompt: Annotated[str, tyro.conf.Positional] = ""
    """The request; empty: --data, or standard input: rows as in --data, or else one request."""
    data: str = ""
    """File of prompts (for kinds see storage/data.py)."""
    out: str = ""
    """Folder for predictions.jsonl; the same command goes on with it after a kill. Empty: to
    standard output, in a readable form in a terminal and as JSON lines elsewhere."""
    screen: bool = False
    """Write the answers worth keeping as training data, those that are sent, to kept.jsonl in --out
    and the others with the reason to dropped.jsonl."""
    calibrate: str = ""
    """An evaluation, results/NAME/BENCHMARK/MODEL: choose the threshold that keeps the wished risk,
    and write threshold.json and coverage_risk.png to --out, or here (docs/monitoring.md)."""
    wish: Wish = field(default_factory=Wish)


def main() -> None:
    command = tyro.cli(Command, description=__doc__)
    try:
        run(command)
    except (ValueError, ServedError, WriteError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; what is on file stays, and the same command goes on") from None


def run(command: Command) -> None:
    """Raises ValueError, ServedError or WriteError."""
    if command.calibrate:
        from evaluation.risk import calibrate  # it draws, which no prediction needs

        return print(calibrate(Path(command.calibrate), command.wish, Path(command.out or ".")))
    if not command.model:
        raise ValueError("give a model folder: predict.py FOLDER PROMPT, or --data FILE")
    if command.screen and not (command.out and command.threshold != ""):
        raise ValueError("--screen needs --threshold, by which it keeps, and a folder --out")
    check_gpu()
    predictor = Predictor(command.model, command)
    prompts = read_prompts(command)
    try:
        if not command.out:
            readable = sys.stdout.isatty()
            for p in predictor.predict(prompts):
                shown = render(p, predictor.config.below, predictor.threshold)
                print(shown if readable else json.dumps(p.row()), flush=True)
            return
        with locked(Path(command.out)):
            keep(predictor, prompts, PredictionFolder(Path(command.out)), command.screen)
    finally:
        predictor.close()


def read_prompts(command: Command) -> list[Prompt]:
    """Raises ValueError."""
    if command.prompt and command.data:
        raise ValueError("give a prompt or --data FILE, not both")
    if command.prompt:
        return [as_prompt(command.prompt)]
    if command.data:
        return load_prompts(hub.data_file(command.data))
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text ({error})") from None
    if text.lstrip()[:1] in ("{", "["):
        return load_prompts("standard input", text)
    return [as_prompt(text.strip())]


def keep(
    predictor: Predictor, prompts: Sequence[Prompt], folder: PredictionFolder, to_screen: bool
) -> None:
    """Answer what is not on file yet, and say what came of all. Raises ValueError, ServedError or
    WriteError."""
    check_same_config(folder, predictor.settings())
    write_text(folder.config_file, json.dumps(dataclasses.asdict(predictor.settings()), indent=2))
    on_file = {p.id: p for p in read_predictions(folder.predictions_file)}
    for p in prompts:
        if p.id in on_file and on_file[p.id].conversation != p.conversation:
            raise ValueError(
                f"{folder.predictions_file} has another prompt of the id {p.id!r}; make ids "
                "unique, or choose another --out"
            )
    left = [p for p in prompts if p.id not in on_file]
    if len(left) < len(prompts):
        print(f"{len(prompts) - len(left)} of {len(prompts)} prompts are on file", file=sys.stderr)
    for p in progress(predictor.predict(left), desc="prompts", total=len(left)):
        append_prediction(folder.predictions_file, p)
        on_file[p.id] = p
    done = list(on_file.values())
    print(summary(done))
    if to_screen:
        counts = screen(done, folder.kept_file, folder.dropped_file)
        print(", ".join(f"{name}: {n}" for name, n in counts.items()))


if __name__ == "__main__":
    main()
