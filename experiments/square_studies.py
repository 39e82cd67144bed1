"""Runs the studies of Square Attack: attacks on data sets, pictures on the way, and the theory."""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments import adversarial_training, batch_sizes, choices, trained_models
from experiments.square_jobs import Job, Settings
from experiments.training_settings import Settings as TrainingSettings
from robustjax import data, keys, theory
from robustjax.attacks import square
from robustjax.benchmark import BatchedFunction, ChunkedAttack
from robustjax.metrics import correct
from robustjax.metrics.queries import common_query_statistics, query_statistics, success_curve
from robustjax.theory.random_search import SearchTrace
from robustjax.threat import ThreatModel

PICTURE_QUERIES = (10, 100, 500)
PICTURES = 4


class Subject(NamedTuple):
    """A model and examples that it has not seen.

    Attributes:
      logits_fn: a ``jax.tree_util.Partial`` over the parameters.
      name: for tables.
      x: images.
      y: labels.
      correct: the model is right on them.
      num_classes: number of classes.
      dataset: name of the data set.
    """

    logits_fn: Callable
    name: str
    x: np.ndarray
    y: np.ndarray
    correct: np.ndarray
    num_classes: int
    dataset: str


class Outcome(NamedTuple):
    """What one seed of a job gave, one entry per example.

    Attributes:
      broken: the model was right, and is wrong on (or takes for the target) what was returned.
      queries: queries spent; None for attacks that ask for gradients.
      size: norm of the perturbation, over the radius.
    """

    broken: np.ndarray
    queries: np.ndarray | None
    size: np.ndarray


def is_trained(training: TrainingSettings) -> bool:
    """Whether the run of these settings has ended."""
    return (Path(training.workdir) / training.objective[0] / "results.json").exists()


class Runner:
    """Runs jobs; models are trained or read, and attacks compiled, once."""

    def __init__(self, settings: Settings, workdir: Path):
        self._settings, self._workdir = settings, workdir
        self._batch_size = batch_sizes.for_evaluation(settings.batch_size)
        self._compiled: dict[Any, ChunkedAttack] = {}
        self._subjects: dict[str, Subject] = {}
        self._structures: dict[tuple, Any] = {}

        def judge(fixed: tuple, numbers: tuple, examples: tuple) -> tuple[Array, Array, Array]:
            (logits_fn, threat), (x_adv, x, wanted) = fixed, examples
            size = threat.norm.value(x_adv - x, batch_ndim=1) / threat.eps
            return correct(logits_fn(x_adv), wanted), threat.contains(x_adv, x), size

        self._judge = BatchedFunction(judge, batch_size=self._batch_size)

    def subject(self, role: str) -> Subject:
        """The model of a role with all the test examples that any of its jobs needs."""
        if role not in self._subjects:
            self._subjects[role] = self._make_subject(role)
        return self._subjects[role]

    def _make_subject(self, role: str) -> Subject:
        settings = self._settings
        wanted = settings.examples
        if role == "robust" and "robust" in settings.study:
            wanted = max(wanted, settings.robust_examples)
        training = settings.training(role)
        if training is None:
            folder = getattr(settings, role)
        else:
            folder = f"{training.workdir}/{training.objective[0]}"
            trained_models.evaluation_set(training, "test", wanted)  # or its error, before training
            if not is_trained(training):
                adversarial_training.main(training)
        trained = trained_models.load(folder, settings.which, data_dir=settings.data_dir)
        test = trained_models.evaluation_set(trained.settings, "test", wanted)
        x, y = data.as_float(test.image), test.label
        # As pytrees of one structure, models of one architecture share all compiled programs.
        own = trained.settings
        architecture = (own.model, own.width, own.normalization, test.num_classes)
        leaves, structure = jax.tree.flatten(trained.logits_fn)
        structure = self._structures.setdefault(architecture, structure)
        logits_fn = jax.tree.unflatten(structure, leaves)
        placed = self._judge.place(
            (_with_scale(logits_fn, 1.0), ThreatModel(choices.NORMS["linf"], 1.0))
        )
        right = self._judge(placed, (), (x, x, y))[0]
        return Subject(logits_fn, trained.name, x, y, right, test.num_classes, test.name)

    def __call__(self, job: Job) -> list[Outcome]:
        """One outcome for each seed; seed ``s`` of all jobs has the same key.

        Raises:
          ValueError: an attack returned a point outside of the threat model.
        """
        subject = self.subject(job.role)
        logits_fn = _with_scale(subject.logits_fn, job.scale)
        name = (job.make.func, *sorted(job.make.keywords.items()))
        if name not in self._compiled:
            self._compiled[name] = ChunkedAttack(job.make, batch_size=self._batch_size)
        attack = self._compiled[name]
        n = job.examples
        x, y, right = subject.x[:n], subject.y[:n], subject.correct[:n]
        index = np.arange(n, dtype=np.int32)
        placed = self._judge.place((logits_fn, job.threat))
        outcomes = []
        for seed in range(self._settings.seed, self._settings.seed + job.seeds):
            wanted = y
            if job.targeted:
                shift = np.random.default_rng(seed).integers(1, subject.num_classes, n)
                wanted = ((y + shift) % subject.num_classes).astype(np.int32)
            x_adv, state = attack(logits_fn, job.threat, jax.random.key(seed), x, wanted, index)
            hit, inside, size = self._judge(placed, (), (x_adv, x, wanted))
            if not inside.all():
                raise ValueError(
                    f"x_adv must lie in the threat model, got points of {job.label} outside"
                )
            queries = None if state is None else np.array(state.queries)
            outcomes.append(Outcome(right & (hit == job.targeted), queries, size))
        return outcomes


def _with_scale(logits_fn: Callable, scale: float) -> jax.tree_util.Partial:
    return jax.tree_util.Partial(_scaled, logits_fn, jnp.float32(scale))


def _scaled(logits_fn: Callable, scale: Array, x: Array) -> Array:
    return scale * logits_fn(x)


def run_jobs(jobs: list[Job], runner: Runner, study: str) -> dict[str, Any]:
    """The result of a study of jobs: one row for each, with what its study adds."""
    outcomes = [runner(job) for job in jobs]
    found: dict[str, Any] = {
        "rows": [
            measured(job, of_job, runner.subject(job.role))
            for job, of_job in zip(jobs, outcomes, strict=True)
        ]
    }
    subjects = [runner.subject(role) for role in dict.fromkeys(job.role for job in jobs)]
    found["models"] = {
        s.name: {"dataset": s.dataset, "clean_accuracy": float(s.correct.mean())} for s in subjects
    }
    if study in ("curves", "targeted"):
        most = max(int(outcome.queries.max()) for of_job in outcomes for outcome in of_job)
        budgets = np.unique(np.geomspace(1, max(most, 2), 50).round().astype(int))
        found["budgets"] = budgets.tolist()
        for row, job, of_job in zip(found["rows"], jobs, outcomes, strict=True):
            right = runner.subject(job.role).correct[: job.examples]
            curve = success_curve(
                jnp.stack([o.queries for o in of_job]),
                jnp.stack([o.broken for o in of_job]),
                jnp.asarray(budgets),
                jnp.asarray(right),
            )
            row["curve"] = np.asarray(curve).mean(axis=0).tolist()
            row["size"] = float(np.mean([o.size[right].mean() for o in of_job]))
            row["largest size"] = float(max(o.size.max() for o in of_job))
    if study == "curves":
        _add_common(found["rows"], jobs, outcomes, runner)
    if study == "masking":
        plain: dict[tuple, Outcome] = {}
        for row, of_job in zip(found["rows"], outcomes, strict=True):
            first = plain.setdefault((row["model"], row["attack"]), of_job[0])
            row["same outcome"] = float((of_job[0].broken == first.broken).mean())
            if first.queries is not None:
                row["same queries"] = float((of_job[0].queries == first.queries).mean())
    return found


def measured(job: Job, outcomes: list[Outcome], subject: Subject) -> dict[str, Any]:
    """Failure, accuracy and queries of a job: averages over its seeds, and each seed's.

    Failure is the share of the initially correct points that stay so; queries are of the broken
    ones.
    """
    right = subject.correct[: job.examples]
    broken = jnp.stack([outcome.broken for outcome in outcomes])
    asks = outcomes[0].queries is not None
    queries = jnp.stack([o.queries for o in outcomes]) if asks else jnp.zeros(broken.shape, int)
    found = query_statistics(queries, broken, jnp.asarray(right))
    seeds = {
        "failure": np.asarray(found.failure_rate),
        "robust accuracy": np.asarray(found.points - found.successes) / job.examples,
    }
    if asks:
        seeds |= {"mean": np.asarray(found.mean), "median": np.asarray(found.median)}
    row = {**job.label, "points": int(right.sum()), "examples": job.examples}
    row |= {name: float(values.mean()) for name, values in seeds.items()}
    row["std"] = {name: float(values.std()) for name, values in seeds.items()}
    row["seeds"] = {name: values.tolist() for name, values in seeds.items()}
    return row


def _add_common(found: list[dict], jobs: list[Job], outcomes: list, runner: Runner) -> None:
    """Queries on the points that all attacks of a norm break, as in Table 3.3."""
    for norm in dict.fromkeys(job.label["norm"] for job in jobs):
        mine = [i for i, job in enumerate(jobs) if job.label["norm"] == norm]
        first = jobs[mine[0]]
        statistics = common_query_statistics(
            jnp.stack([outcomes[i][0].queries for i in mine]),
            jnp.stack([outcomes[i][0].broken for i in mine]),
            jnp.asarray(runner.subject(first.role).correct[: first.examples]),
        )
        for place, i in enumerate(mine):
            found[i]["common points"] = int(statistics.successes[place])
            found[i]["common mean"] = float(statistics.mean[place])
            found[i]["common median"] = float(statistics.median[place])


def trajectories(settings: Settings, runner: Runner) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figure 3.8: what the attack has made of the most resistant images after 10, 100, 500 queries.

    Returns:
      The result, and what the figure shows: images, and for each norm the adversarial ones.
    """
    subject = runner.subject("robust")
    n = min(settings.batch_size, settings.examples)
    x, y = subject.x[:n], subject.y[:n]
    example_keys = keys.per_example(jax.random.key(settings.seed), jnp.arange(n, dtype=jnp.int32))
    at = sorted({min(q, settings.queries) for q in PICTURE_QUERIES})
    found: dict[str, Any] = {"queries": at, "model": subject.name, "norms": {}}
    shown: dict[str, Any] = {"title": subject.name, "queries": at, "norms": {}}
    for norm in settings.norms:
        threat = ThreatModel(choices.NORMS[norm], getattr(settings, f"robust_eps_{norm}"))
        attack = square(
            threat, queries=settings.queries, p_init=getattr(settings, f"p_{norm}"), has_aux=True
        )
        states = list(_states(attack, subject.logits_fn, example_keys, x, y, at))
        resists = np.where(subject.correct[:n], states[-1].queries, -1)
        chosen = np.sort(np.argsort(-resists, kind="stable")[:PICTURES])
        size = threat.norm.value(jnp.asarray(states[-1].x_adv - x), batch_ndim=1)
        margins = np.stack([state.margin[chosen] for state in states])
        found["norms"][norm] = {
            "eps": float(threat.eps),
            "examples": chosen.tolist(),
            "margin": margins.tolist(),
            "size": np.asarray(size)[chosen].tolist(),
        }
        shown["norms"][f"{norm}, {float(threat.eps):.3g}"] = {
            "image": x[chosen],
            "adversarial": [np.asarray(state.x_adv)[chosen] for state in states],
            "margin": margins,
        }
    return found, shown


def _states(attack: Any, logits_fn: Callable, own_keys: Array, x: Any, y: Any, at: list[int]):
    """The states after so many queries each, the first of them asked by the initial point."""

    @jax.jit
    def begin(logits_fn, own_keys, x, y):
        state = attack.init(logits_fn, own_keys, x, y)
        return attack.start(logits_fn, 0, own_keys, state, x, y)

    @jax.jit
    def advance(logits_fn, first, last, own_keys, state, x, y):
        return attack.advance(logits_fn, 0, first, last, own_keys, state, x, y)

    state, done = begin(logits_fn, own_keys, x, y), 1
    for queries in at:
        state = advance(logits_fn, done - 1, queries - 1, own_keys, state, x, y)
        done = queries
        yield jax.tree.map(np.asarray, state)


# Proposition 3.5.1: g(x) = x^T A x / 2 with eigenvalues 1/10 .. 1.
DIMENSION = 10
STEPS = (10, 30, 100, 300, 1000)
RUNS = 500
GAMMA = 3.0
# Proposition 3.5.2: areas, and filters of these sides.
AREAS = range(4, 21)
SIDES = (2, 3)
# Updates of area 16 on images of this side, seen by that many random 3x3 filters.
FILTERS = 2000
IMAGE = 24


def theory_study(seed: int) -> dict[str, Any]:
    """Propositions 3.5.1 and 3.5.2 in numbers, and how convolutions respond to windows."""
    return {
        "search": list(_searches(seed)),
        "windows": [
            {
                "area": k,
                **{f"formula {s}": theory.max_windows(k, s) for s in SIDES if k >= s * s},
                **{f"counted {s}": _most_windows(k, s) for s in SIDES if k >= s * s},
            }
            for k in AREAS
        ],
        "response": _responses(seed),
    }


def _searches(seed: int) -> Iterator[dict[str, Any]]:
    eigenvalues = jnp.linspace(0.1, 1.0, DIMENSION)
    start = jnp.ones(DIMENSION)
    constants = theory.sphere_constants(DIMENSION)

    def g(x: Array) -> Array:
        return 0.5 * (eigenvalues * x**2).sum()

    for steps in STEPS:
        # T + 1 steps of length gamma / sqrt(T) lead to x_{T+1}.
        length = GAMMA / math.sqrt(steps)

        def search(key: Array, steps=steps, length=length) -> SearchTrace:
            def sample(key: Array, t: Array) -> Array:
                return theory.sample_sphere(key, (DIMENSION,), length)

            return theory.random_search(g, sample, key, start, steps=steps + 1)

        trace = jax.jit(jax.vmap(search))(jax.random.split(jax.random.key(seed), RUNS))
        norms = jnp.linalg.norm(eigenvalues * trace.x[:, : steps + 1], axis=-1)
        gap = float(trace.value[0, 0] - trace.value[:, -1].mean())
        bound = functools.partial(
            theory.gradient_norm_bound, constants, gamma=GAMMA, steps=steps, smoothness=1.0
        )
        yield {
            "steps": steps,
            "smallest mean gradient norm": float(norms.mean(axis=0).min()),
            "bound": bound(gap=gap),
            "never rises": bool((jnp.diff(trace.value, axis=1) <= 0).all()),
        }


def _most_windows(area: int, s: int) -> int:
    """The largest count over all staircases: shapes of rows that get no longer downwards."""
    shapes = np.array(list(_staircases(area, area)))  # row lengths, padded by zeros
    masks = np.arange(area) < shapes[:, :, None]
    return int(jax.vmap(lambda mask: theory.count_windows(mask, s))(jnp.asarray(masks)).max())


def _staircases(area: int, longest: int, depth: int | None = None) -> Iterator[list[int]]:
    depth = area if depth is None else depth
    if area == 0:
        yield [0] * depth
        return
    for first in range(min(area, longest), 0, -1):
        for rest in _staircases(area - first, first, depth - 1):
            yield [first, *rest]


def _responses(seed: int) -> dict[str, float]:
    supports = {name: np.zeros((IMAGE, IMAGE), bool) for name in ("square", "rectangle", "random")}
    supports["square"][10:14, 10:14] = True
    supports["rectangle"][11:13, 8:16] = True
    chosen = np.random.default_rng(seed).choice(IMAGE**2, 16, replace=False)
    supports["random"].flat[chosen] = True
    filter_key, sign_key = jax.random.split(jax.random.key(seed))
    filters = jax.random.normal(filter_key, (3, 3, 1, FILTERS)) / 3
    return {
        name: float(theory.mean_response(sign_key, jnp.asarray(support), filters))
        for name, support in supports.items()
    }
