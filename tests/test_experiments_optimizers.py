"""SGD against Adam and RMSProp: the entry point, exact studies as they are, the others tiny."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import (
    command_line,
    optimizer_jobs,
    optimizer_networks,
    optimizer_pictures,
    optimizer_robustness,
    optimizer_studies,
    optimizer_theory,
    optimizer_variants,
)
from experiments.optimizer_networks import OPTIMIZERS, RATES
from experiments.optimizer_studies import STUDIES, Small
from robustjax import dct

TINY = Small(seeds=2, epochs=1, train_size=64, test_size=16, draws=2)


def parse(*words):
    settings = optimizer_robustness.Settings, optimizer_robustness.PRESETS
    return command_line.parse_settings(words, *settings)[0]


def test_dry_run(capsys, tmp_path):
    assert parse() == optimizer_robustness.PRESETS["small"]
    assert parse("--preset=paper") == optimizer_robustness.Settings()
    optimizer_robustness.main(parse("--dry_run", f"--workdir={tmp_path / 'w'}"))
    assert "Dry run: robustness" in capsys.readouterr().out
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (("--seeds=0",), "seeds must be >= 1, got 0"),
        (("--draws=0",), "draws must be >= 1, got 0"),
        (("--study=vision",), "study"),
        (("--preset=paper", "--study=dynamics"), "study at paper size"),
        (("--preset=paper", "--study=head", "--data=MNIST"), "data must name one of Imagenette"),
    ],
)
def test_refusals(words, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        parse(*words)


def test_head_without_weights_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match="pretrained must be a file of weights"):
        optimizer_robustness.main(parse("--preset=paper", f"--workdir={tmp_path / 'w'}"))
    assert not (tmp_path / "w").exists()


def test_studies_are_described():
    for studies in (STUDIES, optimizer_robustness.PAPER):
        for name, study in studies.items():
            assert study.__doc__
            assert f"\n{name} " in optimizer_robustness.__doc__
    assert set(optimizer_robustness.PAPER) == set(optimizer_jobs.STUDIES)


@pytest.mark.parametrize(
    "name, steps",
    [("SGD", (1, 1)), ("SGD-m", (1, 1.9)), ("Adam", (1, 1)), ("RMSProp", (10, 1 / 0.0199**0.5))],
)
def test_steps_on_a_constant_gradient(name, steps):
    """RMSProp's mean of squares starts at zero, and forgets 1 % at a step."""
    optimizer = optimizer_networks.make_optimizer(name, optax.constant_schedule(1.0))
    sign = np.array([1.0, -1.0], np.float32)
    state = optimizer.init(jnp.asarray(sign))
    for step in steps:
        update, state = optimizer.update(jnp.asarray(sign), state, jnp.asarray(sign))
        # 1 - 0.999 has lost four digits in float32.
        np.testing.assert_allclose(update, -step * sign, rtol=1e-4)


def test_sgd_leaves_irrelevant_weights_alone_and_is_trained_on_its_version():
    """Training on zero images changes nothing but biases; on others, all but idle frequencies."""
    task = "band-limited"
    images = optimizer_networks.load_task(TINY, task).train["image"]
    params = optimizer_networks.train_on(TINY, task, "SGD", jnp.stack([images, 0 * images]))
    start = optimizer_networks.initial(TINY, task)["dense1"]["kernel"]
    end = params["dense1"]["kernel"].reshape(2, *start.shape)
    assert np.abs(end[0] - start).max(axis=(1, 2)).min() > 1e-3
    np.testing.assert_array_equal(end[1], start)
    idle = np.asarray(dct.irrelevant_bases(images))
    assert idle.sum() == 192
    kernels = [{"dense1": {"kernel": kernel}} for kernel in (start, end[0])]
    before, after = (optimizer_studies._idle_weights(16, idle, kernel) for kernel in kernels)
    assert before.shape == (2, 192, 128)
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_accuracies_of_a_linear_model():
    """Its distances to the boundary are known; l_2 radii are twice those for 8x8 pixels."""
    x = 1.5 * jax.random.normal(jax.random.key(0), (64, 16, 16, 1))
    w = 0.1 * jax.random.normal(jax.random.key(1), (16, 16, 1))

    def logits_fn(x):
        score = jnp.einsum("nhwc,hwc->n", x, w)
        return jnp.stack([-score, score], axis=1)

    score = logits_fn(x)[:, 1]
    batch = ({"image": x, "label": (score > 0).astype(jnp.int32)},)
    measure = functools.partial(optimizer_studies._measure, logits_fn, jax.random.key(2))
    found = np.asarray(jax.jit(measure)(batch))
    size_2, size_1 = float(jnp.linalg.norm(w)), float(jnp.abs(w).sum())
    reach = [0.8 * size_2, 1.6 * size_2, 0.05 * size_1, 0.1 * size_1]
    expected, above = (
        np.array([float((jnp.abs(score) > share * length).mean()) for length in reach])
        for share in (1.0, 0.98)
    )
    assert expected.min() > 0.1
    assert found[0] == 1
    # From a random start 40 steps turn a vector of the l_2 ball nearly into the best direction.
    assert (expected[:2] <= found[3:5]).all() and (found[3:5] <= above[:2]).all()
    np.testing.assert_allclose(found[5:], expected[2:])
    assert found[2] < found[1] <= 1


@functools.cache
def _columns():
    """Percentages that bear out every claim."""
    columns = (*optimizer_studies.COLUMNS, "average", "log Lipschitz")
    best = {name: np.full(2, 70.0) for name in columns}
    return best, {name: values - 3 for name, values in best.items()}


def test_claims_of_robustness_compare_what_they_say():
    best, worse = _columns()
    worse = {**worse, "clean": best["clean"], "log Lipschitz": best["log Lipschitz"] + 1}
    found = {"SGD": best, "Adam": worse, "RMSProp": worse}
    claims = optimizer_studies._claims("band-limited", found)
    assert [claim.holds for claim in claims] == [True] * 4 + [None, True]
    assert "l_2 0.8" in claims[1].text
    swapped = {"SGD": worse, "Adam": best, "RMSProp": best}
    claims = optimizer_studies._claims("digits", swapped)
    assert [claim.holds for claim in claims] == [True] + [False] * 3 + [None, False]
    assert "l_2 0.4" in claims[1].text


def test_claims_of_bands_compare_what_they_say():
    share = np.array([0, 0, 0.6, 0.92, *[1] * 6])
    drop = np.tile(np.linspace(40.0, 5, 10), (2, 1))
    found = {"irrelevant": share}
    for name in OPTIMIZERS:
        found[name] = {"drop": drop.copy(), "moved": np.full(2, 0.3), "norm": np.ones(2)}
        found[name]["drop"][:, 2] = 10 if name == "SGD" else 25
    found["SGD"]["moved"] = np.full(2, 1e-6)
    claims = optimizer_studies._band_claims(found)
    assert [claim.holds for claim in claims] == [True, True, True, None, True, True]
    found["Adam"]["drop"][:, 2] = 15
    found["Adam"]["moved"] = np.full(2, 1e-3)
    found["SGD"]["moved"] = np.full(2, 0.1)
    claims = optimizer_studies._band_claims(found)
    assert [claim.holds for claim in claims] == [True, True, False, None, False, False]


def test_tables_have_each_network_in_its_place(monkeypatch, tmp_path):
    def measured(small, task, optimizer):
        best, _ = _columns()
        change = 10 * list(optimizer_networks.TASKS).index(task) + list(RATES).index(optimizer)
        return {name: values - (change if name != "clean" else 0) for name, values in best.items()}

    monkeypatch.setattr(optimizer_studies, "measured", measured)
    monkeypatch.setattr(optimizer_studies, "_large_rates", lambda small, task: {
        "Adam, rate 0.003": np.full(2, 71.0 if task == "digits" else 59.0)})  # fmt: skip
    study = optimizer_studies.robustness(TINY)
    averages = [row[-2] for row in study.rows if "rate" not in row[0]]
    assert averages == [f"{70 - v:.1f}" for v in (0, 1, 2, 10, 11, 12)]
    assert [row[0] for row in study.rows if "rate" in row[0]] == [
        "digits: Adam, rate 0.003", "band-limited: Adam, rate 0.003"]  # fmt: skip
    large = [claim.holds for claim in study.claims if "rates" in claim.text]
    assert large == [True, False]
    assert all(len(row) == len(study.columns) for row in study.rows)
    study.figure(tmp_path / "robustness.png")
    assert (tmp_path / "robustness.png").stat().st_size > 5000
    study = optimizer_studies.momentum(TINY)
    assert [row[0] for row in study.rows] == ["SGD", "SGD-m"]
    assert [claim.holds for claim in study.claims] == [False, None]


def test_dynamics(monkeypatch, tmp_path):
    monkeypatch.setattr(optimizer_theory, "_sampled", lambda *arguments: np.zeros((2, 3)))
    study = optimizer_theory.dynamics(TINY)
    assert [claim.holds for claim in study.claims] == [True] * 12 + [None]
    study.figure(tmp_path / "dynamics.png")
    assert (tmp_path / "dynamics.png").stat().st_size > 5000


def test_regions(monkeypatch, tmp_path):
    grid = optimizer_theory._grid
    monkeypatch.setattr(optimizer_theory, "_grid", lambda a, b: grid(a, b, 61))
    study = optimizer_theory.regions(TINY)
    assert [claim.holds for claim in study.claims] == [True] * 5
    study.figure(tmp_path / "regions.png")
    assert (tmp_path / "regions.png").stat().st_size > 5000


def test_energy_and_panels(monkeypatch):
    other = dct.dct_resize(optimizer_networks.load_task(TINY, "digits").train["image"], 28, 28)
    noise = 0.01 * jax.random.normal(jax.random.key(0), other.shape)
    monkeypatch.setattr(optimizer_pictures, "_mnist", lambda: other + noise)
    study = optimizer_pictures.energy(TINY)
    assert [claim.holds for claim in study.claims] == [True] * 4 + [None] * 2
    study = optimizer_pictures.panels(TINY)
    assert [claim.holds for claim in study.claims] == [True, None]
    assert len(study.rows) == 10


def test_frozen_encoder_trains_the_last_layer_alone():
    model = optimizer_variants.HEAD
    params, state = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 512 * 10 + 10
    x = jnp.ones((2, 8, 8, 1))
    kernel = params["head"]["kernel"]
    np.testing.assert_allclose(
        model.apply({"head": {"kernel": kernel, "bias": jnp.ones(10)}}, state, 0 * x, False, None)[
            0
        ],
        1,
    )
