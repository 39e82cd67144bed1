"""AutoAttack: an ensemble of parameter-free attacks, one after the other on what still stands.

| version | attacks |
|---|---|
| ``standard`` | APGD-CE; APGD-T (DLR); FAB-T; Square with 5,000 queries |
| ``plus`` | APGD-CE, APGD-DLR, FAB with 5 restarts each; Square; APGD-T; FAB-T |
| ``rand`` | APGD-CE, APGD-DLR with gradients averaged over 20 draws, for randomised models |
| ``original`` | APGD-CE, APGD-DLR, FAB, Square |

100 iterations each, and 9 targets for the targeted ones. Any other ensemble is a mapping from
names to ``make_attack(threat)``.

Source: Croce & Hein (2020), "Reliable evaluation of adversarial robustness with an ensemble of
diverse parameter-free attacks", section 6; the versions are those of the reference implementation.
Deviations: see ``apgd``, ``fab`` and ``square``. Square draws for each example by itself, while the
reference implementation shares windows and signs in a batch, and it uses every position.
"""

import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Float, Int

from robustjax import checks, keys
from robustjax.attacks import apgd, apgd_targeted, fab, fab_targeted, square
from robustjax.attacks.stepwise import as_partial
from robustjax.benchmark import flags, state_file
from robustjax.benchmark.batches import BatchedFunction
from robustjax.benchmark.chunks import ChunkedAttack, Position
from robustjax.benchmark.compilation import compilations
from robustjax.benchmark.flags import Flag
from robustjax.benchmark.state_file import fingerprint
from robustjax.losses import dlr
from robustjax.metrics.accuracy import correct
from robustjax.threat import ThreatModel
from robustjax.threat import check as check_threat

VERSIONS = ("standard", "plus", "rand", "original")
TARGETS = 9
EOT = 20
# Losses that need more classes than two: an attack of the versions by its name.
LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}
FLAG_EXAMPLES = 64

MakeAttack = Callable[[ThreatModel], Any]


class AttackRecord(NamedTuple):
    """What one attack of the ensemble did.

    Attributes:
      name: of the attack.
      attacked: examples that it was run on, those still robust.
      broken: how many of them it broke.
      robust_accuracy: after it, in [0, 1].
      seconds: in all.
      compile_seconds: of them, spent by XLA on compiling.
      rounds: its budget: restarts, or targets; None if the attack does not say.
      steps: steps in a round, a gradient or a query each; None if the attack does not say.
    """

    name: str
    attacked: int
    broken: int
    robust_accuracy: float
    seconds: float
    compile_seconds: float
    rounds: int | None
    steps: int | None


class AutoAttackResult(NamedTuple):
    """The outcome of an ensemble on ``n`` examples.

    Attributes:
      x_adv: an adversarial example where one was found, else the input; all feasible.
      robust: the model is right on ``x_adv``, evaluated anew; ``(n,)``.
      correct: the model is right on the clean input, ``(n,)``.
      attacks: a record of each attack.
      flags: warnings.
      states: the final state of each stepwise attack on the examples that it was run on, and which
        these are: ``{name: (state, rows)}``; e.g. the queries of Square. Attacks that ended before
        an interruption are not among them.
    """

    x_adv: np.ndarray
    robust: np.ndarray
    correct: np.ndarray
    attacks: tuple[AttackRecord, ...]
    flags: tuple[Flag, ...]
    states: Mapping[str, tuple[Any, np.ndarray]]

    @property
    def clean_accuracy(self) -> float:
        """Share of the examples that the model gets right."""
        return float(self.correct.mean())

    @property
    def robust_accuracy(self) -> float:
        """Share of the examples that the model gets right at ``x_adv``: an upper bound."""
        return float(self.robust.mean())


def ensemble(version: str, num_classes: int) -> dict[str, MakeAttack]:
    """The attacks of a version, by name and in order, for a model of so many classes.

    Targeted attacks aim at no more classes than there are wrong ones, and attacks whose loss needs
    more classes are left out; both make a flag of the evaluation.

    Raises:
      ValueError: the version is none of ``standard``, ``plus``, ``rand``, ``original``.
    """
    checks.choice("version", version, VERSIONS)
    targets = min(TARGETS, num_classes - 1)
    runs, eot = (5 if version == "plus" else 1), (EOT if version == "rand" else None)
    known: dict[str, MakeAttack] = {
        "apgd-ce": functools.partial(apgd, restarts=runs, eot=eot),
        "apgd-dlr": functools.partial(apgd, loss=dlr, restarts=runs, eot=eot),
        "apgd-t": functools.partial(apgd_targeted, targets=targets),
        "fab": functools.partial(fab, restarts=runs, early_stop=True),
        "fab-t": functools.partial(fab_targeted, targets=targets, early_stop=True),
        "square": functools.partial(
            square, queries=5000, p_init=0.8, schedule="reference", rescale_schedule=False
        ),
    }
    names = {
        "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
        "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
        "rand": ("apgd-ce", "apgd-dlr"),
        "original": ("apgd-ce", "apgd-dlr", "fab", "square"),
    }[version]
    return {name: known[name] for name in names if num_classes >= LEAST_CLASSES.get(name, 2)}


def auto_attack(
    version: str | Mapping[str, MakeAttack] = "standard",
    *,
    batch_size: int = 128,
    mesh: Mesh | None = None,
    randomized: bool | None = None,
    gradient_free: Collection[str] = ("square", "simba"),
) -> Callable[..., AutoAttackResult]:
    """Compiles an ensemble once, for every model, radius and data set that it is then called on.

    Args:
      version: ``"standard"``, ``"plus"``, ``"rand"``, ``"original"``, or a mapping from names to
        ``make_attack(threat) -> attack``.
      batch_size: examples at a time, over all devices; divisible by their number. Larger ones suit
        accelerators.
      mesh: devices; default all of all hosts.
      randomized: the model is called as ``logits_fn(x, keys)``, one key per example; by default
        only by the version ``"rand"``.
      gradient_free: names of attacks that use no gradients, whose success after white-box attacks
        is a warning.

    Returns:
      ``evaluate(logits_fn, threat, key, x, y, *, index=None, state_path=None, save_every=10.0,
      on_attack=None) -> AutoAttackResult``. ``threat`` has one ``eps``. ``index (n,)`` are the
      places of the examples in their data set, ``0 .. n-1`` by default, from which their random
      numbers come. With a ``state_path`` the evaluation is saved about every ``save_every`` seconds
      and after each attack, and a call with the same arguments goes on from there; its end leaves
      the file, so that a further call gives the result at once. ``on_attack(record)`` is called
      after each attack. Each host passes all examples and gets the whole result.

    Raises:
      ValueError: an argument is out of range; of a call: inputs are not finite or not in the box,
        labels are not classes of the model, an attack returns points outside of the threat model,
        or the state file is of another evaluation.
    """
    if isinstance(version, str):
        checks.choice("version", version, VERSIONS)
    elif not isinstance(version, Mapping) or not version:
        raise ValueError(
            f"version must be one of {', '.join(VERSIONS)}, or map names to functions, "
            f"got {checks.shown(version)}"
        )
    else:
        for name, make in version.items():
            checks.function(f"attack {name}", make)
    randomized = version == "rand" if randomized is None else randomized
    title = version if isinstance(version, str) else "custom"
    options = {"batch_size": batch_size, "mesh": mesh}

    @functools.cache
    def compiled_for(num_classes: int) -> dict[str, ChunkedAttack]:
        named = ensemble(version, num_classes) if isinstance(version, str) else version
        return {name: ChunkedAttack(make, **options) for name, make in named.items()}

    def judge(fixed: tuple, numbers: tuple, rows: tuple) -> tuple[Array, Array]:
        (logits_fn, threat, key), (x_adv, x, y, index) = fixed, rows
        draw = (keys.per_example(key, index),) if randomized else ()
        return correct(logits_fn(x_adv, *draw), y), threat.contains(x_adv, x)

    judged = BatchedFunction(judge, **options)

    def evaluate(
        logits_fn: Callable[..., Array],
        threat: ThreatModel,
        key: Array,
        x: Float[ArrayLike, "n ..."],
        y: Int[ArrayLike, " n"],
        *,
        index: Int[ArrayLike, " n"] | None = None,
        state_path: str | Path | None = None,
        save_every: float = 10.0,
        on_attack: Callable[[AttackRecord], None] = lambda record: None,
    ) -> AutoAttackResult:
        check_threat(threat)
        if jnp.ndim(threat.eps):
            raise ValueError(f"eps must be one number, got shape {jnp.shape(threat.eps)}")
        keys.check_one(key)
        logits_fn = as_partial(logits_fn)
        x, y = np.asarray(x), np.asarray(y, np.int32)
        checks.batch(x, y)
        threat.check_inputs(x)
        index = np.arange(len(x)) if index is None else np.asarray(index)
        index = checks.per_example("index", index, len(x)).astype(np.int32)
        few = slice(0, FLAG_EXAMPLES)
        draw = (keys.as_per_example(key, len(x[few])),) if randomized else ()
        num_classes = jax.eval_shape(logits_fn, x[few], *draw).shape[-1]
        checks.labels("y", y, num_classes=num_classes)
        chunked = compiled_for(num_classes)

        some = jnp.asarray(x[few]), jnp.asarray(y[few])
        seen = flags.of_model(logits_fn, *some, key, randomized=randomized)
        if isinstance(version, str) and version != "rand":
            seen += flags.class_count(num_classes, TARGETS)
        judge_key, attack_key = jax.random.split(key)
        fixed = judged.place((logits_fn, threat, judge_key))
        clean, _ = judged(fixed, (), (x, x, y, index))
        setting = {
            "version": title,
            "attacks": list(chunked),
            "norm": threat.norm.name,
            "eps": float(threat.eps),
            "examples": len(x),
            "data": fingerprint(x, y, index, threat.lower, threat.upper),
            "model": fingerprint(logits_fn.args, clean),
            "key": fingerprint(jax.random.key_data(key)),
        }
        ledger = _Ledger(state_path, setting, x, clean)
        states = {}
        for number, (name, attack) in enumerate(chunked.items()):
            if number < len(ledger.records):
                continue
            rows = np.flatnonzero(ledger.robust)
            clock, state = _Clock(ledger.seconds, save_every), None
            with compilations() as programs:
                if len(rows):
                    x_adv, state = attack(
                        logits_fn,
                        threat,
                        jax.random.fold_in(attack_key, number),
                        *(a[rows] for a in (x, y, index)),
                        resume=ledger.position,
                        on_chunk=lambda at, clock=clock: clock.due() and ledger.save(at, clock()),
                    )
                    judgement = judged(fixed, (), (x_adv, x[rows], y[rows], index[rows]))
                    ledger.settle(name, rows, x_adv, *judgement)
            record = AttackRecord(
                name,
                len(rows),
                int(len(rows) - ledger.robust[rows].sum()),
                float(ledger.robust.mean()),
                clock(),
                sum(seconds for _, seconds in programs),
                *attack.budget(threat),
            )
            ledger.records.append(record)
            ledger.save()
            if state is not None:
                states[name] = (state, rows)
            on_attack(record)
        robust, inside = judged(fixed, (), (ledger.x_adv, x, y, index))
        if not inside.all():
            raise ValueError("x_adv must be feasible, got points outside of the threat model")
        seen += _of_records(ledger.records, float(clean.mean()), gradient_free)
        seen += _of_result(ledger.robust, robust)
        return AutoAttackResult(
            ledger.x_adv, robust, clean, tuple(ledger.records), tuple(seen), states
        )

    return evaluate


def _of_records(
    records: Sequence[AttackRecord], clean: float, gradient_free: Collection[str]
) -> list[Flag]:
    found, least, after_gradients = [], clean, False
    for record in records:
        if record.name in gradient_free and after_gradients:
            found += flags.unreliable(record.name, least, record.robust_accuracy)
        if record.name not in gradient_free:
            least, after_gradients = min(least, record.robust_accuracy), True
    return found


def _of_result(sequential: np.ndarray, final: np.ndarray) -> list[Flag]:
    differs = int((sequential != final).sum())
    if not differs:
        return []
    return [
        Flag(
            "not_reproduced",
            f"the verdict on {differs} of {len(final)} examples differs when x_adv is evaluated "
            "again: the model is random, or the examples lie on its decision boundary to rounding",
        )
    ]


class _Clock:
    """Seconds of an attack, those before an interruption included, and when to save again."""

    def __init__(self, before: float, save_every: float):
        self._began, self._every = time.monotonic() - before, save_every
        self._saved = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self._began

    def due(self) -> bool:
        if time.monotonic() - self._saved < self._every:
            return False
        self._saved = time.monotonic()
        return True


class _Ledger:
    """What is settled, and where the present attack stands; in memory and in the state file."""

    def __init__(self, path: Any, setting: dict[str, Any], x: np.ndarray, clean: np.ndarray):
        self._path, self._setting = path, setting
        self.x_adv, self.robust = x.copy(), clean.copy()
        self.records: list[AttackRecord] = []
        self.position: Position | None = None
        self.seconds = 0.0
        found = state_file.read(path) if path is not None else None
        if found is None:
            return
        header, arrays = found
        for name, value in setting.items():
            if header["setting"].get(name) != value:
                raise ValueError(
                    f"state file {path} must be of this evaluation, its {name} is "
                    f"{header['setting'].get(name)}, got {value}"
                )
        self.x_adv, self.robust = arrays["x_adv"], arrays["robust"]
        self.records = [AttackRecord(*values) for values in header["records"]]
        self.seconds = header["seconds"]
        if header["position"] is not None:
            leaves = [arrays[name] for name in sorted(arrays) if name.startswith("leaf")]
            self.position = Position(*header["position"], leaves)

    def settle(self, name, rows, x_adv, right, inside) -> None:
        """Takes over what an attack found on the examples ``rows``."""
        if not inside.all():
            bad = int(rows[~inside][0])
            raise ValueError(
                f"attack {name} must return points of the threat model, got one outside for "
                f"example {bad}"
            )
        self.x_adv[rows[~right]] = x_adv[~right]
        self.robust[rows[~right]] = False
        self.position, self.seconds = None, 0.0

    def save(self, position: Position | None = None, seconds: float = 0.0) -> None:
        if self._path is None or jax.process_index():
            return
        leaves = [] if position is None else jax.tree.leaves(position.state)
        header = {
            "setting": self._setting,
            "records": [list(record) for record in self.records],
            "seconds": seconds,
            "position": None if position is None else [position.round, position.step],
        }
        arrays = {f"leaf{number:03}": leaf for number, leaf in enumerate(leaves)}
        state_file.write(self._path, header, {"x_adv": self.x_adv, "robust": self.robust, **arrays})
