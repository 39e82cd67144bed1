"""Max-margin adversarial training: margins of linear models, and what each example adds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.attacks import deepfool
from robustjax.losses import cross_entropy, margin, soft_margin
from robustjax.norms import L2, LInf
from robustjax.objectives import an_pgd, mma
from robustjax.threat import ThreatModel

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
N, D, K = 12, 5, 3
W = jnp.asarray(RNG.normal(size=D), jnp.float32)
X = jnp.asarray(RNG.uniform(0.1, 0.9, size=(N, D)), jnp.float32)
X = X - W * (X @ W).mean() / (W @ W)  # both classes occur
SCORE = np.asarray(X @ W)
Y2 = jnp.asarray(SCORE > 0, jnp.int32)
WRONG = np.arange(N) % 4 == 0
Y2 = jnp.where(WRONG, 1 - Y2, Y2)
NORMS = [LInf(), L2()]
by_norm = pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
# A network of three classes, near whose boundaries the examples lie.
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(D, 8)), jnp.float32),
    "v": jnp.asarray(RNG.normal(size=(8, K)), jnp.float32),
}


def binary(w, x):
    """Logits ``(0, w.x)``."""
    score = x @ w
    return jnp.stack([jnp.zeros_like(score), score], axis=-1)


def network(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


Y = jnp.argmax(network(PARAMS, X), axis=1).astype(jnp.int32)
Y = jnp.where(WRONG, (Y + 1) % K, Y)
BATCH = {"image": X, "label": Y, "index": jnp.arange(N, dtype=jnp.int32)}


def counting(function):
    """The model of a function, whose state counts its passes in training mode."""

    def model_fn(params, model_state, x, train, key):
        assert (key is None) is not train
        return function(params, x), {"calls": model_state["calls"] + train}

    return model_fn


def free(norm, eps):
    return ThreatModel(norm, eps, lower=-jnp.inf, upper=jnp.inf)


def exact_margins(norm):
    return np.abs(SCORE) / float(norm.dual.value(W))


def lengths(norm, x_adv, x=X):
    return np.asarray(norm.value(x_adv - x, batch_ndim=1))


def inner_of(objective, function=network, params=PARAMS, batch=BATCH):
    """The batch with what the inner stage finds."""
    inner = objective(counting(function)).inner
    return jax.jit(inner)(params, {"calls": jnp.zeros(())}, KEY, batch)


def rows_of(objective, batch, function=network, params=PARAMS):
    """Losses, state and metrics of the outer stage, and the gradient of each loss."""
    outer = objective(counting(function)).outer

    def losses(params):
        value, (state, metrics) = outer(params, {"calls": jnp.zeros(())}, KEY, batch)
        return value, (value, state, metrics)

    rows, aux = jax.jit(jax.jacrev(losses, has_aux=True))(params)
    return *aux, rows


def rows_of_cross_entropy(function, params, x, y):
    return jax.jit(jax.jacrev(lambda p: cross_entropy(function(p, x), y)))(params)


def assert_rows_close(got, expected, where, **tolerance):
    assert where.any()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[where], b[where], **tolerance), got, expected
    )


# The search


@pytest.mark.parametrize(
    "norm, start",
    [(LInf(), "uniform"), (L2(), "zero"), (L2(), "uniform")],
    ids=["linf", "l2", "l2 with a random start"],
)
def test_the_length_is_the_margin_of_a_linear_model(norm, start):
    exact = exact_margins(norm)
    eps = float(np.sort(exact)[-3]) * 1.05  # two are too far away
    reachable = ~WRONG & (exact < eps)
    assert 0 < reachable.sum() < (~WRONG).sum()
    # The search goes out from this radius, or in.
    attack = an_pgd(free(norm, eps), radius=float(np.median(exact[reachable])), start=start)
    logits_fn = functools.partial(binary, W)
    x_adv = jax.jit(lambda x: attack(logits_fn, KEY, x, Y2))(X)
    above = (lengths(norm, x_adv) - exact)[reachable]
    # The rest of a random start is in the direction; the other two runs end at the best point.
    allowed = eps / 2**10 + (0.05 * exact[reachable] if norm == L2() and start == "uniform" else 0)
    assert (above >= -1e-6).all() and (above <= allowed + 1e-6).all()
    assert (margin(logits_fn(x_adv), Y2)[reachable] >= 0).all()
    np.testing.assert_array_equal(x_adv[~reachable], X[~reachable])


def test_more_rounds_only_shorten_and_the_box_is_kept():
    threat = ThreatModel(L2(), 1.0)
    x = jnp.clip(X, 0, 1)
    logits_fn = functools.partial(network, PARAMS)
    y = jnp.argmax(logits_fn(x), axis=1).astype(jnp.int32)
    attacks = [an_pgd(threat, rounds=rounds, steps=4, start="zero") for rounds in (1, 3)]
    found = jax.jit(lambda x: [attack(logits_fn, KEY, x, y) for attack in attacks])(x)
    once, thrice = (lengths(L2(), z, x) for z in found)
    moved = once > 0
    assert moved.sum() > N / 2
    assert (thrice <= once + 1e-6)[moved].all() and (thrice < once - 1e-3).any()
    for z in found:
        assert threat.contains(z, x).all()
        assert (jnp.argmax(logits_fn(z), axis=1) != y)[moved].all()


def test_the_boundary_of_the_authors_code_is_even_odds():
    logits_fn = functools.partial(network, PARAMS)
    y = jnp.argmax(logits_fn(X), axis=1).astype(jnp.int32)
    attack = an_pgd(free(LInf(), 5.0), boundary=soft_margin, search_steps=25, start="zero")
    x_adv = jax.jit(lambda x: attack(logits_fn, KEY, x, y))(X)
    moved = lengths(L2(), x_adv) > 0
    chance = np.exp(-np.asarray(cross_entropy(logits_fn(x_adv), y)))
    at_first = np.exp(-np.asarray(cross_entropy(logits_fn(X), y)))
    np.testing.assert_array_equal(moved, at_first > 0.5)
    np.testing.assert_allclose(chance[moved], 0.5, atol=1e-5)


def test_flat_models_zero_radius_and_half_precision():
    constant = jnp.tile(jnp.array([1.0, 0.0, 0.0]), (N, 1))
    cheap = {"steps": 1, "search_steps": 9, "start": "zero", "radius": 1.0}
    low, w = X.astype(jnp.bfloat16), W.astype(jnp.bfloat16)

    @jax.jit
    def run(x):
        flat = an_pgd(free(LInf(), 1.0), **cheap)
        none = an_pgd(free(LInf(), 0.0), steps=1, search_steps=1, start="zero")
        half = an_pgd(free(LInf(), 1.0), **cheap)
        return (
            flat(lambda x: constant + 0 * x[:, :1], KEY, x, jnp.zeros(N, jnp.int32)),
            none(functools.partial(binary, W), KEY, x, Y2),
            half(functools.partial(binary, w), KEY, low, Y2),
        )

    flat, none, half = run(X)
    np.testing.assert_array_equal(flat, X)
    np.testing.assert_array_equal(none, X)
    assert half.dtype == jnp.bfloat16
    right = ~WRONG
    np.testing.assert_allclose(
        lengths(LInf(), half, low)[right], exact_margins(LInf())[right], atol=0.02
    )


# The objective


@by_norm
def test_the_gradient_at_the_boundary_is_that_of_the_margin(norm):
    """``grad CE = -||w||_* / 2 * grad d`` with ``d = |w.x| / ||w||_*``: CE has slope 1/2 there."""
    side = -jnp.sign(jnp.asarray(SCORE))[:, None]
    nearest = X + side * exact_margins(norm)[:, None] * norm.steepest(W)

    def attack(logits_fn, key, x, y):
        return jnp.where(WRONG[:, None], x, nearest)

    objective = mma(free(norm, 5.0), attack=attack, clean_weight=0.0)
    batch = {**BATCH, "label": Y2}
    _, _, metrics, rows = rows_of(objective, inner_of(objective, binary, W, batch), binary, W)

    def margins(w):
        return jnp.abs(X @ w) / norm.dual.value(w)

    expected = -norm.dual.value(W) / 2 * jax.jit(jax.jacrev(margins))(W)
    assert_rows_close(rows, expected, ~WRONG, rtol=1e-4, atol=1e-5)
    assert_rows_close(rows, rows_of_cross_entropy(binary, W, X, Y2), WRONG, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["margin"][~WRONG], exact_margins(norm)[~WRONG], rtol=1e-5)


THREAT = free(L2(), 0.4)


@functools.cache
def found():
    """What the default inner stage finds on the network: the batch with its two new fields."""
    return inner_of(mma(THREAT))


@pytest.mark.parametrize("clean_weight", [1 / 3, 0.0])
def test_what_each_kind_of_example_adds(clean_weight):
    objective = mma(THREAT, clean_weight=clean_weight)
    losses, state, metrics, rows = rows_of(objective, found())
    distance, x_adv = np.asarray(found()["margin"]), found()["adversarial"]
    beyond, within = np.isinf(distance), (distance > 0) & np.isfinite(distance)
    clean = rows_of_cross_entropy(network, PARAMS, X, Y)
    at_boundary = rows_of_cross_entropy(network, PARAMS, x_adv, Y)
    scaled = jax.tree.map(lambda g: clean_weight * g, clean)
    mixed = jax.tree.map(lambda a, b: a + (1 - clean_weight) * b, scaled, at_boundary)
    assert_rows_close(rows, scaled, beyond, rtol=1e-5, atol=1e-8)
    assert_rows_close(rows, clean, WRONG, rtol=1e-5, atol=1e-7)
    assert_rows_close(rows, mixed, within, rtol=1e-5, atol=1e-7)

    plain = cross_entropy(network(PARAMS, X), Y)
    np.testing.assert_allclose(losses[WRONG], plain[WRONG], rtol=1e-6)
    np.testing.assert_allclose(losses[beyond], clean_weight * plain[beyond], rtol=1e-6)
    np.testing.assert_array_equal(distance == 0, WRONG)
    np.testing.assert_allclose(distance[within], lengths(L2(), x_adv)[within], rtol=1e-6)
    np.testing.assert_array_equal(metrics["margin"], np.minimum(distance, np.float32(0.4)))
    np.testing.assert_array_equal(metrics["robust_accuracy"], beyond)
    np.testing.assert_array_equal(metrics["accuracy"], ~WRONG)
    np.testing.assert_array_equal(metrics["loss"], losses)
    assert state["calls"] == 2


def test_another_loss_is_for_the_boundary_alone():
    losses, _, _, _ = rows_of(mma(THREAT, loss=soft_margin, clean_weight=0.0), found())
    distance = np.asarray(found()["margin"])
    within = (distance > 0) & np.isfinite(distance)
    at_boundary = soft_margin(network(PARAMS, found()["adversarial"]), Y)
    np.testing.assert_allclose(losses[within], at_boundary[within], rtol=1e-5, atol=1e-6)
    plain = cross_entropy(network(PARAMS, X), Y)
    np.testing.assert_allclose(losses[WRONG], plain[WRONG], rtol=1e-6)


def test_an_evaluation_counts_no_pass():
    outer = mma(THREAT)(counting(network)).outer
    losses, (state, _) = outer(PARAMS, {"calls": 0}, KEY, found(), train=False)
    np.testing.assert_allclose(losses, rows_of(mma(THREAT), found())[0], rtol=1e-5)
    assert state["calls"] == 0


def test_any_attack_that_finds_near_points_will_do():
    """DeepFool is exact on a linear model, and leaves x where nothing is within eps."""
    exact = exact_margins(L2())
    eps = float(np.sort(exact[~WRONG])[-2]) * 1.05
    objective = mma(free(L2(), eps), attack=deepfool(free(L2(), eps), steps=3))
    margins = inner_of(objective, binary, W, {**BATCH, "label": Y2})["margin"]
    beyond = ~WRONG & (exact * 1.02 > eps)  # its overshoot is 0.02
    expected = np.where(WRONG, 0, np.where(beyond, np.inf, exact * 1.02))
    np.testing.assert_allclose(margins, expected, rtol=1e-3)


def test_the_batch_around_an_example_does_not_matter():
    order = np.random.default_rng(1).permutation(N)[:5]
    part = inner_of(mma(THREAT), batch={name: value[order] for name, value in BATCH.items()})
    for name in ("adversarial", "margin"):
        np.testing.assert_allclose(part[name], found()[name][order], rtol=1e-4, atol=1e-5)


def cheap(eps, norm):
    """The whole loss with a short search, as a function of the parameters and inputs."""
    attack = an_pgd(free(norm, eps), radius=0.2, steps=2, search_steps=2, start="zero")
    loss_fn = mma(free(norm, eps), attack=attack)(counting(network))

    def losses(params, x):
        found, (_, metrics) = loss_fn(params, {"calls": 0}, KEY, {**BATCH, "image": x})
        return found, metrics["robust_accuracy"]

    return losses, loss_fn.inner


def test_compiled_mapped_and_plain_calls_agree():
    losses, robust = cheap(0.4, L2())[0](PARAMS, X)
    mapped = jax.jit(jax.vmap(lambda eps: cheap(eps, L2())[0](PARAMS, X)))
    many, shares = mapped(jnp.array([0.2, 0.4, 5.0]))
    np.testing.assert_allclose(many[1], losses, rtol=1e-4)
    np.testing.assert_array_equal(shares[1], robust)
    assert (np.diff(shares.mean(axis=1)) < 0).all()  # a longer reach leaves fewer


def test_the_inner_stage_has_no_derivative():
    inner = cheap(0.4, LInf())[1]

    def attacked(params, x):
        batch = inner(params, {"calls": 0}, KEY, {**BATCH, "image": x})
        return batch["adversarial"], batch["margin"]

    (x_adv, _), tangents = jax.jit(lambda *at: jax.jvp(attacked, at, at))(PARAMS, X)
    assert jnp.abs(x_adv - X).max() > 0.01
    assert all(not np.any(t) for t in tangents)


def test_soft_margin_is_negative_where_the_label_has_even_odds():
    logits = jnp.asarray(RNG.normal(size=(50, 4)), jnp.float32)
    y = jnp.asarray(RNG.integers(0, 4, 50), jnp.int32)

    @jax.jit
    def run(logits, y):
        two, first = logits[:, :2], y % 2
        far = soft_margin(jnp.array([[200.0, 0.0, 0.0]]), jnp.array([0]))
        pairs = soft_margin(two, first), margin(two, first)
        return soft_margin(logits, y), margin(logits, y), cross_entropy(logits, y), pairs, far

    soft, hard, entropy, pairs, far = jax.device_get(run(logits, y))
    np.testing.assert_allclose(np.logaddexp(0, soft), entropy, rtol=1e-5)
    np.testing.assert_array_equal(soft < 0, np.exp(-entropy) > 0.5)
    assert (soft >= hard).all()
    np.testing.assert_allclose(*pairs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(far, np.log(2) - 200, rtol=1e-6)


PER_EXAMPLE = ThreatModel(L2(), jnp.full(3, 0.1))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: an_pgd(THREAT, radius=0.0), "radius must be > 0, got 0"),
        (lambda: an_pgd(THREAT, radius=0.5), "radius must be <= 0.4, got 0.5"),
        (lambda: an_pgd(THREAT, steps=0), "steps must be >= 1, got 0"),
        (lambda: an_pgd(THREAT, search_steps=-1), "search_steps must be >= 0, got -1"),
        (lambda: an_pgd(THREAT, rounds=0), "rounds must be >= 1, got 0"),
        (lambda: an_pgd(THREAT, loss="slm"), "loss must be a function, got 'slm'"),
        (lambda: an_pgd(THREAT, boundary="slm"), "boundary must be a function, got 'slm'"),
        (lambda: an_pgd(THREAT, start="one"), "start must be one of 'zero', 'uniform'"),
        (lambda: an_pgd(PER_EXAMPLE), "eps of threat must be one number, got shape"),
        (lambda: mma(0.1), "threat must be a ThreatModel"),
        (lambda: mma(PER_EXAMPLE), "eps of threat must be one number, got shape"),
        (lambda: mma(THREAT, attack="pgd"), "attack must be a function, got 'pgd'"),
        (lambda: mma(THREAT, clean_weight=1.5), "clean_weight must be <= 1, got 1.5"),
        (lambda: mma(THREAT, loss="ce"), "loss must be a function, got 'ce'"),
        (lambda: mma(THREAT, boundary=0.5), "boundary must be a function, got 0.5"),
        (lambda: mma(THREAT, attack_mode="test"), "attack_mode must be one of"),
        (lambda: soft_margin(jnp.ones((2, 1)), Y[:2]), "logits must have at least 2 classes"),
        (
            lambda: mma(THREAT)(counting(network)).outer(PARAMS, {"calls": 0}, KEY, BATCH),
            "batch must hold adversarial, margin",
        ),
        (
            lambda: an_pgd(THREAT)(functools.partial(network, PARAMS), KEY, X, Y[:2]),
            "y must have one entry per example",
        ),
    ],
)
def test_refusals(make, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        make()
