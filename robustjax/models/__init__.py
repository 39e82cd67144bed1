"""Models: Flax Linen modules ``(x, *, train) -> logits``, and adapters for models of any kind.

- ``adapters``: ``from_linen``, ``from_nnx``, ``from_function`` make a ``Model(init, apply)``;
  ``eval_logits`` closes it over parameters for an attack
- ``small``: ``Linear``, ``DeepLinear``, ``LinearConv``, ``MLP``, ``SmallCNN``, ``MNISTCNN``,
  ``SingleLayerCNN``
- ``resnet``: ``ResNet`` and ``ResNet10``, ``18``, ``34``, ``50``; ``PreActResNet`` and
  ``PreActResNet18``
- ``wide_resnet``: ``WideResNet``
- ``vgg``: ``VGG`` and ``VGG8``
- ``vit``: ``ViT`` and ``ViT_B16``
- ``audio``: ``M5`` for waveforms
- ``layers``: ``Normalize``, ``Conv``, ``feature_norm``, ``classify``; ``he_fan_out``,
  ``he_fan_in``, ``torch_default``, ``torch_default_bias``
- ``convolution``: ``canonical_conv``, whose derivatives are fast inside loops on CPU, made of
  ``convolution_maps``
"""

from robustjax.models.adapters import (
    LogitsFn,
    Model,
    ModelFn,
    eval_logits,
    from_function,
    from_linen,
    from_nnx,
)
from robustjax.models.audio import M5
from robustjax.models.convolution import canonical_conv
from robustjax.models.layers import (
    Conv,
    Normalize,
    classify,
    feature_norm,
    he_fan_in,
    he_fan_out,
    torch_default,
    torch_default_bias,
)
from robustjax.models.resnet import (
    PreActResNet,
    PreActResNet18,
    ResNet,
    ResNet10,
    ResNet18,
    ResNet34,
    ResNet50,
)
from robustjax.models.small import (
    MLP,
    MNISTCNN,
    DeepLinear,
    Linear,
    LinearConv,
    SingleLayerCNN,
    SmallCNN,
)
from robustjax.models.vgg import CNN6, CNN8, VGG, VGG8
from robustjax.models.vit import ViT, ViT_B16
from robustjax.models.wide_resnet import WideResNet

__all__ = [
    "CNN6",
    "CNN8",
    "M5",
    "MLP",
    "MNISTCNN",
    "VGG",
    "VGG8",
    "Conv",
    "DeepLinear",
    "Linear",
    "LinearConv",
    "LogitsFn",
    "Model",
    "ModelFn",
    "Normalize",
    "PreActResNet",
    "PreActResNet18",
    "ResNet",
    "ResNet10",
    "ResNet18",
    "ResNet34",
    "ResNet50",
    "SingleLayerCNN",
    "SmallCNN",
    "ViT",
    "ViT_B16",
    "WideResNet",
    "canonical_conv",
    "classify",
    "eval_logits",
    "feature_norm",
    "from_function",
    "from_linen",
    "from_nnx",
    "he_fan_in",
    "he_fan_out",
    "torch_default",
    "torch_default_bias",
]
