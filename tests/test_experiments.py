"""Entry points: command lines, presets, the catalogue, dry runs."""

import dataclasses
import importlib
import json

import jax
import numpy as np
import optax
import pytest

from experiments import (
    adversarial_training,
    catalogue,
    choices,
    command_line,
    engm,
    fast_adversarial_training,
    implicit_robustness,
    optimizer_robustness,
    soar,
)
from robustjax import parallel
from robustjax.threat import ThreatModel

PRESETS = adversarial_training.PRESETS
SETTINGS = adversarial_training.Settings


def parse(*words):
    return command_line.parse_settings(words, SETTINGS, PRESETS)[0]


def test_flags_override_the_preset():
    assert parse() == PRESETS["small"]
    assert parse("--preset=paper") == PRESETS["paper"]
    settings = parse(
        "--preset=paper", "--eps=2/255", "--milestones=3,4", "--objective=trades,standard",
        "--attack_step_size=1.6/255", "--resume", "--width=32", "--data_dir=/data",
    )  # fmt: skip
    assert settings == dataclasses.replace(
        PRESETS["paper"],
        eps=2 / 255,
        milestones=(3, 4),
        objective=("trades", "standard"),
        attack_step_size=1.6 / 255,
        resume=True,
        width=32,
        data_dir="/data",
    )


@pytest.mark.parametrize(
    "word, message",
    [
        ("--objective=foo", "standard, madry, trades, mart, .*got 'foo'"),
        ("--objective=", "at least one of standard"),
        ("--model=vgg", "small_cnn"),
        ("--epoch=3", "unknown flag --epoch, did you mean --epochs"),
        ("--eps=a", "a number or a fraction, got 'a'"),
        ("--eps=1/0", "a number or a fraction, got '1/0'"),
        ("--epochs=1.5", "epochs=1.5"),
        ("--preset=large", "small|paper"),
        ("digits", "arguments must be flags .* got 'digits'"),
    ],
)
def test_a_wrong_word_is_answered_with_what_would_do(word, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        parse(word)


def test_help_names_every_flag_in_its_group():
    text = command_line.help_text(SETTINGS, PRESETS, adversarial_training.__doc__)
    lines = text.splitlines()
    for field in dataclasses.fields(SETTINGS):
        (line,) = (row for row in lines if row.startswith(f"  --{field.name}: "))
        above = lines[: lines.index(line)]
        group = next(row for row in reversed(above) if row and not row.startswith(" "))
        assert group == field.metadata["group"]
        for choice in field.metadata["choices"] or ():
            assert choice in line
    assert "  --eps: radius of the threat model, in input units [0.2 | 8/255]" in lines


WITH_JOBS = (engm, fast_adversarial_training, implicit_robustness, optimizer_robustness, soar)
COMMANDS = sorted({command for entry in catalogue.CATALOGUE for command in entry.commands})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_catalogue_can_be_parsed_and_built(command, capsys):
    python, flag, name, *words = command.split()
    assert (python, flag) == ("python", "-m")
    module = importlib.import_module(name)
    if name.startswith("benchmarks."):
        assert not words and callable(module.main)
        return
    settings, _ = command_line.parse_settings(words, module.Settings, module.PRESETS)
    if module in WITH_JOBS and settings.scale == "paper":
        return  # their own tests build all their networks
    if module is not adversarial_training:
        module.main(dataclasses.replace(settings, dry_run=True))
        assert "Dry run" in capsys.readouterr().out
        return
    for objective in settings.objective:
        parts = adversarial_training.build(
            settings, objective, choices.DataFacts((32, 32, 3), 10, 49_000)
        )
        assert parts.steps_per_epoch == 49_000 // settings.batch_size
        assert parts.threat.eps == pytest.approx(settings.eps)


def test_the_catalogue_says_what_is_there(capsys):
    catalogue.main(catalogue.Settings())
    shown = capsys.readouterr().out
    assert "Table 2.1" in shown
    catalogue.main(catalogue.Settings(implemented=True))
    fewer = capsys.readouterr().out
    missing = any(entry.status == "no" for entry in catalogue.CATALOGUE)
    assert (len(fewer) < len(shown)) == missing
    for entry in catalogue.CATALOGUE:
        assert bool(entry.commands) == (entry.status != "no")
    done = sum(entry.status == "yes" for entry in catalogue.CATALOGUE)
    assert f"{len(catalogue.CATALOGUE)} tables and figures: {done} in whole" in shown


@pytest.mark.parametrize("words", [("--dataset=digits",), ("--preset=paper", "--width=8")])
def test_a_dry_run_counts_and_computes_nothing(words, capsys, tmp_path):
    settings = parse(*words, "--dry_run", f"--workdir={tmp_path / 'w'}")
    adversarial_training.main(settings)
    out = capsys.readouterr().out
    assert "FLOPs" in out
    if "paper" in words[0]:
        assert "45,840 (120 x 382)" in out  # 49,000 images, batches of 128
    else:
        assert "360 (30 x 12)" in out
    assert not (tmp_path / "w").exists()


def test_a_run_leaves_everything_it_promises(tmp_path, capsys):
    settings = parse(
        "--dataset=digits", "--epochs=2", "--objective=trades", "--model=linear",
        "--checkpoint_every=1", "--test_steps=2", "--test_restarts=1", "--attack_steps=1",
        "--validation_steps=1", f"--workdir={tmp_path / 'run'}", "--batch_size=96",
        "--test_batch_size=104", "--placement=host", "--augmentation=crop_and_flip",
    )  # fmt: skip
    adversarial_training.main(settings)
    folder = tmp_path / "run" / "trades"
    for name in ("config.json", "metrics.jsonl", "results.json", "curves.png", "panel.png"):
        assert (folder / name).stat().st_size > 0
    assert (folder / "checkpoints").is_dir()
    assert (folder / "tensorboard").is_dir()
    results = json.loads((tmp_path / "run" / "results.json").read_text())["trades"]
    assert results["last"]["step"] == 2 * (1297 // 96)
    assert results["test_examples"] == 300
    assert results["devices"].startswith(f"{jax.device_count()} x")
    assert "jax" in results["versions"]
    out = capsys.readouterr().out
    assert f"{100 * results['best']['clean']:.2f} %" in out
    # Once more, to resume: nothing is trained anew and the numbers stay.
    adversarial_training.main(dataclasses.replace(settings, resume=True))
    again = json.loads((tmp_path / "run" / "results.json").read_text())["trades"]
    assert again["last"] == results["last"]
    assert again["best"] == results["best"]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("constant", [0.1] * 4),
        ("piecewise", [0.1, 0.1, 0.05, 0.025]),
        ("cosine", [0.1, 0.05 * (1 + np.cos(np.pi / 4)), 0.05, 0.05 * (1 - np.cos(np.pi / 4))]),
    ],
)
def test_schedules_at_the_start_of_each_epoch(name, expected):
    schedule = choices.make_schedule(
        name, learning_rate=0.1, epochs=4, steps_per_epoch=5, milestones=(2, 3), decay=0.5
    )
    # optax multiplies from the step after the boundary on
    got = [schedule(5 * epoch + (name == "piecewise")) for epoch in range(4)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_the_cyclic_schedule_is_a_triangle():
    """``interp(epoch, [0, 2E/5, E], [0, max, 0])``, as in the fast adversarial training recipe."""
    schedule = choices.make_schedule(
        "cyclic", learning_rate=0.3, epochs=30, steps_per_epoch=7, milestones=(), decay=1.0
    )
    steps = np.arange(0, 210, 3)
    expected = np.interp(steps / 7, [0, 12, 30], [0, 0.3, 0])
    np.testing.assert_allclose([schedule(step) for step in steps], expected, atol=1e-6)


def test_the_optimizer_of_the_paper_is_momentum_with_coupled_decay():
    settings = PRESETS["paper"]
    optimizer = choices.make_optimizer(
        "sgd", lambda step: 0.1, momentum=0.9, weight_decay=5e-4, max_norm=25.0
    )
    params = {"w": np.array([1.0, -2.0], np.float32)}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.1 * (1 + 5e-4) * params["w"], rtol=1e-6)
    assert isinstance(optimizer, optax.GradientTransformation)
    assert (settings.momentum, settings.weight_decay) == (0.9, 5e-4)


def test_training_attacks_are_those_of_their_names():
    threat = ThreatModel(choices.NORMS["linf"], 0.1)
    x = jax.random.uniform(jax.random.key(0), (4, 3, 3, 1), minval=0.3, maxval=0.7)
    y = np.zeros(4, np.int32)
    weights = jax.random.normal(jax.random.key(1), (9, 3))

    def logits_fn(x):
        return x.reshape(len(x), -1) @ weights

    distances = {}
    for name in choices.ATTACKS:
        attack = choices.make_attack(name, threat, steps=2, step_size=0.03, start="zero")
        distances[name] = np.abs(attack(logits_fn, jax.random.key(2), x, y) - x)
    np.testing.assert_allclose(distances["fgsm"], 0.03, atol=1e-6)
    np.testing.assert_allclose(distances["pgd_corner"], 0.1, atol=1e-6)
    assert distances["pgd"].max() == pytest.approx(0.06, abs=1e-6)
    assert len(np.unique(np.round(distances["fgsm_rs"], 5))) > 4
    assert parallel.AXIS == "data"
