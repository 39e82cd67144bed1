"""An objective whose settings change in the course of training: warm-ups of eps, beta, lambda."""

from collections.abc import Callable

from jaxtyping import Array

from robustjax import checks
from robustjax.objectives.stages import LossFn, Stages, stages
from robustjax.objectives.standard import ModelFn, Objective


def scheduled(
    objective_at: Callable[[Array], Objective], schedule: Callable[[Array], Array]
) -> Objective:
    """The objective ``objective_at(schedule(step))`` at each training step.

    ``scheduled(lambda eps: madry(pgd(ThreatModel(LInf(), eps), steps=7)), optax.linear_schedule(0,
    0.2, 400))`` grows the radius over the first 400 steps, which keeps adversarial training from
    settling on a constant classifier (Andriushchenko & Flammarion 2020, appendix A, for SVHN).

    Args:
      objective_at: from a scalar, which is traced, to an objective.
      schedule: from the step (updates made so far) to the scalar, as in optax.

    Returns:
      An objective. Its batches need the ``step``, int32 scalar, that ``train_step`` puts in.
    """
    checks.function("objective_at", objective_at)
    checks.function("schedule", schedule)

    def objective(model_fn: ModelFn) -> LossFn:
        def now(batch) -> Stages:
            checks.fields("batch", batch, ("step",))
            return stages(objective_at(schedule(batch["step"]))(model_fn))

        def inner(params, model_state, key, batch):
            return now(batch).inner(params, model_state, key, batch)

        def outer(params, model_state, key, batch, train=True):
            return now(batch).outer(params, model_state, key, batch, train)

        return Stages(inner, outer)

    return objective
