"""The entry point of SOAR: command lines, published networks, their pipeline.

The studies on digits are in ``test_experiments_soar_studies.py``.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import command_line, dry_run, soar, soar_jobs, soar_published, training_run


def parse(*words):
    return command_line.parse_settings(words, soar.Settings, soar.PRESETS)[0]


def test_dry_run(capsys, tmp_path):
    assert parse() == soar.PRESETS["small"]
    assert parse("--preset=paper") == soar.Settings()
    soar.main(parse("--dry_run", f"--workdir={tmp_path / 'w'}"))
    assert "Dry run: methods" in capsys.readouterr().out
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (("--seeds=0",), "seeds must be >= 1, got 0"),
        (("--study=attack",), "study"),
        (("--study=points",), "study at small size"),
        (("--preset=paper", "--study=linear"), "study at paper size"),
    ],
)
def test_refusals(words, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        parse(*words)


@pytest.mark.parametrize("name", soar_jobs.NETWORKS)
def test_every_published_network_is_built(name, tmp_path):
    """Names of parts and their arguments; nothing is traced."""
    settings = soar_jobs.job(soar_jobs.BASE, name, 0, tmp_path).settings
    facts = dry_run.data_facts(settings)
    parts = training_run.build(settings, settings.objective[0], facts)
    assert parts.steps_per_epoch == 49_000 // 128
    tuned = "SOAR" in name or "FOAR" in name
    assert settings.learning_rate == (0.004 if tuned else 0.3 if name == "MMA" else 0.1)
    assert (settings.start_from is not None) == (tuned and "cold" not in name)


@pytest.mark.parametrize("study", soar_jobs.STUDIES)
def test_studies_name_networks_and_columns_that_exist(study, tmp_path):
    measure = soar_jobs.STUDIES[study]
    assert set(measure.rows) <= set(soar_jobs.NETWORKS)
    for published in measure.rows.values():
        assert len(published) == len(measure.columns)
    names = [job.labels[0] for job in soar_jobs.jobs_of(study, soar_jobs.BASE, 3, tmp_path)]
    assert len(set(names)) == len(names)
    place = {name: i for i, name in enumerate(names)}
    for name in names:  # what a network goes on from comes before it
        start = soar_jobs.NETWORKS[name].start
        assert start is None or place[start] < place[name]


def test_networks_are_trained_once_and_measured(tmp_path, monkeypatch, capsys):
    """The pipeline of the published runs, on digits with a perceptron."""
    tiny = dataclasses.replace(
        soar_jobs.BASE, dataset="digits", validation_size=None, model="mlp", width=8,
        augmentation="none", epochs=1, batch_size=400, test_batch_size=200, test_steps=1,
        validation_steps=1, robust_examples=100,
    )  # fmt: skip
    monkeypatch.setattr(soar_jobs, "BASE", tiny)
    brief = {"epochs": 1, "milestones": ()}
    networks = {
        name: network._replace(changes={**network.changes, **brief})
        for name, network in soar_jobs.NETWORKS.items()
    }
    monkeypatch.setitem(networks, "SOAR", networks["SOAR"]._replace(
        changes={**networks["SOAR"].changes, "learning_rate": 1e-9}))  # fmt: skip
    for module in (soar_jobs, soar_published):
        monkeypatch.setattr(module, "NETWORKS", networks)
    columns = ("clean", "FGSM", "square, eps/2", "transfer Standard, FGSM", "l2 255/255",
               "confidence", "loss, 1 z")  # fmt: skip
    monkeypatch.setattr(soar_published, "ATTACKS", {
        name: soar_published.ATTACKS[name] for name in ("FGSM", "square")
    })  # fmt: skip
    monkeypatch.setattr(
        soar_jobs, "STUDIES",
        {"methods": soar_jobs.Measure(columns, {"SOAR": (87.95, *[None] * 6)})},
    )  # fmt: skip
    # The network that it is trained on from serves as the source of transferred examples.
    of = soar_published._measured
    monkeypatch.setattr(
        soar_published, "_measured",
        lambda settings, job, columns, sources: of(settings, job, columns, {
            "Standard": soar_jobs.job(tiny, "Standard", 0, Path(job.settings.workdir).parent)
        }),
    )  # fmt: skip
    words = ("--preset=paper", "--study=methods", "--examples=40", "--batch_size=40",
             f"--workdir={tmp_path / 'w'}")  # fmt: skip
    soar.main(parse(*words))
    assert "(87.95)" in capsys.readouterr().out
    results = json.loads((tmp_path / "w/results.json").read_text())["methods"]["results"]["SOAR"]
    mean = {name: value["mean"] for name, value in results.items()}
    assert set(columns) <= set(mean) and np.isfinite(list(mean.values())).all()
    # With next to no learning rate SOAR leaves the standard network as it was.
    assert mean["FGSM"] == mean["transfer Standard, FGSM"]
    # The floor of the penalty alone is (d eps^2 + 1) / 2 E|z| with half of eps, on average.
    assert mean["loss, 1 z"] > 0.3
    folders = sorted(path.name for path in (tmp_path / "w/networks").iterdir())
    assert folders == ["soar-seed0", "standard-seed0"]

    # Nothing is trained again.
    monkeypatch.setattr(soar_published.jobs.adversarial_training, "train", None)
    soar.main(parse(*words, "--resume"))
