"""PyTorch networks: the classes of ``robustbench``, random weights, peers of our small one."""

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

INSTALL = "needs pip install -e '.[parity]' and pip install --no-deps -r requirements-parity.txt"


@functools.cache
def robustbench(name: str) -> ModuleType:
    """A file of ``robustbench.model_zoo.architectures``, loaded by its path.

    The package itself imports torchvision and timm, its architectures PyTorch alone.
    """
    package = importlib.util.find_spec("robustbench")  # does not run it
    if package is None:
        pytest.skip(INSTALL)
    (root,) = package.submodule_search_locations
    path = Path(root) / "model_zoo" / "architectures" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"robustbench_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_cnn(channels, hidden):
    """The peer of ``robustjax.models.SmallCNN`` of these widths, for MNIST."""
    from torch import nn

    from benchmarks import torch_peers

    first, second = channels
    network = torch_peers.SmallCNN(28)
    network.conv1 = nn.Conv2d(1, first, 4, 2, padding=1)
    network.conv2 = nn.Conv2d(first, second, 4, 2, padding=1)
    network.features = (7, 7, second)
    network.dense = nn.Linear(7 * 7 * second, hidden)
    network.head = nn.Linear(hidden, 10)
    return network


def randomise(network, seed: int = 0):
    """Random weights and BatchNorm statistics, none of them 0 or 1; in evaluation mode.

    Kernels have variance ``1 / fan_in``: logits are then of the size that trained networks have.
    """
    import torch

    draw = np.random.default_rng(seed)
    state = network.state_dict()
    for name, tensor in state.items():
        kind, shape = name.rpartition(".")[2], tuple(tensor.shape)
        if kind == "num_batches_tracked" or name in ("mu", "sigma", "mean", "std"):
            continue
        if tensor.ndim > 1:
            value = draw.normal(0, (1 / np.prod(shape[1:])) ** 0.5, shape)
        elif kind in ("weight", "running_var"):
            value = draw.uniform(0.5, 1.5, shape)
        else:
            value = draw.normal(0, 0.3, shape)
        state[name] = torch.tensor(value, dtype=tensor.dtype)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)
