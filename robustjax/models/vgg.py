"""VGG networks for small images: stages of 3x3 convolutions with max-pooling, then dense layers.

Source: Simonyan and Zisserman (2015), "Very deep convolutional networks for large-scale image
recognition". Each convolution is normalised, which the original does not do.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from robustjax.models.layers import Normalize, classify, conv_and_norm, he_fan_in, he_fan_out


class VGG(nn.Module):
    """Stages of 3x3 convolutions, each followed by 2x2 max-pooling; dense layers; ReLU throughout.

    The features are flattened, so parameters fit one size of image. The dense layers are not
    normalised.

    Attributes:
      stages: channels of the convolutions of each stage, in units of ``width``.
      dense: widths of the hidden dense layers, in units of ``width``; the last layer comes on top.
      num_classes: number of logits.
      width: the unit of the widths.
      norm: ``"batch"``, ``"group"`` or ``"none"`` (convolutions then have a bias).
      conv: ``"canonical"`` or ``"plain"``, see ``Conv``.
      mean, std: input normalisation, per channel; see ``Normalize``.
      dtype: dtype of the computation; parameters, statistics and logits are float32.
      axis_name: mapped axis over which BatchNorm's statistics are synchronised.
      kernel_init: initialiser of the convolutions; ``torch_default`` is PyTorch's.

    Raises:
      ValueError: an unknown choice, an input that is not ``(n, h, w, c)``, or images with sides
        below ``2**len(stages)``, of which pooling would leave nothing.
    """

    stages: Sequence[Sequence[int]]
    dense: Sequence[int] = ()
    num_classes: int = 10
    width: int = 64
    norm: str = "batch"
    conv: str = "canonical"
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    dtype: DTypeLike | None = None
    axis_name: str | None = None
    kernel_init: nn.initializers.Initializer = he_fan_out

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Float[Array, "n k"]:
        """Logits of images ``x (n, h, w, c)``."""
        smallest = 2 ** len(self.stages)
        if x.ndim != 4 or min(x.shape[1:3]) < smallest:
            raise ValueError(
                f"x must have shape (n, h, w, c) with h and w >= {smallest}, got {x.shape}"
            )
        conv, norm = conv_and_norm(
            self.conv, self.norm, train, self.dtype, self.axis_name, self.kernel_init
        )
        x = Normalize(self.mean, self.std)(x)
        for i, stage in enumerate(self.stages):
            for j, units in enumerate(stage):
                place = f"stage{i + 1}_{{}}{j + 1}"
                x = conv(units * self.width, 3, padding=1, name=place.format("conv"))(x)
                x = jax.nn.relu(norm(x, name=place.format("norm")))
            x = _max_pool(x)
        x = x.reshape(x.shape[0], -1)
        for i, units in enumerate(self.dense):
            layer = nn.Dense(
                units * self.width, dtype=self.dtype, kernel_init=he_fan_in, name=f"dense{i + 1}"
            )
            x = jax.nn.relu(layer(x))
        return classify(x, self.num_classes)


def _max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n p q c"]:
    """Maxima of 2x2 windows; a last odd row or column is dropped.

    Not ``nn.max_pool``: the derivative of a maximum over axes is five times as fast on CPU. Where
    maxima are equal it is shared among them, where the other gives it to the first.
    """
    n, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
    return x.max(axis=(2, 4))


# Six convolutions, 64-64-M-128-128-M-256-256-M, and two dense layers. Dabouei et al. (2022),
# "Revisiting outer optimization in adversarial training", do not say what their VGG-8 is; this is
# one reading of the name.
VGG8 = partial(VGG, stages=((1, 1), (2, 2), (4, 4)), dense=(4,))

# The plain networks of Ma (2025), "Understanding adversarial robustness in deep learning", table
# 3.10, six and eight convolutions of 64, 128, 196 (and 256) channels without normalisation; their
# layout is that of the public code for the six, and continued for the eight.
CNN6 = partial(VGG, stages=((16, 16), (32, 32), (49, 49)), dense=(64,), width=4, norm="none")
CNN8 = partial(
    VGG, stages=((16, 16), (32, 32), (49, 49), (64, 64)), dense=(64,), width=4, norm="none"
)
