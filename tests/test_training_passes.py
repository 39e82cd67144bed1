"""Forward and backward passes, counted in programs that are never run."""

import jax
import jax.numpy as jnp
import optax
import pytest

from robustjax import models, training
from robustjax.attacks import fgsm, pgd
from robustjax.gradients import awp, engm
from robustjax.norms import LInf
from robustjax.objectives import evaluation_point, first_order, madry, penalized, soar, standard
from robustjax.threat import ThreatModel
from robustjax.training import Passes, count_passes, counted

KEY = jax.random.key(0)
THREAT = ThreatModel(LInf(), 0.1)
BATCH = {
    "image": jnp.full((2, 3, 2, 1), 0.5),
    "label": jnp.arange(2, dtype=jnp.int32),
    "index": jnp.arange(2, dtype=jnp.int32),
}
MODEL = models.from_linen(models.MLP((4,), num_classes=3))
PARAMS = MODEL.init(KEY, BATCH["image"])[0]
COUNTED = counted(MODEL.apply)


def mean_loss(objective, model_fn=COUNTED):
    loss_fn = objective(model_fn)
    return lambda params: loss_fn(params, {}, KEY, BATCH)[0].mean()


def foar(start):
    attack, radius = evaluation_point(THREAT, start)
    return penalized(madry(attack), first_order(radius), at="adversarial")


def second_order(**options):
    attack, radius = evaluation_point(THREAT)
    return penalized(madry(attack), soar(radius, **options), at="adversarial")


# The table's (forward, backward). Its backward passes are those of the loss and one for the
# parameters.
TABLE = {
    "standard": (standard(), (1, 1)),
    "PGD-1": (madry(fgsm(THREAT)), (2, 2)),
    "PGD-7": (madry(pgd(THREAT, steps=7)), (8, 8)),
    "FOAR": (penalized(standard(), first_order(0.1)), (1, 2)),
    "FOAR, PGD-1 point": (foar("pgd1"), (2, 3)),
    "SOAR": (second_order(), (3, 4)),
}


@pytest.mark.parametrize("name", TABLE)
def test_rows_of_the_published_table(name):
    objective, (forward, backward) = TABLE[name]
    assert count_passes(mean_loss(objective), PARAMS) == (forward, backward - 1, 0)


# The derivative for the parameters goes back through each forward pass that it depends on
# (backward), and through the gradients in the penalty (tangent). The attack is a constant.
GRADIENTS = {
    "standard": (1, 1, 0),
    "PGD-7": (8, 8, 0),
    "FOAR": (1, 1 + 1, 1),  # back through the one forward pass of loss and penalty
    "FOAR, PGD-1 point": (2, 2 + 1, 1),
    "SOAR": (3, 3 + 2, 2),  # back through those of the two gradients
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_passes_of_the_parameter_gradient(name):
    found = count_passes(jax.grad(mean_loss(TABLE[name][0])), PARAMS)
    assert found == GRADIENTS[name]
    assert found.total == sum(GRADIENTS[name])


def test_exact_hessian_products_need_forward_mode():
    # PGD-1, the loss, and one gradient whose passes are doubled by jvp.
    loss = mean_loss(second_order(hessian="exact"))
    assert count_passes(loss, PARAMS) == Passes(forward=3, backward=3, tangent=1)


def test_loops_and_branches():
    def logits(x):
        return COUNTED(PARAMS, {}, x, True, None)[0]

    def total(x):
        return logits(x).sum()

    def steps(x):
        return jax.lax.scan(lambda x, _: (x + jax.grad(total)(x), None), x, length=5)[0]

    def branches(x):
        other = jax.grad(total)
        return jax.lax.cond(x.sum() > 0, jax.jit(steps), other, x)

    x = jax.ShapeDtypeStruct((2, 6), jnp.float32)
    assert count_passes(steps, x) == count_passes(branches, x) == (5, 5, 0)
    assert count_passes(jax.vmap(lambda x: logits(x[None])), x) == (1, 0, 0)
    assert count_passes(lambda x: jax.jvp(logits, (x,), (x,)), x) == (1, 0, 1)
    assert count_passes(lambda x: x + 1, x) == (0, 0, 0)


def test_training_steps_with_other_oracles():
    def passes(oracle):
        step = training.train_step(COUNTED, standard(), optax.sgd(0.1), oracle=oracle)
        state = training.create_state(PARAMS, {}, optax.sgd(0.1), KEY, oracle=oracle)
        return count_passes(step, state, BATCH)

    assert passes(None) == (1, 1, 0)
    assert passes(engm(1.0)) == passes(awp()) == (2, 2, 0)


def test_marks_change_nothing():
    objective = TABLE["FOAR"][0]
    plain, marked = (
        jax.jit(jax.value_and_grad(mean_loss(objective, fn)))(PARAMS)
        for fn in (MODEL.apply, COUNTED)
    )
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), plain, marked))


def test_bad_input(plain_calls):
    with pytest.raises(ValueError, match="model_fn must be a function"):
        counted("mlp")
    with pytest.raises(ValueError, match="fn must be a function"):
        count_passes(None)
