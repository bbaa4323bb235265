"""Files that a thread writes while the run goes on: .venv/bin/python -m pytest tests/test_saving.py

That a run that is killed meanwhile loses nothing is shown in test_cycle.py."""

import os
import threading
from functools import partial

import pytest
import torch
from conftest import finish, small_args, start_ranks
from safetensors.torch import load_file

from backend import parallel
from backend.policy import PolicyConfig, export, load_policy
from grpo import GRPOConfig, make_optimizer
from storage.files import WriteError
from storage.run_folder import RunFolder


@pytest.mark.parametrize("parameters", ["float32", "bfloat16"])
def test_on_file_is_the_moment_at_which_it_was_given(tmp_path, random_folder, parameters):
    """The thread waits while weights and AdamW's state go on."""
    source, config = random_folder("llama", True), PolicyConfig(parameters=parameters)
    policy = load_policy(source, config)
    optimizer = make_optimizer(policy, GRPOConfig(lr=0.01))
    names = {p: name for name, p in policy.named_parameters()}

    def step() -> None:
        for p in policy.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()

    def tensors() -> dict:
        own = {name: p.detach() for p, name in names.items()}
        return own | parallel.optimizer_tensors(optimizer, names)

    def values() -> dict:
        return {name: getattr(t, "to_local", lambda t=t: t)().clone()
                for name, t in tensors().items()}  # fmt: skip

    saver, gate = parallel.Saver(), threading.Event()
    saver.start(lambda _: gate.wait())
    step()
    before = values()
    export(policy, source, tmp_path / "checkpoint", saver=saver)
    parallel.save_state(tmp_path / "state", tensors(), {"step": 1}, saver)
    step()
    after = values()
    assert not list(tmp_path.iterdir())
    gate.set()
    saver.join()
    exported = load_file(tmp_path / "checkpoint" / "model.safetensors")
    for name, tensor in exported.items():
        assert torch.equal(tensor, before[f"model.{name}"].bfloat16()), name
    parallel.load_state(tmp_path / "state", tensors())
    loaded = values()
    assert loaded.keys() == before.keys() and len(loaded) == 4 * len(names)
    for name, tensor in loaded.items():
        assert torch.equal(tensor, before[name]) and not torch.equal(tensor, after[name]), name


def test_a_failed_job_is_told_and_those_after_it_are_not_run(tmp_path):
    def fail() -> None:
        raise OSError("no room")

    saver, ran = parallel.Saver(), []
    saver.start(lambda _: ran.append(1))
    saver.join_failed()  # nothing has failed
    saver.start(partial(parallel.write_on_rank_0, tmp_path / "checkpoint", fail))
    saver.start(lambda _: ran.append(2))
    saver.wait()
    with pytest.raises(WriteError, match=r"checkpoint cannot be written \(no room\); free disk"):
        saver.join_failed()
    assert ran == [1]


def test_a_state_that_cannot_be_written_ends_the_run_with_its_sentence(
    tmp_path, parrot_folder, prompt_file
):
    """Two ranks; a file stands where the states' folder should be."""
    args = small_args(parrot_folder, prompt_file, cycles=1, save_every=1)
    run = RunFolder(tmp_path / "runs" / "tiny")
    run.path.mkdir(parents=True)
    run.states.touch()
    ranks = start_ranks(2, args, tmp_path)
    shown = [p.communicate(timeout=240)[0] for p in ranks]
    assert all(p.returncode for p in ranks) and "Traceback" not in "".join(shown), shown
    assert "".join(shown).count("error: ") == 1
    assert "step_00001 cannot be written (Not a directory); free disk" in shown[0]
    assert [path.name for path in run.checkpoints()] == ["cycle_01_step_00001"]
    os.remove(run.states)
    kept = len(run.all_rollouts())
    assert kept >= 16
    finish(start_ranks(2, args, tmp_path))
    assert len(run.all_rollouts()) == 32 and len(run.checkpoints()) == 2
