"""Example-normalised gradients: every example is weighted by the norm of its own gradient.

The outer step of adversarial training minimises ``mean_i w_i L_i`` with weights that are constants
of the step. Followed by momentum SGD (``optim.msgd``) that is

==========  ====================================================  ============================
oracle      weight ``w_i``                                        derivatives beside the update
==========  ====================================================  ============================
``plain``   1                                                     none
``engm``    ``min(alpha / ||g_i||, 1)``                           ``||g_i||`` every step
``f_engm``  ``alpha / ||g_i||``                                   ``||g_i||`` every step
``a_engm``  ``min(alpha / |slope ||h_i|| + intercept|, 1)``       ``||h_i||``; ``||g_i||`` every
                                                                  tau steps
``n_engm``  ``min(alpha / ||h_i||, 1)``                           ``||h_i||``
==========  ====================================================  ============================

with ``g_i`` the gradient of the loss of example ``i`` for all parameters and ``h_i`` that for its
(attacked) input. ``mgnc`` and ``sngm``, which normalise the gradient of the batch, are optax chains
and go with ``plain``. For code that has per-example gradients already there is ``optim.engm``.

Source: Dabouei et al. (2022), "Revisiting outer optimization in adversarial training", sections 3.2
and 3.3. All oracles report ``weight`` and, but for ``plain``, the norm it comes from.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from robustjax import checks
from robustjax.gradients.per_example import NormRule, ghost_norms, input_gradient_norms
from robustjax.gradients.plain import Oracle
from robustjax.objectives import LossFn, Stages, stages
from robustjax.optim import engm_weights, f_engm_weights

# weigh(loss_fn, params, model_state, oracle_state, key, batch) -> (weights, oracle_state, metrics)
Weigh = Callable[..., tuple[Float[Array, " n"], Any, dict[str, Array]]]


def reweighted(weigh: Weigh, init: Callable[[Any], Any] = lambda params: ()) -> Oracle:
    """The gradient of ``mean_i w_i L_i`` with weights that are held constant.

    Args:
      weigh: ``weigh(loss_fn, params, model_state, oracle_state, key, batch) -> (weights (n,),
        oracle_state, metrics)``; its batch has been through the inner stage of ``loss_fn``.
      init: ``init(params) -> oracle_state``.
    """
    checks.function("weigh", weigh)
    checks.function("init", init)

    def oracle(loss_fn: LossFn) -> Callable:
        parts = stages(loss_fn)

        def grad_fn(params, model_state, oracle_state, key, batch):
            batch = parts.inner(params, model_state, key, batch)
            weights, oracle_state, report = jax.lax.stop_gradient(
                weigh(parts, params, model_state, oracle_state, key, batch)
            )
            n = batch["label"].shape[0]
            checks.per_example("weights", weights, n)

            def weighted_mean(params) -> tuple[Array, Any]:
                losses, aux = parts.outer(params, model_state, key, batch)
                checks.per_example("losses of the objective", losses, n)
                return (weights * losses).mean(), aux

            grads, (new_model_state, metrics) = jax.grad(weighted_mean, has_aux=True)(params)
            return grads, (new_model_state, oracle_state, {**metrics, "weight": weights, **report})

        return grad_fn

    return Oracle(init, oracle)


def engm(alpha: ArrayLike, *, norms: NormRule | None = None) -> Oracle:
    """ENGM: no example contributes a gradient longer than ``alpha``.

    ``mean_i min(alpha / ||g_i||, 1) g_i``, of length ``<= alpha``. Large ``alpha`` is the plain
    gradient; below all norms it is ``f_engm(alpha)``. It is the clipping of differentially private
    SGD without the noise. Shrinking is not free of bias: skewed gradients are drawn to their bulk.

    Args:
      alpha: norm bound, ``> 0``; 5 for ResNet-18 and 10.4 for WRN-34-10 (see
        ``optim.scale_alpha``). It may be traced.
      norms: rule for ``||g_i||``; default ``ghost_norms()``. With BatchNorm ``vjp_norms()`` takes
        the norms of exactly what is weighted; the others take them in evaluation mode.

    Raises:
      ValueError: ``alpha`` is not positive.

    Source: Dabouei et al. (2022), equation (5).
    """
    checks.number("alpha", alpha, above=0, at_most=float("inf"))
    return _by_parameter_norms(lambda norm: engm_weights(norm, alpha), norms)


def f_engm(alpha: ArrayLike = 1.0, *, norms: NormRule | None = None) -> Oracle:
    """F-ENGM: every example contributes a gradient of length ``alpha``, short ones are enlarged.

    Args:
      alpha: the length, ``> 0``. The paper's formula has 1, its text alpha.
      norms: as for ``engm``.

    Source: Dabouei et al. (2022), section 4.2.
    """
    checks.number("alpha", alpha, above=0)
    return _by_parameter_norms(lambda norm: f_engm_weights(norm, alpha), norms)


def _by_parameter_norms(rule: Callable[[Array], Array], norms: NormRule | None) -> Oracle:
    norms = ghost_norms() if norms is None else checks.function("norms", norms)

    def weigh(loss_fn, params, model_state, oracle_state, key, batch):
        norm = norms(loss_fn, params, model_state, key, batch)
        return rule(norm), oracle_state, {"parameter_norm": norm}

    return reweighted(weigh)


def n_engm(alpha: ArrayLike = 0.5, *, input_norms: NormRule | None = None) -> Oracle:
    """N-ENGM: the norm of the input gradient stands for that of the parameter gradient.

    Args:
      alpha: bound of the input gradient's norm, ``> 0``: alpha of ``engm`` over the slope of the
        two norms, 0.5 for ResNet-18.
      input_norms: rule for ``||h_i||``; default ``input_gradient_norms()``.

    Source: Dabouei et al. (2022), section 3.3 and algorithm 1 (naive).
    """
    checks.number("alpha", alpha, above=0, at_most=float("inf"))
    rule = input_gradient_norms() if input_norms is None else input_norms

    def weigh(loss_fn, params, model_state, oracle_state, key, batch):
        norm = rule(loss_fn, params, model_state, key, batch)
        return engm_weights(norm, alpha), oracle_state, {"input_norm": norm}

    return reweighted(weigh)


class AENGMState(NamedTuple):
    """The running regression of ``a_engm``, float32 and int32 scalars.

    Attributes:
      slope: gamma_1, of the parameter norm on the input norm.
      intercept: gamma_0.
      count: steps made.
    """

    slope: Float[Array, ""]
    intercept: Float[Array, ""]
    count: Int[Array, ""]


def a_engm(
    alpha: ArrayLike,
    *,
    tau: int | Int[Array, ""] = 50,
    decay: float = 0.7,
    norms: NormRule | None = None,
    input_norms: NormRule | None = None,
    exact_on_refresh: bool = False,
    start: str = "identity",
    axis_name: str | None = None,
) -> Oracle:
    """A-ENGM: the parameter norms are predicted from the input norms by a running regression.

    Every ``tau`` steps, beginning with the first, the norms ``||g_i||`` are measured and regressed
    on ``||h_i||`` over the batch; slope and intercept enter a moving average.

    Args:
      alpha: as for ``engm``.
      tau: steps from one regression to the next, ``>= 1``; it may be traced.
      decay: weight of the old slope and intercept in the moving average, in ``[0, 1)``.
      norms: rule for ``||g_i||``, as for ``engm``.
      input_norms: rule for ``||h_i||``; default ``input_gradient_norms()``.
      exact_on_refresh: use the measured norms in the steps that have them, with which ``tau=1`` is
        ENGM. The paper says that of its algorithm, which as printed always uses the predictions.
      start: where the moving average begins: ``"identity"`` at slope 1 and intercept 0, as
        printed, which for some 10 tau steps biases the weights; ``"first"`` at the first
        regression.
      axis_name: mapped axis over which the batch is split; the regression is that of the whole.

    Returns:
      An oracle with ``AENGMState``, the same on all devices.

    Raises:
      ValueError: an argument is out of range.

    Source: Dabouei et al. (2022), equations (6), (7) and algorithm 1, where ``max`` is a misprint
    of ``min`` and the norm of ``h`` is missing. A batch whose input norms are all equal (variance
    below 1e-12) leaves the regression as it is.
    """
    checks.number("alpha", alpha, above=0, at_most=float("inf"))
    if not checks.is_traced(tau):
        checks.integer("tau", tau, at_least=1)
    checks.number("decay", decay, at_least=0, below=1)
    checks.choice("start", start, ("identity", "first"))
    norms = ghost_norms() if norms is None else checks.function("norms", norms)
    rule = input_gradient_norms() if input_norms is None else input_norms

    def init(params) -> AENGMState:
        del params
        return AENGMState(jnp.ones(()), jnp.zeros(()), jnp.zeros((), jnp.int32))

    def weigh(loss_fn: Stages, params, model_state, state: AENGMState, key, batch):
        input_norm = rule(loss_fn, params, model_state, key, batch)
        refresh = state.count % tau == 0

        def measured():
            norm = norms(loss_fn, params, model_state, key, batch)
            slope, intercept = _regression(
                input_norm, norm, (state.slope, state.intercept), axis_name
            )
            kept = decay * jnp.where(state.count == 0, start == "identity", True)
            return (
                norm,
                kept * state.slope + (1 - kept) * slope,
                kept * state.intercept + (1 - kept) * intercept,
            )

        def remembered():
            return jnp.zeros_like(input_norm), state.slope, state.intercept

        norm, slope, intercept = jax.lax.cond(refresh, measured, remembered)
        predicted = jnp.abs(slope * input_norm + intercept)
        if exact_on_refresh:
            predicted = jnp.where(refresh, norm, predicted)
        report = {"input_norm": input_norm, "predicted_norm": predicted}
        new_state = AENGMState(slope, intercept, state.count + 1)
        return engm_weights(predicted, alpha), new_state, report

    return reweighted(weigh, init)


def _regression(
    x: Float[Array, " n"],
    y: Float[Array, " n"],
    otherwise: tuple[Array, Array],
    axis_name: str | None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Slope and intercept of least squares of ``y`` on ``x``, over the whole of a split batch."""

    def mean(*values):
        means = [jnp.mean(v, dtype=jnp.float32) for v in values]
        return means if axis_name is None else jax.lax.pmean(means, axis_name)

    x_mean, y_mean = mean(x, y)
    variance, covariance = mean((x - x_mean) ** 2, (x - x_mean) * (y - y_mean))
    spread = variance >= 1e-12
    slope = covariance / jnp.where(spread, variance, 1)
    slope, intercept = slope, y_mean - slope * x_mean
    return jnp.where(spread, slope, otherwise[0]), jnp.where(spread, intercept, otherwise[1])
