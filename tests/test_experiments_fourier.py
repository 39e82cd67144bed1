"""The entry point of the Fourier attacks: command line, dry run, a tiny run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import adversarial_training, choices, command_line, fourier_attack, training_run
from robustjax import data, training
from robustjax.fourier_norms import FourierLInf
from robustjax.norms import LInf
from robustjax.training import checkpoint, report

SETTINGS, PRESETS = fourier_attack.Settings, fourier_attack.PRESETS


def parse(*words):
    return command_line.parse_settings(words, SETTINGS, PRESETS)[0]


def test_flags_override_the_preset():
    assert parse() == PRESETS["small"]
    settings = parse(
        "--preset=paper", "--balls=fourier,linf", "--eps_max=4/255", "--checkpoints=a, b",
        "--methods=pgd", "--low=0.2", "--width=None",
    )  # fmt: skip
    assert settings == dataclasses.replace(
        PRESETS["paper"],
        balls=("fourier", "linf"),
        eps_max=4 / 255,
        checkpoints="a, b",
        methods=("pgd",),
        low=0.2,
    )
    assert [path.name for path in settings.folders] == ["a", "b"]
    assert fourier_attack.norm_of(settings, "fourier_low") == FourierLInf(low=0.2)
    assert fourier_attack.norm_of(settings, "linf") == LInf()


def test_the_published_grid():
    paper = PRESETS["paper"]
    grid = np.linspace(0, paper.eps_max, paper.eps_count)
    np.testing.assert_allclose(grid * 255, np.arange(17) / 2)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--balls=fourier_mid",), "must be of linf, fourier, fourier_low, fourier_high"),
        (("--steps=0",), "steps must be >= 1, got 0"),
        (("--high=0.6",), "high must be <= 0.5, got 0.6"),
        (("--eps_max=-1",), "eps_max must be >= 0"),
        (("--trainings=linf,l1",), "standard, linf, l2, noise, got 'l1'"),
    ],
)
def test_what_is_refused(words, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        parse(*words)


def test_too_many_examples_are_refused(tmp_path, plain_calls):
    settings = parse("--examples=301", f"--workdir={tmp_path / 'w'}")
    with pytest.raises(ValueError, match="examples must be <= 300, got 301"):
        fourier_attack.main(settings)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("words", [(), ("--preset=paper", "--balls=fourier", "--methods=pgd")])
def test_a_dry_run_counts_and_computes_nothing(words, capsys, tmp_path):
    fourier_attack.main(parse(*words, "--dry_run", f"--workdir={tmp_path / 'w'}"))
    out = capsys.readouterr().out
    assert "FLOPs" in out
    if words:
        assert "36,479,194" in out and "runs/fourier_attack/models/madry" in out  # WRN-28-10
    else:
        assert all(name in out for name in fourier_attack.TRAININGS)
    assert not (tmp_path / "w").exists()


def test_noise_is_added_to_the_images_in_training():
    """The objective sees images moved by the noise, clipped to the box."""
    settings, seen = parse("--noise=0.1"), []

    def model_fn(params, model_state, x, train, key):
        if train:
            seen.append(x)
        return jnp.zeros((len(x), 10)) + jnp.sum(params), model_state

    x = jnp.full((4, 20, 20, 1), 0.5)
    batch = {"image": x, "label": jnp.arange(4), "index": jnp.arange(4), "step": jnp.int32(0)}
    loss_fn = fourier_attack._objective(settings, "noise")(model_fn)
    loss_fn(jnp.zeros(1), {}, jax.random.key(0), batch)
    noise = np.asarray(seen[0] - x)
    assert noise.std() == pytest.approx(0.1, rel=0.1) and abs(noise.mean()) < 0.01


def test_a_run_trains_attacks_and_reports(tmp_path, capsys):
    workdir = tmp_path / "run"
    settings = parse(
        "--trainings=linf", "--epochs=1", "--examples=20", "--batch_size=16", "--steps=2",
        "--train_steps=1", "--eps_count=3", "--balls=linf,fourier_low", "--projections=2",
        "--model=linear", f"--workdir={workdir}",
    )  # fmt: skip
    results = fourier_attack.main(settings)
    for name in ("config.json", "curves.png", "panel_linf.png"):
        assert (workdir / name).stat().st_size > 0
    stored = json.loads((workdir / "results.json").read_text())
    assert stored["models"] == results["models"] and stored["examples"] == 20
    np.testing.assert_allclose(stored["eps"], [0, 0.1, 0.2])
    for curves in results["models"].values():
        for ball, curve in curves.items():
            assert curve["accuracy"][0] >= curve["accuracy"][-1]
            assert curve["max_eps_strict"] <= curve["max_eps"] in stored["eps"]
            assert curve["violation"][0] < 1e-6
            assert (max(curve["violation"]) > 0) == (ball == "fourier_low")
        # At eps 0 every attack leaves the clean accuracy.
        assert curves["linf"]["accuracy"][0] == curves["fourier_low"]["accuracy"][0]
    out = capsys.readouterr().out
    assert "max eps" in out and "fourier_low" in out


def test_a_run_evaluates_checkpoints(tmp_path, capsys):
    """As the paper preset does, with a model that adversarial training has left."""
    train = dataclasses.replace(
        adversarial_training.PRESETS["small"],
        dataset="digits",
        objective=("standard",),
        model="linear",
    )
    parts = training_run.build(train, "standard", choices.DataFacts((8, 8, 1), 10, 1297))
    params, model_state = parts.model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    folder = tmp_path / "models" / "standard"
    report.open_workdir(folder, dataclasses.asdict(train), resume=False)
    state = training.create_state(params, model_state, parts.optimizer, jax.random.key(0))
    with checkpoint.open_checkpoints(folder / "checkpoints", best_metric="clean") as manager:
        checkpoint.save(manager, state, {"clean": 0.1})
    settings = parse(
        f"--checkpoints={folder}", "--eps_count=2", "--balls=fourier", "--steps=2",
        "--projections=0", f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    results = fourier_attack.main(settings)
    (curves,) = results["models"].values()
    test = data.load("digits", "test")
    logits = parts.model.apply(params, model_state, jnp.asarray(test.image), False, None)[0]
    clean, attacked = curves["fourier"]["accuracy"]
    assert clean == pytest.approx(np.mean(np.argmax(logits, 1) == test.label)) and attacked < clean
    assert list(results["models"]) == ["standard"]
    other = dataclasses.replace(settings, dataset="mnist5k", workdir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="dataset must be that of the models, digits"):
        fourier_attack.main(other)
