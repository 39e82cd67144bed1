"""Entry points: command lines, presets, the catalogue, dry runs."""

import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parallel_training
import pytest

from experiments import (
    adversarial_training,
    batch_sizes,
    catalogue,
    choices,
    command_line,
    engm,
    evaluate,
    fast_adversarial_training,
    implicit_robustness,
    optimizer_robustness,
    soar,
    training_measures,
    training_run,
)
from robustjax import data, models, parallel, training
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
        assert "390 (30 x 13)" in out
    assert not (tmp_path / "w").exists()


def test_a_run_leaves_everything_it_promises(tmp_path, capsys):
    settings = parse(
        "--dataset=digits", "--epochs=2", "--objective=trades", "--model=linear",
        "--checkpoint_every=1", "--test_steps=2", "--test_restarts=1", "--attack_steps=1",
        "--validation_steps=1", f"--workdir={tmp_path / 'run'}", "--batch_size=96",
        "--test_batch_size=100", "--placement=host", "--augmentation=crop_and_flip",
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
    # Once more, to resume: nothing is trained anew and the numbers stay. The run may be older than
    # some settings that have their defaults.
    for path in (tmp_path / "run" / "config.json", folder / "config.json"):
        config = json.loads(path.read_text())
        assert config.pop("batch_statistics") == "separate"
        path.write_text(json.dumps(config))
    changed = dataclasses.replace(settings, resume=True, batch_statistics="synchronised")
    with pytest.raises(ValueError, match="batch_statistics=None, got batch_statistics='sync"):
        adversarial_training.main(changed)
    adversarial_training.main(dataclasses.replace(settings, resume=True))
    again = json.loads((tmp_path / "run" / "results.json").read_text())["trades"]
    assert again["last"] == results["last"]
    assert again["best"] == results["best"]
    assert json.loads((folder / "config.json").read_text())["batch_statistics"] == "separate"


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


def test_batches_of_evaluation_grow_and_those_of_training_are_refused():
    grown = [batch_sizes.for_evaluation(1000, devices) for devices in (1, 8, 16, 64, 3000)]
    assert grown == [1000, 1000, 1008, 1024, 3000]
    assert batch_sizes.for_evaluation(100) == 104  # on the eight devices of the tests
    assert batch_sizes.misfit(180, 9) is None
    with pytest.raises(
        ValueError,
        match=r"batch_size \(180\) must be divisible by the number of devices \(8\), as 176 and "
        "184 are",
    ):
        batch_sizes.check_training(180)
    assert batch_sizes.misfit(4, 8).endswith("as 8 is")


@pytest.mark.parametrize("devices", [8, 16])
def test_presets_run_on_ordinary_numbers_of_devices(devices):
    for settings in (*PRESETS.values(), evaluate.DEMO):
        batch_sizes.check_training(settings.batch_size, devices)
    for asked in (*PRESETS.values(), *evaluate.PRESETS.values()):
        size = getattr(asked, "test_batch_size", asked.batch_size)
        assert 0 <= batch_sizes.for_evaluation(size, devices) - size < devices
        parallel.local_batch_size(batch_sizes.for_evaluation(size), parallel.device_mesh())


def test_a_dry_run_tells_what_would_be_refused(capsys):
    adversarial_training.main(parse("--dry_run", "--dataset=digits", "--batch_size=180"))
    out = capsys.readouterr().out
    assert "would be refused here: batch_size (180)" in out and "as 176 and 184 are" in out
    adversarial_training.main(parse("--dry_run", "--dataset=digits"))
    assert "refused" not in capsys.readouterr().out


NOISE = parallel_training.DATASET


def small(**changes):
    """Settings for those images of three classes, with a network that has BatchNorm."""
    base = dataclasses.replace(
        PRESETS["small"], model="mlp", norm="l2", eps=0.5, eps_warmup=0, attack_steps=2,
        attack_step_size=0.3, batch_size=16, optimizer="sgd", learning_rate=0.2,
        schedule="constant", objective=("madry",), validation_steps=2,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


@pytest.fixture
def with_batch_norm(monkeypatch):
    def make(num_classes, width, norm, dtype):
        return parallel_training.Network()

    monkeypatch.setitem(choices.MODELS, "mlp", make)


def built(settings):
    parts = training_run.build(settings, "madry", training_run.facts_of(settings, NOISE))
    key = jax.random.key(0)
    params, model_state = parts.model.init(key, jnp.zeros((1, 6, 6, 1)))
    return parts, training.create_state(
        params, model_state, parts.optimizer, key, oracle=parts.oracle
    )


def numbers(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(parallel.to_host(tree))])


def trained(devices, **changes):
    """Parameters and running statistics after two steps."""
    settings = small(**changes)
    mesh = parallel.device_mesh(jax.devices()[:devices])
    parts, state = built(settings)
    specs = None
    if settings.parameters == "sharded":
        specs = parallel.shard_specs(state, mesh, at_least=64)
    advance = training_run._advance(settings, parts, NOISE, jax.random.key(0), mesh, specs)
    state, _ = advance(parallel.place(state, mesh, specs), 0, 0, 2)
    logits = models.eval_logits(parts.exact_model.apply, state.params, state.model_state)
    assert jnp.isfinite(logits(NOISE.image)).all()  # evaluation needs no axis
    return numbers((state.params, state.model_state))


@pytest.mark.parametrize("attack_mode", ["eval", "train"])
def test_synchronised_batch_statistics_are_those_of_one_device(with_batch_norm, attack_mode):
    one = trained(1, attack_mode=attack_mode)
    together = trained(8, attack_mode=attack_mode, batch_statistics="synchronised")
    np.testing.assert_allclose(together, one, atol=1e-5)
    apart = trained(8, attack_mode=attack_mode)
    assert np.abs(apart - one).max() > 1e-2
    sharded = trained(8, attack_mode=attack_mode, parameters="sharded")
    np.testing.assert_allclose(sharded, one, atol=1e-5)


@pytest.mark.parametrize("name", choices.MODELS)
def test_batch_norm_of_every_model_can_be_synchronised(name):
    settings = dataclasses.replace(PRESETS["paper"], model=name)
    shape = (4000, 1) if name == "m5" else (32, 32, 3)
    facts = choices.DataFacts(shape, 10, 100)
    apart, together = (
        training_run.module_of(settings, facts, jnp.float32, axis_name=axis)
        for axis in (None, parallel.AXIS)
    )
    x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    params, model_state = jax.eval_shape(models.from_linen(apart).init, jax.random.key(0), x)
    assert ("batch_stats" in model_state) == (together != apart)
    if "batch_stats" not in model_state:
        return
    apply = models.from_linen(together).apply
    jax.eval_shape(lambda *args: apply(*args, False, None), params, model_state, x)
    with pytest.raises(NameError, match=parallel.AXIS):  # only training mode names the axis
        jax.eval_shape(lambda *args: apply(*args, True, None), params, model_state, x)


def test_norms_pulled_back_through_one_device_need_its_own_statistics(plain_calls):
    one = {"norm_rule": "vjp", "oracle": "engm", "batch_statistics": "synchronised"}
    with pytest.raises(ValueError, match=r"batch_statistics separate .*, got synchronised and rep"):
        small(**one)
    small(**one, parameters="sharded")


def test_no_measure_depends_on_how_evaluation_is_batched(with_batch_norm):
    found = []
    for size in (1, 7, 100):
        settings = small(test_batch_size=size, monitor=5, probe=4)
        parts, state = built(settings)
        splits = dict.fromkeys(("train", "validation", "test"), NOISE.subset(np.arange(21)))
        measure = training_measures.make_measure(
            settings, parts.objective, parts.exact_model, parts.threat, splits, jax.random.key(3),
            parallel.device_mesh(),
        )  # fmt: skip
        found.append(measure(state))
    logits = models.eval_logits(parts.exact_model.apply, state.params, state.model_state)
    right = np.argmax(logits(NOISE.image[:21]), axis=1) == NOISE.label[:21]
    assert found[0]["validation"]["clean"] == pytest.approx(right.mean())
    for other in found[1:]:
        assert other["validation"] == found[0]["validation"]
        for split in ("monitor", "gradients"):
            assert other[split] == pytest.approx(found[0][split], rel=1e-5)
    assert batch_sizes.for_evaluation(7) == 8 and len(list(data.eval_batches(NOISE, 8))) == 6
