"""How the processes of a run find each other: flags, variables, Slurm."""

import json
import socket

import jax
import pytest
from survival.runs import Run, network

from experiments import command_line, launch

NAMES = ("coordinator_address", "num_processes", "process_id")


@pytest.fixture
def joined(monkeypatch):
    """``joined(**flags)``: what ``jax.distributed.initialize`` is told; None: it is not called."""
    told = []
    for variable in launch.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **words: told.append(words))
    monkeypatch.setattr(jax.config, "update", lambda *words: None)
    monkeypatch.setattr(launch, "_await_coordinator", lambda *words: None)

    def join(**flags):
        told.clear()
        launch.join(command_line.Common(**flags))
        return tuple(told[0][name] for name in NAMES) if told else None

    return join


def set_variables(monkeypatch, *values):
    for name, value in zip(NAMES, values, strict=True):
        monkeypatch.setenv(launch.VARIABLES[name], value)


def test_one_process_joins_nothing(joined):
    assert joined() is None


def test_flags_say_it_all(joined):
    flags = {"coordinator_address": "host0:1234", "num_processes": 4, "process_id": 3}
    assert joined(**flags) == ("host0:1234", 4, 3)


def test_variables_do_instead_of_flags_and_flags_come_first(joined, monkeypatch):
    set_variables(monkeypatch, "host0:1234", "4", "3")
    assert joined() == ("host0:1234", 4, 3)
    assert joined(process_id=2) == ("host0:1234", 4, 2)
    assert joined(coordinator_address="host1:99") == ("host1:99", 4, 3)


def test_without_any_of_them_jax_finds_the_cluster(joined):
    assert joined(distributed=True) == (None, None, None)


def test_an_address_alone_is_not_enough_and_an_empty_one_is_none(joined, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host0:1234")
    with pytest.raises(ValueError, match="num_processes must be given"):
        joined()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "")
    assert joined() is None


def test_a_variable_is_not_a_number(joined, monkeypatch):
    set_variables(monkeypatch, "host0:1234", "4", "first")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID must be a whole number, got 'first'"):
        joined()


def free_job():
    """A job number from which Slurm's processes make a port that is free."""
    for job in range(4096):
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", 61440 + job))
                return job
            except OSError:
                continue
    raise AssertionError("all ports of Slurm's range are taken")


def test_two_tasks_of_slurm_train_one_network(tmp_path):
    """With ``--distributed`` alone: who and where they are is in the variables that srun sets."""
    job = {"SLURM_JOB_ID": str(free_job()), "SLURM_STEP_NODELIST": "localhost",
           "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "0"}  # fmt: skip
    words = (f"--workdir={tmp_path / 'run'}", "--epochs=1", "--distributed")
    runs = [Run(*words, environment={**job, "SLURM_PROCID": str(task)}) for task in range(2)]
    assert [run.wait() for run in runs] == [0, 0], runs[0].printed() + runs[1].printed()
    assert "2 x cpu of 2 hosts" in runs[0].printed()
    results = json.loads((network(tmp_path / "run") / "results.json").read_text())
    assert results["last"]["step"] == 12
