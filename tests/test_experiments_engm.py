"""The entry point of the outer optimizers: presets, published runs, a tiny run of some studies."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import (
    catalogue,
    command_line,
    dry_run,
    engm,
    engm_jobs,
    engm_published,
    engm_studies,
    jobs,
    noisy_digits,
    training_run,
)
from experiments.claims import Claim, check_claims, print_claims
from robustjax.training import report


def parse(*words):
    return command_line.parse_settings(words, engm.Settings, engm.PRESETS)[0]


def test_flags_override_the_preset():
    assert parse() == engm.PRESETS["small"]
    settings = parse("--preset=paper", "--study=sota,tau", "--noassert_claims", "--seeds=1")
    assert settings == dataclasses.replace(
        engm.PRESETS["paper"], study=("sota", "tau"), assert_claims=False, seeds=1
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (("--study=sota",), "study at small size must be one of .*, got 'sota'"),
        (("--preset=paper", "--study=convergence"), "study at paper size .* got 'convergence'"),
        (("--epochs=10", "--evaluate_every=4"), r"epochs \(10\) must be divisible"),
        (("--noise=1.5",), "noise must be <= 1, got 1.5"),
        (("--seeds=0",), "seeds must be >= 1, got 0"),
    ],
)
def test_refusals(words, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        parse(*words)


def test_every_published_number_has_a_network_with_its_settings():
    base = engm_jobs.BASE
    table = engm_jobs.jobs_of("methods", base, 1)
    assert len(table) == 24
    for job in table:
        s = job.settings
        assert (s.epochs, s.milestones, s.beta, s.alpha) == (200, (100, 150), 6.0, 5.0)
        assert (s.awp == 5e-3) == (job.labels[1] == "AWP")
        assert (s.oracle == "engm") == (job.labels[2] == "ENGM")
    wide = engm_jobs.jobs_of("sota", base, 1)
    assert {job.settings.alpha for job in wide} == {10.4}
    assert wide[0].published == {"clean": 85.36, "autoattack": 56.17}
    seven = engm_jobs.jobs_of("optimizers", base, 3)
    assert len(seven) == 21 and [job.settings.seed for job in seven[:3]] == [0, 1, 2]
    # The published columns agree with each other but for ENGM's row.
    for method, (_, best, last, _, overfit) in engm_jobs.TABLE_2.items():
        assert (abs(100 * (best - last) / best - overfit) < 0.11) == (method != "engm")
    with pytest.raises(ValueError, match="trains networks, got 'landscape'"):
        engm_jobs.jobs_of("landscape", base, 1)


@pytest.mark.parametrize("study", engm.TRAINED)
def test_every_published_network_is_built(study):
    """Names of parts and their arguments; nothing is traced."""
    for job in engm_jobs.jobs_of(study, engm_jobs.BASE, 1):
        facts = dry_run.data_facts(job.settings)
        (objective,) = job.settings.objective
        parts = training_run.build(job.settings, objective, facts)
        assert parts.steps_per_epoch == facts.train_size // job.settings.batch_size
        assert len(job.labels) == len(engm_jobs.LABELS[study])


def test_a_dry_run_counts_each_kind_of_step_once(capsys):
    settings = parse("--preset=paper", "--study=tau,landscape", "--dry_run")
    engm.main(settings)
    out = capsys.readouterr().out
    assert "Dry run: study tau" in out
    assert out.count("11,173,962") == 5  # ResNet-18, five values of tau


def test_claims_are_printed_and_checked(capsys):
    claims = [Claim("a", "> 1", "2", True), Claim("b", "> 1", "0", None)]
    print_claims("title", claims)
    assert "reported" in capsys.readouterr().out
    check_claims(claims)
    with pytest.raises(ValueError, match=r"1 of 3 claims must hold .* c: expected > 1, got 0"):
        check_claims([*claims, Claim("c", "> 1", "0", False)])


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Some studies at a size at which nothing but identities can hold."""
    workdir = tmp_path_factory.mktemp("engm") / "run"
    words = ("--study=alpha,gradients,landscape,convergence", "--seeds=1", "--epochs=2",
             "--evaluate_every=1", "--train_size=64", "--test_size=16", "--probe=8",
             "--noassert_claims", f"--workdir={workdir}")  # fmt: skip
    engm.main(parse(*words))
    return workdir, words


def test_a_tiny_run_leaves_tables_figures_and_results(small_run):
    workdir, _ = small_run
    results = json.loads((workdir / "results.json").read_text())
    assert {"alpha", "gradients", "landscape", "convergence", "environment"} <= set(results)
    for study in ("alpha", "gradients", "landscape", "convergence"):
        assert (workdir / f"{study}.png").stat().st_size > 5000
    claims = {c["text"]: c for c in results["alpha"]["claims"]}
    assert claims["alpha = inf is MSGD"]["holds"] is True
    (claim,) = results["convergence"]["claims"]
    assert claim["holds"] is True
    assert len(results["gradients"]["results"]["natural"]["mean_norm"]) == 2


def test_finished_studies_are_kept(small_run):
    workdir, words = small_run
    with pytest.raises(ValueError, match="already holds a run"):
        engm.main(parse(*words))
    before = json.loads((workdir / "results.json").read_text())
    engm.main(parse(*words[1:], "--study=convergence", "--resume"))
    after = json.loads((workdir / "results.json").read_text())
    assert after["alpha"] == before["alpha"]


def test_runs_do_not_depend_on_what_runs_beside_them():
    """One at a time, or several with a group that has to be filled up."""
    task = noisy_digits.load_task(train_size=64, test_size=16)
    recipe = noisy_digits.Recipe(epochs=2, evaluate_every=1, probe=8)  # as in the run above
    together = noisy_digits.train(recipe, noisy_digits.Knobs(seed=(3, 4)), task)
    alone = noisy_digits.train(recipe, noisy_digits.Knobs(seed=4), task)
    assert together.robust.shape == (2, 2) and alone.robust.shape == (1, 2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b[0], rtol=1e-5, atol=1e-6),
        together._replace(epoch=together.epoch[None].repeat(2, 0)),
        alone._replace(epoch=alone.epoch[None]),
    )


def test_the_task_has_wrong_labels_in_training_alone():
    clean, noisy = (noisy_digits.load_task(noise=share) for share in (0.0, 0.3))
    changed = np.mean(np.asarray(clean.train["label"] != noisy.train["label"]))
    assert 0.2 < changed <= 0.3
    np.testing.assert_array_equal(clean.test["label"], noisy.test["label"])
    np.testing.assert_array_equal(clean.train["image"], noisy.train["image"])


def test_a_study_of_networks_trains_evaluates_and_resumes(tmp_path, monkeypatch, capsys):
    """The pipeline of the published runs, on digits with a linear model."""
    tiny = dataclasses.replace(
        engm_published.MNIST, dataset="digits", model="linear", eps_warmup=0, attack_steps=1,
        batch_size=400, test_batch_size=200, validation_steps=2, test_steps=2, probe=8,
        probe_train=True, dispatch=3,
    )  # fmt: skip
    monkeypatch.setattr(engm_published, "MNIST", tiny)
    monkeypatch.setattr(engm_jobs, "METHODS", {
        name: engm_jobs.METHODS[name] for name in ("msgd", "n_engm", "a_engm", "engm")
    })  # fmt: skip
    rows = engm_jobs._rows("mnist")
    monkeypatch.setattr(engm_jobs, "_rows", lambda study: [rows[0], rows[2]])
    settings = parse("--preset=mnist", "--mnist_epochs=2", f"--workdir={tmp_path / 'w'}")
    engm.main(settings)
    out = capsys.readouterr().out
    assert "MSGD" in out and "A-ENGM" in out
    results = json.loads((tmp_path / "w" / "results.json").read_text())["mnist"]["results"]
    assert set(results) == {"MSGD", "A-ENGM"}
    for name in ("clean", "best", "last", "overfit", "mean_norm", "variance", "correlation"):
        assert np.isfinite(results["MSGD"][name]["mean"])
    records = report.read_metrics(tmp_path / "w/mnist/a-engm-seed0/madry")
    assert {"train", "validation", "gradients"} == {r["split"] for r in records}
    assert 0 < records[0]["weight"] <= 1
    assert all("correlation_train" in r for r in records if r["split"] == "gradients")

    # Nothing is trained again.
    monkeypatch.setattr(jobs.adversarial_training, "train", None)
    engm.main(dataclasses.replace(settings, resume=True))
    again = json.loads((tmp_path / "w" / "results.json").read_text())["mnist"]["results"]
    assert again["MSGD"] == results["MSGD"]


def test_intervals_are_those_of_the_bootstrap():
    assert engm_studies.interval(np.array([5.0])) == "5"
    assert engm_studies.interval(np.array([4.0, 6.0])).startswith("5 ± 1.4 [4, ")
    summary = engm_studies.summary({"a": np.array([1.0, 2.0, 3.0])})["a"]
    assert summary["mean"] == 2 and summary["low"] < 2 < summary["high"]


def test_the_catalogue_names_every_table_and_figure():
    items = {entry.item for entry in catalogue.CATALOGUE if entry.paper == catalogue.OUTER}
    assert {f"Table {i}" for i in range(1, 6)} | {f"Fig. {i}" for i in range(1, 6)} <= items
