"""Networks for waveforms ``(n, samples, channels)``.

Source: Dai, Dai, Qu, Li and Das (2017), "Very deep convolutional neural networks for raw
waveforms", Table 1.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from robustjax import checks
from robustjax.models.layers import (
    Conv,
    Normalize,
    classify,
    feature_norm,
    torch_default,
    torch_default_bias,
)

_POOL = 4


class M5(nn.Module):
    """Convolution, normalisation, ReLU and maximum pooling by 4, four times; mean; dense layer.

    The first kernel is 80 samples long, the others 3. The defaults are the published network. The
    one of PyTorch's tutorials is ``M5(35, widths=(32, 32, 64, 64), stride=16, padding="VALID")``,
    of 26,915 parameters.

    Attributes:
      num_classes: number of logits.
      widths: channels of the convolutions.
      stride: of the first convolution, in samples.
      first_kernel: its length, in samples.
      padding: of convolutions and pooling: ``"SAME"``, with the lengths of the publication, or
        ``"VALID"``.
      norm: ``"batch"``, ``"group"`` or ``"none"``.
      conv: ``"canonical"`` or ``"plain"``, see ``Conv``.
      mean, std: input normalisation, per channel; see ``Normalize``.
      dtype: dtype of the computation; parameters, statistics and logits are float32.
      axis_name: mapped axis over which BatchNorm's statistics are synchronised.

    Raises:
      ValueError: an unknown choice, no width, an input that is not ``(n, samples, channels)``, or
        with ``"VALID"`` one that is too short.

    Weights and biases begin as in PyTorch, which the authors do not say.
    """

    num_classes: int
    widths: Sequence[int] = (128, 128, 256, 512)
    stride: int = 4
    first_kernel: int = 80
    padding: str = "SAME"
    norm: str = "batch"
    conv: str = "canonical"
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    dtype: DTypeLike | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Float[Array, "n k"]:
        """Logits of waveforms ``x (n, samples, channels)``."""
        if x.ndim != 3:
            raise ValueError(f"x must have shape (n, samples, channels), got {x.shape}")
        checks.choice("padding", self.padding, ("SAME", "VALID"))
        if not self.widths:
            raise ValueError("widths must hold at least one, got none")
        # A signal is an image one pixel wide.
        x = Normalize(self.mean, self.std)(x)[:, :, None]
        for i, width in enumerate(self.widths):
            kernel, stride = (self.first_kernel, self.stride) if i == 0 else (3, 1)
            if self.padding == "VALID" and (x.shape[1] - kernel) // stride + 1 < _POOL:
                raise ValueError(f"x is too short for convolution {i + 1}, of {kernel} samples")
            layer = Conv(
                width,
                kernel_size=(kernel, 1),
                strides=(stride, 1),
                padding=self.padding,
                use_bias=True,
                conv=self.conv,
                dtype=self.dtype,
                kernel_init=torch_default,
                bias_init=torch_default_bias(kernel * x.shape[-1]),
                name=f"conv{i + 1}",
            )
            x = feature_norm(
                self.norm,
                layer(x),
                train=train,
                dtype=self.dtype,
                axis_name=self.axis_name,
                name=f"norm{i + 1}",
            )
            x = nn.max_pool(jax.nn.relu(x), (_POOL, 1), (_POOL, 1), self.padding)
        return classify(
            x,
            self.num_classes,
            kernel_init=torch_default,
            bias_init=torch_default_bias(self.widths[-1]),
        )
