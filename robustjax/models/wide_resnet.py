"""Wide residual networks for small images.

Sources: Zagoruyko and Komodakis (2016), "Wide residual networks"; Gowal et al. (2020), "Uncovering
the limits of adversarial training against norm-bounded adversarial examples", for the variant with
``activation="swish", strided_padding="end"``.
"""

from collections.abc import Sequence

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from robustjax import checks
from robustjax.models.layers import Normalize, classify, conv_and_norm, he_fan_out
from robustjax.models.resnet import ACTIVATIONS, PreActBlock


class WideResNet(nn.Module):
    """WRN-``depth``-``widen_factor``: three stages of pre-activation blocks, 16k, 32k, 64k wide.

    Projections act on the pre-activated input, normalisation and activation follow the last stage.

    Attributes:
      depth: number of convolutions and dense layers, ``6 n + 4`` for ``n`` blocks in a stage.
      widen_factor: ``k``.
      num_classes: number of logits.
      norm: ``"batch"``, ``"group"`` or ``"none"`` (convolutions then have a bias).
      dropout_rate: rate of dropout between the convolutions of a block.
      activation: ``"relu"`` or ``"swish"``.
      strided_padding: ``"all_sides"`` or ``"end"``, see ``PreActBlock``.
      conv: ``"canonical"`` or ``"plain"``, see ``Conv``.
      mean, std: input normalisation, per channel; see ``Normalize``.
      dtype: dtype of the computation; parameters, statistics and logits are float32.
      axis_name: mapped axis over which BatchNorm's statistics are synchronised.
      kernel_init: initialiser of the convolutions.

    Raises:
      ValueError: ``depth`` is not ``6 n + 4``, or an unknown choice.
    """

    depth: int
    widen_factor: int
    num_classes: int = 10
    norm: str = "batch"
    dropout_rate: float = 0.0
    activation: str = "relu"
    strided_padding: str = "all_sides"
    conv: str = "canonical"
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    dtype: DTypeLike | None = None
    axis_name: str | None = None
    kernel_init: nn.initializers.Initializer = he_fan_out

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Float[Array, "n k"]:
        """Logits of images ``x (n, h, w, c)``."""
        blocks, remainder = divmod(self.depth - 4, 6)
        if remainder or blocks < 1:
            raise ValueError(f"depth must be 6 n + 4 with n >= 1, got {self.depth}")
        checks.integer("widen_factor", self.widen_factor, at_least=1)
        checks.number("dropout_rate", self.dropout_rate, at_least=0.0, below=1.0)
        conv, norm = conv_and_norm(
            self.conv, self.norm, train, self.dtype, self.axis_name, self.kernel_init
        )
        x = Normalize(self.mean, self.std)(x)
        x = conv(16, 3, padding=1, name="stem_conv")(x)
        for stage, width in enumerate((16, 32, 64)):
            for block in range(blocks):
                layer = PreActBlock(
                    channels=width * self.widen_factor,
                    strides=2 if stage > 0 and block == 0 else 1,
                    conv=conv,
                    norm=norm,
                    shortcut="preactivated",
                    dropout_rate=self.dropout_rate,
                    train=train,
                    activation=self.activation,
                    strided_padding=self.strided_padding,
                    name=f"stage{stage + 1}_block{block + 1}",
                )
                x = layer(x)
        x = ACTIVATIONS[self.activation](norm(x, name="final_norm"))
        return classify(x, self.num_classes)
