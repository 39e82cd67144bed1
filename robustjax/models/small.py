"""Small models: linear, multi-layer perceptron, two-layer convolutional network."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from robustjax.models.layers import Conv, Normalize, classify, he_fan_in


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
