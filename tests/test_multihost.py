"""Two processes over loopback make the run of one: training, checkpoint, evaluation."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of the one process, then of each of the two."""
    folder = tmp_path_factory.mktemp("hosts")
    started = {1: start(1, folder / "one"), 2: start(2, folder / "two")}
    for group in started.values():
        for process in group:
            output, _ = process.communicate(timeout=300)
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
    assert [json.loads(line)["step"] for line in lines] == [5, 10]
