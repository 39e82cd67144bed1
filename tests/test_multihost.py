"""Two processes over loopback make the run of one: training, checkpoint, evaluation, attacks."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import parallel_training as runs
import pytest

from robustjax import parallel

SCRIPT = Path(__file__).with_name("two_hosts.py")


def start(processes, folder):
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT)]
    return [
        subprocess.Popen(
            [*command, str(process), str(processes), str(port), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(processes)
    ]


def waited(process):
    try:
        return process.communicate(timeout=300)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of the one process, then of each of the two."""
    folder = tmp_path_factory.mktemp("hosts")
    started = {1: start(1, folder / "one"), 2: start(2, folder / "two")}
    for group in started.values():
        for process in group:
            output, _ = waited(process)
            assert process.returncode == 0, output[-3000:]
    paths = [folder / "one" / "results-0.json"]
    paths += [folder / "two" / f"results-{process}.json" for process in range(2)]
    return [json.loads(path.read_text()) for path in paths], folder


def test_devices_are_shared_out(results):
    (one, *two), _ = results
    assert (one["devices"], one["local"]) == (4, 4)
    assert [(r["devices"], r["local"]) for r in two] == [(4, 2), (4, 2)]


@pytest.mark.parametrize("what", ["resident", "streamed", "restored"])
def test_two_hosts_train_as_one(results, what):
    """Two epochs of 20 batches, which leave out 17 of the 1,297 examples."""
    (one, *two), _ = results
    assert two[0][what] == two[1][what]
    np.testing.assert_allclose(two[0][what], one[what], rtol=1e-4)
    assert one["restored"] == one["resident"]
    assert not np.allclose(one["streamed"], one["resident"], rtol=1e-6)


def test_every_host_has_the_whole_evaluation(results):
    (one, *two), _ = results
    assert two[0]["verdicts"] == two[1]["verdicts"]
    for name, correct in one["verdicts"].items():
        assert len(correct) == 300
        assert np.mean(np.array(correct) != np.array(two[0]["verdicts"][name])) <= 0.01


def test_only_the_first_process_writes(results):
    _, folder = results
    lines = (folder / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(5, 45, 5)]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes of two devices each make of every method, and of the attacks."""
    folder = tmp_path_factory.mktemp("methods")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = SCRIPT.with_name("parallel_training.py")
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(number), "2", str(port), str(folder / str(number))],
            env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    for process in started:
        output, _ = waited(process)
        assert process.returncode == 0, output[-3000:]
    return [dict(np.load(folder / f"{number}.npz")) for number in range(2)]


def mesh_of(devices):
    return parallel.device_mesh(jax.devices()[:devices])


# Of the largest number after three steps, in float32: sums over devices are made in another order.
# SOAR divides a difference of two gradients by h = 0.01, rounding included.
TOLERANCE = dict.fromkeys(runs.METHODS, 2e-6) | {"soar": 1e-4}


def assert_same_training(method, a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE[method] * np.abs(b).max())


@pytest.mark.parametrize("method", runs.METHODS)
def test_any_devices_and_hosts_train_the_same_network(method, two_processes):
    """1, 2, 4, 8 devices, and 2 of each of two processes, with synchronised statistics."""
    own = [found[f"{method}/synchronised"] for found in two_processes]
    np.testing.assert_array_equal(own[0], own[1])
    one = runs.train(method, "synchronised", mesh_of(1))
    for devices in (2, 4, 8):
        assert_same_training(method, runs.train(method, "synchronised", mesh_of(devices)), one)
    assert_same_training(method, own[0], one)


@pytest.mark.parametrize("method", runs.METHODS)
def test_processes_with_statistics_of_each_device_train_as_one(method, two_processes):
    """4 devices, and 2 of each of two processes; the result is not that of one device."""
    own = [found[f"{method}/separate"] for found in two_processes]
    np.testing.assert_array_equal(own[0], own[1])
    assert_same_training(method, own[0], runs.train(method, "separate", mesh_of(4)))
    together = two_processes[0][f"{method}/synchronised"]
    assert np.abs(own[0] - together).max() > 1e-4 * np.abs(together).max()


def test_attacks_do_not_depend_on_devices_and_hosts(two_processes):
    expected = runs.attacked(mesh_of(1))
    assert 0 < expected["robust"].mean() < 1
    for found in (runs.attacked(mesh_of(8)), *two_processes):
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
