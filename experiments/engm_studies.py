"""Tables of outer optimizers at small size: noisy digits, within minutes on a laptop.

Every study takes ``Small`` and returns a ``Study``: a table, numbers for ``results.json``, claims
and figures. Runs that several studies need are made once.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments import engm_figures, noisy_digits
from experiments.claims import Claim
from experiments.noisy_digits import METHODS, MODEL, Knobs, Recipe, Runs, Task
from experiments.studies import Study, interval, summary
from experiments.training_measures import WEIGHT_ERROR_ALPHAS
from robustjax import attacks, data, metrics, models, norms
from robustjax.threat import ThreatModel

INF = float("inf")


class Small(NamedTuple):
    """The size of the studies, and the runs made so far.

    Attributes:
      seeds: networks of each kind.
      epochs: of a run; 1/3 of them where there is no label noise.
      evaluate_every: epochs from one evaluation to the next.
      train_size, test_size: examples.
      probe: training examples whose gradients are measured.
      noise: share of labels redrawn.
      seed: the first one.
    """

    seeds: int
    epochs: int
    evaluate_every: int
    train_size: int
    test_size: int
    probe: int
    noise: float
    seed: int = 0

    def runs(self, method: str, objective: str = "madry", **knobs: Any) -> Runs:
        """Runs on noisy digits; ``knobs`` as of ``noisy_digits.Knobs``, lists over the runs."""
        # Nobody asks for the gradients of the others.
        probe = self.probe if objective in ("madry", "standard") else 0
        recipe = Recipe(
            method, objective, self.epochs, evaluate_every=self.evaluate_every, probe=probe
        )
        return self.made(recipe, self.noise, **knobs)

    def made(self, recipe: Recipe, noise: float, **knobs: Any) -> Runs:
        """Runs of any recipe, made once."""
        frozen = tuple((name, tuple(value) if np.ndim(value) else value)
                       for name, value in sorted(knobs.items()))  # fmt: skip
        return _runs(recipe, frozen, noise, self.train_size, self.test_size)

    def all_seeds(self) -> tuple[int, ...]:
        """One for each network of a kind."""
        return tuple(range(self.seed, self.seed + self.seeds))

    def some_seeds(self) -> tuple[int, ...]:
        """Half of them, for the studies with many kinds of networks."""
        return self.all_seeds()[: max(self.seeds // 2, 1)]

    def task(self, noise: float) -> Task:
        """The digits with a share of their labels redrawn."""
        return _task(noise, self.train_size, self.test_size)

    def over_seeds(self, method: str, objective: str = "madry", **knobs: Any) -> Runs:
        """The runs of one setting over all seeds."""
        return self.runs(method, objective, seed=self.all_seeds(), **knobs)


@functools.lru_cache
def _task(noise: float, train_size: int, test_size: int) -> Task:
    return noisy_digits.load_task(noise=noise, train_size=train_size, test_size=test_size)


@functools.lru_cache
def _runs(recipe: Recipe, knobs: tuple, *task: Any) -> Runs:
    return noisy_digits.train(recipe, Knobs(**dict(knobs)), _task(*task))


def best_last_overfit(runs: Runs) -> dict[str, np.ndarray]:
    """Robust accuracy at its best and at the end, and robust overfitting, in per cent, per run."""
    return {
        "clean": 100 * runs.clean[:, -1],
        "best": 100 * runs.robust.max(axis=1),
        "last": 100 * runs.robust[:, -1],
        "overfit": np.array([metrics.robust_overfitting(curve) for curve in runs.robust]),
    }


def _correlations(runs: Runs) -> np.ndarray:
    """Correlation of parameter and input gradient norms, ``(runs, evaluations)``."""
    return np.array([
        [metrics.correlation(a, b) for a, b in zip(of_run, other, strict=True)]
        for of_run, other in zip(runs.parameter_norm, runs.input_norm, strict=True)
    ])  # fmt: skip


def optimizers(small: Small) -> Study:
    """Table 2 and Fig. 5h: seven outer optimizers, vanilla adversarial training."""
    runs = {method: small.over_seeds(method) for method in METHODS}
    numbers = {}
    for method, of_method in runs.items():
        numbers[method] = {
            **best_last_overfit(of_method),
            "mean_norm": of_method.mean_norm.mean(axis=1),
            "correlation": _correlations(of_method).mean(axis=1),
        }
    names = ("clean", "best", "last", "overfit", "mean_norm")
    rows = [
        [m.upper().replace("_", "-"), *(interval(numbers[m][n]) for n in names),
         f"{numbers[m]['correlation'].mean():.2f}"]
        for m in METHODS
    ]  # fmt: skip
    mean = {m: {n: float(v.mean()) for n, v in numbers[m].items()} for m in METHODS}
    msgd, engm, approximate = mean["msgd"], mean["engm"], mean["a_engm"]
    claims = [
        Claim("robust overfitting of ENGM is small", "<= 5 %", f"{engm['overfit']:.1f} %",
              engm["overfit"] <= 5),
        Claim("robust overfitting of MSGD is large", ">= 15 %", f"{msgd['overfit']:.1f} %",
              msgd["overfit"] >= 15),
    ]  # fmt: skip
    for which in ("best", "last"):
        for method in ("engm", "a_engm", "n_engm"):
            name = method.upper().replace("_", "-")
            claims.append(Claim(
                f"{which} robust accuracy: {name} over MSGD", f"> {msgd[which]:.1f} %",
                f"{mean[method][which]:.1f} %", mean[method][which] > msgd[which],
            ))  # fmt: skip
    gap = abs(engm["best"] - approximate["best"])
    lowest = min(np.nanmin(_correlations(r).mean(axis=0)) for r in runs.values())
    claims += [
        Claim("A-ENGM is close to ENGM (best)", "<= 3 points", f"{gap:.1f}", gap <= 3),
        Claim("parameter and input gradient norms go together, always", "r > 0.6",
              f"r >= {lowest:.2f}", bool(lowest > 0.6)),
        Claim("MGNC and SNGM over MSGD (best)", f"> {msgd['best']:.1f} %",
              f"{mean['mgnc']['best']:.1f}, {mean['sngm']['best']:.1f} %", None),
        Claim("F-ENGM is worse than MSGD (best)", f"< {msgd['best']:.1f} %",
              f"{mean['f_engm']['best']:.1f} %", None),
        Claim("MSGD has the best clean accuracy",
              f">= {max(v['clean'] for v in mean.values()):.1f} %", f"{msgd['clean']:.1f} %", None),
    ]  # fmt: skip
    curves = {m: (r.epoch, 100 * r.robust) for m, r in runs.items()}
    return Study(
        f"Seven outer optimizers, noisy digits, {small.seeds} seeds (mean ± std [95 % interval])",
        ["optimizer", "clean %", "best PGD-20 %", "last PGD-20 %", "overfit %", "mean norm", "r"],
        rows,
        {m: summary(n) for m, n in numbers.items()},
        claims,
        functools.partial(
            engm_figures.robust_curves,
            curves=curves,
            bars={m: v["best"] - msgd["best"] for m, v in mean.items()},
        ),
    )


def methods(small: Small) -> Study:
    """Table 3: four objectives, MSGD against ENGM."""
    names = {"madry": "Vanilla", "trades": "TRADES", "mart": "MART", "trades_awp": "AWP"}
    rows, results, claims = [], {}, []
    for objective, name in names.items():
        found = {}
        for method in ("msgd", "engm"):
            seeds = small.all_seeds() if objective == "madry" else small.some_seeds()
            found[method] = best_last_overfit(small.runs(method, objective, seed=seeds))
            rows.append([name, method.upper(), *(interval(v) for v in found[method].values())])
            results[f"{objective}, {method}"] = summary(found[method])
        msgd, engm = (found[m]["last"].mean() for m in ("msgd", "engm"))
        claims.append(Claim(
            f"{name}: last robust accuracy of ENGM over MSGD", f">= {msgd:.1f} %",
            f"{engm:.1f} %", bool(engm >= msgd) if objective == "madry" else None,
        ))  # fmt: skip
    return Study(
        "Four objectives, noisy digits",
        ["objective", "optimizer", "clean %", "best PGD-20 %", "last PGD-20 %", "overfit %"],
        rows, results, claims,
    )  # fmt: skip


EPS = (0.0, 0.05, 0.1, 0.15, 0.2)


def eps(small: Small) -> Study:
    """Table 5: moments of the gradients and DeepFool distance over the radius, without noise."""
    rows, results = [], {}
    epochs = max(small.epochs // 3 // small.evaluate_every, 1) * small.evaluate_every
    found = {}
    for method in ("msgd", "engm"):
        recipe = Recipe(method, "madry", epochs, evaluate_every=small.evaluate_every,
                        probe=small.probe)  # fmt: skip
        runs = small.made(recipe, 0.0, eps=EPS)
        found[method] = (runs, _deepfool(runs.params, small.task(0.0).test))
    msgd, engm = found["msgd"][0], found["engm"][0]
    mean_norm, variance = msgd.mean_norm.mean(axis=1), msgd.variance.mean(axis=1)
    correlation = _correlations(msgd).mean(axis=1)
    rho = {method: distances for method, (_, distances) in found.items()}
    table = {
        "mean norm": mean_norm, "variance": variance, "r": correlation,
        "rho, MSGD": rho["msgd"], "rho, ENGM": rho["engm"],
        "robust %, MSGD": 100 * msgd.robust[:, -1], "robust %, ENGM": 100 * engm.robust[:, -1],
    }  # fmt: skip
    rows = [[name, *(f"{v:.3g}" for v in values)] for name, values in table.items()]
    results = {name: np.asarray(values) for name, values in table.items()}
    rises = bool((np.diff(mean_norm) >= 0).all())
    shown = ", ".join(f"{v:.2f}" for v in mean_norm)
    gain = rho["engm"] - rho["msgd"]
    claims = [
        Claim("the mean norm grows with eps", "non-decreasing", shown, rises),
        Claim("ENGM's gain in DeepFool distance grows with eps", "non-decreasing",
              ", ".join(f"{g:+.3f}" for g in gain), None),
        Claim("the correlation is stronger without attack", f"> {correlation[1:].max():.4f}",
              f"{correlation[0]:.4f}", None),
    ]  # fmt: skip
    return Study(
        f"Gradients and DeepFool distance over eps, clean digits, {epochs} epochs, MSGD",
        ["", *(f"eps = {e:g}" for e in EPS)],
        rows, results, claims,
        functools.partial(engm_figures.over_eps, eps=EPS, table=table),
    )  # fmt: skip


def _deepfool(params: Any, test: Mapping[str, Array]) -> np.ndarray:
    """Mean DeepFool distance of every run."""
    runs = jax.tree.leaves(params)[0].shape[0]
    networks = [jax.tree.map(lambda p, i=i: jnp.asarray(p[i]), params) for i in range(runs)]
    return np.array([
        deepfool_distance(models.eval_logits(MODEL.apply, p, {}), test["image"], test["label"])
        for p in networks
    ])  # fmt: skip


def deepfool_distance(logits_fn: Callable, image: Any, label: Any, batch_size: int = 100) -> float:
    """Mean l_2 distance to the decision boundary over the correctly classified examples.

    DeepFool of Moosavi-Dezfooli et al. (2016) with 50 steps and overshoot 0.02. Examples beyond the
    last whole batch are left out.
    """
    size = min(batch_size, len(label))
    found = [
        _distances(logits_fn, jnp.asarray(data.as_float(image[i : i + size])),
                   jnp.asarray(label[i : i + size]))
        for i in range(0, len(label) - size + 1, size)
    ]  # fmt: skip
    return float(metrics.minimum_norm_report(jnp.concatenate(found), [0.0]).mean)


@jax.jit
def _distances(logits_fn: Callable, x: Array, y: Array) -> Array:
    # However far: only the distance is of interest.
    attack = attacks.deepfool(ThreatModel(norms.L2(), 1e6), has_aux=True)
    return attack(logits_fn, jax.random.key(0), x, y)[1].distance


def gradients(small: Small) -> Study:
    """Figs. 2 and 3: moments and correlation over the epochs, natural against adversarial."""
    runs = {
        "adversarial": small.over_seeds("msgd"),
        "natural": small.over_seeds("msgd", "standard"),
    }
    curves = {
        name: {
            "mean_norm": r.mean_norm.mean(axis=0),
            "variance": r.variance.mean(axis=0),
            "correlation": _correlations(r).mean(axis=0),
        }
        for name, r in runs.items()
    }
    epoch = runs["natural"].epoch
    errors = {alpha: _weight_errors(runs["adversarial"], alpha) for alpha in WEIGHT_ERROR_ALPHAS}
    # The first learning rate ends at 60 %.
    before, after = int(0.6 * len(epoch)) - 1, len(epoch) - 1
    natural, adversarial = curves["natural"], curves["adversarial"]
    rows = []
    for name, series in curves.items():
        for quantity, values in series.items():
            rows.append([name, quantity.replace("_", " "), *(f"{values[i]:.3g}" for i in
                                                            (0, before, after))])  # fmt: skip
    for alpha, values in errors.items():
        rows.append(["adversarial", f"weight error %, alpha = {alpha:g}",
                     *(f"{values[i]:.3g}" for i in (0, before, after))])  # fmt: skip
    claims = [
        Claim(f"{what.replace('_', ' ')}: adversarial above natural", "at every evaluation",
              f"at {int((adversarial[what] > natural[what]).sum())} of {len(epoch)}",
              bool((adversarial[what] > natural[what]).all()) if what == "mean_norm" else None)
        for what in ("mean_norm", "variance")
    ] + [
        Claim("natural: the mean norm falls after the decay of the learning rate",
              f"< {natural['mean_norm'][before]:.3g}", f"{natural['mean_norm'][after]:.3g}",
              bool(natural["mean_norm"][after] < natural["mean_norm"][before])),
        Claim("adversarial: the mean norm grows after it",
              f"> {adversarial['mean_norm'][before]:.3g}",
              f"{adversarial['mean_norm'][after]:.3g}", None),
        Claim("correlation throughout", "r > 0.6",
              f"r >= {min(c['correlation'].min() for c in curves.values()):.2f}",
              bool(min(c["correlation"].min() for c in curves.values()) > 0.6)),
        Claim("correlation: natural over adversarial, mean",
              f">= {adversarial['correlation'].mean():.2f}",
              f"{natural['correlation'].mean():.2f}",
              bool(natural["correlation"].mean() >= adversarial["correlation"].mean())),
    ]  # fmt: skip
    return Study(
        "Per-example gradients over the epochs, noisy digits",
        ["training", "quantity", "first", "before decay", "last"],
        rows,
        {**curves, "weight_error": {str(a): e for a, e in errors.items()}, "epoch": epoch},
        claims,
        functools.partial(engm_figures.gradient_curves, epoch=epoch, curves=curves, errors=errors),
    )


def _weight_errors(runs: Runs, alpha: float) -> np.ndarray:
    """Error of weights that come from a regression on the probe itself, per cent, per epoch."""
    return np.array([
        [metrics.regressed_weight_error(p, h, alpha) for p, h in zip(ps, hs, strict=True)]
        for ps, hs in zip(runs.parameter_norm, runs.input_norm, strict=True)
    ]).mean(axis=0)  # fmt: skip
