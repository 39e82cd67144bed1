"""Gradient attacks against closed forms on linear models, feasibility, and independence."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from robustjax import attacks, keys
from robustjax.attacks import gaussian_start, least_likely
from robustjax.losses import cross_entropy, cw, dlr, kl_divergence, margin
from robustjax.metrics import cumulative_accuracy, instantaneous_accuracy
from robustjax.norms import L1, L2, LInf, Lp
from robustjax.optim import steepest_descent
from robustjax.threat import ThreatModel

NORMS = [LInf(), L2(), L1(), Lp(3.0)]
RNG = np.random.default_rng(0)
N, SHAPE, D, K = 8, (3, 2, 2), 12, 5
X = jnp.array(RNG.uniform(size=(N, *SHAPE)), jnp.float32)
Y = jnp.array(RNG.integers(0, K, N), jnp.int32)
Y2 = Y % 2
W = jnp.array(RNG.normal(size=D), jnp.float32)
WK = jnp.array(RNG.normal(size=(D, K)), jnp.float32)
HIDDEN = jnp.array(RNG.normal(size=(D, 16)), jnp.float32)
OUT = jnp.array(RNG.normal(size=(16, K)), jnp.float32)
KEY = jax.random.key(0)


def jitted(factory):
    """The attacks of a factory, compiled: what is tested is what runs."""

    def make(*args, **options):
        return jax.jit(factory(*args, **options), static_argnums=0)

    return make


pgd, bim = jitted(attacks.pgd), jitted(attacks.bim)
fgsm, fgsm_rs = jitted(attacks.fgsm), jitted(attacks.fgsm_rs)


def binary(x):
    """Logits ``(0, w.x)``: the margin of class 1 is ``w.x``, of class 0 ``-w.x``."""
    score = x.reshape(len(x), -1) @ W
    return jnp.stack([jnp.zeros_like(score), score], axis=-1)


def linear(x):
    return x.reshape(len(x), -1) @ WK


def network(x):
    return jnp.tanh(x.reshape(len(x), -1) @ HIDDEN) @ OUT


def constant(x):
    return jnp.zeros((len(x), K)) + 0.0 * x.reshape(len(x), -1)[:, :1]


def free(norm, eps=0.3):
    return ThreatModel(norm, eps, lower=-jnp.inf, upper=jnp.inf)


def worst_margin(y):
    """``y f(x) - eps ||w||_*`` of the binary model, with y in {0, 1} read as -1, +1."""
    return lambda norm, eps: (2 * y - 1) * (X.reshape(N, -1) @ W) - eps * float(norm.dual.value(W))


LINEAR_ATTACKS = {
    "fgsm": lambda t: fgsm(t),
    "bim": lambda t: bim(t, steps=4, step_size=0.5 * t.eps),
    "pgd": lambda t: pgd(t, steps=30, step_size=t.eps),
    "pgd-default-step": lambda t: pgd(t, steps=5, start="zero"),
    "pgd-restarts": lambda t: pgd(t, steps=30, step_size=t.eps, restarts=2),
    "pgd-best": lambda t: pgd(t, steps=30, step_size=t.eps, iterate="best", select="any"),
    "margin": lambda t: pgd(t, steps=30, step_size=t.eps, loss=margin),
    "momentum": lambda t: pgd(
        t, steps=40, step_rule=optax.chain(optax.trace(0.5), steepest_descent(t.norm, t.eps))
    ),
}


# Two attacks in every norm; what the others add to them does not depend on it, momentum apart.
LINEAR_CASES = [(name, norm) for name in ("fgsm", "pgd") for norm in NORMS] + [
    ("bim", L2()),
    ("pgd-default-step", L1()),
    ("pgd-restarts", Lp(3.0)),
    ("pgd-best", L2()),
    ("margin", L1()),
    ("momentum", L1()),
    ("momentum", Lp(3.0)),
]


@pytest.mark.parametrize(
    "name, norm", LINEAR_CASES, ids=[f"{name}-{norm.name}" for name, norm in LINEAR_CASES]
)
def test_linear_model_without_box_loses_the_dual_norm(name, norm):
    eps = 0.3
    attack = LINEAR_ATTACKS[name](free(norm, eps))
    x_adv = attack(binary, KEY, X, Y2)
    expected = jax.nn.softplus(-worst_margin(Y2)(norm, eps))
    np.testing.assert_allclose(cross_entropy(binary(x_adv), Y2), expected, rtol=2e-4, atol=1e-5)


def test_adam_reaches_the_corner_of_the_linf_ball():
    attack = pgd(free(LInf()), steps=40, step_rule=optax.adam(0.05), start="zero")
    x_adv = attack(binary, KEY, X, Y2)
    np.testing.assert_allclose(
        cross_entropy(binary(x_adv), Y2), jax.nn.softplus(-worst_margin(Y2)(LInf(), 0.3)), rtol=1e-4
    )


@pytest.mark.parametrize("name", LINEAR_ATTACKS)
def test_linear_model_in_the_linf_box(name):
    threat = ThreatModel(LInf(), 0.3)
    sign = (2 * Y2 - 1)[:, None] * jnp.sign(W)
    flat = X.reshape(N, -1)
    room = jnp.where(sign > 0, jnp.minimum(0.3, flat), jnp.minimum(0.3, 1 - flat))
    worst = (2 * Y2 - 1) * (flat @ W) - room @ jnp.abs(W)
    x_adv = LINEAR_ATTACKS[name](threat)(binary, KEY, X, Y2)
    np.testing.assert_allclose(
        cross_entropy(binary(x_adv), Y2), jax.nn.softplus(-worst), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("boxed", [False, True])
def test_robustness_of_a_linear_model_of_many_classes(boxed):
    """Exactly robust iff no other class can overtake; targeted PGD on each class finds out."""
    eps = 0.05
    threat = ThreatModel(LInf(), eps) if boxed else free(LInf(), eps)
    flat, logits = np.asarray(X).reshape(N, -1), np.asarray(linear(X))
    y = jnp.array(logits.argmax(1), jnp.int32)
    worst = np.full(N, np.inf)
    for i, k in itertools.product(range(N), range(K)):
        if k == y[i]:
            continue
        w = np.asarray(WK)[:, y[i]] - np.asarray(WK)[:, k]
        down, up = (np.minimum(eps, flat[i]), np.minimum(eps, 1 - flat[i])) if boxed else (eps, eps)
        gap = logits[i, y[i]] - logits[i, k] - (np.abs(w) * np.where(w > 0, down, up)).sum()
        worst[i] = min(worst[i], gap)
    assert 0 < (worst > 0).sum() < N  # both outcomes occur
    attack = pgd(threat, steps=3, step_size=eps, start="zero", targeted=True, has_aux=True)
    hit = [attack(linear, KEY, X, jnp.full(N, k, jnp.int32))[1].success for k in range(K)]
    broken = np.array(hit)[:, :] & (np.arange(K)[:, None] != np.asarray(y))
    np.testing.assert_array_equal(~broken.any(axis=0), worst > 0)


def test_l2_in_the_box_comes_close_to_the_best_feasible_point():
    """The best point is ``clip(x + c w)`` with c such that its distance is eps: bisection."""
    eps, flat = 0.8, np.asarray(X).reshape(N, -1)
    threat = ThreatModel(L2(), eps)
    direction = -np.asarray(2 * Y2 - 1)[:, None] * np.asarray(W)
    best = []
    for x, d in zip(flat, direction, strict=True):
        low, high = 0.0, 1e3
        for _ in range(80):
            mid = (low + high) / 2
            far = np.linalg.norm(np.clip(x + mid * d, 0, 1) - x) > eps
            low, high = (low, mid) if far else (mid, high)
        best.append(d @ (np.clip(x + low * d, 0, 1) - x))
    attack = pgd(threat, steps=300, step_size=0.01, start="zero", loss=margin)
    x_adv = attack(binary, KEY, X, Y2)
    gained = margin(binary(x_adv), Y2) - margin(binary(X), Y2)
    assert (np.asarray(gained) <= np.array(best) + 1e-4).all()
    np.testing.assert_allclose(gained, best, rtol=0.02)


def test_fgsm_direction_has_the_dual_norm_and_full_length():
    gradient = jax.jit(jax.grad(lambda x: cross_entropy(network(x), Y).sum()))(X)
    for norm in NORMS:
        x_adv = fgsm(free(norm))(network, KEY, X, Y)
        inner = (gradient * (x_adv - X)).reshape(N, -1).sum(axis=1)
        dual = norm.dual.value(gradient, batch_ndim=1)
        np.testing.assert_allclose(inner, 0.3 * dual, rtol=1e-4)
        np.testing.assert_allclose(norm.value(x_adv - X, batch_ndim=1), 0.3, rtol=1e-4)


def test_one_step_of_pgd_from_zero_is_fgsm():
    threat = ThreatModel(LInf(), 0.1)
    one = pgd(threat, steps=1, step_size=0.1, start="zero")(network, KEY, X, Y)
    np.testing.assert_array_equal(one, fgsm(threat)(network, KEY, X, Y))
    np.testing.assert_array_equal(
        one, bim(threat, steps=1, step_size=0.1)(network, jax.random.key(9), X, Y)
    )


UNCLIPPED = {"restarts": 2, "select": "any", "clip_start": False}


@pytest.mark.parametrize(
    "norm, options",
    [
        *((norm, {"start": "uniform"}) for norm in NORMS),
        (LInf(), {"start": "zero"}),
        (Lp(3.0), {"start": "zero"}),
        (L2(), {"start": gaussian_start(0.5)}),
        (L1(), {"start": gaussian_start(0.5)}),
        (LInf(), {"corner": True}),
        (L1(), {"corner": True}),
        (L2(), UNCLIPPED),
        (Lp(3.0), UNCLIPPED),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else "-".join(value),
)
def test_feasible_from_the_corners_of_the_box(norm, options):
    x = jnp.round(X).at[0].set(X[0])  # pixels at exactly 0 and 1
    threat = ThreatModel(norm, 0.25)
    x_adv = pgd(threat, steps=3, step_size=0.4, **options)(network, KEY, x, Y)
    assert bool(threat.contains(x_adv, x, atol=1e-5).all())
    assert bool((x_adv != x).any())


def test_steps_and_radius_bound_the_distance():
    for steps in (0, 1, 3):
        x_adv = bim(ThreatModel(LInf(), 0.1), steps=steps, step_size=0.04)(network, KEY, X, Y)
        assert float(jnp.abs(x_adv - X).max()) <= min(0.1, steps * 0.04) + 1e-6
    np.testing.assert_array_equal(
        bim(ThreatModel(LInf(), 0.1), steps=0, step_size=0.04)(network, KEY, X, Y), X
    )


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_zero_gradient_leaves_the_start(norm):
    threat = ThreatModel(norm, 0.2)
    np.testing.assert_array_equal(fgsm(threat)(constant, KEY, X, Y), X)
    x_adv = pgd(threat, steps=3)(constant, KEY, X, Y)
    start_keys = keys.fold_in(keys.as_per_example(KEY, N), 0)
    start = jax.jit(lambda x: threat.sample(start_keys, x))(X)
    np.testing.assert_allclose(x_adv, start, atol=1e-6)
    assert bool((start != X).any())


def test_eps_zero_is_the_identity():
    x_adv = pgd(ThreatModel(L2(), 0.0), steps=2, restarts=2)(network, KEY, X, Y)
    np.testing.assert_allclose(x_adv, X, atol=1e-7)


ATTACK = pgd(ThreatModel(L2(), 0.5), steps=2, restarts=2, select="any")


def test_the_same_whatever_the_batch_split():
    whole = ATTACK(network, KEY, X, Y)
    example_keys = keys.per_example(KEY, jnp.arange(N))
    for size in (2,):
        parts = [
            ATTACK(network, example_keys[i : i + size], X[i : i + size], Y[i : i + size])
            for i in range(0, N, size)
        ]
        np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)
    order = RNG.permutation(N)
    permuted = ATTACK(network, example_keys[order], X[order], Y[order])
    np.testing.assert_allclose(permuted, whole[order], atol=1e-6)


@pytest.mark.parametrize("devices", [2, 8])
def test_the_same_whatever_the_number_of_devices(devices):
    mesh = jax.sharding.Mesh(jax.devices()[:devices], ("data",))
    mapped = jax.jit(
        jax.shard_map(
            lambda k, x, y: ATTACK(network, k, x, y),
            mesh=mesh,
            in_specs=(P("data"),) * 3,
            out_specs=P("data"),
            check_vma=False,
        )
    )
    example_keys = keys.per_example(KEY, jnp.arange(N))
    np.testing.assert_allclose(mapped(example_keys, X, Y), ATTACK(network, KEY, X, Y), atol=1e-6)


def test_jit_and_vmap_agree_with_plain_calls():
    # In l_inf: sampling the l_2 ball alone takes seconds, without jit and to compile.
    attack = pgd(ThreatModel(LInf(), 0.1), steps=2, restarts=2, select="any")
    plain = attack(network, KEY, X, Y)
    with jax.disable_jit():
        eager = attack(network, KEY, X, Y)
    np.testing.assert_allclose(eager, plain, atol=1e-6)
    others = jax.random.split(KEY, 3)
    stacked = jax.vmap(lambda key: attack(network, key, X, Y))(others)
    assert stacked.shape == (3, *X.shape)
    np.testing.assert_allclose(stacked[1], attack(network, others[1], X, Y), atol=1e-6)


def test_a_sweep_over_eps_compiles_once():
    traces = []

    @jax.jit
    def attack(eps):
        traces.append(eps)
        return pgd(ThreatModel(LInf(), eps), steps=2)(network, KEY, X, Y)

    for eps in (0.01, 0.2):
        x_adv = attack(eps)
        assert float(jnp.abs(x_adv - X).max()) <= eps + 1e-6
        np.testing.assert_allclose(
            x_adv, pgd(ThreatModel(LInf(), eps), steps=2)(network, KEY, X, Y), atol=1e-6
        )
    assert len(traces) == 1


def test_every_example_can_have_its_own_radius():
    eps = jnp.linspace(0.0, 0.35, N)
    x_adv = pgd(ThreatModel(LInf(), eps), steps=2, step_size=eps)(network, KEY, X, Y)
    np.testing.assert_allclose(jnp.abs(x_adv - X).reshape(N, -1).max(axis=1), eps, atol=1e-6)


def test_targeted_on_the_other_of_two_classes_is_untargeted():
    threat = ThreatModel(LInf(), 0.1)
    plain = bim(threat, steps=3, step_size=0.05)(binary, KEY, X, Y2)
    targeted = bim(threat, steps=3, step_size=0.05, targeted=True)
    np.testing.assert_array_equal(targeted(binary, KEY, X, 1 - Y2), plain)
    predicted = jnp.argmax(binary(X), axis=-1)
    np.testing.assert_array_equal(
        least_likely(targeted)(binary, KEY, X, Y2),
        bim(threat, steps=3, step_size=0.05)(binary, KEY, X, predicted),
    )


def test_least_likely_goes_for_the_smallest_logit():
    attack = least_likely(bim(ThreatModel(LInf(), 1.0), steps=20, step_size=0.2, targeted=True))
    target = jnp.argmin(linear(X), axis=-1)
    assert bool((target != jnp.argmax(linear(X), axis=-1)).all())
    moved = attack(linear, KEY, X, Y)
    before = cross_entropy(linear(X), target)
    assert bool((cross_entropy(linear(moved), target) < before).all())


def test_stopping_on_success_is_the_cumulative_accuracy():
    y = jnp.argmax(network(X), axis=-1).astype(jnp.int32)
    options = {"steps": 12, "step_size": 0.004, "start": "zero", "has_aux": True}
    threat = ThreatModel(LInf(), 0.4)
    _, trace = pgd(threat, **options)(network, KEY, X, y)
    prediction = trace.prediction[0]
    assert prediction.shape == (13, N)
    np.testing.assert_array_equal(prediction[0], y)
    instantaneous = instantaneous_accuracy(prediction, y)
    cumulative = cumulative_accuracy(prediction, y)
    assert (np.diff(cumulative) <= 0).all()
    assert (np.asarray(cumulative) <= np.minimum.accumulate(instantaneous) + 1e-7).all()
    assert cumulative[1] == instantaneous[1]
    assert 0 < cumulative[-1] < 1
    _, stopped = pgd(threat, early_stop=True, **options)(network, KEY, X, y)
    np.testing.assert_array_equal(instantaneous_accuracy(stopped.prediction[0], y), cumulative)
    assert float(1 - stopped.success.mean()) == pytest.approx(float(cumulative[-1]))


def test_linear_binary_trace_only_rises():
    _, trace = pgd(free(LInf()), steps=6, start="zero", has_aux=True)(binary, KEY, X, Y2)
    assert (np.diff(trace.loss[0], axis=0) >= -1e-6).all()


def test_more_restarts_only_add_candidates():
    def attacked(restarts, select):
        attack = pgd(
            ThreatModel(L2(), 0.35), steps=2, restarts=restarts, select=select, has_aux=True
        )
        x_adv, trace = attack(network, KEY, X, Y)
        assert trace.loss.shape == (restarts, 3, N)
        return np.asarray(trace.success), np.asarray(cross_entropy(network(x_adv), Y))

    wins, losses = attacked(1, "any")  # there is nothing to select
    more_wins, _ = attacked(6, "any")
    _, larger_losses = attacked(6, "loss")
    assert (more_wins >= wins).all()
    assert (larger_losses >= losses - 1e-6).all()
    assert (larger_losses > losses + 1e-5).any()


def test_best_iterate_is_the_largest_loss_of_the_trace():
    options = {"steps": 5, "step_size": 0.5, "has_aux": True}
    x_adv, trace = pgd(ThreatModel(L2(), 0.5), iterate="best", **options)(network, KEY, X, Y)
    np.testing.assert_allclose(
        cross_entropy(network(x_adv), Y), trace.loss[0].max(axis=0), rtol=1e-4, atol=1e-5
    )


def test_a_nan_never_wins():
    def fragile(x):
        # Not a number as soon as the first pixel leaves its place.
        moved = jnp.abs(x - X).reshape(len(x), -1)[:, :1] > 0
        return jnp.where(moved, jnp.nan, network(x))

    x_adv = pgd(ThreatModel(LInf(), 0.1), steps=2, start="zero", iterate="best")(fragile, KEY, X, Y)
    assert bool(jnp.isfinite(fragile(x_adv)).all())


def test_corners():
    threat = free(LInf(), 0.1)
    x_adv = pgd(threat, steps=4, step_size=0.02, corner=True)(network, KEY, X, Y)
    np.testing.assert_allclose(jnp.abs(x_adv - X), 0.1, rtol=1e-4)


def test_fgsm_rs_between_its_limits():
    threat = free(LInf(), 0.1)
    start_keys = keys.fold_in(keys.as_per_example(KEY, N), 0)
    np.testing.assert_allclose(
        fgsm_rs(threat, step_size=0.0)(network, KEY, X, Y), threat.sample(start_keys, X), atol=1e-7
    )
    x_adv = fgsm_rs(threat, step_size=0.2)(network, KEY, X, Y)
    start = threat.sample(start_keys, X)
    gradient = jax.grad(lambda x: cross_entropy(network(x), Y).sum())(start)
    np.testing.assert_allclose(x_adv - X, 0.1 * jnp.sign(gradient), atol=1e-6)


def test_the_start_beyond_the_box_keeps_its_noise():
    """With x at the box's edge and the start outside, no gradient passes: the step is nothing."""
    x = jnp.ones((4, 2, 2, 1))
    threat = ThreatModel(LInf(), 0.2)

    def score(z):
        flat = z.reshape(len(z), -1)
        return jnp.stack([flat.sum(axis=1), jnp.zeros(len(z))], axis=-1)

    y = jnp.zeros(4, jnp.int32)  # the loss rises as pixels fall
    through = fgsm_rs(threat, step_size=0.1, clip_start=False)(score, KEY, x, y)
    start_keys = keys.fold_in(keys.as_per_example(KEY, 4), 0)
    start = free(LInf(), 0.2).sample(start_keys, x)
    expected = jnp.where(start > 1, 1.0, jnp.clip(start - 0.1, 0.8, 1.0))
    np.testing.assert_allclose(through, expected, atol=1e-6)
    clipped = fgsm_rs(threat, step_size=0.1)(score, KEY, x, y)
    np.testing.assert_allclose(clipped, jnp.clip(jnp.minimum(start, 1) - 0.1, 0.8, 1.0), atol=1e-6)


def test_saturated_pixels_do_move():
    x = jnp.round(X)
    x_adv = fgsm(ThreatModel(LInf(), 0.1))(network, KEY, x, Y)
    gradient = jax.grad(lambda x: cross_entropy(network(x), Y).sum())(x)
    inward = (jnp.sign(gradient) == jnp.where(x == 1, -1, 1)) & (gradient != 0)
    assert bool(inward.any())
    np.testing.assert_allclose(jnp.abs(x_adv - x)[inward], 0.1, atol=1e-6)


@pytest.mark.parametrize("loss", [cross_entropy, cw, dlr, margin])
def test_every_loss_drives_the_attack(loss):
    x_adv = pgd(ThreatModel(LInf(), 0.3), steps=10, loss=loss, start="zero")(network, KEY, X, Y)
    before, after = margin(network(X), Y), margin(network(x_adv), Y)
    assert float(after.mean()) > float(before.mean())


def test_clean_logits_as_target_of_the_divergence():
    attack = pgd(ThreatModel(LInf(), 0.2), steps=5, loss=kl_divergence, start=gaussian_start(1e-3))
    x_adv = attack(network, KEY, X, network(X))
    assert float(kl_divergence(network(x_adv), network(X)).min()) > 1e-4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_is_kept(dtype):
    attack = attacks.pgd(ThreatModel(L2(), 0.3), steps=2)
    logits_fn = lambda x: network(x.astype(jnp.float32))  # noqa: E731
    x_adv = jax.eval_shape(lambda x: attack(logits_fn, KEY, x, Y), X.astype(dtype))
    assert x_adv.dtype == dtype


def test_no_derivative_passes_through():
    def loss(scale):
        x_adv = pgd(ThreatModel(L2(), 0.3), steps=2, iterate="best")(
            lambda x: scale * network(x), KEY, X, Y
        )
        return x_adv.sum()

    assert float(jax.grad(loss)(1.0)) == 0.0


def test_public_names():
    assert set(attacks.__all__) <= set(dir(attacks))
