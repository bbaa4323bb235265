"""Variants beside the method: .venv/bin/python -m pytest tests/test_ablate.py"""

import csv
import dataclasses
import json
import subprocess
import sys

import pytest
from conftest import REQUESTS, ROOT, make_rollout, small_args

import ablate
from storage.files import write_text
from storage.record import append_rollout
from storage.run_folder import RunFolder


def test_two_variants_of_which_one_fails(tmp_path, parrot_folder, prompt_file, monkeypatch):
    """Trained, evaluated and compared. The prompt file has no human labels, so that variant
    fails; the same command would try it again, and nothing else but the evaluation."""
    monkeypatch.chdir(tmp_path)
    test = tmp_path / "test.jsonl"
    prompts = [{"prompt": r.replace("about", "on")} for r in REQUESTS]
    test.write_text("".join(json.dumps(p) + "\n" for p in prompts))
    options = small_args(parrot_folder, prompt_file, cycles=1, window=4, batch=4, rl_steps=1)
    options = options[options.index("--template") :]
    del options[options.index("--name") : options.index("--name") + 2]
    given = dict(preset="small", name="t", test=str(test), options=" ".join(options))
    command = ablate.Command(variants=("human_labels", "gamma_1"), seeds=(3,), **given)
    words = [f"--{name}={value}" for name, value in given.items()]
    done = subprocess.run(
        [sys.executable, str(ROOT / "ablate.py"), "--variants", *command.variants, "--seeds", "3",
         *words], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "human_labels, seed 3: ended with 1: error:" in done.stderr
    assert "no labelled responses" in done.stderr and "gamma_1" not in done.stderr

    written = {p.name for p in command.out.iterdir()}
    assert {"tables.txt", "forest-test.png", "forest-test.svg"} <= written
    with open(command.out / "variants-against-see.csv") as f:
        rows = list(csv.DictReader(f))
    assert [(r["variant"], r["figure"], r["seeds"]) for r in rows] == [
        ("gamma_1", figure, "1") for figure in ablate.variants.FIGURES
    ]
    head, *lines = (command.out / "tables.txt").read_text().split("The runs\n")[1].split("\n")
    assert head == "All by the same sources."
    runs = [line.split()[:3] for line in lines[2:4]]
    assert runs == [["see", "-", "1"], ["gamma_1", "2", "1"]]  # an import and a call

    started = []
    monkeypatch.setattr(ablate, "start", lambda program, *_: started.append(program[-1]))
    assert ablate.run(command) == ([3], [])
    assert started == ["ablations.human_labels", str(ROOT / "evaluate.py")]
    started.clear()
    other = ablate.Command(**vars(command) | {"options": command.options + " --cycles 2"})
    assert ablate.run(other)[0] == []  # none is finished with these, so nothing to compare
    assert len(started) == 3

    listed = " ".join(ablate.listing().split())
    assert "keeps self-scores away from the judge's mean (Sec. 3.1). [run: 1 seed(s) in" in listed
    assert "human_labels Phase 2 distils human labels" in listed and "[not run]" in listed


def test_what_cannot_be_evaluated_in_one_way(tmp_path, tokenizer):
    """Another judge; a prompt that was written otherwise; not other prompts."""
    config = dict.fromkeys(ablate.ALIKE, 1)

    def run(name: str, prompt: str, written: str, **changes) -> RunFolder:
        folder = RunFolder(tmp_path / name)
        folder.rollouts(1).parent.mkdir(parents=True)
        write_text(folder.config_file, json.dumps(config | changes))
        r = make_rollout(tokenizer, prompt=written)
        append_rollout(folder.rollouts(1), dataclasses.replace(r, prompt_id=prompt))
        return folder

    see = run("see", "a", "Say it.")
    assert ablate.unlike(run("same", "a", "Say it."), see) is None
    assert ablate.unlike(run("others", "b", "Say that."), see) is None
    assert ablate.unlike(run("rationale", "a", "Say it, and why."), see) == "prompt template"
    assert ablate.unlike(run("judged", "a", "Say it.", judge=2), see) == "judge"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"variants": ()}, "no variant is given; --variants NAME"),
        ({"variants": ("nothing",)}, "there is no variant nothing; --list"),
        ({"against": "nothing"}, "there is no variant nothing; --list"),
        ({"preset": "small"}, "give a prompt file to --test"),
        ({"options": "--model DIR"}, "give a prompt file to --test"),
        ({"seeds": (1, 1)}, "--seeds needs one seed at least, each once"),
        ({"seeds": (-1,)}, "--seeds needs one seed at least, each once and not below 0"),
    ],
)
def test_what_is_refused_before_anything_runs(changes, message):
    ablate.check(ablate.Command(variants=("gamma_1",)))
    with pytest.raises(ValueError, match=message):
        ablate.check(ablate.Command(**{"variants": ("gamma_1",)} | changes))
