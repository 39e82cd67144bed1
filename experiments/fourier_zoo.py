"""The 25 networks of RobustBench that Faghri et al. (2021) attack in Fourier balls, as data.

Source: Faghri et al. (2021), "Bridging the gap between adversarial robustness and optimization
bias", table B.2; Croce et al. (2021), "RobustBench: a standardized adversarial robustness
benchmark", for the architectures and the normalisation of the inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn

from experiments import choices
from robustjax import models
from robustjax.benchmark import import_torch

TRAININGS = ("standard", "Linf", "L2", "corruptions")

# Input normalisation: what the checkpoint does not hold.
_CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)}
_ENGSTROM = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
_AUGUSTIN = {
    "mean": (0.4913997551666284, 0.48215855929893703, 0.4465309133731618),
    "std": (0.24703225141799082, 0.24348516474564, 0.26158783926049628),
}
_RONY = {"mean": (0.491, 0.482, 0.447), "std": (0.247, 0.243, 0.262)}
_HALF = {"mean": 0.5, "std": 0.5}


class ZooModel(NamedTuple):
    """A network of the zoo.

    Attributes:
      training: what it was trained to withstand, of ``TRAININGS``; RobustBench's folder.
      architecture: in words.
      make: the module of so many classes; None if there is none here.
      normalization: ``mean`` and ``std`` of the inputs, unless the checkpoint has its own.
      entry: of a file with more than the weights in it.
    """

    training: str
    architecture: str
    make: Callable[[int], nn.Module] | None
    normalization: Mapping[str, Any] = {}
    entry: str | None = None


def _wide(training: str, depth: int, k: int, **others: Any) -> ZooModel:
    return ZooModel(
        training, f"WRN-{depth}-{k}", lambda classes: models.WideResNet(depth, k, classes), **others
    )


def _swish(training: str, depth: int, k: int) -> ZooModel:
    def make(classes: int) -> nn.Module:
        return models.WideResNet(depth, k, classes, activation="swish", strided_padding="end")

    return ZooModel(training, f"WRN-{depth}-{k}, swish", make, _CIFAR)


def _preact(training: str, **others: Any) -> ZooModel:
    def make(classes: int) -> nn.Module:
        return models.PreActResNet18(num_classes=classes, shortcut="preactivated", final_norm=True)

    return ZooModel(training, "PreActResNet-18", make, _CIFAR, **others)


def _resnet50(training: str, normalization: Mapping[str, Any]) -> ZooModel:
    def make(classes: int) -> nn.Module:
        return models.ResNet50(num_classes=classes)

    return ZooModel(training, "ResNet-50", make, normalization)


# By name; the same name in another folder of RobustBench has the folder before it.
ZOO: Mapping[str, ZooModel] = {
    "Standard": _wide("standard", 28, 10),
    "Gowal2020Uncovering_70_16_extra": _swish("Linf", 70, 16),
    "Gowal2020Uncovering_28_10_extra": _swish("Linf", 28, 10),
    "Wu2020Adversarial_extra": _wide("Linf", 28, 10),
    "Carmon2019Unlabeled": _wide("Linf", 28, 10),
    "Sehwag2020Hydra": _wide("Linf", 28, 10),
    "Gowal2020Uncovering_70_16": _swish("Linf", 70, 16),
    "Gowal2020Uncovering_34_20": _swish("Linf", 34, 20),
    "Wang2020Improving": _wide("Linf", 28, 10),
    "Wu2020Adversarial": _wide("Linf", 34, 10),
    "Hendrycks2019Using": _wide("Linf", 28, 10, normalization=_HALF),
    "Gowal2020Uncovering_extra": _swish("L2", 70, 16),
    "Gowal2020Uncovering": _swish("L2", 70, 16),
    "L2/Wu2020Adversarial": _wide("L2", 34, 10),
    "Augustin2020Adversarial": _resnet50("L2", _AUGUSTIN),
    "Engstrom2019Robustness": _resnet50("L2", _ENGSTROM),
    # Printed twice in the table.
    "Rice2020Overfitting": _preact("L2"),
    "Rony2019Decoupling": _wide("L2", 28, 10, normalization=_RONY),
    # Its inputs are standardised image by image.
    "Ding2020MMA": ZooModel("L2", "WRN-28-4 of standardised images", None),
    "Hendrycks2020AugMix_ResNeXt": ZooModel("corruptions", "ResNeXt-29, 4x32d", None),
    "Hendrycks2020AugMix_WRN": _wide("corruptions", 40, 2, normalization=_HALF),
    "Kireev2021Effectiveness_RLATAugMixNoJSD": _preact("corruptions", entry="last"),
    "Kireev2021Effectiveness_AugMixNoJSD": _preact("corruptions", entry="last"),
    "Kireev2021Effectiveness_Gauss50percent": _preact("corruptions", entry="last"),
    "Kireev2021Effectiveness_RLAT": _preact("corruptions", entry="last"),
}
SUPPORTED = tuple(name for name, model in ZOO.items() if model.make is not None)


def files_in(folder: str | Path, names: Sequence[str] = SUPPORTED) -> str:
    """Where RobustBench puts networks, in its own folder of models.

    Args:
      folder: RobustBench's ``models/cifar10``.
      names: of ``ZOO``; by default all that can be read.

    Returns:
      ``NAME:FILE`` by commas, as ``parse`` reads it.
    """

    def place(name: str) -> Path:
        training = "Linf" if ZOO[name].training == "standard" else ZOO[name].training
        return Path(folder) / training / f"{name.rpartition('/')[2]}.pt"

    return ",".join(f"{name}:{place(name)}" for name in names)


def parse(words: str) -> dict[str, str]:
    """Names to files of ``NAME:FILE,NAME:FILE``.

    Raises:
      ValueError: a word is not of this form, or a name is there twice.
    """
    files: dict[str, str] = {}
    for word in filter(None, (word.strip() for word in words.split(","))):
        name, _, path = word.partition(":")
        if not name or not path:
            raise ValueError(f"torch_checkpoints must be NAME:FILE by commas, got {word!r}")
        if name in files:
            raise ValueError(f"torch_checkpoints must name {name} once, got it twice")
        files[name] = path
    return files


def module_of(name: str, num_classes: int, width: int | None = None) -> nn.Module:
    """The network of a name: one of the zoo, or an architecture of ``choices.MODELS``.

    Args:
      name: of ``ZOO`` or ``choices.MODELS``.
      num_classes: of the data.
      width: of an architecture, not of the zoo; None: the published one.

    Raises:
      ValueError: the name is unknown, or there is no such architecture here.
    """
    if name not in ZOO:
        if name not in choices.MODELS:
            raise ValueError(
                "torch_checkpoints must name networks of table B.2, as Carmon2019Unlabeled, or "
                f"architectures, {', '.join(choices.MODELS)}; got {name!r}"
            )
        return choices.MODELS[name](num_classes, width, "batch", None)
    model = ZOO[name]
    if model.make is None:
        raise ValueError(
            f"torch_checkpoints cannot hold {name}: its architecture, {model.architecture}, is not "
            "among those that are imported"
        )
    return model.make(num_classes)


def load(
    name: str, path: str, num_classes: int, *, channels: int = 3, width: int | None = None
) -> models.LogitsFn:
    """A network of the zoo from its file.

    Args:
      name: as of ``module_of``.
      path: a PyTorch state dict, or an ``.npz`` of its arrays.
      num_classes: of the data.
      channels: of the images.
      width: as of ``module_of``.

    Returns:
      Logits in evaluation mode, of images in [0, 1].

    Raises:
      ValueError: naming the network: there is none of this name or architecture, or the file
        cannot be read or holds another network.
    """
    module = module_of(name, num_classes, width)
    entry = ZOO[name].entry if name in ZOO else None
    try:
        state_dict = import_torch.read_state_dict(path, entry=entry)
        if name in ZOO and not _has_normalization(state_dict):
            module = module.clone(**ZOO[name].normalization)
        module, params, model_state = import_torch.convert(
            state_dict, module, image_channels=channels
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return models.eval_logits(models.from_linen(module).apply, params, model_state)


def _has_normalization(state_dict: Mapping[str, Any]) -> bool:
    return any(name.rpartition(".")[2] in ("mu", "mean", "sigma", "std") for name in state_dict)
