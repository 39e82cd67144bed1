"""Adam, RMSProp and signGD as one family: a mean of gradients over a root mean square of them.

``m = beta1 g + (1 - beta1) m``, ``v = beta2 g^2 + (1 - beta2) v``, ``theta = theta - learning_rate
m / (sqrt(v) + eps)``, element by element. Here **the betas weight the new gradient**; Adam's usual
``b1`` and ``b2`` weight the old mean, ``beta = 1 - b``.

=========  =====  =====  ====  ===============  =================================================
optimizer  beta1  beta2  eps   bias_correction  the same in optax
=========  =====  =====  ====  ===============  =================================================
Adam       0.1    0.001  1e-8  yes              ``adam``
RMSProp    1      0.01   1e-8  no               ``rmsprop(decay=0.99, eps_in_sqrt=False)``
signGD     1      1      0     no               ``sign_sgd``, ``robustjax.optim.sign_gd``
=========  =====  =====  ====  ===============  =================================================

For training use the optimizers of optax. The family is there to move between them with two
numbers, as the study of their robustness does.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike

from robustjax import checks


def scale_by_adaptive_family(
    beta1: ArrayLike,
    beta2: ArrayLike,
    eps: ArrayLike = 1e-8,
    bias_correction: bool = False,
) -> optax.GradientTransformation:
    """Replaces updates by ``m / (sqrt(v) + eps)``; a learning rate comes after it in the chain.

    Without bias correction the means start at zero: the first RMSProp step is ``sign(g) /
    sqrt(beta2)``, ten times a later one for beta2 = 0.01. With it, a constant gradient gives
    ``sign(g)`` at every step, up to eps. With eps = 0 the direction does not change when the loss
    is multiplied by a positive number. Where ``sqrt(v) + eps`` is 0 the update is 0.

    Args:
      beta1: weight of the new gradient in m, in ``(0, 1]``; it may be traced.
      beta2: weight of the new squared gradient in v, in ``(0, 1]``; it may be traced.
      eps: added to the root, >= 0.
      bias_correction: divide the means by ``1 - (1 - beta)^t``, as Adam does.

    Returns:
      A gradient transformation; its state is optax's state of Adam, in the dtypes of the
      parameters.

    Raises:
      ValueError: a hyper-parameter is out of its range.

    Source: Ma, "Understanding adversarial robustness in deep learning" (PhD thesis, University of
    Toronto, 2025), equation 4.2, which has no bias correction; the Adam of its experiments does.
    """
    checks.number("beta1", beta1, above=0, at_most=1)
    checks.number("beta2", beta2, above=0, at_most=1)
    checks.number("eps", eps, at_least=0)

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = (optax.tree.zeros_like(params) for _ in range(2))
        return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=mu, nu=nu)

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, 1 - beta1, 1)
        nu = optax.tree.update_moment(updates, state.nu, 1 - beta2, 2)
        m, v = mu, nu
        if bias_correction:
            m = optax.tree.bias_correction(mu, 1 - beta1, count)
            v = optax.tree.bias_correction(nu, 1 - beta2, count)
        new_updates = jax.tree.map(lambda m, v: _ratio(m, jnp.sqrt(v) + eps), m, v)
        # Hyper-parameters that are arrays promote bfloat16.
        new_state = optax.ScaleByAdamState(count=count, mu=mu, nu=nu)
        return optax.tree.cast_like(new_updates, updates), optax.tree.cast_like(new_state, state)

    return optax.GradientTransformation(init, update)


def _ratio(m: Any, scale: Any) -> Any:
    zero = scale == 0
    return jnp.where(zero, 0, m / jnp.where(zero, 1, scale))
