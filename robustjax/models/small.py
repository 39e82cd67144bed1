"""Small models: linear and deep linear ones, perceptron, shallow convolutional networks."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from robustjax import checks
from robustjax.frequency import correlate
from robustjax.models.layers import (
    Conv,
    Normalize,
    classify,
    he_fan_in,
    torch_default,
    torch_default_bias,
)


class Linear(nn.Module):
    """Logits that are an affine function of the flattened input.

    Attributes:
      num_classes: number of logits.
      mean, std: input normalisation, per channel; see ``Normalize``.
    """

    num_classes: int
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Float[Array, "n k"]:
        """Logits of ``x (n, ...)``; ``train`` changes nothing."""
        x = Normalize(self.mean, self.std)(x)
        return classify(x.reshape(x.shape[0], -1), self.num_classes)


def unit_columns(key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
    """Initialiser: normal columns, of l_2 norm 1; a vector is one column."""
    w = jax.random.normal(key, shape, dtype)
    return w / jnp.linalg.norm(w, axis=0)


class DeepLinear(nn.Module):
    """Dense layers without bias or activation on the flattened input: ``x W_1 W_2 ... W_L``.

    A linear classifier whose parametrisation matters to what training finds. Hidden matrices begin
    with columns of l_2 norm 1, the last one at zero.

    Attributes:
      features: widths of the hidden layers.
      num_classes: number of logits.

    Source: Faghri et al. (2021), "Bridging the gap between adversarial robustness and optimization
    bias", the linear experiments.
    """

    features: Sequence[int]
    num_classes: int

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Float[Array, "n k"]:
        """Logits of ``x (n, ...)``; ``train`` changes nothing."""
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.features):
            layer = nn.Dense(width, use_bias=False, kernel_init=unit_columns, name=f"dense{i + 1}")
            x = layer(x)
        return _linear_head(self.num_classes)(x)


class LinearConv(nn.Module):
    """Circular correlations with filters as wide as the flattened input, then a dense layer.

    A linear classifier whose weight has, in Fourier space, the product of its layers' spectra.
    Filters begin with l_2 norm 1, the dense layer, which has no bias, at zero.

    Attributes:
      num_classes: number of logits.
      depth: number of layers with the last, ``>= 1``.

    Raises:
      ValueError: ``depth < 1``.

    Source: Faghri et al. (2021), "Bridging the gap between adversarial robustness and optimization
    bias", section 3.2; with correlations in place of the convolutions printed there, see
    ``robustjax.theory.linear_networks``.
    """

    num_classes: int
    depth: int = 2

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Float[Array, "n k"]:
        """Logits of ``x (n, ...)``; ``train`` changes nothing."""
        checks.integer("depth", self.depth, at_least=1)
        x = x.reshape(x.shape[0], -1)
        for i in range(self.depth - 1):
            x = correlate(self.param(f"filter{i + 1}", unit_columns, x.shape[1:]), x)
        return _linear_head(self.num_classes)(x)


def _linear_head(num_classes: int) -> nn.Dense:
    return nn.Dense(num_classes, use_bias=False, kernel_init=nn.initializers.zeros, name="head")


class MLP(nn.Module):
    """Perceptron with ReLU layers on the flattened input.

    Attributes:
      features: widths of the hidden layers.
      num_classes: number of logits.
      mean, std: input normalisation, per channel; see ``Normalize``.
      dtype: dtype of the hidden layers; parameters and logits are float32.
    """

    features: Sequence[int]
    num_classes: int
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Float[Array, "n k"]:
        """Logits of ``x (n, ...)``; ``train`` changes nothing."""
        x = Normalize(self.mean, self.std)(x)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.features):
            dense = nn.Dense(width, dtype=self.dtype, kernel_init=he_fan_in, name=f"dense{i + 1}")
            x = jax.nn.relu(dense(x))
        return classify(x, self.num_classes)


class SmallCNN(nn.Module):
    """Two 4x4 convolutions of stride 2 and padding 1, one dense layer, ReLU, logits.

    With the default widths it is the small MNIST network of provable and adversarial training:
    166,406 parameters at 28x28. Any image of at least 4x4 will do; 8x8 digits give 2x2 features.

    Attributes:
      num_classes: number of logits.
      channels: widths of the convolutions.
      hidden: width of the dense layer.
      conv: ``"canonical"`` or ``"plain"``, see ``Conv``.
      mean, std: input normalisation, per channel; see ``Normalize``.
      dtype: dtype of the computation; parameters and logits are float32.

    Source: Wong and Kolter (2018), "Provable defenses against adversarial examples via the convex
    outer adversarial polytope", section 4.
    """

    num_classes: int = 10
    channels: Sequence[int] = (16, 32)
    hidden: int = 100
    conv: str = "canonical"
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Float[Array, "n k"]:
        """Logits of images ``x (n, h, w, c)``; ``train`` changes nothing."""
        x = Normalize(self.mean, self.std)(x)
        for i, width in enumerate(self.channels):
            layer = Conv(
                width,
                kernel_size=4,
                strides=2,
                padding=1,
                use_bias=True,
                conv=self.conv,
                dtype=self.dtype,
                name=f"conv{i + 1}",
            )
            x = jax.nn.relu(layer(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=he_fan_in, name="dense")(x)
        return classify(jax.nn.relu(x), self.num_classes)


class MNISTCNN(nn.Module):
    """Two 4x4 convolutions of stride 1 and padding 1 with ReLU, a dense layer of 100, logits.

    Nothing stands between the two dense layers. Without normalisation layers; weights and biases
    begin as in PyTorch. 2,172,806 parameters at 28x28.

    Attributes:
      num_classes: number of logits.
      channels: widths of the convolutions.
      hidden: width of the dense layer.
      conv: ``"canonical"`` or ``"plain"``, see ``Conv``.
      mean, std: input normalisation, per channel; see ``Normalize``.
      dtype: dtype of the computation; parameters and logits are float32.

    Source: Ma, Pan and Farahmand (2023), "Understanding the robustness difference between
    stochastic gradient descent and adaptive gradient methods"; the padding follows from the
    published size of the dense layer.
    """

    num_classes: int = 10
    channels: Sequence[int] = (16, 32)
    hidden: int = 100
    conv: str = "canonical"
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Float[Array, "n k"]:
        """Logits of images ``x (n, h, w, c)``; ``train`` changes nothing."""
        x = Normalize(self.mean, self.std)(x)
        for i, width in enumerate(self.channels):
            layer = Conv(
                width,
                kernel_size=4,
                padding=1,
                use_bias=True,
                conv=self.conv,
                dtype=self.dtype,
                kernel_init=torch_default,
                bias_init=torch_default_bias(16 * x.shape[-1]),
                name=f"conv{i + 1}",
            )
            x = jax.nn.relu(layer(x))
        x = x.reshape(x.shape[0], -1)
        dense = nn.Dense(
            self.hidden,
            dtype=self.dtype,
            kernel_init=torch_default,
            bias_init=torch_default_bias(x.shape[-1]),
            name="dense",
        )
        return classify(
            dense(x),
            self.num_classes,
            kernel_init=torch_default,
            bias_init=torch_default_bias(self.hidden),
        )


class SingleLayerCNN(nn.Module):
    """One 3x3 convolution of stride 1 and padding 1 with ReLU, and a dense layer; no pooling.

    Four filters are enough for catastrophic overfitting in single-step adversarial training.

    Attributes:
      num_classes: number of logits.
      filters: of the convolution.
      conv: ``"canonical"`` or ``"plain"``, see ``Conv``.
      mean, std: input normalisation, per channel; see ``Normalize``.
      dtype: dtype of the computation; parameters and logits are float32.
      kernel_init: initialiser of both layers. How far training overfits depends on it.

    Source: Andriushchenko and Flammarion (2020), "Understanding and improving fast adversarial
    training", section 4.2. Padding and bias are those of their code.
    """

    num_classes: int = 10
    filters: int = 4
    conv: str = "canonical"
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    dtype: DTypeLike | None = None
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Float[Array, "n k"]:
        """Logits of images ``x (n, h, w, c)``; ``train`` changes nothing."""
        x = Normalize(self.mean, self.std)(x)
        layer = Conv(
            self.filters, kernel_size=3, padding=1, use_bias=True, conv=self.conv,
            dtype=self.dtype, kernel_init=self.kernel_init, name="conv",
        )  # fmt: skip
        x = jax.nn.relu(layer(x))
        head = nn.Dense(self.num_classes, kernel_init=self.kernel_init, name="head")
        return head(x.reshape(x.shape[0], -1).astype(jnp.promote_types(x.dtype, jnp.float32)))
