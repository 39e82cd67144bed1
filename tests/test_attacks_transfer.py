import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import keys, models
from robustjax.attacks.gradient import fgsm, pgd
from robustjax.attacks.transfer import substitute_augment, transfer_accuracy, transfer_matrix
from robustjax.metrics import correct
from robustjax.norms import L2, LInf
from robustjax.threat import ThreatModel

N, D, K = 23, 6, 3
THREAT = ThreatModel(LInf(), 0.1)


def classify(w, x):
    return (x - 0.5) @ w


def linear(seed):
    w = jnp.asarray(np.random.default_rng(seed).normal(size=(D, K)), jnp.float32)
    return jax.tree_util.Partial(classify, w)  # one compiled program for all of them


def data(logits_fn=None):
    x = jnp.asarray(np.random.default_rng(9).uniform(size=(N, D)), jnp.float32)
    y = jnp.argmax((linear(0) if logits_fn is None else logits_fn)(x), axis=1).astype(jnp.int32)
    return x, y


SOURCES = {"a": linear(0), "b": linear(1)}
TARGETS = {"b": SOURCES["b"], "a": SOURCES["a"], "c": linear(2)}
ATTACK = pgd(THREAT, steps=2)
by_hand = jax.jit(ATTACK)


def test_the_matrix_is_every_pair_by_hand():
    x, y = data()
    key = jax.random.key(4)
    matrix = transfer_matrix(SOURCES, TARGETS, ATTACK, key, x, y, batch_size=10)
    assert (matrix.sources, matrix.targets) == (("a", "b"), ("b", "a", "c"))
    assert matrix.robust_correct.shape == (2, 3, N) and matrix.clean_correct.shape == (3, N)
    for i, source in enumerate(SOURCES.values()):
        # White-box where source and target are one: the same key gives the same examples.
        x_adv = by_hand(source, keys.per_example(key, jnp.arange(N)), x, y)
        for j, target in enumerate(TARGETS.values()):
            np.testing.assert_array_equal(matrix.robust_correct[i, j], correct(target(x_adv), y))
            np.testing.assert_array_equal(matrix.clean_correct[j], correct(target(x), y))
    np.testing.assert_allclose(matrix.clean, matrix.clean_correct.mean(axis=1))
    np.testing.assert_allclose(matrix.robust, matrix.robust_correct.mean(axis=2))
    assert matrix.clean[1] == 1 and matrix.robust[0, 1] < 1
    # No transferred attack is stronger than that on the target itself: a linear model's own
    # perturbation is the strongest there is.
    assert np.all(matrix.robust[1, 1] >= matrix.robust[0, 1])


def test_the_batch_size_does_not_matter():
    x, y = data()
    a, c, key = SOURCES["a"], TARGETS["c"], jax.random.key(4)
    small = transfer_matrix({"a": a}, {"c": c}, ATTACK, key, x, y, batch_size=7)
    large = transfer_matrix({"a": a}, {"c": c}, ATTACK, key, x, y, batch_size=100)
    np.testing.assert_array_equal(small.robust_correct, large.robust_correct)
    np.testing.assert_array_equal(small.clean_correct, large.clean_correct)
    assert transfer_accuracy(a, c, ATTACK, key, x, y) == pytest.approx(large.robust[0, 0])


def test_source_equal_to_target_is_white_box_for_a_network():
    model = models.from_linen(models.MLP(features=(8,), num_classes=K))
    logits = []
    for seed in range(2):
        params, state = model.init(jax.random.key(seed), jnp.zeros((1, 2, 3, 1)))
        logits.append(models.eval_logits(model.apply, params, state))
    x = data()[0].reshape(N, 2, 3, 1)
    y = jnp.argmax(logits[0](x), axis=1).astype(jnp.int32)
    key = jax.random.key(0)
    run = jax.jit(lambda f, key, x, y: correct(f(ATTACK(f, key, x, y)), y))
    white_box = jnp.mean(run(logits[0], key, x, y))
    matrix = transfer_matrix(
        {"own": logits[0], "other": logits[1]}, {"own": logits[0]}, ATTACK, key, x, y
    )
    assert matrix.robust[0, 0] == pytest.approx(white_box)
    assert matrix.robust[1, 0] >= matrix.robust[0, 0]


def test_an_attack_without_effect_leaves_the_clean_accuracy():
    x, y = data(linear(3))
    idle = fgsm(ThreatModel(L2(), 0.0))
    matrix = transfer_matrix(SOURCES, TARGETS, idle, jax.random.key(0), x, y, batch_size=10)
    np.testing.assert_array_equal(matrix.robust, np.tile(matrix.clean, (2, 1)))


def test_augmentation_steps_along_the_sign_of_the_jacobian():
    """For a linear substitute the Jacobian's row of the label is the class's column of weights."""
    w = jnp.array([[1.0, -2.0], [0.0, 0.5], [-1.0, 1.0]])
    x = jnp.array([[0.5, 0.5, 0.5], [0.95, 0.2, 0.5]])
    y = jnp.array([0, 1])
    expected = [[0.6, 0.5, 0.4], [0.85, 0.3, 0.6]]
    augment = jax.jit(
        lambda x, y, step, upper=1.0: substitute_augment(lambda x: x @ w, x, y, step, upper=upper)
    )
    out = augment(x, y, 0.1)
    np.testing.assert_allclose(out, np.concatenate([x, expected]), atol=1e-6)
    back = augment(x, 1 - y, -0.1)
    np.testing.assert_allclose(back[2:], [[0.6, 0.4, 0.4], [0.85, 0.2, 0.6]], atol=1e-6)
    clipped = augment(x, 0 * y, 0.1)
    np.testing.assert_allclose(clipped[3], [1.0, 0.2, 0.4], atol=1e-6)
    free = augment(x, 0 * y, 0.1, jnp.inf)
    np.testing.assert_allclose(free[3], [1.05, 0.2, 0.4], atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sources": {}}, "sources must map names to functions"),
        ({"targets": {"a": 3}}, r"targets\['a'\] must be a function"),
        ({"attack": "pgd"}, "attack must be a function, got 'pgd'"),
        ({"y": jnp.zeros(4, int)}, "y must have one entry per example"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"key": jax.random.split(jax.random.key(0), N)}, "key must be a single key"),
        ({"attack": lambda f, key, x, y: x[:1]}, "the result of attack, must have the shape of x"),
    ],
)
def test_what_is_refused(change, message, plain_calls):
    x, y = data()
    given = {"sources": SOURCES, "targets": TARGETS, "attack": ATTACK, "key": jax.random.key(0)}
    with pytest.raises(ValueError, match=message):
        transfer_matrix(**(given | {"x": x, "y": y} | change))


def test_augmentation_refuses(plain_calls):
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="step must be finite"):
        substitute_augment(lambda x: x, x, jnp.array([0, 1]), np.inf)
    with pytest.raises(ValueError, match="y must have one entry per example"):
        substitute_augment(lambda x: x, x, jnp.array([0]), 0.1)
