"""The evaluation entry point: flags, dry run, our checkpoints, PyTorch files, interruptions."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from experiments import adversarial_training, choices, command_line, evaluate, trained_models
from robustjax import models
from robustjax.attacks import StepwiseAttack
from robustjax.norms import L2, LInf
from robustjax.threat import ThreatModel


def parse(*words):
    return command_line.parse_settings(words, evaluate.Settings, evaluate.PRESETS)[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small network after an epoch on the digits."""
    folder = tmp_path_factory.mktemp("trained")
    settings = dataclasses.replace(
        adversarial_training.PRESETS["small"],
        dataset="digits", model="mlp", width=8, objective=("madry",), epochs=1, eps_warmup=0,
        attack_steps=1, batch_size=80, test_batch_size=200, validation_steps=1, test_steps=1,
        test_restarts=1, workdir=str(folder / "run"),
    )  # fmt: skip
    adversarial_training.main(settings)
    return folder / "run" / "madry"


def test_flags():
    assert parse() == evaluate.PRESETS["small"]
    settings = parse("--preset=paper", "--threat=l2", "--eps=128/255", "--attack=pgd,square")
    assert settings.attack == ("pgd", "square")
    assert settings.eps == 128 / 255
    assert settings.examples == 10_000


@pytest.mark.parametrize("words", [(), ("--preset=paper",), ("--attack=pgd,square,simba",)])
def test_dry_run(words, capsys, tmp_path):
    assert evaluate.main(parse(*words, "--dry_run", f"--workdir={tmp_path / 'w'}")) is None
    out = capsys.readouterr().out
    assert "FLOPs if no example breaks" in out
    if words == ("--preset=paper",):
        assert "11,171,146 parameters" in out
    assert not (tmp_path / "w").exists()


def test_our_checkpoint(trained, tmp_path, capsys):
    words = (
        f"--checkpoint={trained}", "--attack=fgsm,apgd-ce,square", "--examples=24", "--eps=0.1",
        "--batch_size=24", f"--workdir={tmp_path / 'w'}",
    )  # fmt: skip
    result = evaluate.main(parse(*words))
    assert [a["name"] for a in result["attacks"]] == ["fgsm", "apgd-ce", "square"]
    assert result["examples"] == 24
    saved = json.loads((tmp_path / "w" / "results.json").read_text())
    assert saved["robust_accuracy"] == result["robust_accuracy"] <= result["clean_accuracy"]
    assert (tmp_path / "w" / "panel.png").stat().st_size > 1000
    with np.load(tmp_path / "w" / "adversarial.npz") as file:
        model = trained_models.load(trained)
        right = np.asarray(model.logits_fn(jnp.array(file["x_adv"])).argmax(-1)) == file["y"]
        assert right.mean() == result["robust_accuracy"]
    assert "fgsm" in capsys.readouterr().out
    again = evaluate.main(parse(*words))
    assert again["robust_accuracy"] == result["robust_accuracy"]
    # Batches of 10 are filled up to 16 on eight devices, and the last one is not full of examples.
    other = evaluate.main(parse(*words[:-1], "--batch_size=10", f"--workdir={tmp_path / 'other'}"))
    assert [a["broken"] for a in other["attacks"]] == [a["broken"] for a in result["attacks"]]
    with (
        np.load(tmp_path / "w" / "adversarial.npz") as a,
        np.load(tmp_path / "other" / "adversarial.npz") as b,
    ):
        np.testing.assert_allclose(a["x_adv"], b["x_adv"], atol=1e-6)
    with pytest.raises(ValueError, match="already holds a run"):
        evaluate.main(parse(*words, "--noresume"))
    with pytest.raises(ValueError, match=r"holds a run with eps=0\.1, got eps=0\.2"):
        evaluate.main(parse(*words, "--eps=0.2"))


def test_best_and_last_checkpoint(trained):
    best, last = (trained_models.load(trained, which) for which in ("best", "last"))
    assert best.step <= last.step == 1297 // 80
    assert best.settings.model == "mlp"


def as_torch(variables):
    """Arrays under the names and in the layouts that PyTorch would give them."""
    from robustjax.benchmark.import_torch import _naming, _torch_name

    naming = _naming(models.WideResNet(10, 1))
    state = {}
    for path, value in traverse_util.flatten_dict(variables).items():
        array = np.asarray(value)
        order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim, range(array.ndim))
        state[_torch_name(path[1:], naming)] = array.transpose(order)
    return state


def test_pytorch_file(tmp_path, monkeypatch):
    def narrow(num_classes, width, norm, dtype):
        return models.WideResNet(depth=10, widen_factor=1, num_classes=num_classes)

    monkeypatch.setitem(choices.MODELS, "wrn28", narrow)
    model = models.from_linen(narrow(3, None, "batch", None))
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(12, 8, 8, 3)).astype(np.float32)
    params, model_state = model.init(jax.random.key(0), images)
    np.savez(tmp_path / "net.npz", **as_torch({"params": params, **model_state}))
    labels = np.array(
        model.apply(params, model_state, jnp.array(images), False, None)[0].argmax(-1), np.int32
    )
    labels[:3] = [0, 1, 2]
    np.savez(tmp_path / "set.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    settings = parse(
        f"--torch_checkpoint={tmp_path / 'net.npz'}", "--model=wrn28", "--attack=fgsm",
        f"--dataset=npz:{tmp_path / 'set.npz'}", "--examples=12", "--batch_size=16", "--eps=0",
        f"--workdir={tmp_path / 'w'}",
    )  # fmt: skip
    result = evaluate.main(settings)
    assert result["clean_accuracy"] == result["robust_accuracy"] >= 0.75
    assert result["model"] == "net.npz (wrn28)"


@pytest.mark.parametrize("name", choices.EVALUATION_ATTACKS)
def test_every_attack_is_made_from_a_threat_model(name):
    norm = L2() if name == "cw" else LInf()
    attack = choices.EVALUATION_ATTACKS[name](ThreatModel(norm, 0.1))
    assert callable(attack)
    whole = ("fgsm", "bim", "pgd")
    assert isinstance(attack, StepwiseAttack) == (name not in whole)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--attack=autoattack,pgd",), "attack must be autoattack alone"),
        (("--examples=0",), "examples must be >= 1, got 0"),
        (("--eps=-1",), "eps must be >= 0, got -1"),
        (("--attack=magic",), "got 'magic'"),
        (("--seed=-1",), "seed must be >= 0, got -1"),
    ],
)
def test_bad_flags(words, message):
    with pytest.raises(ValueError, match=message):
        parse(*words)


def test_bad_folders(trained, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        trained_models.load(tmp_path)
    (tmp_path / "config.json").write_text('{"objective": ["madry"], "color": 3}')
    with pytest.raises(ValueError, match="must hold the settings of a training run"):
        trained_models.load(tmp_path)
    with pytest.raises(ValueError, match="which must be one of 'best', 'last', got 'first'"):
        trained_models.load(trained, "first")
    with pytest.raises(ValueError, match="examples must be <= 300, got 301"):
        trained_models.evaluation_set(trained_models.read_settings(trained), "test", 301)
