"""The entry point of Square Attack: command line, jobs, dry run, a tiny run of every study."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import command_line, square_attack, square_jobs, square_studies
from robustjax import attacks
from robustjax.norms import L2, LInf

SETTINGS, PRESETS = square_jobs.Settings, square_jobs.PRESETS


def parse(*words):
    return command_line.parse_settings(words, SETTINGS, PRESETS)[0]


def test_flags_override_the_preset():
    assert parse() == PRESETS["small"]
    settings = parse(
        "--preset=paper", "--study=p,theory", "--p=0.05,0.8", "--pgd_restarts=1,3",
        "--robust=runs/x/madry", "--eps_linf=4/255", "--noresume",
    )  # fmt: skip
    assert settings == dataclasses.replace(
        PRESETS["paper"],
        study=("p", "theory"),
        p=("0.05", "0.8"),
        pgd_restarts=(1, 3),
        robust="runs/x/madry",
        eps_linf=4 / 255,
        resume=False,
    )
    assert settings.training("robust") is None
    own = settings.training("standard")
    assert own.objective == ("standard",) and own.dataset == "cifar10"


@pytest.mark.parametrize(
    "words, message",
    [
        (("--study=fig3",), "ablation, p, seeds"),
        (("--norms=l1",), "linf, l2, got 'l1'"),
        (("--p=0.5",), "0.0125"),
        (("--queries=0",), "queries must be >= 1, got 0"),
        (("--robust_p=1.5",), "robust_p must be <= 1, got 1.5"),
        (("--eps_l2=0",), "eps_l2 must be > 0, got 0"),
        (("--pgd_restarts=",), "pgd_restarts must hold at least one"),
        (("--pgd_restarts=0",), "pgd_restarts must be >= 1, got 0"),
        (("--epochs=0",), "epochs must be >= 1"),
    ],
)
def test_what_is_refused(words, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        parse(*words)


def test_a_batch_that_does_not_fit_the_devices_is_refused_before_anything_is_trained(tmp_path):
    words = ("--preset=paper", f"--workdir={tmp_path / 'w'}")
    with pytest.raises(ValueError, match=r"train_batch_size of mnist \(50\) .*, as 48 and 56 are"):
        square_attack.main(parse(*words))
    assert not (tmp_path / "w").exists()
    assert parse(*words, "--train_batch_size=48").training("robust").batch_size == 48
    for role in square_jobs.ROLES:  # who has been trained is asked no more
        own = parse(*words).training(role)
        folder = tmp_path / "w" / "models" / role / own.objective[0]
        folder.mkdir(parents=True)
        (folder / "results.json").write_text("{}")
    square_attack._check_batches(parse(*words))


def test_the_jobs_are_those_of_the_tables():
    paper = PRESETS["paper"]
    ablation = square_jobs.jobs_of("ablation", paper)
    assert [job.label["norm"] for job in ablation] == ["linf"] * 10 + ["l2"] * 6
    # The last of each norm is the attack as it is by default.
    assert ablation[9].make.keywords == {
        "queries": 10_000, "p_init": 0.05, "shape": "square", "signs": "channel",
        "init": "vertical_stripes",
    }  # fmt: skip
    assert ablation[15].make.keywords["update"] == "eta"
    assert len(square_jobs.jobs_of("p", paper)) == 20
    robust = square_jobs.jobs_of("robust", paper)
    published = {(job.threat.eps, job.label["attack"]) for job in robust}
    assert set(square_attack.PUBLISHED_ACCURACY) <= published
    assert {job.threat.norm for job in robust} == {LInf(), L2()}
    for study in square_jobs.STUDIES:
        for job in square_jobs.jobs_of(study, paper):
            assert job.role in square_jobs.ROLES and "norm" in job.label
            assert callable(job.make(job.threat))  # takes its options
    assert not square_jobs.jobs_of("theory", paper)


def test_published_numbers_stand_only_beside_the_published_setting():
    paper = PRESETS["paper"]
    beside = square_attack._published("robust", dataclasses.replace(paper, seed=3, workdir="w"))
    assert beside({"eps": 2.0, "attack": "Square"}) == "16.7"
    assert beside({"eps": 0.3, "attack": "Square"}) == ""
    assert square_attack._published("ablation", paper) is None
    assert square_attack._published("robust", dataclasses.replace(paper, restarts=5)) is None
    assert square_attack._published("seeds", PRESETS["small"]) is None


def dry_run(words, tmp_path, capsys):
    square_attack.main(parse(*words, "--dry_run", f"--workdir={tmp_path / 'w'}"))
    assert not (tmp_path / "w").exists()
    return capsys.readouterr().out


def test_a_dry_run_counts_and_computes_nothing(tmp_path, capsys):
    out = dry_run(("--study=seeds,theory", "--norms=linf"), tmp_path, capsys)
    assert f"{2 * 200 * 10 * 1000:.3e}" in out and "theory" in out  # models, examples, seeds
    assert "600 (30 x 20)" in out  # steps of training on the digits


def test_a_dry_run_of_the_paper_needs_no_models(tmp_path, capsys):
    words = ("--preset=paper", "--study=robust", "--standard=runs/none", "--batch_size=8")
    out = dry_run(words, tmp_path, capsys)
    assert "100,300 (85 x 1180)" in out
    # 10,000 images: 20,000 queries, once and 50 times; at three l_2 radii Square and SimBA.
    assert f"{10_000 * (20_000 * 51 + 6 * 10_000):.3e}" in out
    # At four radii 1, 10 and 100 restarts of 51 gradients.
    assert f"{10_000 * 4 * 111 * 51:.3e}" in out


def test_prop_352_is_counted_over_all_staircases():
    assert sorted(square_studies._staircases(4, 4)) == [
        [1, 1, 1, 1], [2, 1, 1, 0], [2, 2, 0, 0], [3, 1, 0, 0], [4, 0, 0, 0],
    ]  # fmt: skip
    assert [square_studies._most_windows(k, 2) for k in (4, 6, 8, 9, 12)] == [1, 2, 3, 4, 6]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Every study once, on a linear model and few variants; the model is trained once."""
    workdir = tmp_path_factory.mktemp("square") / "run"
    patch = pytest.MonkeyPatch()
    tiny = dataclasses.replace(
        square_jobs.RECIPES["digits"], model="linear", learning_rate=0.05, validation_steps=1,
        test_steps=1, epochs=1,
    )  # fmt: skip
    patch.setitem(square_jobs.RECIPES, "tiny", tiny)
    patch.setattr(square_jobs, "LINF_ABLATION", square_jobs.LINF_ABLATION[-2:])
    patch.setattr(square_studies, "RUNS", 20)
    patch.setattr(square_studies, "STEPS", (10, 30))
    patch.setattr(square_studies, "AREAS", range(4, 10))
    patch.setattr(square_studies, "PICTURE_QUERIES", (1, 4, 50))
    settings = parse(
        "--standard=tiny", f"--robust={workdir}/models/standard/standard", "--examples=16",
        "--robust_examples=24", "--batch_size=8", "--queries=20", "--robust_queries=20",
        "--targeted_queries_linf=20", "--seeds=2", "--stability_seeds=2", "--p=0.3",
        "--norms=linf", "--restarts=2", "--pgd_restarts=2", "--pgd_steps=2", "--robust_p=0.3",
        f"--workdir={workdir}",
    )  # fmt: skip
    yield settings, square_attack.main(settings)
    patch.undo()


def test_every_study_leaves_its_part(small_run):
    settings, results = small_run
    stored = json.loads((Path(settings.workdir) / "results.json").read_text())
    assert list(stored) == list(results) == list(square_jobs.STUDIES)
    for study in square_jobs.STUDIES:
        jobs = square_jobs.jobs_of(study, settings)
        assert float(stored[study]["seconds"]) >= 0
        assert len(stored[study].get("rows", ())) == len(jobs)
        figure = Path(settings.workdir) / f"{study}.png"
        assert figure.exists() == (study != "seeds")
        for job, row in zip(jobs, stored[study].get("rows", ()), strict=True):
            assert row["examples"] == (24 if study == "robust" else 16)
            assert len(row["seeds"]["failure"]) == job.seeds
            points, accuracy = row["points"], float(row["robust accuracy"])
            assert accuracy == pytest.approx(float(row["failure"]) * points / row["examples"])


def test_results_of_the_tiny_run_are_consistent(small_run):
    _, results = small_run
    for row in results["curves"]["rows"]:
        assert row["curve"] == sorted(row["curve"])
        assert row["curve"][-1] == pytest.approx(1 - row["failure"])
        assert row["largest size"] <= 1 + 1e-5
    # More restarts, seeded alike, break no fewer.
    by = {(r["norm"], r["eps"], r["attack"]): r["failure"] for r in results["robust"]["rows"]}
    assert by["linf", 0.15, "Square, restarts 2"] <= by["linf", 0.15, "Square"]
    # A power of two changes no rounding: neither outcome nor queries.
    for row in results["masking"]["rows"]:
        if row["attack"] == "Square" and row["logits times"] != 1e4:
            assert row["same outcome"] == row["same queries"] == 1
    assert "yes" in square_attack.remarks("masking", results["masking"])[0]
    steps = results["steps"]
    assert steps["queries"] == [1, 4, 20]
    assert (np.diff(np.array(steps["norms"]["linf"]["margin"]), axis=0) >= 0).all()
    for row in results["theory"]["search"]:
        assert row["never rises"] and row["smallest mean gradient norm"] <= row["bound"]
    for row in results["theory"]["windows"]:
        for s in (2, 3):
            assert row.get(f"formula {s}") == row.get(f"counted {s}")
    response = results["theory"]["response"]
    assert response["square"] > max(response["rectangle"], response["random"])


def test_a_finished_run_is_not_computed_again(small_run, monkeypatch):
    settings, results = small_run

    def refuse(*arguments):
        raise AssertionError("computed again")

    monkeypatch.setattr(square_attack, "_study", refuse)
    assert square_attack.main(settings)["ablation"]["rows"] == results["ablation"]["rows"]


def test_an_interrupted_run_goes_on_with_the_study_that_was_cut_off(small_run, monkeypatch):
    settings, results = small_run
    path = Path(settings.workdir) / "results.json"
    whole = path.read_text()
    path.write_text(json.dumps({k: v for k, v in json.loads(whole).items() if k != "theory"}))
    ran = []
    run = square_attack._study

    def noted(study, *rest):
        ran.append(study)
        return run(study, *rest)

    monkeypatch.setattr(square_attack, "_study", noted)
    again = square_attack.main(settings)
    assert ran == ["theory"] and again["theory"]["windows"] == results["theory"]["windows"]
    path.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        square_attack.main(settings)
    path.write_text(whole)


def test_another_setting_needs_another_folder(small_run):
    settings, _ = small_run
    with pytest.raises(ValueError, match="queries=20, got queries=21"):
        square_attack.main(dataclasses.replace(settings, queries=21))


def test_pictures_show_the_attack_as_it_runs():
    """The states on the way end in what the whole attack returns."""
    weight = jax.random.normal(jax.random.key(0), (36, 3))

    def logits_fn(x):
        return x.reshape(len(x), -1) @ weight

    x = np.asarray(jax.random.uniform(jax.random.key(1), (4, 6, 6, 1)))
    y = np.asarray(jnp.argmax(logits_fn(x), axis=-1), np.int32)
    threat = square_attack.jobs_of("curves", PRESETS["small"])[0].threat
    threat = dataclasses.replace(threat, eps=0.02)
    attack = attacks.square(threat, queries=30, has_aux=True)
    own_keys = jax.random.split(jax.random.key(2), 4)
    partial = jax.tree_util.Partial(logits_fn)
    *_, last = square_studies._states(attack, partial, own_keys, x, y, [1, 7, 30])
    _, whole = attack(logits_fn, own_keys, x, y)
    np.testing.assert_array_equal(last.queries, whole.queries)
    np.testing.assert_allclose(last.x_adv, whole.x_adv, atol=1e-6)
