"""Implicit robustness: sweeps against closed forms, exact studies as they are, others canned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import theory as theory_benchmark
from experiments import (
    command_line,
    implicit_fourier,
    implicit_robustness,
    implicit_studies,
    implicit_theory,
)
from experiments import implicit_sweeps as sweeps
from experiments.implicit_studies import Grids, Program
from experiments.implicit_sweeps import Examples, Optimum
from robustjax.fourier_norms import FourierL1, FourierLInf
from robustjax.norms import L1, L2, LInf
from robustjax.theory import linear_networks, max_margin, robust_classifiers, saddle_point

TINY = Grids(seeds=1, ratios=(16, 32))


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    """Tiny programs: what takes time is compiling them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def parse(*words):
    settings = implicit_robustness.Settings, implicit_robustness.PRESETS
    return command_line.parse_settings(words, *settings)[0]


def test_dry_run(capsys, tmp_path):
    assert parse() == implicit_robustness.PRESETS["small"]
    words = "--study=penalty,saddle,zoo", "--dry_run", f"--workdir={tmp_path / 'w'}"
    implicit_robustness.main(parse(*words))
    shown = capsys.readouterr().out
    assert "Dry run: penalty" in shown and "2,000" in shown
    assert "Dry run: saddle: closed forms" in shown
    assert "Dry run: zoo: 2 perceptrons" in shown
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (("--seeds=0",), "seeds must be >= 1, got 0"),
        (("--study=vision",), "study"),
        (("--preset=paper", "--study=first_order"), "study at paper size"),
    ],
)
def test_refusals(words, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        parse(*words)


def test_studies_are_described():
    for name, study in implicit_robustness.LINEAR.items():
        assert study.__doc__
        assert f"\n{name} " in implicit_robustness.__doc__
    for name in implicit_robustness.SMALL:
        assert f"\n{name} " in implicit_robustness.__doc__
    assert implicit_robustness.grids_of(parse("--seeds=2")) == Grids(seeds=2)
    assert implicit_robustness.grids_of(parse("--preset=paper")) == implicit_studies.PUBLISHED


# Sweeps.


@functools.cache
def data():
    return sweeps.draw((6, 3), 2, 12)


def of_set(examples, i):
    """One data set as it is, without what fills it up."""
    n = int((examples.shares[i] > 0).sum())
    x, y = examples.x[i, :n], examples.y[i, :n]
    return Examples(x[None], y[None], jnp.full((1, n), 1 / n), examples.key[i : i + 1])


def test_data_sets_of_a_seed_share_their_first_examples():
    examples = data()
    assert examples.x.shape == (4, 6, 12)
    np.testing.assert_array_equal(examples.x[0, :3], examples.x[2, :3])
    np.testing.assert_array_equal(examples.x[2, 3:], examples.x[2, :3])
    np.testing.assert_allclose(examples.shares.sum(axis=1), 1)
    np.testing.assert_array_equal(examples.shares[2] > 0, np.arange(6) < 3)
    assert np.abs(examples.x[0] - examples.x[1]).min() > 0


@functools.cache
def descended():
    return {
        loss: sweeps.steepest(data(), jnp.asarray([0.5, 1.0]), norm=L1(), steps=50, loss=loss)
        for loss in ("exponential", "logistic")
    }


@pytest.mark.parametrize("loss", ["exponential", "logistic"])
def test_what_fills_up_a_data_set_changes_nothing(loss):
    """Coordinate descent by hand, on the examples alone."""
    one = of_set(data(), 2)
    x, y, w = np.asarray(one.x[0]), np.asarray(one.y[0]), np.zeros(12)
    bound = np.abs(x).max() ** 2
    for _ in range(50):
        scores = y * (x @ w)
        if loss == "exponential":
            share, size = np.exp(-scores) / np.exp(-scores).sum(), 0.5 / bound
        else:
            share = 1 / (1 + np.exp(scores)) / 3
            size = min(0.5, 1 / (bound * np.log1p(np.exp(-scores)).mean()))
        slope = (share * y) @ x
        w[np.abs(slope).argmax()] += size * slope[np.abs(slope).argmax()]
    np.testing.assert_allclose(descended()[loss][0, 2], w, atol=1e-10)


def test_attacks_raise_the_logarithm_of_the_risk_by_a_penalty():
    x, y, _, _ = (part[0] for part in of_set(data(), 0))
    w = jnp.sin(jnp.arange(12.0))

    @jax.jit
    def both(w):
        risk = saddle_point.attacked_risk(w, x, y, LInf(), 0.2, loss=saddle_point.exponential)
        return jnp.log(risk), max_margin.log_exponential_risk(w, x, y) + 0.2 * L1().value(w)

    np.testing.assert_allclose(*both(w))


def test_inner_steps_end_where_the_closed_form_says():
    x, y, _, _ = (part[0] for part in of_set(data(), 0))
    w = jnp.sin(jnp.arange(12.0))
    directions = jax.jit(lambda w: sweeps.directions(w, x, y, FourierLInf()))
    closed = jax.jit(lambda w: robust_classifiers.worst_perturbations(w, y, FourierLInf(), 1.0))
    np.testing.assert_allclose(directions(w), closed(w), atol=1e-12)
    assert not directions(0 * w).any()


def test_attacks_find_the_margins_to_the_step_of_their_radii():
    best = sweeps.optimum(data(), LInf())
    assert np.abs(best.gap).max() < 1e-9
    weights = descended()["exponential"][1]
    eps = np.asarray(sweeps.largest_eps(weights, data(), norm=LInf()))
    assert (eps > 0).all() and (eps <= best.eps).all()
    off = (eps - sweeps.attacked_eps(weights, data(), LInf(), best.eps)) / best.eps
    assert (off >= -1e-9).all() and (off < 0.1 + 1e-9).all()


def test_the_best_of_a_grid_is_kept_and_overflow_is_not():
    grids, best = Grids(seeds=2), sweeps.optimum(data(), LInf())
    good = solutions(data(), LInf())
    weights = np.stack([0.5 * good + 0.5 * np.roll(good, 1, 1), good, np.full_like(good, np.inf)])
    weights[1, :2] = 0  # of the first size
    found = implicit_studies.reached(jnp.asarray(weights), data(), LInf(), best, grids)
    np.testing.assert_allclose(found.share[1], 1)
    first = np.asarray(sweeps.largest_eps(weights[0], data(), norm=LInf()))[:2]
    np.testing.assert_allclose(found.eps[0], np.where(first.mean() > 0, first, 0))


# Studies with the exact solutions in place of training: every claim must hold.


def solutions(examples, norm):
    """The most robust weights of each data set, ``(sets, d)``."""
    return np.stack([
        solution(x[shares > 0].tobytes(), x.shape[1], y[shares > 0].tobytes(), norm)
        for x, y, shares in zip(*map(np.asarray, examples[:3]), strict=True)
    ])  # fmt: skip


@functools.cache
def solution(x, d, y, norm):
    return max_margin.max_margin(np.frombuffer(x).reshape(-1, d), np.frombuffer(y), norm).w


def solved(norm):
    return Program(lambda examples: jnp.asarray(solutions(examples, norm))[None], 1, 1)


def test_sweep(monkeypatch, tmp_path):
    monkeypatch.setattr(implicit_studies, "ATTACKS", {"l_inf": LInf(), "l_2": L2()})
    norms = {"CD": LInf(), "GD": L2(), "signGD": L1(), implicit_studies.SEARCHED: L2(),
             "l_1 penalty": LInf(), "l_2 penalty": L2(), "l_inf penalty": L1()}  # fmt: skip
    monkeypatch.setattr(
        implicit_studies, "sweep_programs",
        lambda grids: {name: solved(norm) for name, norm in norms.items()},
    )  # fmt: skip
    monkeypatch.setattr(
        implicit_studies, "training",
        lambda grids, norm, best: dict.fromkeys(
            (implicit_studies.TRAINED, implicit_studies.TRAINED_SEARCHED), solved(norm)
        ),
    )  # fmt: skip
    study = implicit_studies.sweep(TINY)
    assert [c.text for c in study.claims if c.holds is False] == []
    assert len(study.claims) == 8 + 9
    assert [row[2:] for row in study.rows if row[:2] == ["l_inf", "CD"]] == [["1.000", "1.000"]]
    assert len(study.rows) == 2 * 10 and all(len(row) == len(study.columns) for row in study.rows)
    study.figure(tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    # Another optimizer in the place of CD, and nothing is near the optimum.
    found = study.results["l_inf"]
    best = Optimum(found.pop("optimum"), found.pop("certificate gap"))
    found = {name: implicit_studies.Found(**one) for name, one in found.items()}
    found["CD"], found["GD"] = found["GD"], found["CD"]
    claims = implicit_studies._sweep_claims("l_inf", np.array(TINY.ratios), best, found)
    assert [c.holds for c in claims] == [True, False, True, True, False, False, True, None]


def test_fourier(monkeypatch, tmp_path):
    norms = {"convolutional network": FourierLInf(), "dense network": L2(),
             "Fourier-CD": FourierLInf(), "CD": LInf(), "GD": L2(), "signGD": L1(),
             "Fourier-l_1 penalty": FourierLInf()}  # fmt: skip
    monkeypatch.setattr(
        implicit_fourier, "fourier_programs",
        lambda grids: {name: solved(norm) for name, norm in norms.items()},
    )  # fmt: skip
    monkeypatch.setattr(
        implicit_fourier, "training",
        lambda grids, norm, best: {implicit_fourier.TRAINED: solved(norm)},
    )  # fmt: skip
    study = implicit_fourier.fourier(TINY)
    assert [c.holds for c in study.claims] == [True] * 8
    study.figure(tmp_path / "fourier.png")
    assert (tmp_path / "fourier.png").stat().st_size > 5000


def test_the_first_step_of_two_convolutions():
    """The last layer starts at zero, so the first has no gradient yet."""
    one = of_set(data(), 2)
    found = sweeps.convolutional(one, jnp.asarray([0.5]), jnp.asarray([2.0]), every=1, times=1)
    first, _ = linear_networks.init_convolutional(one.key[0], 12)
    mean = (one.y[0][:, None] * one.x[0]).mean(axis=0)
    last = 0.5 * linear_networks.correlate(2 * first, mean)
    expected = linear_networks.convolutional_weight([2 * first, last])
    np.testing.assert_allclose(found[0, 0, 0], expected, atol=1e-12)


def test_gap(monkeypatch, tmp_path):
    """Weights on the way from the sum of the examples to the optimum, and a float32 overflow."""
    sets = {"float64": sweeps.draw((12, 3), 1, 100), "d = 2": sweeps.draw((3,), 1, 2)}
    sets["float32"] = sets["float64"]
    best = {kind: solutions(examples, FourierLInf()) for kind, examples in sets.items()}

    def run(examples, kind):
        start = np.einsum("sn,snd->sd", examples.y * examples.shares, examples.x)
        left = np.array([1, 0.1, 0.01, 1e-3, 1e-4, 1e-5])[:, None, None]
        weights = left * start / np.abs(best[kind]).max() + (1 - left) * best[kind]
        weights = np.broadcast_to(weights.swapaxes(0, 1), (15, len(start), 6, start.shape[1]))
        weights = weights.copy()
        if kind == "float32":
            weights[10:] = np.inf
        return jnp.asarray(weights)

    monkeypatch.setattr(
        implicit_fourier, "gap_programs",
        lambda grids: {
            kind: implicit_studies.Planned(
                Program(functools.partial(run, kind=kind), 15, 6), sets[kind]
            )
            for kind in ("float64", "float32", "d = 2")
        },
    )  # fmt: skip
    study = implicit_fourier.gap(Grids(seeds=1))
    assert [c.holds for c in study.claims] == [True, True, True, None, None]
    assert study.claims[-1].measured == "10 of 10"
    assert len(study.rows) == 45 and all(len(row) == len(study.columns) for row in study.rows)
    study.figure(tmp_path / "gap.png")
    assert (tmp_path / "gap.png").stat().st_size > 5000


def test_adversarial_training(tmp_path):
    study = implicit_theory.at(TINY._replace(steps=100))
    held = {c.text: c.holds for c in study.claims}
    assert held["first seed: eps*, and the size from which w = 0"]
    assert held["w = 0, exactly, from ||mean y x|| on, and not before"]
    assert held["10 inner steps find the perturbations of the closed form, after all trainings"]
    assert [row[-1] for row in study.rows][-4:] == ["1"] * 4
    study.figure(tmp_path / "at.png")
    assert (tmp_path / "at.png").stat().st_size > 5000


@pytest.mark.parametrize("name", ["penalty", "saddle", "slack"])
def test_exact_studies(name, tmp_path):
    study = implicit_theory.STUDIES[name](Grids(seeds=1, penalty_steps=1000))
    assert [c.text for c in study.claims if not c.holds] == []
    assert all(len(row) == len(study.columns) for row in study.rows)
    study.figure(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_balls(tmp_path):
    study = implicit_theory.balls(Grids())
    assert [c.holds for c in study.claims] == [True] * 5
    study.figure(tmp_path / "balls.png")
    assert (tmp_path / "balls.png").stat().st_size > 20_000


def test_preconditioned_descent(tmp_path):
    study = implicit_theory.precond(Grids(seeds=1))
    assert [c.holds for c in study.claims] == [True] * 3
    study.figure(tmp_path / "precond.png")
    assert (tmp_path / "precond.png").stat().st_size > 5000


def test_a_quick_run_of_the_benchmark(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        implicit_studies, "sweep_programs",
        lambda grids: implicit_studies.descents(grids, {"Fourier-CD": FourierL1()}),
    )  # fmt: skip
    monkeypatch.setattr(implicit_studies, "training", lambda grids, norm, best: {})
    quick = theory_benchmark.PRESETS["quick"]
    results = theory_benchmark.main(quick)
    assert results["sweep"]["programs"].keys() == {"Fourier-CD"}
    total = results["sweep"]["compile"] + results["sweep"]["run"]
    assert results["sweep"]["total"] > total > 0
    assert results["dynamics"]["seconds"].keys() == {"GD", "signGD", "Adam", "RMSProp", "all"}
    assert results["loops"]["difference"] < 1e-9
    assert len(results["loops"]["ratios"]) == 2
    assert "aim: at least 20" in capsys.readouterr().out
