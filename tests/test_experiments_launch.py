"""How the processes of a run find each other: flags, variables, Slurm."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from survival.runs import Run, free_port, network

from experiments import command_line, launch

NAMES = ("coordinator_address", "num_processes", "process_id")
TASKS = ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "OMPI_COMM_WORLD_LOCAL_SIZE",
         "JAX_LOCAL_DEVICE_IDS")  # fmt: skip


@pytest.fixture
def joined(monkeypatch):
    """``joined(**flags)``: what ``jax.distributed.initialize`` is told; None: it is not called."""
    told = []
    for variable in (*launch.VARIABLES.values(), *TASKS):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **words: told.append(words))
    monkeypatch.setattr(jax.config, "update", lambda *words: None)
    monkeypatch.setattr(launch, "_await_coordinator", lambda *words: None)

    def join(**flags):
        told.clear()
        launch.join(command_line.Common(**flags))
        return tuple(told[0][name] for name in NAMES) if told else None

    join.told = told
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


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, None),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, []),
        ({"SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "2"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, None),
        (
            {"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_NODES": "1"},
            None,
        ),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2", "JAX_LOCAL_DEVICE_IDS": "3"}, None),
    ],
)
def test_the_only_task_of_a_node_takes_all_its_gpus(joined, monkeypatch, variables, expected):
    """Where nothing is said JAX decides: one GPU for each of several tasks."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    joined(distributed=True)
    assert joined.told[0]["local_device_ids"] == expected
    joined(coordinator_address="host0:1234", num_processes=4, process_id=3)
    assert joined.told[0]["local_device_ids"] == expected


SEES = """
import sys
import jax
from experiments import command_line, launch

how, address = sys.argv[1:]
flags = {
    "found": dict(distributed=True),
    "told": dict(coordinator_address=address, num_processes=1, process_id=0),
}
if how == "by jax alone":
    jax.distributed.initialize()
else:
    launch.join(command_line.Common(**flags[how]))
from jax._src import xla_bridge
print("visible", xla_bridge.CUDA_VISIBLE_DEVICES.value, jax.process_count())
"""


@pytest.mark.parametrize("how, visible", [("found", "all"), ("told", "all"), ("by jax alone", "0")])
def test_a_lone_task_of_slurm_sees_all_gpus(how, visible):
    """JAX alone would show it the first one."""
    job = {"SLURM_JOB_ID": str(free_job()), "SLURM_STEP_NODELIST": "localhost",
           "SLURM_NTASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "0",
           "SLURM_PROCID": "0", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SEES, how, f"127.0.0.1:{free_port()}"],
        env={**os.environ, **job}, cwd=Path(__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert f"visible {visible} 1" in done.stdout, done.stdout + done.stderr


ASKS_FOR_CPUS = """
import dataclasses
import jax
from experiments import command_line

@dataclasses.dataclass(frozen=True)
class Settings:
    devices: int = command_line.setting(3, "how many", "run")

def main(settings):
    jax.config.update("jax_num_cpu_devices", settings.devices)
    print("devices", jax.device_count())

command_line.run(main, Settings, {"only": Settings()}, "")
"""


def test_an_entry_point_may_say_how_many_devices_there_are():
    """Nothing has asked JAX for them before."""
    done = subprocess.run(
        [sys.executable, "-c", ASKS_FOR_CPUS],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        cwd=Path(__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert "devices 3" in done.stdout, done.stdout + done.stderr


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
