"""PyTorch checkpoints of RobustBench's architectures and of vision transformers as models of ours.

    state_dict = read_state_dict("Carmon2019Unlabeled.pt")
    module, params, model_state = convert(state_dict, models.WideResNet(28, 10))
    logits_fn = models.eval_logits(models.from_linen(module).apply, params, model_state)

A checkpoint is data from elsewhere: it is read without running any code that it may hold, and what
does not fit the network is refused, with the list of it. The file says nothing about the network
beside names and shapes, so the module must be the right one:

| PyTorch class of ``robustbench`` | module of ``robustjax.models`` |
|---|---|
| ``ResNet18``, ``34``, ``50`` | ``ResNet18()``, ``ResNet34()``, ``ResNet50()`` |
| ``PreActResNet(PreActBlock, [2, 2, 2, 2])`` | ``PreActResNet18()`` |
| the same of ``PreActBlockV2``, or with ``out_shortcut`` | with ``shortcut="preactivated"`` |
| either with ``bn_before_fc`` | with ``final_norm=True`` |
| ``WideResNet(depth, widen_factor=k)`` | ``WideResNet(depth, k)`` |
| ``DMWideResNet(depth=d, width=k)`` | ``WideResNet(d, k, strided_padding="end")`` |
| ``DMPreActResNet(depth=18)`` | ``PreActResNet18(final_norm=True, strided_padding="end",`` |
| | ``projection_size=3)`` |
| either with ``activation_fn=Swish`` | with ``activation="swish"`` |
| ``mu`` and ``sigma``, or ``mean`` and ``std`` | ``mean=..., std=...`` of any of them |
| ``timm``'s ``vit_base_patch16_224`` and its like | ``ViT_B16(mean=0.5, std=0.5)``, ``ViT(...)`` |

Normalisation constants that the checkpoint holds are used; those that are only in the code of the
PyTorch class must be given to the module.

Sources: Croce et al. (2021), "RobustBench: a standardized adversarial robustness benchmark", and
its model zoo; Wightman (2019), "PyTorch image models", for the names in vision transformers.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from robustjax import checks, models
from robustjax.benchmark.state_dict import as_array, read_state_dict

__all__ = ["Imported", "convert", "read_state_dict"]


class Imported(NamedTuple):
    """A network with its weights.

    Attributes:
      module: the module, with the normalisation that the checkpoint holds.
      params: its parameters, float32 numpy arrays.
      model_state: its BatchNorm statistics, float32 numpy arrays.
    """

    module: nn.Module
    params: dict[str, Any]
    model_state: dict[str, Any]


class _Naming(NamedTuple):
    """RobustBench's names of layers, for ours.

    ``block`` counts stages from 1 as ``stage``, from 0 as ``stage0``, blocks from 0.
    """

    block: str
    layers: Mapping[str, str]


_RESNET = _Naming(
    "layer{stage}.{block0}",
    {
        "stem_conv": "conv1",
        "stem_norm": "bn1",
        "conv1": "conv1",
        "norm1": "bn1",
        "conv2": "conv2",
        "norm2": "bn2",
        "conv3": "conv3",
        "norm3": "bn3",
        "shortcut_conv": "shortcut.0",
        "shortcut_norm": "shortcut.1",
        "final_norm": "bn",
        "head": "linear",
    },
)
_WIDE_RESNET = _Naming(
    "block{stage}.layer.{block0}",
    {**_RESNET.layers, "shortcut_conv": "convShortcut", "final_norm": "bn1", "head": "fc"},
)
_DM_WIDE_RESNET = _Naming(
    "layer.{stage0}.block.{block0}",
    {
        "stem_conv": "init_conv",
        "norm1": "batchnorm_0",
        "conv1": "conv_0",
        "norm2": "batchnorm_1",
        "conv2": "conv_1",
        "shortcut_conv": "shortcut",
        "final_norm": "batchnorm",
        "head": "logits",
    },
)
_DM_PREACT_RESNET = _Naming(
    "layer_{stage0}.{block0}",
    {
        **_DM_WIDE_RESNET.layers,
        "stem_conv": "conv_2d",
        "conv1": "conv_2d_1",
        "conv2": "conv_2d_2",
    },
)
_VIT = _Naming(
    "",
    {
        "patch_embed": "patch_embed.proj",
        "norm": "norm",
        "norm1": "norm1",
        "qkv": "attn.qkv",
        "projection": "attn.proj",
        "norm2": "norm2",
        "mlp1": "mlp.fc1",
        "mlp2": "mlp.fc2",
        "head": "head",
    },
)
_KINDS = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def convert(
    state_dict: Mapping[str, Any],
    module: nn.Module,
    *,
    image_channels: int = 3,
    image_size: int | None = None,
    head: bool = True,
) -> Imported:
    """The weights of a PyTorch network, for the module that is its like.

    Names may begin with ``module.`` or ``model.``. The counters ``num_batches_tracked`` are not
    needed, nor is ``sub_block1``, a block that some wide residual networks have and never use.
    Mean and standard deviation of the inputs are taken from the ``state_dict`` if it holds them
    (``mu`` and ``sigma`` or ``mean`` and ``std``, alone or in a layer ``normalize``); all networks
    see images in [0, 1].

    Args:
      state_dict: arrays by name, as ``read_state_dict`` gives them.
      module: ``ResNet``, ``PreActResNet``, ``WideResNet`` or ``ViT`` with the settings of the
        PyTorch class; the table above tells which. ``strided_padding="end"`` tells the networks of
        Gowal et al., whose layers have other names.
      image_channels: channels of the images, ``>= 1``.
      image_size: their side, ``>= 1``, in pixels. It matters to ``ViT`` alone, which has a
        parameter for each place: ``None`` is 224 for it.
      head: whether the last layer is wanted. Without it, the number of classes may differ, and
        ``params`` have no ``"head"``: for fine-tuning on other classes.

    Returns:
      ``(module, params, model_state)``; the module has the normalisation of the ``state_dict``.

    Raises:
      ValueError: the module is none of these; or the ``state_dict`` does not fit it, with the list
        of all names that are missing or surplus, of wrong shapes, and of values that are not
        finite, or not positive where they must be.
    """
    naming = _naming(module)
    checks.integer("image_channels", image_channels, at_least=1)
    if image_size is None:
        image_size = 224 if naming is _VIT else 32
    checks.integer("image_size", image_size, at_least=1)
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            f"state_dict must be a mapping of names to arrays, got {checks.shown(state_dict)}"
        )
    problems: list[str] = []
    given = _without_prefixes(state_dict, problems)
    normalization = _pop_normalization(given, image_channels, module, problems)

    images = jax.ShapeDtypeStruct((1, image_size, image_size, image_channels), jnp.float32)
    shapes = jax.eval_shape(models.from_linen(module).init, jax.random.key(0), images)
    variables = {"params": shapes[0], **shapes[1]}
    wanted = {
        _torch_name(path[1:], naming): (path, leaf.shape)
        for path, leaf in traverse_util.flatten_dict(variables).items()
    }
    if not head:
        ours = {name for name, (path, _) in wanted.items() if path[1] == "head"}
        wanted = {name: leaf for name, leaf in wanted.items() if name not in ours}
        given = {name: array for name, array in given.items() if name not in ours}
    problems += [f"{name} is missing" for name in wanted if name not in given]
    converted = {}
    for name, array in given.items():
        twin = name.removeprefix("sub_") if name.startswith("sub_block1.") else name
        layer, _, kind = twin.rpartition(".")
        if kind == "num_batches_tracked" and f"{layer}.running_mean" in wanted:
            continue
        if twin not in wanted:
            problems.append(f"{name} is surplus")
            continue
        path, shape = wanted[twin]
        variance = kind == "running_var"
        fault = _fault(array, _torch_shape(shape), at_least=0.0 if variance else -np.inf)
        if fault:
            problems.append(f"{name} {fault}")
        elif twin == name:
            converted[path] = _our_layout(array)
    if problems:
        raise ValueError(f"state_dict must fit {_described(module)}; {'; '.join(problems)}")
    if normalization:
        module = module.clone(**normalization)
    variables = traverse_util.unflatten_dict(converted)
    return Imported(module, variables.pop("params"), variables)


def _naming(module: Any) -> _Naming:
    padded_at_end = getattr(module, "strided_padding", "all_sides") == "end"
    if isinstance(module, models.WideResNet):
        return _DM_WIDE_RESNET if padded_at_end else _WIDE_RESNET
    if isinstance(module, models.PreActResNet):
        return _DM_PREACT_RESNET if padded_at_end else _RESNET
    if isinstance(module, models.ResNet):
        return _RESNET
    if isinstance(module, models.ViT):
        return _VIT
    raise ValueError(
        f"module must be a ResNet, PreActResNet, WideResNet or ViT, got {checks.shown(module)}"
    )


def _without_prefixes(state_dict: Mapping[str, Any], problems: list[str]) -> dict[str, np.ndarray]:
    given: dict[str, np.ndarray] = {}
    for name, value in state_dict.items():
        array = as_array(value)
        if array is None or not isinstance(name, str):
            problems.append(f"{name} is no named tensor")
            continue
        short = re.sub(r"^((module|model)\.)+", "", name)
        if short in given:
            problems.append(f"{short} is there twice")
        given[short] = array
    return given


def _pop_normalization(
    given: dict[str, np.ndarray], channels: int, module: nn.Module, problems: list[str]
) -> dict[str, tuple[float, ...]]:
    """Removes mean and standard deviation; ``{}`` if there are none."""
    found = []
    for layer in ("", "normalize.", "normalizer."):
        for pair in (("mu", "sigma"), ("mean", "std")):
            names = [layer + name for name in pair]
            if any(name in given for name in names):
                problems += [f"{name} is missing" for name in names if name not in given]
                found.append([(name, given.pop(name, np.ones(1))) for name in names])
    if len(found) > 1:
        listed = ", ".join(name for pair in found for name, _ in pair)
        problems.append(f"{listed} are more than one normalisation")
    if found and (module.mean is not None or module.std is not None):
        problems.append("a normalisation is in it, and given to the module as well")
    constants = {}
    for kind, (name, array) in zip(("mean", "std"), found[0] if found else (), strict=False):
        flat = array.reshape(-1)
        fits = array.size in (1, channels) and array.size == max(array.shape, default=1)
        fault = _fault(flat, flat.shape, above=0.0 if kind == "std" else -np.inf)
        if not fits:
            problems.append(f"{name} has shape {array.shape}, expected {channels} channels")
        elif fault:
            problems.append(f"{name} {fault}")
        else:
            constants[kind] = tuple(map(float, flat))
    return constants


def _fault(
    array: np.ndarray,
    shape: tuple[int, ...],
    *,
    at_least: float = -np.inf,
    above: float = -np.inf,
) -> str | None:
    """What is wrong with an array, if anything."""
    if array.shape != shape:
        return f"has shape {array.shape}, expected {shape}"
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return f"has dtype {array.dtype}, expected a floating one"
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        return "has values that are not finite in float32"
    if (array < at_least).any():
        return f"has values below {at_least:g}"
    if (array <= above).any():
        return f"has values that are not above {above:g}"
    return None


def _torch_name(path: tuple[str, ...], naming: _Naming) -> str:
    *layers, kind = path
    names = []
    for layer in layers:
        block = re.fullmatch(r"stage(\d+)_block(\d+)", layer)
        transformer = re.fullmatch(r"block(\d+)", layer)
        if transformer:
            names.append(f"blocks.{int(transformer.group(1)) - 1}")
        elif block:
            stage, number = map(int, block.groups())
            names.append(naming.block.format(stage=stage, stage0=stage - 1, block0=number - 1))
        else:
            names.append(naming.layers[layer])
    return ".".join((*names, _KINDS.get(kind, kind)))


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Convolutions: HWIO to OIHW; dense layers: transposed."""
    if len(shape) == 3:  # tokens and positions
        return shape
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _our_layout(array: np.ndarray) -> np.ndarray:
    """Convolutions: OIHW to HWIO; dense layers: transposed."""
    if array.ndim != 3:
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return np.ascontiguousarray(array, dtype=np.float32)


def _described(module: nn.Module) -> str:
    settings = {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(module)
        if field.init and field.name not in ("parent", "name")
    }
    defaults = {field.name: field.default for field in dataclasses.fields(module)}
    chosen = [f"{name}={value!r}" for name, value in settings.items() if value != defaults[name]]
    return f"{type(module).__name__}({', '.join(chosen)})"
