"""Converted networks have the logits of the PyTorch classes of ``robustbench``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity import networks
from robustjax import models
from robustjax.benchmark.import_torch import convert, read_state_dict

torch = pytest.importorskip("torch", reason=networks.INSTALL)

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
X = np.random.default_rng(0).random((3, 32, 32, 3), np.float32)


def resnet(block, sizes):
    file = networks.robustbench("resnet")
    return file.ResNet(getattr(file, block), sizes)


def preact(block, sizes, **options):
    file = networks.robustbench("resnet")
    return file.PreActResNet(getattr(file, block), sizes, **options)


def wide(depth, widen_factor, **options):
    file = networks.robustbench("wide_resnet")
    return file.WideResNet(depth=depth, widen_factor=widen_factor, **options)


def dm(name, activation, **options):
    file = networks.robustbench("dm_wide_resnet")
    functions = {"relu": torch.nn.ReLU, "swish": file.Swish}
    network = getattr(file, name)(
        activation_fn=functions[activation], mean=MEAN, std=STD, **options
    )
    return network


CASES = {
    "resnet18": (lambda: resnet("BasicBlock", [2, 2, 2, 2]), models.ResNet18()),
    "resnet10": (lambda: resnet("BasicBlock", [1, 1, 1, 1]), models.ResNet10()),
    "bottleneck": (
        lambda: resnet("Bottleneck", [1, 2, 1, 1]),
        models.ResNet((1, 2, 1, 1), block="bottleneck"),
    ),
    "preact18": (lambda: preact("PreActBlock", [2, 2, 2, 2]), models.PreActResNet18()),
    "preact18-v2-final": (
        lambda: preact("PreActBlockV2", [2, 2, 2, 2], bn_before_fc=True, num_classes=100),
        models.PreActResNet18(num_classes=100, shortcut="preactivated", final_norm=True),
    ),
    "preact-out-shortcut": (
        lambda: preact("PreActBlock", [1, 1, 1, 1], out_shortcut=True),
        models.PreActResNet((1, 1, 1, 1), shortcut="preactivated"),
    ),
    "preact-final": (
        lambda: preact("PreActBlock", [1, 2, 1, 1], bn_before_fc=True),
        models.PreActResNet((1, 2, 1, 1), final_norm=True),
    ),
    "wide-10-1": (lambda: wide(10, 1), models.WideResNet(10, 1)),
    "wide-16-2": (lambda: wide(16, 2, num_classes=7), models.WideResNet(16, 2, num_classes=7)),
    "wide-10-3-sub-block": (lambda: wide(10, 3, sub_block1=True), models.WideResNet(10, 3)),
    "wide-28-10": (lambda: wide(28, 10, sub_block1=True), models.WideResNet(28, 10)),
}
DM_CASES = {
    "dm-wide-16-2-swish": (
        lambda: dm("DMWideResNet", "swish", depth=16, width=2),
        models.WideResNet(16, 2, activation="swish", strided_padding="end"),
    ),
    "dm-wide-10-1-relu": (
        lambda: dm("DMWideResNet", "relu", depth=10, width=1),
        models.WideResNet(10, 1, strided_padding="end"),
    ),
    "dm-preact18-swish": (
        lambda: dm("DMPreActResNet", "swish"),
        models.PreActResNet18(
            final_norm=True, activation="swish", strided_padding="end", projection_size=3
        ),
    ),
}


def difference(network, module, params, model_state, images=X):
    """The largest difference of the logits, which are neither tiny nor huge nor constant."""
    logits_fn = jax.jit(models.eval_logits(models.from_linen(module).apply, params, model_state))
    theirs = network(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    assert 0.1 < np.abs(theirs).max() < 100 and np.ptp(theirs, axis=0).max() > 1e-2
    return np.abs(logits_fn(jnp.asarray(images)) - theirs).max()


def with_buffers(network):
    """As ``robustbench``'s models: ``(x - mu) / sigma`` in front, the constants as buffers."""
    network.register_buffer("mu", torch.tensor(MEAN).view(1, 3, 1, 1))
    network.register_buffer("sigma", torch.tensor(STD).view(1, 3, 1, 1))
    forward = network.forward
    network.forward = lambda x: forward((x - network.mu) / network.sigma)
    return network


@pytest.mark.parametrize("name", CASES)
def test_converted_networks_have_the_logits_of_robustbench(name):
    make, module = CASES[name]
    network = networks.randomise(with_buffers(make()))
    converted = convert(network.state_dict(), module)
    assert converted.module.mean == pytest.approx(MEAN)
    assert difference(network, *converted, X[:2] if name == "wide-28-10" else X) <= 1e-4


@pytest.mark.parametrize("name", DM_CASES)
def test_converted_networks_of_gowal_et_al_have_the_logits_of_robustbench(name):
    make, module = DM_CASES[name]
    network = networks.randomise(make())
    # Their constants are not in the checkpoint.
    converted = convert(network.state_dict(), module.clone(mean=MEAN, std=STD))
    assert difference(network, *converted) <= 1e-4


def test_a_normalisation_layer_in_front(tmp_path):
    class Normalizer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

        def forward(self, x):
            return (x - self.mean) / self.std

    network = networks.randomise(wide(10, 1))
    layers = {"normalize": Normalizer(), "model": network}
    whole = torch.nn.Sequential()
    for name, layer in layers.items():
        whole.add_module(name, layer)
    torch.save({"state_dict": torch.nn.DataParallel(whole).state_dict()}, tmp_path / "model.pt")
    converted = convert(read_state_dict(tmp_path / "model.pt"), models.WideResNet(10, 1))
    assert difference(whole, *converted) <= 1e-4


def test_the_wrong_block_of_the_same_names_gives_other_logits():
    # The state dict does not tell them apart: whoever converts it must.
    network = networks.randomise(preact("PreActBlockV2", [1, 1, 1, 1]))
    right = models.PreActResNet((1, 1, 1, 1), shortcut="preactivated")
    assert difference(network, *convert(network.state_dict(), right)) <= 1e-4
    wrong = convert(network.state_dict(), right.clone(shortcut="input"))
    assert difference(network, *wrong) > 0.1


def test_a_head_without_bias_is_refused():
    network = wide(10, 1, bias_last=False)
    with pytest.raises(ValueError, match=r"fc\.bias is missing"):
        convert(network.state_dict(), models.WideResNet(10, 1))
