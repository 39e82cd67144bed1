"""What a robust accuracy under PGD does not tell: attacks and measures that see masked gradients.

Studies on the networks of ``soar_networks``: a report on gradient masking, transfer attacks, the
members of AutoAttack, attacks in l_2, and the loss on the way to an adversarial example.

Source: Ma (2025), "Understanding adversarial robustness in deep learning", chapter 3.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments import soar_figures
from experiments.claims import Claim
from experiments.soar_networks import (
    PERCEPTRON,
    Networks,
    Place,
    Small,
    evaluate,
    l2_radius,
    load_task,
    standard,
    threat_of,
    train,
)
from experiments.studies import Study
from robustjax import attacks, benchmark, losses, metrics, models

SCALE = 1e4
MASKING = ("standard", "PGD-10", "SOAR, zero", "SOAR, random", "SOAR, PGD-1")
SCALED, LINEAR = "standard, logits x 10,000", "linear, standard"
# Of the flags, those whose absence the thesis reports for SOAR with PGD-1 points.
NAMED = ("vanishing_gradients", "withstands_unbounded", "transfer_is_stronger", "overconfident")


def masking(small: Small) -> Study:
    """The report on gradient masking, and two networks of which the answer is known."""
    test_set = load_task(small).test
    sources = standard(small, source=True)
    linear = models.Linear(num_classes=10)
    shown = {method: (PERCEPTRON, train(small, method)) for method in MASKING}
    shown[SCALED] = (PERCEPTRON, _scaled(standard(small)))
    shown[LINEAR] = (linear, standard(small, linear))
    reports = {
        name: [
            benchmark.masking_report(
                networks.logits_fn(module, seed),
                jax.random.key(seed),
                test_set["image"],
                test_set["label"],
                threat_of(small.eps),
                source_logits_fn=sources.logits_fn(PERCEPTRON, seed),
            )
            for seed in range(small.seeds)
        ]
        for name, (module, networks) in shown.items()
    }
    columns = {
        "non-zero of 64": "nonzero_entries",
        "PGD-20 %": "pgd_accuracy",
        "unbounded %": "unbounded_accuracy",
        "transfer %": "transfer_accuracy",
        "Square %": "square_accuracy",
        "confidence %": "clean_confidence",
        "on PGD-1 %": "pgd1_confidence",
    }
    mean = {name: {c: np.mean([getattr(r, c) for r in found]) for c in columns.values()}
            for name, found in reports.items()}  # fmt: skip
    rows = [
        [name, *(f"{mean[name][c] * (100 if '%' in title else 1):.1f}"
                 for title, c in columns.items()), _counted(found)]
        for name, found in reports.items()
    ]  # fmt: skip
    results = {name: {"reports": [r._asdict() for r in found], "signs": [r.signs for r in found]}
               for name, found in reports.items()}  # fmt: skip
    return Study(
        f"Signs of gradient masking, {small.seeds} seeds",
        ["network", *columns, "signs (of how many seeds)"],
        rows,
        results,
        _masking_claims(reports, mean),
    )


def _scaled(networks: Networks) -> Networks:
    """The same networks with logits of many times the size: their gradients vanish."""
    params = {**networks.params}
    params["head"] = jax.tree.map(lambda leaf: SCALE * leaf, params["head"])
    return Networks(params, networks.model_state)


def _counted(reports: list[benchmark.MaskingReport]) -> str:
    signs = [sign for report in reports for sign in report.signs]
    counts = {sign: signs.count(sign) for sign in dict.fromkeys(signs)}
    return ", ".join(f"{sign.replace('_', ' ')} ({n})" for sign, n in counts.items()) or "none"


def _masking_claims(reports, mean) -> list[Claim]:
    def none(name, flags=None):
        raised = {sign for report in reports[name] for sign in report.signs}
        raised = raised if flags is None else raised & set(flags)
        return not raised, _counted(reports[name])

    entries = {name: mean[name]["nonzero_entries"] for name in MASKING}
    every = all(report.signs for report in reports[SCALED])
    claims = [
        Claim("logits times 10,000 raise a sign on every seed", "signs", _counted(reports[SCALED]),
              every),
    ]  # fmt: skip
    for name in (LINEAR, "PGD-10"):
        holds, found = none(name)
        claims.append(Claim(f"{name}: no sign on any seed", "none", found, holds))
    holds, found = none("SOAR, PGD-1", NAMED)
    claims += [
        Claim("SOAR, PGD-1: gradients, transfer, confidence, unbounded attack raise no sign",
              "none of the four", found, holds),
        Claim("SOAR, PGD-1: a search without gradients is no stronger than PGD",
              f">= {100 * mean['SOAR, PGD-1']['pgd_accuracy']:.1f} %",
              f"{100 * mean['SOAR, PGD-1']['square_accuracy']:.1f} %", None),
        Claim("zero points leave the fewest non-zero input gradients of all", "SOAR, zero",
              ", ".join(f"{v:.1f}" for v in entries.values()),
              min(entries, key=entries.__getitem__) == "SOAR, zero"),
        *(Claim(f"{name} raises signs", "signs", _counted(reports[name]), None)
          for name in ("SOAR, zero", "SOAR, random")),
    ]  # fmt: skip
    return claims


ROBUST = ("standard", "PGD-10", "TRADES", "MART", "FOAR, PGD-1", "SOAR, PGD-1")
# Masked in the published table.
OTHER_POINTS = ("SOAR, zero", "SOAR, random")
WIDE = models.MLP((256, 256), num_classes=10)


def transfer(small: Small) -> Study:
    """Examples made on two other standard networks, and a search that sees no gradients."""
    names = ROBUST + OTHER_POINTS
    networks = {name: train(small, name) for name in names}
    sources = standard(small, source=True), standard(small, WIDE, source=True)
    found = evaluate(small, _transfer, networks, small.eps, *sources)
    accuracy = {name: [100 * v.mean() for v in values] for name, values in found.items()}
    rows = [[name, *(f"{v:.1f}" for v in values)] for name, values in accuracy.items()]
    claims = [
        Claim(f"{name}: transfer attacks are no stronger than PGD-20 on itself",
              f">= {accuracy[name][0]:.1f} %",
              ", ".join(f"{v:.1f} %" for v in accuracy[name][2:]),
              bool(min(accuracy[name][2:]) >= accuracy[name][0]))
        for name in ROBUST
    ]  # fmt: skip
    simba = [accuracy[name][1] - accuracy[name][0] for name in names]
    zero = accuracy["SOAR, zero"]
    claims += [
        Claim("on no network SimBA is stronger than PGD-20: least difference", ">= 0 points",
              f"{min(simba):.1f} points", None),
        Claim("SOAR, zero: breaks under transfer, where PGD-20 fails (published: 2.9 and 89.2 %)",
              f"< {zero[0]:.1f} %", f"{zero[2]:.1f} %", None),
    ]  # fmt: skip
    columns = ("white-box PGD-20", "SimBA", "PGD-20, same size", "PGD-20, wider")
    return Study(
        f"Transfer and search, {small.seeds} seeds, accuracy in per cent",
        ["network", *columns],
        rows,
        {name: dict(zip(columns, values, strict=True)) for name, values in found.items()},
        claims,
    )


def _transfer(module: nn.Module, place: Place, shared: tuple) -> tuple[Array, ...]:
    test_set, networks, same, wide = shared
    x, y = test_set["image"], test_set["label"]
    logits_fn = networks.logits_fn(module, place.network)
    threat = threat_of(place.eps)
    pgd = attacks.pgd(threat, steps=20, step_size=threat.eps / 4)
    # One pass over the pixels: at most two queries for each, and the first one.
    simba = attacks.simba(threat, max_queries=2 * x[0].size + 1)
    return tuple(
        metrics.correct(logits_fn(attack(attacked, place.key, x, y)), y).mean()
        for attack, attacked in (
            (pgd, logits_fn),
            (simba, logits_fn),
            (pgd, same.logits_fn(PERCEPTRON, place.seed)),
            (pgd, wide.logits_fn(WIDE, place.seed)),
        )
    )


# Few examples and short runs: the whole is done within a minute.
MEMBERS = ("APGD-CE", "APGD-T (DLR)", "FAB-T", "Square")
AUTOATTACK = ("standard", "PGD-10", "FOAR, PGD-1", "SOAR, PGD-1")
ATTACKED, STEPS, QUERIES = 100, 40, 500


def autoattack(small: Small) -> Study:
    """Each member of AutoAttack by itself, at eps and half of it, and what stands all of them."""
    networks = {name: train(small, name) for name in AUTOATTACK}
    seeds = min(2, small.seeds)
    at = {eps: evaluate(small, _members, networks, eps, seeds=seeds)
          for eps in (small.eps, small.eps / 2)}  # fmt: skip
    # (seeds, members + 1, examples) -> per cent
    accuracy = {eps: {name: 100 * values[0].mean(axis=(0, 2)) for name, values in found.items()}
                for eps, found in at.items()}  # fmt: skip
    rows = [
        [f"{eps:g}", name, *(f"{v:.1f}" for v in values)]
        for eps, found in accuracy.items() for name, values in found.items()
    ]  # fmt: skip
    own = accuracy[small.eps]
    lost = {name: values[0] - values[1] for name, values in own.items()}
    half = all((accuracy[small.eps / 2][name] >= own[name]).all() for name in AUTOATTACK)
    claims = [
        Claim("accuracies are no lower at half the radius", "yes", str(half), bool(half)),
        Claim("from APGD-CE to APGD-T, SOAR loses more than PGD-10 training",
              f"> {lost['PGD-10']:.1f} points", f"{lost['SOAR, PGD-1']:.1f} points", None),
        Claim("FOAR loses more than PGD-10 training too", f"> {lost['PGD-10']:.1f} points",
              f"{lost['FOAR, PGD-1']:.1f} points", None),
    ]  # fmt: skip
    return Study(
        f"Members of AutoAttack, {seeds} seeds, {ATTACKED} examples, accuracy in per cent",
        ["eps", "network", *MEMBERS, "all"],
        rows,
        {f"{eps:g}": found for eps, found in accuracy.items()},
        claims,
        functools.partial(soar_figures.members, accuracy=accuracy, members=(*MEMBERS, "all")),
    )


def _members(module: nn.Module, place: Place, shared: tuple) -> tuple[Array, ...]:
    test_set, networks = shared
    x, y = test_set["image"][:ATTACKED], test_set["label"][:ATTACKED]
    logits_fn = networks.logits_fn(module, place.network)
    threat = threat_of(place.eps)
    members = (
        attacks.apgd(threat, steps=STEPS),
        attacks.apgd_targeted(threat, steps=STEPS),
        attacks.fab_targeted(threat, steps=STEPS, early_stop=True),
        attacks.square(threat, queries=QUERIES),
    )
    robust = [
        metrics.correct(logits_fn(attack(logits_fn, place.key, x, y)), y) for attack in members
    ]
    return (jnp.stack([*robust, jnp.all(jnp.stack(robust), axis=0)]),)


# Shares of the largest radius: 60, 120 and 255 of 443.4 in the units of 1/255 for CIFAR-10.
SHARES = (0.135, 0.271, 0.575, 1.0)
L2 = ("standard", "SOAR, PGD-1", "PGD-10, l_2", "TRADES, l_2")


def l2(small: Small) -> Study:
    """l_2 attacks on networks trained for l_inf by SOAR, and for l_2 by others."""
    networks = {
        name: train(small, name.removesuffix(", l_2"), norm="l2" if "l_2" in name else "linf")
        for name in L2
    }
    largest = l2_radius(small)
    found = evaluate(small, _l2, networks, largest, standard(small, source=True))
    accuracy = {name: 100 * values[0].mean(axis=0) for name, values in found.items()}
    rows = [[name, *(f"{v:.1f}" for v in values)] for name, values in accuracy.items()]
    soar, base = accuracy["SOAR, PGD-1"], accuracy["standard"]
    radii = [share * largest for share in SHARES]
    claims = [
        Claim("SOAR for l_inf over standard training at the largest radius",
              f"> {base[-2]:.1f} %", f"{soar[-2]:.1f} %", bool(soar[-2] > base[-2])),
        Claim("SOAR for l_inf over standard training at every radius",
              ", ".join(f"> {v:.1f}" for v in base[1:-1]),
              ", ".join(f"{v:.1f} %" for v in soar[1:-1]), None),
        Claim("SOAR for l_inf over PGD-10 training for l_2",
              ", ".join(f"> {v:.1f}" for v in accuracy["PGD-10, l_2"][1:-1]),
              ", ".join(f"{v:.1f} %" for v in soar[1:-1]), None),
    ]  # fmt: skip
    return Study(
        f"l_2 attacks, PGD-100, {small.seeds} seeds, accuracy in per cent",
        ["network", "clean", *(f"{radius:.3g}" for radius in radii), f"transfer, {largest:.3g}"],
        rows,
        {"radii": radii, **{name: values[0] for name, values in found.items()}},
        claims,
        functools.partial(soar_figures.over_radius, radii=radii, accuracy=accuracy),
    )


def _l2(module: nn.Module, place: Place, shared: tuple) -> tuple[Array, ...]:
    test_set, networks, sources = shared
    x, y = test_set["image"], test_set["label"]
    logits_fn = networks.logits_fn(module, place.network)

    def attacked(radius, model=logits_fn):
        threat = threat_of(radius, "l2")
        attack = attacks.pgd(threat, steps=100, step_size=2.5 * threat.eps / 100)
        return metrics.correct(logits_fn(attack(model, place.key, x, y)), y).mean()

    white_box = jax.lax.map(attacked, place.eps * jnp.asarray(SHARES))
    moved = attacked(place.eps, sources.logits_fn(PERCEPTRON, place.seed))
    return (jnp.concatenate([metrics.correct(logits_fn(x), y).mean()[None], white_box,
                             moved[None]]),)  # fmt: skip


INTERPOLATED = ("standard", "PGD-10", "SOAR, zero", "SOAR, PGD-1")


def interpolation(small: Small) -> Study:
    """The loss on the way from an example to what PGD-20 finds, and its curvature at the start."""
    networks = {name: train(small, name) for name in INTERPOLATED}
    found = evaluate(small, _interpolated, networks, small.eps)
    curves = {name: values[0] for name, values in found.items()}  # (seeds, points)
    bend = {name: (c[:, 0] - 2 * c[:, 1] + c[:, 2]).mean() for name, c in curves.items()}
    steepest = {name: np.abs(np.diff(c, 2, axis=1)).max(axis=1).mean()
                for name, c in curves.items()}  # fmt: skip
    first = {name: ((c[:, 4] - c[:, 0]) / (c[:, -1] - c[:, 0])).mean()
             for name, c in curves.items()}  # fmt: skip
    rows = [
        [name, f"{c[:, 0].mean():.3f}", f"{c[:, -1].mean():.3f}", f"{100 * first[name]:.1f}",
         f"{bend[name]:.4f}", f"{steepest[name]:.4f}"]
        for name, c in curves.items()
    ]  # fmt: skip
    claims = [
        Claim("standard: flat at x, then a rise: share of it in the first fifth of the way",
              "< 20 % (a straight line)",
              f"{100 * first['standard']:.1f} %", bool(first["standard"] < 0.2)),
        Claim("standard: second difference at x to the largest on the way",
              f"< {steepest['standard']:.4f} / 2", f"{bend['standard']:.4f}",
              bool(abs(bend["standard"]) < steepest["standard"] / 2)),
    ]  # fmt: skip
    return Study(
        "Loss from x to an adversarial example, 21 points, mean over the test set",
        ["network", "loss at x", "at the end", "rise in the first fifth %",
         "second difference at x", "largest"],
        rows,
        {"losses": curves, "second_difference": bend},
        claims,
        functools.partial(soar_figures.interpolation, curves=curves),
    )  # fmt: skip


def _interpolated(module: nn.Module, place: Place, shared: tuple) -> tuple[Array, ...]:
    test_set, networks = shared
    x, y = test_set["image"], test_set["label"]
    logits_fn = networks.logits_fn(module, place.network)
    threat = threat_of(place.eps)
    found = attacks.pgd(threat, steps=20, step_size=threat.eps / 4)(logits_fn, place.key, x, y)
    curves = benchmark.interpolation_losses(logits_fn, x, found, y, loss=losses.cross_entropy)
    return (curves.mean(axis=1),)
