"""What training does to the robustness of networks: perceptrons on digits, within minutes.

Every study takes ``SmallNetworks`` and returns a ``Study``. Linear models have one largest eps,
and an optimizer or a norm that reaches it; networks are trained against a radius, or with a
penalty, that must be chosen. What is found for networks is reported; what is exact, the first-order
margin where the network is linear, is asserted.

Source: Faghri, Gowal, Vasconcelos, Fleet, Pedregosa and Le Roux (2021), "Bridging the gap between
adversarial robustness and optimization bias": figures 5.4 (c, d), 5.5, appendix B.4.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from experiments import implicit_network_figures, noisy_digits, side_by_side
from experiments.claims import Claim
from experiments.implicit_margins import curved_margins, measure_margins
from experiments.noisy_digits import MODEL, Knobs, Recipe, Task
from experiments.studies import Study
from robustjax import attacks, losses, metrics, models
from robustjax.fourier_norms import FourierLInf
from robustjax.metrics.margins import max_eps, near_clean
from robustjax.norms import LInf
from robustjax.threat import ThreatModel

TEST_EPS = 0.1
# Training radii in test radii, and weights of the divergence of TRADES: the grids of the figures.
TRAIN_EPS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
BETAS = tuple(10.0**k for k in range(-4, 5))
OBJECTIVES: Mapping[str, str] = {"AT": "madry", "TRADES": "trades"}


class SmallNetworks(NamedTuple):
    """The size of the studies.

    Attributes:
      seeds: networks of each kind.
      epochs: of training.
      train_size, test_size: examples.
    """

    seeds: int = 2
    epochs: int = 32
    train_size: int = 512
    test_size: int = 500


def adam_pgd(threat: ThreatModel, *, steps: int = 40) -> attacks.Attack:
    """The attack of the evaluation: PGD on the margin by Adam with learning rate 0.1."""
    return attacks.pgd(threat, steps=steps, step_rule=optax.adam(0.1), loss=losses.margin)


@functools.lru_cache
def _task(small: SmallNetworks) -> Task:
    return noisy_digits.load_task(noise=0.0, train_size=small.train_size, test_size=small.test_size)


class _Place(NamedTuple):
    """A network among all of them, and a radius."""

    network: Any
    eps: Any


def _train(
    small: SmallNetworks, objective: str, task: Task, *, norm: str = "linf", **knobs: Any
) -> Any:
    """Parameters of networks ``(values of the knobs x seeds, ...)``, trained in one program."""
    images = len(task.train["label"]) // small.train_size  # more for images with noise
    epochs = max(small.epochs // images, 1)
    recipe = Recipe("msgd", objective, epochs, norm=norm, evaluate_every=epochs)
    count = max(np.size(value) for value in knobs.values())
    seeds = np.tile(np.arange(small.seeds), count)
    repeated = {name: np.repeat(np.asarray(v, np.float32), small.seeds if np.ndim(v) else 1)
                for name, v in knobs.items()}  # fmt: skip
    return noisy_digits.train(recipe, Knobs(seed=seeds, **repeated), task).params


def _under_adam_pgd(eps: float, place: _Place, arrays: tuple) -> tuple[Array, Array]:
    """Clean and robust accuracy of one network."""
    params, test = arrays
    logits_fn = _logits_fn(params, place.network)
    x, y = test["image"], test["label"]
    x_adv = adam_pgd(ThreatModel(LInf(), eps))(logits_fn, jax.random.key(1), x, y)
    return metrics.correct(logits_fn(x), y).mean(), metrics.correct(logits_fn(x_adv), y).mean()


def _logits_fn(params: Any, network: Any) -> models.LogitsFn:
    return models.eval_logits(MODEL.apply, jax.tree.map(lambda leaf: leaf[network], params), {})


def _accuracies(small: SmallNetworks, params: Any) -> dict[str, np.ndarray]:
    """Clean and robust accuracy in per cent, ``(values of the knobs, seeds)``."""
    count = len(jax.tree.leaves(params)[0])
    place = _Place(np.arange(count), np.float32(TEST_EPS))
    found = side_by_side.run(_under_adam_pgd, TEST_EPS, place, (params, _task(small).test))
    shaped = (100 * values.reshape(-1, small.seeds) for values in found)
    return dict(zip(("clean", "robust"), shaped, strict=True))


def _table(values: Sequence[str], found: Mapping[str, Mapping[str, np.ndarray]]) -> list[list[str]]:
    return [
        [name, value, *(f"{of[c][i].mean():.1f} ± {of[c][i].std():.1f}" for c in of)]
        for name, of in found.items()
        for i, value in enumerate(values)
    ]


def networks_eps(small: SmallNetworks) -> Study:
    """Robust accuracy at one eps over the eps of training: AT and TRADES (figure 5.4 c)."""
    found, claims = {}, []
    for name, objective in OBJECTIVES.items():
        eps = np.array(TRAIN_EPS, np.float32) * TEST_EPS
        found[name] = _accuracies(small, _train(small, objective, _task(small), eps=eps))
        robust = found[name]["robust"].mean(axis=1)
        best = int(robust.argmax())
        claims += [
            Claim(f"{name}: best trained at the eps of the test, or one step of the grid away",
                  f"{TRAIN_EPS[0]:g} to {TRAIN_EPS[2]:g} test eps",
                  f"{TRAIN_EPS[best]:g} test eps", None),
            Claim(f"{name}: robust accuracy is lower at both ends of the grid",
                  f"< {robust[best]:.1f} %", f"{robust[0]:.1f} %, {robust[-1]:.1f} %", None),
        ]  # fmt: skip
    return Study(
        f"Digits, a perceptron: accuracy (%) over the radius of training, l_inf, mean ± std over "
        f"{small.seeds} seeds; test eps {TEST_EPS:g}, Adam-PGD-40 on the margin",
        ["training", "eps / test eps", "clean", f"eps {TEST_EPS:g}"],
        _table([f"{value:g}" for value in TRAIN_EPS], found),
        {"eps": np.array(TRAIN_EPS) * TEST_EPS, **found},
        claims,
        functools.partial(
            implicit_network_figures.accuracies,
            x=TRAIN_EPS,
            found=found,
            label="eps of training / eps of the test",
            at=1.0,
        ),
    )


def networks_trades(small: SmallNetworks) -> Study:
    """Clean and robust accuracy over the weight of the divergence of TRADES (figure 5.4 d)."""
    params = _train(small, "trades", _task(small), eps=TEST_EPS, beta=np.array(BETAS))
    found = _accuracies(small, params)
    clean, robust = (found[name].mean(axis=1) for name in ("clean", "robust"))
    best = int(robust.argmax())
    claims = [
        Claim("TRADES: robust accuracy falls as beta goes to 0", f"< {robust[best]:.1f} %",
              f"{robust[0]:.1f} % at beta {BETAS[0]:g}", None),
        Claim("TRADES: robust accuracy is highest at a moderate beta", "not at the ends",
              f"beta {BETAS[best]:g}", None),
        Claim("TRADES: clean accuracy does not rise with beta", "largest rise 0 points",
              f"{max(0.0, np.diff(clean).max()):.1f} points", None),
        Claim("TRADES: at a very large beta both fall",
              f"< {clean[best]:.1f} %, {robust[best]:.1f} %",
              f"{clean[-1]:.1f} %, {robust[-1]:.1f} %", None),
    ]  # fmt: skip
    return Study(
        f"Digits, a perceptron: accuracy (%) over beta of TRADES, l_inf, mean ± std over "
        f"{small.seeds} seeds; eps {TEST_EPS:g}, Adam-PGD-40 on the margin",
        ["training", "beta", "clean", f"eps {TEST_EPS:g}"],
        _table([f"{beta:g}" for beta in BETAS], {"TRADES": found}),
        {"beta": BETAS, **found},
        claims,
        functools.partial(
            implicit_network_figures.accuracies,
            x=BETAS,
            found={"TRADES": found},
            label="beta of TRADES",
        ),
    )


# Radii of the attacks in the study of the zoo, close where accuracy begins to fall.
ZOO_EPS = (0.0, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3)
SHOWN_EPS = (0.05, 0.1)
COPIES, NOISE = 8, 0.2


def _with_noise(task: Task) -> Task:
    """Each training image ``COPIES`` times, with noise of its own, in the box."""
    train = task.train
    image = jnp.tile(train["image"], (COPIES, 1, 1, 1))
    image = image + NOISE * jax.random.normal(jax.random.key(7), image.shape)
    label = jnp.tile(train["label"], COPIES)
    index = jnp.arange(len(label), dtype=jnp.int32)
    return task._replace(train={"image": jnp.clip(image, 0, 1), "label": label, "index": index})


def _under_balls(balls: tuple, place: _Place, arrays: tuple) -> tuple[Array, ...]:
    """Accuracy of one network in each ball."""
    params, test = arrays
    logits_fn = _logits_fn(params, place.network)
    x, y = test["image"], test["label"]

    def accuracy(norm):
        threat = ThreatModel(norm, place.eps)
        # From x: at a small eps the network is nearly linear, and the first step the best.
        attack = attacks.pgd(
            threat, steps=10, step_size=threat.eps / 4, loss=losses.margin, start="zero"
        )
        x_adv = attack(logits_fn, jax.random.key(1), x, y)
        return metrics.correct(logits_fn(x_adv), y).mean()

    return tuple(accuracy(norm) for norm in balls)


def zoo(small: SmallNetworks) -> Study:
    """Largest l_inf and Fourier-l_inf eps of networks trained in four ways (figure 5.5)."""
    task = _task(small)
    trained = {
        "standard": _train(small, "standard", task, eps=0.0),
        "l_inf AT": _train(small, "madry", task, eps=TEST_EPS),
        "l_2 AT": _train(small, "madry", task, norm="l2", eps=5 * TEST_EPS),
        "noise": _train(small, "standard", _with_noise(task), eps=0.0),
    }
    everything = jax.tree.map(lambda *leaves: np.concatenate(leaves), *trained.values())
    count = len(trained) * small.seeds
    balls = {"l_inf": LInf(), "Fourier-l_inf": FourierLInf()}
    place = _Place(
        np.tile(np.arange(count), len(ZOO_EPS)), np.repeat(np.array(ZOO_EPS, np.float32), count)
    )
    found = side_by_side.run(_under_balls, tuple(balls.values()), place, (everything, task.test))
    curves: dict[str, dict[str, np.ndarray]] = {name: {} for name in trained}
    for ball, values in zip(balls, found, strict=True):
        of_ball = values.reshape(len(ZOO_EPS), len(trained), small.seeds)
        for i, name in enumerate(trained):
            curves[name][ball] = of_ball[:, i].T  # (seeds, eps)
    largest = {
        name: {ball: np.array([_largest(curve) for curve in of]) for ball, of in of_name.items()}
        for name, of_name in curves.items()
    }
    ball = "Fourier-l_inf"
    plain = largest["standard"][ball].mean()
    # The reference evaluation: the largest eps of the grid that costs no more than one point.
    claims = [
        Claim("no network withstands the Fourier attack at a large eps", "<= 5 %",
              f"{100 * max(curves[n][ball][:, -1].mean() for n in curves):.1f} % at "
              f"{ZOO_EPS[-1]:g}", None),
        *(Claim(f"largest Fourier eps: {name} over standard", f">= {plain:.3f}",
                f"{largest[name][ball].mean():.3f}", None)
          for name in ("l_inf AT", "l_2 AT", "noise")),
    ]  # fmt: skip
    rows = [
        [name, f"{100 * curves[name][ball][:, 0].mean():.1f}",
         *(f"{of.mean():.3f} ± {of.std():.3f}" for of in largest[name].values()),
          *(f"{100 * curves[name][b][:, ZOO_EPS.index(eps)].mean():.1f}"
           for b in balls for eps in SHOWN_EPS)]
        for name in trained
    ]  # fmt: skip
    shown = [f"{b} {eps:g}" for b in balls for eps in SHOWN_EPS]
    return Study(
        "Digits, a perceptron: largest eps that costs one point at most, and accuracy (%); mean "
        f"over {small.seeds} seeds, PGD-10 on the margin",
        ["training", "clean", *(f"max eps, {b}" for b in balls), *shown],
        rows,
        {"eps": ZOO_EPS, "curves": curves, "max_eps": largest},
        claims,
        functools.partial(implicit_network_figures.curves, eps=ZOO_EPS, found=curves),
    )


def _largest(curve: np.ndarray) -> float:
    table = dict(zip(ZOO_EPS, map(float, curve), strict=True))
    return max_eps(table.__getitem__, ZOO_EPS, near_clean(float(curve[0])), all_smaller=True)


# First-order margins: digits below 5 against the others, few hidden units.
HIDDEN = 16
QUANTILES = (0, 0.1, 0.5, 0.9, 1)


def first_order(small: SmallNetworks) -> Study:
    """Margins from gradients against those that an attack finds (appendix B.4)."""
    task = _task(small)
    found = jax.tree.map(np.asarray, measure_margins(HIDDEN, task.train, task.test, jnp.array(400)))
    keep = found.correct & (found.attack < 1)
    linear = keep & (1.01 * found.estimate <= found.region)
    ratio = found.estimate / found.attack
    u = np.array([0.25, 0.5, 1.0, 2.0])
    ratios = curved_margins(u)
    expected = {"tanh": np.sinh(2 * u) / (2 * u), "sinh": np.tanh(u) / u}
    exact = np.abs(ratio[linear] - 1).max() if linear.any() else float("inf")
    claims = [
        Claim("where the boundary lies in the example's linear region, the estimate is the eps of "
              "the attack", "within 1e-3", f"{exact:.1e} of {linear.sum()} examples",
              bool(exact < 1e-3)),
        Claim("no attack within the smaller of estimate and region succeeds", "0 examples",
              f"{(found.correct & ~found.certified).sum()} of {found.correct.sum()}",
              bool(found.certified[found.correct].all())),
        *(Claim(f"{name}(a w.x): estimate over margin", " ".join(f"{v:.4f}" for v in want),
                " ".join(f"{v:.4f}" for v in ratios[name]),
                bool(np.allclose(ratios[name], want, rtol=1e-4)))
          for name, want in expected.items()),
    ]  # fmt: skip
    rows = [
        [name, f"{part.sum()}", *(f"{v:.3f}" for v in np.quantile(ratio[part], QUANTILES))]
        for name, part in {"in one linear region": linear, "the others": keep & ~linear}.items()
        if part.any()
    ]  # fmt: skip
    rows += [
        [f"{name}(a w.x), a w.x = {u[0]:g}, {u[1]:g}, {u[2]:g}, {u[3]:g}", f"{len(u)}",
         *(f"{v:.3f}" for v in ratios[name]), ""]
        for name in ratios
    ]  # fmt: skip
    return Study(
        f"First-order margin over the smallest eps of PGD-20: 64-{HIDDEN}-1, ReLU, on digits below "
        "5 against the others, l_inf; below, functions whose ratio is known",
        ["examples", "number", "least", "10 %", "median", "90 %", "largest"],
        rows,
        {"margins": found._asdict(), "u": u, "ratios": ratios},
        claims,
        functools.partial(implicit_network_figures.margins, found=found, linear=linear, keep=keep),
    )


STUDIES: Mapping[str, Callable[[SmallNetworks], Study]] = {
    "networks_eps": networks_eps,
    "networks_trades": networks_trades,
    "first_order": first_order,
    "zoo": zoo,
}
