"""The entry point of the Fourier attacks: command line, dry run, a tiny run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    adversarial_training,
    choices,
    command_line,
    fourier_attack,
    fourier_models,
    fourier_zoo,
    training_run,
)
from robustjax import data, models, training
from robustjax.fourier_norms import FourierLInf
from robustjax.frequency import band_mask, dft
from robustjax.norms import LInf
from robustjax.threat import ThreatModel
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
        (("--torch_checkpoints=Standard",), "must be NAME:FILE by commas, got 'Standard'"),
        (("--torch_checkpoints=Standard:a,Standard:b",), "must name Standard once"),
        (("--torch_checkpoints=Wong2020:a",), "networks of table B.2, .* got 'Wong2020'"),
        (("--torch_checkpoints=Ding2020MMA:a",), "cannot hold Ding2020MMA: its architecture"),
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
    assert "refused" not in out
    fourier_attack.main(parse("--dry_run", "--train_batch_size=100", f"--workdir={tmp_path / 'w'}"))
    assert "refused here: train_batch_size (100)" in capsys.readouterr().out  # on eight devices
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
    loss_fn = fourier_models.objective_of(settings, "noise")(model_fn)
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
    again = fourier_attack.main(dataclasses.replace(settings, resume=True))
    assert again == stored


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


@pytest.mark.parametrize("ball", ["fourier", "fourier_low", "fourier_high"])
def test_a_step_has_eps_at_every_frequency_of_its_band(ball):
    """Before the clip to the box; the panels show what is left of it after."""
    settings = parse("--methods=pgd", "--steps=1", "--projections=0")
    norm, x = fourier_attack.norm_of(settings, ball), jnp.full((2, 8, 8, 1), 0.5)
    w = jax.random.normal(jax.random.key(0), (64, 3))

    def logits_fn(x):
        return jnp.tanh(x.reshape(len(x), -1) @ w)

    threat = ThreatModel(norm, 0.3, -jnp.inf, jnp.inf)
    (attack,) = fourier_attack._attacks(settings, threat)
    delta = attack(logits_fn, jax.random.key(1), x, jnp.array([0, 2])) - x
    inside = np.asarray(band_mask(8, 8, low=norm.low, high=norm.high))
    size = np.abs(dft(delta, batch_ndim=1))[..., 0]
    np.testing.assert_allclose(size, np.where(inside, 0.3, 0) * np.ones((2, 1, 1)), atol=1e-5)


def test_the_table_of_the_zoo():
    assert len(fourier_zoo.ZOO) == 25
    counts = [sum(m.training == t for m in fourier_zoo.ZOO.values()) for t in fourier_zoo.TRAININGS]
    assert counts == [1, 10, 8, 6]
    for name in fourier_zoo.SUPPORTED:
        module = fourier_zoo.module_of(name, 7)
        assert module.num_classes == 7
        words = fourier_zoo.ZOO[name].architecture.replace(",", "-").split("-")
        if words[0] == "WRN":
            assert [module.depth, module.widen_factor] == list(map(int, words[1:3]))


TINY = fourier_zoo.ZooModel(
    "Linf", "WRN-10-1", lambda classes: models.WideResNet(10, 1, classes), {"mean": 0.5, "std": 0.5}
)


def wide_state():
    """What PyTorch's WideResNet(10, 1) for gray images saves, with random numbers."""
    draw, state = np.random.default_rng(0), {}

    def norm(name, channels):
        for kind in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{kind}"] = draw.uniform(0.5, 1.5, channels)

    state["conv1.weight"] = draw.normal(size=(16, 1, 3, 3))
    for stage, (inputs, outputs) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
        block = f"block{stage}.layer.0"
        norm(f"{block}.bn1", inputs)
        norm(f"{block}.bn2", outputs)
        state[f"{block}.conv1.weight"] = draw.normal(size=(outputs, inputs, 3, 3))
        state[f"{block}.conv2.weight"] = draw.normal(size=(outputs, outputs, 3, 3))
        if inputs != outputs:
            state[f"{block}.convShortcut.weight"] = draw.normal(size=(outputs, inputs, 1, 1))
    norm("bn1", 64)
    state["fc.weight"], state["fc.bias"] = draw.normal(size=(10, 64)), draw.normal(size=10)
    return {name: value.astype(np.float32) for name, value in state.items()}


def test_torch_checkpoints_are_models_of_a_run(tmp_path, monkeypatch):
    """With the table's normalisation, or with that of the file."""
    monkeypatch.setitem(fourier_zoo.ZOO, "L2/Tiny", TINY)
    monkeypatch.setitem(fourier_zoo.ZOO, "Tiny", TINY)
    state = wide_state()
    np.savez(tmp_path / "plain.npz", **state)
    own = {"mu": np.full((1, 1, 1, 1), 0.25), "sigma": np.full((1, 1, 1, 1), 0.5)}
    np.savez(tmp_path / "own.npz", **{f"module.{k}": v for k, v in (state | own).items()})
    settings = parse(
        f"--torch_checkpoints=Tiny:{tmp_path / 'plain.npz'},L2/Tiny:{tmp_path / 'own.npz'}"
    )
    found = fourier_models.subjects(settings, data.load("digits", "test"))
    assert list(found) == ["Tiny", "L2_Tiny"]
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1)) / 2
    # (x - 0.25) / 0.5 is (x + 0.25 - 0.5) / 0.5
    moved, plain = jnp.split(jax.jit(found["Tiny"])(jnp.concatenate([x + 0.25, x])), 2)
    own = jax.jit(found["L2_Tiny"])(x)
    assert own.shape == (2, 10) and jnp.isfinite(own).all()
    np.testing.assert_allclose(own, moved, rtol=1e-3, atol=1e-3)
    assert jnp.abs(plain - moved).max() > 1e-2


def test_another_network_in_a_torch_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(fourier_zoo.ZOO, "Tiny", TINY)
    state = wide_state()
    del state["fc.bias"]
    np.savez(tmp_path / "short.npz", **state)
    for path, message in [
        (tmp_path / "short.npz", "Tiny: state_dict must fit .* fc.bias is missing"),
        (tmp_path / "none.npz", "Tiny: path must be a file that exists"),
    ]:
        with pytest.raises(ValueError, match=message):
            fourier_zoo.load("Tiny", str(path), 10, channels=1)


def test_a_dry_run_of_the_zoo_reads_no_file(capsys):
    words = ("--preset=paper", "--checkpoints=None", "--balls=fourier", "--methods=pgd")
    fourier_attack.main(
        parse(*words, "--torch_checkpoints=Rice2020Overfitting:none.pt", "--dry_run")
    )
    out = capsys.readouterr().out
    assert "PreActResNet-18" in out and "11,172,170" in out
