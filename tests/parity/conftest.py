"""A network that is trained once, on both sides."""

import importlib.util
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

from parity import networks
from robustjax import attacks, data, models, objectives, training
from robustjax.norms import LInf
from robustjax.threat import ThreatModel


class Trained(NamedTuple):
    """``logits_fn`` of ours, the PyTorch ``network`` of the same weights, and the test set."""

    logits_fn: Any
    network: Any
    image: np.ndarray
    label: np.ndarray


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """PyTorch's threads wait for each other, slowly where the workers of a suite share cores."""
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained() -> Trained:
    """SmallCNN on MNIST-5k after four epochs of FGSM-RS at l_inf 0.1; the same in every run."""
    objective = objectives.madry(attacks.fgsm_rs(ThreatModel(LInf(), 0.1)))
    return both(models.SmallCNN(), objective)


@pytest.fixture(scope="session")
def tiny() -> Trained:
    """A SmallCNN of 13,494 parameters after four epochs on clean images."""
    return both(models.SmallCNN(channels=(4, 8), hidden=32), objectives.standard())


def both(module: models.SmallCNN, objective: objectives.Objective) -> Trained:
    """Four epochs of Adam, and the same network in PyTorch."""
    pytest.importorskip("torch", reason=networks.INSTALL)
    from benchmarks import torch_peers

    train, test = data.load("mnist5k", "train"), data.load("mnist5k", "test")
    model = models.from_linen(module)
    batch_size, epochs = 100, 4
    steps = epochs * (len(train) // batch_size)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    step = training.train_step(model.apply, objective, optimizer)
    run = jax.jit(training.several_resident_steps(step, data.take))

    key = jax.random.key(0)
    params, model_state = model.init(key, data.as_float(train.image[:1]))
    state = training.create_state(params, model_state, optimizer, key)
    arrays = {"image": train.image, "label": train.label}
    for epoch in range(epochs):
        state, metrics = run(state, arrays, data.epoch_batches(key, epoch, len(train), batch_size))
    assert float(metrics["loss"][-1]) < 1.0

    network = networks.small_cnn(module.channels, module.hidden)
    network = torch_peers.load_flax(network, state.params, state.model_state)
    return Trained(
        jax.jit(models.eval_logits(model.apply, state.params, state.model_state)),
        network.eval().requires_grad_(False),
        np.asarray(data.as_float(test.image)),
        test.label,
    )
