"""SGD against Adam and RMSProp: the published networks, their numbers, their pipeline."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import (
    command_line,
    dry_run,
    optimizer_evaluation,
    optimizer_jobs,
    optimizer_published,
    optimizer_robustness,
    optimizer_spectra,
    training_run,
)
from experiments.optimizer_networks import OPTIMIZERS
from robustjax import data


def parse(*words):
    settings = optimizer_robustness.Settings, optimizer_robustness.PRESETS
    return command_line.parse_settings(words, *settings)[0]


def test_published_averages_follow_from_published_cells():
    """Table 4.1 is the mean of three cells of Table 4.3; two of CIFAR-10 differ in print."""
    off = {("CIFAR-10", "SGD"): 0.12, ("CIFAR-10", "RMSProp"): 0.03}
    assert set(optimizer_published.TABLE_4_1) == set(optimizer_published.TABLE_4_3)
    for name, of_data in optimizer_published.TABLE_4_1.items():
        severities = optimizer_published.SEVERITIES[name]
        columns = optimizer_published.top(severities.columns, severities.top)
        cells = optimizer_published.TABLE_4_3
        cells = optimizer_published.TABLE_4_3_TOP_5 if severities.top == 5 else cells
        for optimizer, (_, expected) in of_data.items():
            found = dict(zip(columns, cells[name][optimizer], strict=True))
            apart = optimizer_published.average(name, found) - expected
            assert abs(apart - off.get((name, optimizer), 0)) < 0.01


def test_published_severities():
    assert optimizer_published.SEVERITIES["CIFAR-10"].radii == {
        "l_2 0.1": ("l2", 0.1), "l_2 0.2": ("l2", 0.2), "l_2 0.3": ("l2", 0.3),
        "l_inf 1/255": ("linf", 1 / 255), "l_inf 2/255": ("linf", 2 / 255),
        "l_inf 4/255": ("linf", 4 / 255),
    }  # fmt: skip
    assert optimizer_published.SEVERITIES["MNIST"].highlighted == (
        "Gaussian 0.1", "l_2 1", "l_inf 0.07")  # fmt: skip
    for table in (getattr(optimizer_published, f"TABLE_4_{i}") for i in (3, 4, 5, 6, 7)):
        for rows in table.values():
            assert all(len(row) == 10 and max(row) <= 100 for row in rows.values())


STUDIES_AND_DATA = [(study, name) for study, names in optimizer_jobs.COVERED.items()
                    for name in names]  # fmt: skip


@pytest.mark.parametrize("study, name", STUDIES_AND_DATA)
def test_every_published_network_is_built(study, name, tmp_path):
    """Names of parts and their arguments; nothing is traced."""
    jobs = optimizer_jobs.jobs_of(study, optimizer_jobs.BASE, name, tmp_path)
    for job in jobs[-3:]:
        settings = job.settings
        parts = training_run.build(settings, "standard", dry_run.data_facts(settings))
        assert parts.steps_per_epoch > 0
        assert settings.momentum == (0.9 if job.labels[1] == "SGD-m" else 0)
        assert settings.weight_decay == 0
        rates = dict(zip(OPTIMIZERS, optimizer_jobs.TASKS[name].rates, strict=True))
        rate = rates[job.labels[1].removesuffix("-m")]
        assert settings.learning_rate == (0.01 if study == "head" else rate)
        assert settings.batch_size == (
            512 if study == "head" else 32 if name in ("Caltech-101", "Imagenette") else 128
        )
    folders = {job.settings.workdir for job in jobs}
    assert len(folders) == len(jobs)
    assert len(jobs) == {"momentum": 2, "filters": 11, "energy": 0, "panels": 0}.get(study, 3)


def test_studies_share_networks(tmp_path):
    folders = {
        study: [job.settings.workdir
                for job in optimizer_jobs.jobs_of(study, optimizer_jobs.BASE, "CIFAR-10", tmp_path)]
        for study in ("robustness", "momentum", "filters", "bands", "batchnorm")
    }  # fmt: skip
    assert folders["bands"] == folders["robustness"]
    assert folders["momentum"][0] == folders["filters"][0] == folders["robustness"][0]
    assert not set(folders["batchnorm"]) & set(folders["robustness"])


def test_networks_are_trained_once_and_measured(tmp_path, monkeypatch, capsys):
    """The pipeline of the published runs, on digits with a perceptron and one optimizer."""
    changes = {"dataset": "digits", "validation_size": None, "model": "mlp", "width": 8,
               "epochs": 1, "milestones": (), "batch_size": 400, "test_batch_size": 40}  # fmt: skip
    tasks = {**optimizer_jobs.TASKS, "CIFAR-100": optimizer_jobs.Task(changes, (0.3, 0.1, 0.1))}
    row = optimizer_published.TABLE_4_3["CIFAR-100"]["SGD"]
    tables = {"robustness": optimizer_jobs.Table({"CIFAR-100": {"SGD": row}})}
    monkeypatch.setattr(optimizer_jobs, "TABLES", tables)
    monkeypatch.setattr(optimizer_spectra, "SHOWN", 2)
    for module in (optimizer_jobs, optimizer_evaluation):
        monkeypatch.setattr(module, "REMOVED", ())
    for module in (optimizer_jobs, optimizer_spectra):
        monkeypatch.setattr(module, "OPTIMIZERS", ("SGD",))
        monkeypatch.setattr(module, "TASKS", tasks)
    asked = []

    def attack(settings):
        """In place of AutoAttack one that finds nothing."""
        asked.append((settings.threat, settings.eps))
        assert (settings.examples, settings.which) == (40, "best")
        assert settings.attack == ("autoattack",)
        test = data.load("digits", "test").subset(np.arange(40))
        folder = Path(settings.workdir)
        folder.mkdir(parents=True)
        np.savez(folder / "adversarial.npz", x_adv=test.image, y=test.label)
        (folder / "results.json").write_text('{"robust_accuracy": 0.5}')
        return {"robust_accuracy": 0.5}

    monkeypatch.setattr(optimizer_evaluation.jobs.evaluate, "main", attack)
    words = ("--preset=paper", "--data=CIFAR-100", "--seeds=1", "--examples=40", "--batch_size=40",
             "--draws=2", f"--workdir={tmp_path / 'w'}")  # fmt: skip
    studies = "robustness,filters,bands,energy,perturbed"
    monkeypatch.setattr(training_run, "_panel", lambda *arguments: None)
    optimizer_robustness.main(parse(*words, f"--study={studies}"))
    output = capsys.readouterr().out
    assert "(55.65)" in output and "(59.76)" in output  # published: average, clean
    assert asked == list(optimizer_published.SEVERITIES["CIFAR-100"].radii.values())
    results = json.loads((tmp_path / "w/results.json").read_text())
    found = results["robustness"]["results"]["CIFAR-100, SGD"]
    mean = {name: value["mean"] for name, value in found.items()}
    columns = optimizer_published.SEVERITIES["CIFAR-100"].columns
    # The attack found nothing: all accuracies are those of the first 40 examples.
    assert len({mean[column] for column in columns[4:]}) == 1
    assert len({mean[f"{column}, top-5"] for column in columns[4:]}) == 1
    for column in columns:
        assert 0 < mean[column] < mean[f"{column}, top-5"] <= 100
    assert mean["average"] == pytest.approx(np.mean([
        mean[f"{column}, top-5"] for column in ("Gaussian 0.007", "l_2 0.3", "l_inf 4/255")
    ]))  # fmt: skip
    assert np.log(mean["Lipschitz bound"]) == pytest.approx(mean["log product of norms"])
    clean = results["filters"]["results"]["CIFAR-100"]["none, 0"]
    assert clean[0] == pytest.approx(mean["clean"])
    assert np.shape(results["bands"]["results"]["CIFAR-100"]["SGD"]["drop"]) == (1, 10)
    assert results["energy"]["results"]["CIFAR-100"]["images"] == 1297
    folders = [path.name for path in (tmp_path / "w/networks").iterdir()]
    assert folders == ["cifar-100-sgd-seed0"]
    for study in studies.split(","):
        name = study if study in ("robustness", "energy") else f"{study}_cifar-100"
        assert (tmp_path / f"w/{name}.png").stat().st_size > 5000
