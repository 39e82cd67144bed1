"""The entry point of fast adversarial training: command lines, published networks, their pipeline.

The studies on digits are in ``test_experiments_fast_studies.py``.
"""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments import (
    adversarial_training,
    batch_sizes,
    catalogue,
    command_line,
    dry_run,
    fast_jobs,
    fast_published,
    jobs,
    training_run,
)
from experiments import fast_adversarial_training as fast
from robustjax.training import report


def parse(*words):
    return command_line.parse_settings(words, fast.Settings, fast.PRESETS)[0]


def test_dry_run(capsys, tmp_path):
    assert parse() == fast.PRESETS["small"]
    assert parse("--preset=paper") == fast.Settings()
    fast.main(parse("--dry_run", f"--workdir={tmp_path / 'w'}"))
    words = (
        "--preset=paper",
        "--study=single_layer,filters",
        "--dry_run",
        f"--workdir={tmp_path / 'w'}",
    )
    fast.main(parse(*words))
    out = capsys.readouterr().out
    assert "Dry run: methods" in out
    assert "41,082" in out  # four 3x3x3 filters and a dense layer from 4096 to 10, with biases
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (("--epochs=7", "--evaluations=2"), r"epochs \(7\) must be divisible"),
        (("--eps=0",), "eps must be > 0, got 0"),
        (("--study=imagenet",), "study at small size"),
        (("--batch_multiple=0",), "batch_multiple must be >= 1, got 0"),
        (("--preset=paper", "--study=start"), "study at paper size"),
    ],
)
def test_refusals(words, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        parse(*words)


TRAINING = adversarial_training.Settings


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"oracle": "free"}, "oracle free needs objective standard.*got madry"),
        ({"penalty_clip": "gradient"}, "penalty_clip gradient needs a penalty"),
        ({"penalty_clip": "value", "penalty": "cure"}, "penalty_clip value is for objective soar"),
        ({"penalty_clip": "gradient", "penalty": "cure", "awp": 0.1}, "needs oracle plain"),
        ({"objective": ("soar",), "norm": "l2"}, "norm must be linf for soar, got l2"),
        ({"image_size": 8}, "placement must be host with image_size, got device"),
        ({"warmup": "step", "eps_warmup": 2, "attack_step_size": None}, "attack_step_size must be"),
    ],
)
def test_settings_that_do_not_go_together(changes, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        TRAINING(**changes)


@pytest.mark.parametrize("study", fast_jobs.STUDIES)
def test_every_published_network_is_built(study):
    """Names of parts and their arguments; nothing is traced."""
    networks = fast_jobs.jobs_of(study, fast_jobs.BASE, 1)
    assert len({jobs.folder_name(job) for job in networks}) == len(networks)
    for job in networks[:: max(len(networks) // 12, 1)]:
        facts = dry_run.data_facts(job.settings)
        parts = training_run.build(job.settings, job.settings.objective[0], facts)
        assert parts.steps_per_epoch == facts.train_size // job.settings.batch_size
        assert len(job.labels) == len(fast_jobs.LABELS[study])


def test_settings_of_the_published_networks():
    table = {job.labels: job.settings for job in fast_jobs.jobs_of("methods", fast_jobs.BASE, 1)}
    aligned = table["CIFAR-10", "16/255", "FGSM + GradAlign"]
    assert (aligned.penalty_weight, aligned.learning_rate) == (pytest.approx(2.0), 0.3)
    svhn = table["SVHN", "12/255", "FGSM + GradAlign"]
    assert svhn.penalty_weight == pytest.approx(3.16, abs=5e-3)  # Table 2.2
    assert (svhn.epochs, svhn.eps_warmup, svhn.warmup) == (15, 5, "step")
    assert table["SVHN", "8/255", "PGD-10"].warmup == "radius"
    free = table["CIFAR-10", "8/255", "Free"]
    assert (free.oracle, free.replays, free.epochs, free.learning_rate) == ("free", 8, 96, 0.04)
    rs = table["CIFAR-10", "8/255", "FGSM-RS"]
    assert 255 * rs.attack_step_size == pytest.approx(10)


def test_stages_of_imagenet_go_on_from_each_other(tmp_path):
    settings = parse("--preset=paper", "--seeds=1")
    chain = [
        job.settings
        for job in fast_published.placed_jobs(settings, "imagenet", tmp_path)
        if job.labels[:2] == ("FGSM + GradAlign", "6/255")
    ]
    assert [s.image_size for s in chain] == [128, 224, 288]
    assert [s.batch_size for s in chain] == [512, 180, 100]
    assert chain[0].start_from is None
    sizes = {
        multiple: [
            job.settings.batch_size
            for job in fast_published.placed_jobs(
                parse("--preset=paper", "--seeds=1", f"--batch_multiple={multiple}"), "imagenet",
                tmp_path,
            )
            if job.labels[:2] == ("FGSM + GradAlign", "6/255")
        ]
        for multiple in (8, 16, 1024)
    }  # fmt: skip
    assert sizes == {8: [512, 176, 96], 16: [512, 176, 96], 1024: [1024] * 3}
    for before, after in itertools.pairwise(chain):
        assert after.start_from == str(Path(before.workdir) / "madry")
        assert after.learning_rate == before.cycle_end


@pytest.mark.parametrize("devices", [8, 16])
def test_only_two_published_batches_do_not_divide_over_ordinary_devices(devices):
    for study in fast_jobs.STUDIES:
        refused = {
            job.settings.batch_size
            for job in fast_jobs.jobs_of(study, fast_jobs.BASE, 1)
            if batch_sizes.misfit(job.settings.batch_size, devices)
        }
        assert refused == ({180, 100} if study == "imagenet" else set())
        for job in fast_jobs.jobs_of(study, fast_jobs.BASE, 1, batch_multiple=devices):
            batch_sizes.check_training(job.settings.batch_size, devices)


def test_a_later_stage_is_refused_before_the_first_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "trained", None)
    settings = parse("--preset=paper", "--seeds=1")
    with pytest.raises(
        ValueError,
        match=r"batch_size of FGSM \+ GradAlign, 2/255, 224 \(180\) must be .* \(8\), as 176 and "
        "184 are; --batch_multiple rounds it",
    ):
        fast_published.run_study(settings, "imagenet", tmp_path)


def test_a_study_of_networks(tmp_path, monkeypatch, capsys):
    """The pipeline of the published runs: streamed and resized images, a linear model."""
    tiny = dataclasses.replace(
        fast_jobs.BASE, dataset="mnist5k", placement="host", image_size=8, validation_size=None,
        model="linear", precision="float32", augmentation="crop", epochs=2, batch_size=1000,
        test_batch_size=200, test_steps=2, test_restarts=1, robust_examples=100, monitor=32,
        validation_steps=1, dispatch=3,
    )  # fmt: skip
    monkeypatch.setattr(fast_published, "BASE", tiny)
    changes = {**fast_jobs.method("Free", 8), "epochs": 2}
    rows = [(("Free", "8/255"), changes, {"clean": 77.92})]
    monkeypatch.setattr(fast_jobs, "_rows", lambda study: rows)
    settings = parse("--preset=paper", "--study=curves", "--seeds=1", f"--workdir={tmp_path / 'w'}")
    fast.main(settings)
    out = capsys.readouterr().out
    assert "(77.92)" in out and "Free" in out
    results = json.loads((tmp_path / "w/results.json").read_text())["curves"]["results"]
    for name in ("clean", "PGD-50-10", "stopped early clean", "alignment", "collapsed"):
        assert np.isfinite(results["Free, 8/255"][name]["mean"])
    assert (tmp_path / "w/curves.png").stat().st_size > 5000
    folder = tmp_path / "w/curves/free-8of255-seed0/standard"
    records = report.read_metrics(folder)
    assert {"train", "validation", "monitor"} == {r["split"] for r in records}
    found = json.loads((folder / "results.json").read_text())
    assert (found["chosen_by"], found["attacked_examples"]) == ("pgd1", 100)
    # Trained on from there, the first network is the last of before.
    more = dataclasses.replace(
        tiny, **fast_jobs.method("FGSM", 8), epochs=1, learning_rate=1e-9, start_from=str(folder),
        workdir=str(tmp_path / "more"), augmentation="none",
    )  # fmt: skip
    after = adversarial_training.train(more)["madry"]["last"]["clean"]
    assert after == pytest.approx(found["last"]["clean"], abs=0.005)


@pytest.mark.parametrize("kind, last", [("Table", 8), ("Fig", 16)])
def test_the_catalogue_names_every_table_and_figure(kind, last):
    items = [e.item for e in catalogue.CATALOGUE if e.paper == catalogue.FAST_AT]
    numbers = {n for item in items if item.startswith(kind) for n in re.findall(r"2\.(\d+)", item)}
    assert numbers == {str(n) for n in range(1, last + 1)}
