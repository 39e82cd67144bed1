"""The evaluation contract of RobustBench: one call, one record that says all that it rests on.

Robust accuracy is the share of the examples that the classifier gets right for all perturbations of
the threat model. Attacks give an upper bound of it; the record tells which ones, with what budget.

Source: Croce et al. (2021), "RobustBench: a standardized adversarial robustness benchmark",
section 3.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Float, Int

from robustjax import checks
from robustjax.benchmark.auto_attack import (
    AttackRecord,
    AutoAttackResult,
    MakeAttack,
    auto_attack,
)
from robustjax.benchmark.environment import environment
from robustjax.benchmark.flags import Flag
from robustjax.threat import ThreatModel


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """A record of an evaluation. ``to_json`` gives all but the arrays.

    Attributes:
      model: name of the model.
      dataset: name of the data set.
      norm: of the threat model.
      eps: its radius, in units of the inputs.
      examples: how many were evaluated.
      clean_accuracy: share that the model gets right, in [0, 1].
      robust_accuracy: share that it gets right at the worst perturbations found, in [0, 1].
      version: of the ensemble, or ``"custom"``.
      attacks: budget and outcome of each attack, in order.
      flags: warnings; empty for an evaluation without doubts.
      seed: of all random numbers.
      seconds: duration of this call.
      environment: hardware, versions, date.
      outcome: adversarial examples and verdicts; not in the JSON.
    """

    model: str
    dataset: str
    norm: str
    eps: float
    examples: int
    clean_accuracy: float
    robust_accuracy: float
    version: str
    attacks: tuple[AttackRecord, ...]
    flags: tuple[Flag, ...]
    seed: int
    seconds: float
    environment: Mapping[str, Any]
    outcome: AutoAttackResult

    def to_json(self) -> dict[str, Any]:
        """Plain values, for ``json.dumps``."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["outcome"]
        values["attacks"] = [attack._asdict() for attack in self.attacks]
        values["flags"] = [flag._asdict() for flag in self.flags]
        return values


def benchmark(
    model: Callable[..., Array],
    x: Float[ArrayLike, "n ..."],
    y: Int[ArrayLike, " n"],
    threat: ThreatModel,
    attacks: str | Mapping[str, MakeAttack] = "standard",
    *,
    seed: int = 0,
    batch_size: int = 128,
    mesh: Mesh | None = None,
    randomized: bool | None = None,
    state_path: str | Path | None = None,
    on_attack: Callable[[AttackRecord], None] = lambda record: None,
    model_name: str = "",
    dataset: str = "",
) -> BenchmarkResult:
    """Evaluates a classifier in a threat model; by default with AutoAttack.

    Args:
      model: ``logits_fn(x (n, ...)) -> logits (n, K)``, in evaluation mode and float32. From
        ``robustjax.models.eval_logits`` it can be interrupted and checked for being the same.
      x: inputs ``(n, ...)`` in the box of the threat model.
      y: labels ``(n,)``.
      threat: norm ball and box, one ``eps``.
      attacks: a version of ``auto_attack``, or a mapping from names to ``make_attack(threat)``.
      seed: of all random numbers.
      batch_size: examples at a time, over all devices; divisible by their number.
      mesh: devices; default all of all hosts.
      randomized: the model is called as ``model(x, keys)``; see ``auto_attack``.
      state_path: file to save the state in, and to go on from after an interruption.
      on_attack: called with the record of each attack when it ends.
      model_name: for the record.
      dataset: for the record.

    Raises:
      ValueError: see ``auto_attack``.
    """
    checks.integer("seed", seed)
    began = time.monotonic()
    evaluate = auto_attack(attacks, batch_size=batch_size, mesh=mesh, randomized=randomized)
    outcome = evaluate(
        model, threat, jax.random.key(seed), x, y, state_path=state_path, on_attack=on_attack
    )
    return BenchmarkResult(
        model=model_name,
        dataset=dataset,
        norm=threat.norm.name,
        eps=float(threat.eps),
        examples=len(y),
        clean_accuracy=outcome.clean_accuracy,
        robust_accuracy=outcome.robust_accuracy,
        version=attacks if isinstance(attacks, str) else "custom",
        attacks=outcome.attacks,
        flags=outcome.flags,
        seed=seed,
        seconds=time.monotonic() - began,
        environment=environment(),
        outcome=outcome,
    )
