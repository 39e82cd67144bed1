"""Layers that the models share: input normalisation, convolution, feature normalisation, head.

Initialisation: convolutions are normal with variance ``2 / (k_h k_w c_out)`` (``he_fan_out``),
dense layers normal with variance ``2 / d_in`` (``he_fan_in``), scales one and biases zero. These
are the choices of the reference code of fast adversarial training. ``torch_default`` is what
PyTorch gives a layer that nothing is said about.

Sources: He et al. (2015), "Delving deep into rectifiers"; Andriushchenko and Flammarion (2020),
"Understanding and improving fast adversarial training".
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from robustjax import checks
from robustjax.models.convolution import canonical_conv

he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
he_fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
# U(-1/sqrt(fan_in), 1/sqrt(fan_in)) has the variance 1 / (3 fan_in).
torch_default = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_default_bias(fan_in: int) -> nn.initializers.Initializer:
    """``U(-1/sqrt(fan_in), 1/sqrt(fan_in))``: PyTorch's biases of a layer with so many inputs."""
    limit = checks.integer("fan_in", fan_in, at_least=1) ** -0.5

    def init(key: Any, shape: Any, dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


CONVOLUTIONS = {"canonical": canonical_conv, "plain": jax.lax.conv_general_dilated}
NORMS = ("batch", "group", "none")


class Normalize(nn.Module):
    """Input normalisation ``(x - mean) / std`` with constants, per channel or one for all.

    It belongs to the model, so that attacks and their radii stay in input units. It has no
    parameters, and computes in at least float32.

    Attributes:
      mean: one number, or one per channel; ``None`` is 0.
      std: one positive number, or one per channel; ``None`` is 1.

    Raises:
      ValueError: ``std`` is not positive, the input is not floating-point, or the number of
        channels differs.
    """

    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None

    @nn.compact
    def __call__(self, x: Any) -> Float[Array, "n ..."]:
        """Normalises ``x (n, ..., c)``."""
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise ValueError(
                f"x must be floating-point, such as images in [0, 1], got {jnp.result_type(x)}"
            )
        x = jnp.asarray(x)
        if self.mean is None and self.std is None:
            return x
        mean = checks.number("mean", 0.0 if self.mean is None else self.mean)
        std = checks.number("std", 1.0 if self.std is None else self.std, above=0.0)
        return (x - _per_channel("mean", mean, x)) / _per_channel("std", std, x)


def _per_channel(name: str, value: float | Sequence[float], x: Array) -> np.ndarray:
    constants = np.asarray(value, jnp.promote_types(x.dtype, jnp.float32))
    if constants.ndim > 1 or constants.size not in (1, x.shape[-1]):
        raise ValueError(
            f"{name} must be one number or one for each of the {x.shape[-1]} channels, "
            f"got shape {constants.shape}"
        )
    return constants


class Conv(nn.Module):
    """Two-dimensional convolution of ``NHWC`` images, in float32 or a lower ``dtype``.

    Attributes:
      features: output channels.
      kernel_size: side of a square kernel, or ``(height, width)``.
      strides: stride, or ``(vertical, horizontal)``.
      padding: ``"SAME"``, ``"VALID"``, pairs ``((top, bottom), (left, right))``, or one number for
        all four sides, as in PyTorch (``"SAME"`` with stride 2 pads unevenly, PyTorch does not).
      use_bias: whether a bias is added; normalisation layers make it superfluous.
      conv: ``"canonical"`` for derivatives that are fast inside loops on CPU (``canonical_conv``),
        ``"plain"`` for JAX's own. They agree in values and in derivatives.
      dtype: dtype of the computation; ``None`` is that of input and parameters together.
        Parameters are float32.
      kernel_init, bias_init: initialisers of kernel and bias.

    Raises:
      ValueError: ``conv`` is unknown, or the input is not ``(n, h, w, c)``.
    """

    features: int
    kernel_size: int | tuple[int, int]
    strides: int | tuple[int, int] = 1
    padding: str | int | Sequence[tuple[int, int]] = "SAME"
    use_bias: bool = False
    conv: str = "canonical"
    dtype: DTypeLike | None = None
    kernel_init: nn.initializers.Initializer = he_fan_out
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Array) -> Float[Array, "n p q d"]:
        """Convolves ``x (n, h, w, c)``."""
        convolution = CONVOLUTIONS[checks.choice("conv", self.conv, CONVOLUTIONS)]
        if x.ndim != 4:
            raise ValueError(f"x must have shape (n, h, w, c), got {x.shape}")
        size = (*_pair(self.kernel_size), x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, size)
        bias = self.param("bias", self.bias_init, (self.features,)) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        padding = self.padding
        if isinstance(padding, int):
            padding = ((padding, padding), (padding, padding))
        y = convolution(
            x, kernel, _pair(self.strides), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y if bias is None else y + bias


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def feature_norm(
    norm: str,
    x: Float[Array, "n h w c"],
    *,
    train: bool,
    dtype: DTypeLike | None = None,
    axis_name: str | None = None,
    name: str | None = None,
) -> Float[Array, "n h w c"]:
    """Normalises features; to be called inside a compact module, whose submodule it becomes.

    Statistics are float32 whatever ``dtype``, as are scale, bias and the running averages.

    Args:
      norm: ``"batch"``: BatchNorm, with PyTorch's momentum 0.1 (0.9 in Flax's convention) and
        epsilon 1e-5. In training mode it uses and records the statistics of the batch, else the
        running ones. The running variance is the biased one; PyTorch records the unbiased
        variance, larger by ``m / (m - 1)`` for ``m`` values per channel in a batch.
        ``"group"``: GroupNorm with 32 groups, or the largest divisor of the channels below it that
        leaves at least two channels in a group. ``"none"``: ``x`` itself.
      x: features.
      train: whether BatchNorm is in training mode.
      dtype: dtype of the result; ``None`` is at least float32.
      axis_name: mapped axis over which BatchNorm's statistics are taken together.
      name: name of the submodule.

    Raises:
      ValueError: ``norm`` is unknown.

    Sources: Ioffe and Szegedy (2015), "Batch normalization"; Wu and He (2018), "Group
    normalization".
    """
    checks.choice("norm", norm, NORMS)
    if norm == "batch":
        layer = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=dtype,
            axis_name=axis_name,
            name=name,
        )
        return layer(x)
    if norm == "group":
        groups = group_count(x.shape[-1])
        return nn.GroupNorm(num_groups=groups, epsilon=1e-5, dtype=dtype, name=name)(x)
    return x


def group_count(channels: int, at_most: int = 32) -> int:
    """The largest divisor of ``channels`` that is ``<= at_most`` and leaves two in a group."""
    return max(
        groups
        for groups in range(1, at_most + 1)
        if channels % groups == 0 and (groups == 1 or channels // groups >= 2)
    )


def classify(
    features: Float[Array, "n *shape c"],
    num_classes: int,
    *,
    name: str = "head",
    kernel_init: nn.initializers.Initializer = he_fan_in,
    bias_init: nn.initializers.Initializer = nn.initializers.zeros,
) -> Float[Array, "n k"]:
    """Mean over positions, then a dense layer, in at least float32; inside a compact module.

    Args:
      features: ``(n, c)``, or ``(n, h, w, c)`` to be averaged over ``h`` and ``w``.
      num_classes: number of logits, >= 1.
      name: name of the dense layer.
      kernel_init: initialiser of the kernel of the dense layer.
      bias_init: initialiser of its bias.
    """
    checks.integer("num_classes", num_classes, at_least=1)
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    pooled = features.mean(axis=range(1, features.ndim - 1))
    head = nn.Dense(num_classes, kernel_init=kernel_init, bias_init=bias_init, name=name)
    return head(pooled)


# conv(features, kernel_size, strides)(x) and norm(x, name=...): a model's choices for its blocks
ConvFn = Callable[..., Conv]
NormFn = Callable[..., Array]


def conv_and_norm(
    conv: str,
    norm: str,
    train: bool,
    dtype: DTypeLike | None,
    axis_name: str | None,
    kernel_init: nn.initializers.Initializer,
    use_bias: bool | None = None,
) -> tuple[ConvFn, NormFn]:
    """``Conv`` and ``feature_norm`` with a model's choices filled in.

    Convolutions have a bias where there is no normalisation, unless ``use_bias`` decides.
    """
    use_bias = norm == "none" if use_bias is None else use_bias
    return (
        partial(Conv, use_bias=use_bias, conv=conv, dtype=dtype, kernel_init=kernel_init),
        partial(feature_norm, norm, train=train, dtype=dtype, axis_name=axis_name),
    )
