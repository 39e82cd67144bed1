"""Residual networks: ResNet and pre-activation ResNet, by default with a stem for small images.

Sources: He et al. (2016), "Deep residual learning for image recognition"; He et al. (2016),
"Identity mappings in deep residual networks". The layout for 32x32 images (3x3 stem without
pooling, four stages of widths 1, 2, 4, 8 times ``width``, strides 1, 2, 2, 2) is the one that the
literature on adversarial training uses. Convolutions pad as PyTorch does, unless told otherwise.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import flax.linen as nn
import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from robustjax import checks
from robustjax.models.layers import (
    ConvFn,
    Normalize,
    NormFn,
    classify,
    conv_and_norm,
    he_fan_in,
    he_fan_out,
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each normalised, added to the input; ReLU after the sum.

    Attributes:
      channels: output channels.
      strides: stride of the first convolution.
      conv, norm: the model's convolution and normalisation.
    """

    channels: int
    strides: int
    conv: ConvFn
    norm: NormFn

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n p q d"]:
        """The block's output."""
        y = self.conv(self.channels, 3, self.strides, padding=1, name="conv1")(x)
        y = jax.nn.relu(self.norm(y, name="norm1"))
        y = self.conv(self.channels, 3, padding=1, name="conv2")(y)
        y = self.norm(y, name="norm2")
        return jax.nn.relu(y + _projected(self, x, self.channels))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolution to ``4 * channels``, each normalised.

    Attributes:
      channels: channels of the first two convolutions.
      strides: stride of the 3x3 convolution.
      conv, norm: the model's convolution and normalisation.
    """

    channels: int
    strides: int
    conv: ConvFn
    norm: NormFn

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n p q d"]:
        """The block's output."""
        y = self.conv(self.channels, 1, name="conv1")(x)
        y = jax.nn.relu(self.norm(y, name="norm1"))
        y = self.conv(self.channels, 3, self.strides, padding=1, name="conv2")(y)
        y = jax.nn.relu(self.norm(y, name="norm2"))
        y = self.conv(4 * self.channels, 1, name="conv3")(y)
        y = self.norm(y, name="norm3")
        return jax.nn.relu(y + _projected(self, x, 4 * self.channels))


def _projected(block: BasicBlock | BottleneckBlock, x: Array, channels: int) -> Array:
    """The shortcut: the identity, or a normalised 1x1 convolution where the shape changes."""
    if block.strides == 1 and x.shape[-1] == channels:
        return x
    x = block.conv(channels, 1, block.strides, padding=0, name="shortcut_conv")(x)
    return block.norm(x, name="shortcut_norm")


ACTIVATIONS = {"relu": jax.nn.relu, "swish": jax.nn.silu}
STRIDED_PADDINGS = {"all_sides": 1, "end": ((0, 1), (0, 1))}


class PreActBlock(nn.Module):
    """Norm, activation, 3x3 convolution, twice, added to the input; nothing after the sum.

    Attributes:
      channels: output channels.
      strides: stride of the first convolution.
      conv, norm: the model's convolution and normalisation.
      shortcut: what the projection is applied to where the shape changes: the block's
        ``"input"``, or the ``"preactivated"`` input, after norm and activation.
      dropout_rate: rate of dropout before the second convolution.
      train: whether dropout is active.
      activation: ``"relu"`` or ``"swish"``.
      strided_padding: how 3x3 convolutions with a stride pad: ``"all_sides"`` by one, as is usual
        in PyTorch, or only at the ``"end"``, bottom and right, as TensorFlow's and JAX's ``SAME``
        does for even sizes.
      projection_size: side of the projection's kernel, 1 or 3.
    """

    channels: int
    strides: int
    conv: ConvFn
    norm: NormFn
    shortcut: str = "input"
    dropout_rate: float = 0.0
    train: bool = False
    activation: str = "relu"
    strided_padding: str = "all_sides"
    projection_size: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n p q d"]:
        """The block's output."""
        checks.choice("shortcut", self.shortcut, ("input", "preactivated"))
        size = checks.choice("projection_size", self.projection_size, (1, 3))
        activation = ACTIVATIONS[checks.choice("activation", self.activation, ACTIVATIONS)]
        checks.choice("strided_padding", self.strided_padding, STRIDED_PADDINGS)
        padding = 1 if self.strides == 1 else STRIDED_PADDINGS[self.strided_padding]
        y = activation(self.norm(x, name="norm1"))
        if self.strides != 1 or x.shape[-1] != self.channels:
            source = x if self.shortcut == "input" else y
            x = self.conv(
                self.channels,
                size,
                self.strides,
                padding=0 if size == 1 else padding,
                name="shortcut_conv",
            )(source)
        y = self.conv(self.channels, 3, self.strides, padding=padding, name="conv1")(y)
        y = activation(self.norm(y, name="norm2"))
        y = nn.Dropout(self.dropout_rate, deterministic=not self.train)(y)
        return x + self.conv(self.channels, 3, padding=1, name="conv2")(y)


BLOCKS = {"basic": BasicBlock, "bottleneck": BottleneckBlock}


class ResNet(nn.Module):
    """Residual network; ``ResNet10``, ``ResNet18``, ``ResNet34`` and ``ResNet50`` fix the stages.

    Attributes:
      stage_sizes: number of blocks in each stage; stage ``i`` has ``2**i * width`` channels and,
        but for the first, halves the image.
      block: ``"basic"`` or ``"bottleneck"``.
      num_classes: number of logits.
      width: channels of the stem and of the first stage.
      norm: ``"batch"``, ``"group"`` or ``"none"`` (convolutions then have a bias).
      stem: ``"small"``, a 3x3 convolution, or ``"imagenet"``, a 7x7 convolution of stride 2 and 3x3
        maximum pooling of stride 2, as in the original.
      conv: ``"canonical"`` or ``"plain"``, see ``Conv``.
      mean, std: input normalisation, per channel; see ``Normalize``.
      dtype: dtype of the computation; parameters, statistics and logits are float32.
      axis_name: mapped axis over which BatchNorm's statistics are synchronised.
      kernel_init: initialiser of the convolutions; ``torch_default`` is PyTorch's.

    Raises:
      ValueError: an unknown choice, or an input that is not ``(n, h, w, c)``.
    """

    stage_sizes: Sequence[int]
    block: str = "basic"
    num_classes: int = 10
    width: int = 64
    norm: str = "batch"
    stem: str = "small"
    conv: str = "canonical"
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    dtype: DTypeLike | None = None
    axis_name: str | None = None
    kernel_init: nn.initializers.Initializer = he_fan_out

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Float[Array, "n k"]:
        """Logits of images ``x (n, h, w, c)``."""
        block = BLOCKS[checks.choice("block", self.block, BLOCKS)]
        conv, norm = conv_and_norm(
            self.conv, self.norm, train, self.dtype, self.axis_name, self.kernel_init
        )
        x = _stem_conv(self.stem, self.width, conv, Normalize(self.mean, self.std)(x))
        x = jax.nn.relu(norm(x, name="stem_norm"))
        if self.stem == "imagenet":
            x = _pooled(x)
        for name, channels, strides in _blocks(self.stage_sizes, self.width):
            x = block(channels, strides, conv, norm, name=name)(x)
        return classify(x, self.num_classes)


class PreActResNet(nn.Module):
    """Pre-activation residual network; ``PreActResNet18`` fixes the stages.

    The defaults are those of the reference code of fast adversarial training: the projections
    act on the block's input, and nothing stands between the last sum and the average. The
    original has ``shortcut="preactivated"``, ``final_norm=True``. The variant of Gowal et al. has
    ``final_norm=True, activation="swish", strided_padding="end", projection_size=3``; that of
    Ma et al., which trains without any normalisation, ``shortcut="preactivated",
    use_bias=False, kernel_init=head_init=torch_default``.

    Attributes:
      stage_sizes, num_classes, width, norm, conv, mean, std, dtype, axis_name, kernel_init: as in
        ``ResNet``.
      stem: ``"small"`` or ``"imagenet"``, as in ``ResNet``, but with nothing between convolution
        and pooling: the first block normalises.
      use_bias: whether convolutions have a bias; ``None``: where there is no normalisation.
      head_init: initialiser of the head; its bias begins at zero.
      shortcut: ``"input"`` or ``"preactivated"``: what a projection is applied to.
      final_norm: whether the last stage is followed by normalisation and activation.
      activation, strided_padding, projection_size: as in ``PreActBlock``.

    Sources: He et al. (2016), "Identity mappings in deep residual networks"; Wong, Rice and Kolter
    (2020), "Fast is better than free"; Andriushchenko and Flammarion (2020); Gowal et al. (2020),
    "Uncovering the limits of adversarial training against norm-bounded adversarial examples";
    Ma, Pan and Farahmand (2023), "Understanding the robustness difference between stochastic
    gradient descent and adaptive gradient methods".
    """

    stage_sizes: Sequence[int]
    num_classes: int = 10
    width: int = 64
    norm: str = "batch"
    shortcut: str = "input"
    final_norm: bool = False
    activation: str = "relu"
    strided_padding: str = "all_sides"
    projection_size: int = 1
    stem: str = "small"
    use_bias: bool | None = None
    conv: str = "canonical"
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    dtype: DTypeLike | None = None
    axis_name: str | None = None
    kernel_init: nn.initializers.Initializer = he_fan_out
    head_init: nn.initializers.Initializer = he_fan_in

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Float[Array, "n k"]:
        """Logits of images ``x (n, h, w, c)``."""
        conv, norm = conv_and_norm(
            self.conv, self.norm, train, self.dtype, self.axis_name, self.kernel_init, self.use_bias
        )
        x = _stem_conv(self.stem, self.width, conv, Normalize(self.mean, self.std)(x))
        if self.stem == "imagenet":
            x = _pooled(x)
        for name, channels, strides in _blocks(self.stage_sizes, self.width):
            block = PreActBlock(
                channels,
                strides,
                conv,
                norm,
                self.shortcut,
                activation=self.activation,
                strided_padding=self.strided_padding,
                projection_size=self.projection_size,
                name=name,
            )
            x = block(x)
        if self.final_norm:
            x = ACTIVATIONS[self.activation](norm(x, name="final_norm"))
        return classify(x, self.num_classes, kernel_init=self.head_init)


def _stem_conv(stem: str, width: int, conv: ConvFn, x: Array) -> Array:
    """The first convolution: 3x3, or 7x7 of stride 2 for large images."""
    if checks.choice("stem", stem, ("small", "imagenet")) == "imagenet":
        return conv(width, 7, 2, padding=3, name="stem_conv")(x)
    return conv(width, 3, padding=1, name="stem_conv")(x)


def _pooled(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


def _blocks(stage_sizes: Sequence[int], width: int) -> Iterator[tuple[str, int, int]]:
    """Name, channels and stride of each block."""
    for stage, size in enumerate(stage_sizes):
        for block in range(size):
            strides = 2 if stage > 0 and block == 0 else 1
            yield f"stage{stage + 1}_block{block + 1}", width * 2**stage, strides


ResNet10 = partial(ResNet, stage_sizes=(1, 1, 1, 1))
ResNet18 = partial(ResNet, stage_sizes=(2, 2, 2, 2))
ResNet34 = partial(ResNet, stage_sizes=(3, 4, 6, 3))
ResNet50 = partial(ResNet, stage_sizes=(3, 4, 6, 3), block="bottleneck")
PreActResNet18 = partial(PreActResNet, stage_sizes=(2, 2, 2, 2))
