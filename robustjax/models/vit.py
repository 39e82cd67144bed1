"""Vision transformers: an image as a sequence of patches.

Source: Dosovitskiy et al. (2021), "An image is worth 16x16 words: transformers for image
recognition at scale", section 3.1 and appendix D. Dropout is left out.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from robustjax import checks
from robustjax.models.layers import Conv, Normalize, classify

_EPSILON = 1e-6


class TransformerBlock(nn.Module):
    """Self-attention and a perceptron, each of the normalised input and added to it.

    Attributes:
      num_heads: of the attention; divides the width of the tokens.
      mlp_width: of the perceptron's hidden layer, with the exact GELU.
      dtype: dtype of the computation; parameters are float32.
    """

    num_heads: int
    mlp_width: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n t c"]) -> Float[Array, "n t c"]:
        """The block's output."""
        norm = partial(nn.LayerNorm, epsilon=_EPSILON, dtype=self.dtype)
        dense = partial(
            nn.Dense,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(1e-6),
        )
        n, tokens, width = x.shape
        qkv = dense(3 * width, name="qkv")(norm(name="norm1")(x))
        query, key, value = jnp.moveaxis(
            qkv.reshape(n, tokens, 3, self.num_heads, width // self.num_heads), 2, 0
        )
        attended = jax.nn.dot_product_attention(query, key, value)
        x = x + dense(width, name="projection")(attended.reshape(n, tokens, width))
        hidden = dense(self.mlp_width, name="mlp1")(norm(name="norm2")(x))
        return x + dense(width, name="mlp2")(jax.nn.gelu(hidden, approximate=False))


class ViT(nn.Module):
    """Vision transformer with a class token; ``ViT_B16`` is the base model with patches of 16.

    Layers are normalised before, not after, attention and perceptron. The position embedding is
    learned, so images must have the size of those that the parameters were made for.

    Attributes:
      num_classes: number of logits.
      patch_size: side of the square patches, in pixels; divides that of the images.
      depth: number of blocks.
      width: of the tokens.
      mlp_width: of the hidden layer in each block.
      num_heads: of the attention; divides ``width``.
      conv: ``"canonical"`` or ``"plain"``, see ``Conv``; for the embedding of the patches.
      mean, std: input normalisation, per channel; see ``Normalize``. Published weights want 0.5.
      dtype: dtype of the computation; parameters and logits are float32.

    Raises:
      ValueError: an attribute is out of range, heads or patches do not fit, or the input is not
        ``(n, h, w, c)``.
    """

    num_classes: int = 1000
    patch_size: int = 16
    depth: int = 12
    width: int = 768
    mlp_width: int = 3072
    num_heads: int = 12
    conv: str = "canonical"
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Float[Array, "n k"]:
        """Logits of images ``x (n, h, w, c)``; ``train`` changes nothing."""
        for name in ("patch_size", "depth", "width", "mlp_width", "num_heads"):
            checks.integer(name, getattr(self, name), at_least=1)
        checks.divisible("width", self.width, "num_heads", self.num_heads)
        x = Normalize(self.mean, self.std)(x)
        patches = Conv(
            self.width,
            kernel_size=self.patch_size,
            strides=self.patch_size,
            padding="VALID",
            use_bias=True,
            conv=self.conv,
            dtype=self.dtype,
            kernel_init=nn.initializers.lecun_normal(),
            name="patch_embed",
        )
        height_and_width = x.shape[1:3]
        x = patches(x)
        for side in height_and_width:
            checks.divisible("side of the images", side, "patch_size", self.patch_size)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("cls_token", nn.initializers.zeros, (1, 1, self.width))
        tokens = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([tokens, x], axis=1)
        positions = self.param("pos_embed", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = x + positions.astype(x.dtype)
        for i in range(self.depth):
            block = TransformerBlock(
                self.num_heads, self.mlp_width, self.dtype, name=f"block{i + 1}"
            )
            x = block(x)
        x = nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name="norm")(x[:, 0])
        return classify(x, self.num_classes, kernel_init=nn.initializers.zeros)


ViT_B16 = partial(ViT, patch_size=16, depth=12, width=768, mlp_width=3072, num_heads=12)
