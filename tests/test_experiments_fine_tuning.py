"""Waveforms through the training entry point, and heads on frozen encoders."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import (
    adversarial_training,
    choices,
    fine_tuning,
    trained_models,
    training_run,
    training_settings,
)
from robustjax import data, models

TINY = dataclasses.replace(
    adversarial_training.PRESETS["small"],
    model="mlp",
    width=4,
    validation_size=16,
    objective=("madry",),
    eps=0.1,
    eps_warmup=0,
    attack_steps=1,
    epochs=2,
    checkpoint_every=2,
    batch_size=16,
    test_batch_size=16,
    test_steps=1,
    test_restarts=1,
    validation_steps=1,
)


ENCODER = {
    "dense1": {"kernel": np.full((320, 4), 0.01, np.float32), "bias": np.ones(4, np.float32)},
    "dense2": {"kernel": np.eye(4, dtype=np.float32), "bias": np.zeros(4, np.float32)},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Settings and folder of a run on waveforms, whose encoder was given and frozen."""
    folder = tmp_path_factory.mktemp("fine_tuning")
    train, test = (data.tones(jax.random.key(seed), 48, 320, 3) for seed in (0, 1))
    arrays = {"x_train": train.image, "y_train": train.label}
    np.savez(folder / "tones.npz", **arrays, x_test=test.image, y_test=test.label)
    settings = dataclasses.replace(
        TINY,
        dataset=f"npz:{folder}/tones.npz",
        pretrained=str(folder),
        frozen="encoder",
        rate_warmup=1,
        weight_decay=0.1,
        workdir=str(folder / "run"),
    )
    old = {**ENCODER, "head": {"kernel": np.ones((4, 7)), "bias": np.ones(7)}}  # of 7 classes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained_models, "variables", lambda path, data_dir: (old, {}))
        adversarial_training.main(settings)
    return settings, folder / "run" / "madry"


def test_waveforms_are_trained_on_attacked_and_evaluated(run):
    results = json.loads((run[1] / "results.json").read_text())
    assert results["last"]["step"] == 2 * (48 - 16) // 16 and results["test_examples"] == 48
    assert 0 <= results["last"]["pgd1"] <= results["last"]["clean"] <= 1


def test_a_frozen_encoder_keeps_every_bit_and_the_head_is_trained(run):
    settings, folder = run
    params, model_state = trained_models.variables(folder)
    head = params.pop("head")
    jax.tree.map(np.testing.assert_array_equal, params, ENCODER)
    assert model_state == {} and head["kernel"].shape == (4, 3)
    assert (np.abs(head["bias"]) > 0).all()  # where it began
    again = dataclasses.replace(settings, pretrained=str(folder))
    encoder, _ = trained_models.encoder(again, choices.DataFacts((320, 1), 5, 48))
    jax.tree.map(np.testing.assert_array_equal, encoder, ENCODER)


def test_an_encoder_of_another_network_is_refused(run, plain_calls):
    settings = dataclasses.replace(run[0], pretrained=str(run[1]), width=5)
    with pytest.raises(ValueError, match="pretrained must be a mlp of these settings, got another"):
        trained_models.encoder(settings, choices.DataFacts((320, 1), 5, 48))


def test_the_box_of_waveforms_reaches_from_minus_one_to_one():
    for shape, lower in (((320, 1), -1.0), ((16, 16, 1), 0.0)):
        settings = dataclasses.replace(TINY, model="linear")
        parts = training_run.build(settings, "madry", choices.DataFacts(shape, 3, 48))
        assert (parts.threat.lower, parts.threat.upper) == (lower, 1.0)


def test_a_frozen_encoder_stays_in_evaluation_mode():
    model = models.from_linen(models.M5(3, widths=(2,), first_kernel=4))
    frozen = fine_tuning.frozen_encoder(model)
    x = data.tones(jax.random.key(0), 4, 40, 3).image
    params, state = jax.jit(model.init)(jax.random.key(0), x)

    @jax.jit
    def both(params, state, x):
        exact, _ = model.apply(params, state, x, False, None)
        return exact, frozen.apply(params, state, x, True, jax.random.key(1))

    exact, (logits, new_state) = both(params, state, x)
    np.testing.assert_array_equal(logits, exact)
    jax.tree.map(np.testing.assert_array_equal, new_state, state)


def test_only_the_head_moves_and_as_it_would_alone():
    """Adam on the head of a linear network: the same steps as Adam on a dense layer alone."""
    model = models.from_linen(models.MLP((4,), 3))
    frozen = fine_tuning.frozen_encoder(model)
    x, y = jnp.ones((5, 6)) * jnp.arange(1.0, 6)[:, None], jnp.arange(5) % 3
    params, _ = jax.jit(model.init)(jax.random.key(0), x)
    features = np.maximum(x @ params["dense1"]["kernel"] + params["dense1"]["bias"], 0)

    def loss(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def steps(whole, head):
        inner = optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.05))
        outer = fine_tuning.only_head(inner)
        states = outer.init(whole), inner.init(head)
        for _ in range(3):
            grads = jax.grad(lambda p: loss(frozen.apply(p, {}, x, True, None)[0]))(whole)
            updates, state = outer.update(grads, states[0], whole)
            whole = optax.apply_updates(whole, updates)
            alone = jax.grad(lambda p: loss(features @ p["kernel"] + p["bias"]))(head)
            updates, other = inner.update(alone, states[1], head)
            head = optax.apply_updates(head, updates)
            states = state, other
        of_x = jax.grad(lambda x: loss(frozen.apply(whole, {}, x, False, None)[0]))(x)
        return whole, head, grads["dense1"], of_x

    whole, head, encoder_gradient, of_x = steps(params, params["head"])
    jax.tree.map(np.testing.assert_array_equal, whole["dense1"], params["dense1"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole["head"], head)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(encoder_gradient))
    assert np.abs(of_x).max() > 0  # attacks still see through the encoder


def test_the_encoder_of_a_state_dict_is_read_from_its_file(tmp_path, plain_calls):
    """ResNet-10 of width 2 under RobustBench's names, of 100 classes for a network of 3."""
    module = models.ResNet10(width=2, num_classes=100)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(models.from_linen(module).init, jax.random.key(0), x)
    state = {"conv1.weight": (2, 3, 3, 3), "linear.weight": (100, 16), "linear.bias": (100,)}

    def norm(name, width):
        for kind in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{kind}"] = (width,)

    norm("bn1", 2)
    for stage, (before, width) in enumerate([(2, 2), (2, 4), (4, 8), (8, 16)], start=1):
        block = f"layer{stage}.0"
        state[f"{block}.conv1.weight"] = (width, before, 3, 3)
        state[f"{block}.conv2.weight"] = (width, width, 3, 3)
        norm(f"{block}.bn1", width), norm(f"{block}.bn2", width)
        if before != width:
            state[f"{block}.shortcut.0.weight"] = (width, before, 1, 1)
            norm(f"{block}.shortcut.1", width)
    draw = np.random.default_rng(0)
    arrays = {name: draw.uniform(0.5, 1, s).astype(np.float32) for name, s in state.items()}
    np.savez(tmp_path / "weights.npz", **arrays)
    settings = dataclasses.replace(
        TINY,
        model="resnet10",
        width=2,
        normalization="batch",
        pretrained=str(tmp_path / "weights.npz"),
    )
    facts = choices.DataFacts((32, 32, 3), 3, 48)
    params, model_state = trained_models.encoder(settings, facts)
    assert set(params) == set(shapes[0]) - {"head"}
    assert jax.tree.map(np.shape, model_state) == jax.tree.map(np.shape, shapes[1])
    ours = params["stage4_block1"]["conv2"]["kernel"]
    np.testing.assert_array_equal(ours.transpose(3, 2, 0, 1), arrays["layer4.0.conv2.weight"])
    with pytest.raises(ValueError, match="must fit ResNet"):
        trained_models.encoder(dataclasses.replace(settings, width=4), facts)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"pretrained": "a", "start_from": "b"}, "pretrained must be None with start_from"),
        ({"frozen": "head"}, "frozen must be one of 'none', 'encoder'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(plain_calls, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_images_augmentations_are_refused_for_waveforms(plain_calls):
    settings = dataclasses.replace(training_settings.Settings(), model="m5")
    facts = choices.DATA_FACTS["speech_commands"]
    with pytest.raises(ValueError, match="must be none for waveforms, got crop_and_flip and none"):
        training_run.build(settings, "standard", facts)


def test_a_network_without_a_head_cannot_be_frozen(plain_calls):
    with pytest.raises(ValueError, match="params must hold 'head', got body"):
        fine_tuning.only_head(optax.sgd(0.1)).init({"body": jnp.ones(2)})
