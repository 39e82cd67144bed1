"""Square Attack: its ablations, its query counts, what gradients do not see, and its theory.

  python -m experiments.square_attack                        digits and small networks, 3 minutes
  python -m experiments.square_attack --study=ablation,p
  python -m experiments.square_attack --preset=paper         MNIST and CIFAR-10, published budgets
  python -m experiments.square_attack --preset=paper --dry_run      builds all, runs nothing

ablation  windows, signs and first points: failure, average and median queries
p         the same over the share of pixels in the first windows
seeds     how much they vary
targeted  cross-entropy or margin as the loss of the targeted attack
curves    success rate over queries, beside SimBA with pixels and with cosines
robust    PGD and Square with restarts on an adversarially trained model; l_2 attacks on the model
          trained for l_inf
masking   logits times a constant, which blinds PGD and leaves Square alone
steps     images after 10, 100 and 500 queries
theory    random search against its bound, and why the windows are squares

Source: Andriushchenko et al. (2020), "Square Attack: a query-efficient black-box adversarial attack
via random search", and Andriushchenko (2024), "Understanding generalization and robustness in
modern deep learning", chapter 3. Its ImageNet models are not part of the library: the paper preset
runs their budgets on CIFAR-10, and MNIST as published. The models are trained first, into
WORKDIR/models, or read from the folders of other runs. WORKDIR gets config.json, results.json and
STUDY.png; a run that was interrupted keeps its finished studies when it is started again.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import (
    batch_sizes,
    choices,
    command_line,
    square_figures,
    square_studies,
    trained_models,
)
from experiments.dry_run import dry_run as dry_run_of_training
from experiments.square_jobs import PRESETS, ROLES, Job, Settings, jobs_of
from experiments.training_settings import Settings as TrainingSettings
from robustjax import data, models, training
from robustjax.attacks import StepwiseAttack
from robustjax.benchmark.environment import environment
from robustjax.training import report

# Networks of Madry et al. (2018) on MNIST, in per cent: robust accuracy in Tables 3.4 and 3.5,
# robust accuracy and queries over 10 seeds in Table 3.8.
PUBLISHED_ACCURACY = {
    (0.3, "Square, restarts 50"): 88.25,
    (2.0, "PGD-50, restarts 1"): 79.6,
    (2.0, "PGD-50, restarts 10"): 67.4,
    (2.0, "PGD-50, restarts 100"): 59.8,
    (2.0, "SimBA (pixel)"): 87.6,
    (2.0, "Square"): 16.7,
    (2.5, "PGD-50, restarts 1"): 69.2,
    (2.5, "PGD-50, restarts 10"): 51.3,
    (2.5, "PGD-50, restarts 100"): 36.0,
    (2.5, "SimBA (pixel)"): 75.8,
    (2.5, "Square"): 2.4,
    (3.0, "PGD-50, restarts 1"): 57.6,
    (3.0, "PGD-50, restarts 10"): 29.8,
    (3.0, "PGD-50, restarts 100"): 12.7,
    (3.0, "SimBA (pixel)"): 58.1,
    (3.0, "Square"): 0.6,
}
PUBLISHED_SEEDS = {
    ("robust", "linf"): "87.0 ± 0.1; 299 ± 47; 52 ± 7",
    ("robust", "l2"): "16.0 ± 1.4; 1454 ± 71; 742 ± 78",
}


def main(settings: Settings) -> dict[str, Any] | None:
    """Runs or resumes the studies of these settings; returns what ``results.json`` holds."""
    if settings.dry_run:
        dry_run(settings)
        return None
    config = dataclasses.asdict(settings)
    for name in ("study", "workdir", "resume", "dry_run", "data_dir"):
        del config[name]
    _check_batches(settings)
    workdir = report.open_workdir(settings.workdir, config, resume=settings.resume)
    path = workdir / "results.json"
    results = _kept(path) if settings.resume else {}
    runner = square_studies.Runner(settings, workdir)
    for study in settings.study:
        if study not in results:
            began = time.monotonic()
            found = _study(study, settings, runner, workdir)
            found["seconds"] = round(time.monotonic() - began, 1)
            found["environment"] = environment()
            results[study] = found
            if report.is_writer():
                report.write_json(path, results)
        _print(study, settings, results[study])
    report.print_lines(f"results and figures: {settings.workdir}")
    return results


def _check_batches(settings: Settings) -> None:
    """Refuses now what would be refused when a study first needs its model."""
    needed = {job.role for study in settings.study for job in jobs_of(study, settings)}
    if "steps" in settings.study:
        needed.add("robust")
    for role in sorted(needed):
        own = settings.training(role)
        if own is not None and not square_studies.is_trained(own):
            name = f"train_batch_size of {getattr(settings, role)}"
            batch_sizes.check_training(own.batch_size, name=name)


def _kept(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold the results of finished studies: it is damaged")
    return found


def _study(
    study: str, settings: Settings, runner: square_studies.Runner, workdir: Path
) -> dict[str, Any]:
    jobs = jobs_of(study, settings)
    if jobs:
        found = square_studies.run_jobs(jobs, runner, study)
    elif study == "theory":
        found = square_studies.theory_study(settings.seed)
    else:
        found, shown = square_studies.trajectories(settings, runner)
        if report.is_writer():
            square_figures.steps(shown, workdir / f"{study}.png")
    if report.is_writer() and study in square_figures.FIGURES:
        square_figures.FIGURES[study](found, workdir / f"{study}.png")
    return found


def _print(study: str, settings: Settings, result: Mapping[str, Any]) -> None:
    seconds = f"{float(result['seconds']):.0f} s"
    if study == "theory":
        _print_theory(result, seconds)
    elif study == "steps":
        _print_steps(result, seconds)
    else:
        _print_rows(study, settings, result, seconds)


# Column, its heading, and how a number is shown.
_COLUMNS = (
    ("failure", "failure %", lambda v: f"{100 * v:.1f}"),
    ("robust accuracy", "accuracy %", lambda v: f"{100 * v:.1f}"),
    ("mean", "average", lambda v: f"{v:.1f}"),
    ("median", "median", lambda v: f"{v:.1f}"),
    ("size", "norm / eps", lambda v: f"{v:.3f}"),
    ("largest size", "largest", lambda v: f"{v:.3f}"),
    ("common mean", "average, common", lambda v: f"{v:.1f}"),
    ("common median", "median, common", lambda v: f"{v:.1f}"),
    ("same outcome", "same outcome %", lambda v: f"{100 * v:.1f}"),
    ("same queries", "same queries %", lambda v: f"{100 * v:.1f}"),
)


def _print_rows(study: str, settings: Settings, result: Mapping[str, Any], seconds: str) -> None:
    rows = result["rows"]
    labels = list(jobs_of(study, settings)[0].label)
    shown = [column for column in _COLUMNS if any(column[0] in row for row in rows)]
    published = _published(study, settings)
    with_spread = any(len(row["seeds"]["failure"]) > 1 for row in rows)

    def cell(row: Mapping[str, Any], name: str, form: Callable[[float], str]) -> str:
        if name not in row:
            return ""
        text = form(float(row[name]))
        if with_spread and name in row["std"]:
            text += f" ± {form(float(row['std'][name]))}"
        return text

    counts = "/".join(dict.fromkeys(str(row["examples"]) for row in rows))
    title = f"{study}: {counts} examples, {seconds}"
    columns = [*labels, *(heading for _, heading, _ in shown)]
    if published:
        title += "; published, %: another network, the same training, data and budget"
        columns.append("published")
    table = []
    for row in rows:
        cells = [f"{row[k]:.4g}" if isinstance(row[k], float) else row[k] for k in labels]
        cells += [cell(row, name, form) for name, _, form in shown]
        table.append([*cells, *([published(row)] if published else [])])
    report.print_table(title, columns, table)
    report.print_lines(
        *(
            f"{name}: {model['dataset']}, clean {report.percent(model['clean_accuracy'])}"
            for name, model in result["models"].items()
        ),
        *remarks(study, result),
    )


def _published(study: str, settings: Settings) -> Callable[[Mapping[str, Any]], str] | None:
    """The published numbers of a row, if the run is that of the paper but for the network."""
    free = ("study", "standard", "seed", "batch_size", "workdir", "resume", "data_dir")
    of_paper = dataclasses.replace(
        PRESETS["paper"], **{name: getattr(settings, name) for name in free}
    )
    if settings != of_paper:
        return None
    if study == "robust":
        return lambda row: str(PUBLISHED_ACCURACY.get((row["eps"], row["attack"]), ""))
    if study == "seeds":
        return lambda row: PUBLISHED_SEEDS.get((row["model"], row["norm"]), "")
    return None


def remarks(study: str, result: Mapping[str, Any]) -> list[str]:
    """What the paper finds and whether these numbers agree, with the numbers."""
    rows = result["rows"]
    if study == "ablation":
        mean = {(row["variant"], row["init"]): float(row["mean"]) for row in rows}
        own = mean.get(("square channel", "vertical_stripes"))
        others = {
            variant: value
            for (variant, init), value in mean.items()
            if variant.startswith(("random", "rectangle")) and init == "vertical_stripes"
        }
        if own is None or not others:
            return []
        lowest = min(others.values())
        listed = ", ".join(f"{variant} {value:.1f}" for variant, value in others.items())
        return [f"squares need fewer queries: {_yes(own < lowest)} ({own:.1f} against {listed})"]
    if study == "p":
        found = []
        for norm in dict.fromkeys(row["norm"] for row in rows):
            failures = [100 * float(row["failure"]) for row in rows if row["norm"] == norm]
            low, high = min(failures), max(failures)
            found.append(f"{norm}: failure from {low:.1f} to {high:.1f} % over all p")
        return found
    if study == "targeted":
        found = []
        for norm in dict.fromkeys(row["norm"] for row in rows):
            ce, margin = (
                next(
                    100 * float(r["failure"])
                    for r in rows
                    if (r["norm"], r["loss"]) == (norm, loss)
                )
                for loss in ("cross-entropy", "margin")
            )
            agrees = _yes(ce <= margin + 1)
            found.append(
                f"{norm}: cross-entropy fails at most a point more often than margin: {agrees} "
                f"({ce:.1f} % against {margin:.1f} %)"
            )
        return found
    if study == "masking":
        same = all(
            float(row["same outcome"]) == float(row["same queries"]) == 1
            for row in rows
            if row["attack"] == "Square" and np.log2(row["logits times"]) % 1 == 0
        )
        return [f"Square is exactly the same with logits times a power of two: {_yes(same)}"]
    return []


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _print_steps(result: Mapping[str, Any], seconds: str) -> None:
    rows = [
        [norm, example, f"{size / of_norm['eps']:.3f}", *(f"{m[i]:.3f}" for m in of_norm["margin"])]
        for norm, of_norm in result["norms"].items()
        for i, (example, size) in enumerate(zip(of_norm["examples"], of_norm["size"], strict=True))
    ]
    report.print_table(
        f"steps: {result['model']}, margin of the attack (positive: broken), {seconds}",
        ["norm", "example", "norm / eps", *(f"{q} queries" for q in result["queries"])],
        rows,
    )


def _print_theory(result: Mapping[str, Any], seconds: str) -> None:
    report.print_table(
        f"Proposition 3.5.1: random search on a quadratic, {square_studies.DIMENSION} dimensions, "
        f"{square_studies.RUNS} runs, {seconds}",
        ["steps T", "smallest mean gradient norm", "bound", "holds", "values never rise"],
        [
            [r["steps"], f"{r['smallest mean gradient norm']:.4f}", f"{r['bound']:.4f}",
             _yes(r["smallest mean gradient norm"] <= r["bound"]), _yes(r["never rises"])]
            for r in result["search"]
        ],
    )  # fmt: skip
    kinds = [f"{kind} {s}" for s in square_studies.SIDES for kind in ("formula", "counted")]
    report.print_table(
        "Proposition 3.5.2: most s x s windows in an update of area k; counted over all staircases",
        ["area k", *(f"{kind}x{kind[-1]}" for kind in kinds)],
        [[r["area"], *(r.get(kind, "") for kind in kinds)] for r in result["windows"]],
    )
    responses = ", ".join(f"{name} {value:.3f}" for name, value in result["response"].items())
    report.print_lines(
        f"largest response of random 3x3 filters to 16 pixels, over eps: {responses}"
    )


def dry_run(settings: Settings) -> None:
    """Builds models and attacks abstractly and prints what the studies cost at most."""
    costs, arguments = {}, {}
    for role in ROLES:
        own = settings.training(role)
        if own is not None:
            dry_run_of_training(own)
        elif (Path(getattr(settings, role)) / report.CONFIG).exists():
            own = trained_models.read_settings(getattr(settings, role))
        else:
            own = TrainingSettings()  # what such a run has if no flag changed it
        arguments[role], costs[role] = _abstract(settings, own)
    rows, built = [], set()
    for study in settings.study:
        counts = {"query": 0, "gradient": 0}
        flops, jobs = 0.0, jobs_of(study, settings)
        for job in jobs:
            attack = job.make(job.threat)
            name = (job.role, job.threat.norm, job.make.func, *sorted(job.make.keywords.items()))
            if name not in built:
                jax.eval_shape(attack, *arguments[job.role])
                built.add(name)
            kind, evaluations = _evaluations(job, attack)
            total = evaluations * job.seeds * job.examples
            counts[kind] += total
            flops += total * costs[job.role][kind]
        shown = [f"{counts[kind]:.3e}" if counts[kind] else "" for kind in counts]
        rows.append([study, len(jobs) or "", *shown, f"{flops:.3e}" if jobs else ""])
    report.print_table(
        f"Dry run: {settings.standard} (standard), {settings.robust} (robust)",
        ["study", "attacks", "queries", "gradients", "FLOPs if no example breaks"],
        rows,
    )


def _evaluations(job: Job, attack: Any) -> tuple[str, int]:
    """What an attack asks of the model for each example at most, and how often."""
    if isinstance(attack, StepwiseAttack):
        start = 1 if "queries" in job.make.keywords else 0  # the first point of Square
        return "query", attack.rounds * (attack.steps + start)
    options = job.make.keywords
    return "gradient", options["restarts"] * (options["steps"] + 1)


def _abstract(settings: Settings, own: TrainingSettings) -> tuple[tuple, dict[str, float]]:
    """Arguments of an attack, and FLOPs of a query and of a gradient for one example."""
    facts = choices.DATA_FACTS.get(own.dataset)
    if facts is None:
        test = data.load(own.dataset, "test", data_dir=settings.data_dir)
        facts = choices.DataFacts(test.image.shape[1:], test.num_classes, len(test))
    make = choices.MODELS[own.model]
    model = models.from_linen(make(facts.num_classes, own.width, own.normalization, jnp.float32))
    n = settings.batch_size
    image = jax.ShapeDtypeStruct((n, *facts.image_shape), jnp.float32)
    label = jax.ShapeDtypeStruct((n,), jnp.int32)
    example_keys = jax.eval_shape(functools.partial(jax.random.split, num=n), jax.random.key(0))
    params, model_state = jax.eval_shape(model.init, jax.random.key(0), image)
    logits_fn = models.eval_logits(model.apply, params, model_state)

    def forward(logits_fn, x):
        return logits_fn(x)

    gradient = jax.grad(lambda x, logits_fn: logits_fn(x).sum())
    costs = {
        "query": training.count_flops(forward, logits_fn, image) / n,
        "gradient": training.count_flops(gradient, image, logits_fn) / n,
    }
    return (logits_fn, example_keys, image, label), costs


if __name__ == "__main__":
    command_line.run(main, Settings, PRESETS, __doc__)
