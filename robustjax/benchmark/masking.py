"""Signs of gradient masking: a model that looks robust because gradient attacks fail on it.

Five looks at one model, each of which a model without masking stands: its input gradients are not
zero, no accuracy is left without a bound on the perturbation, examples made on another model are no
stronger than those made on itself, it is less sure where it is attacked, and a search that sees no
gradients is no stronger than an attack that does.

Source: Ma (2025), "Understanding adversarial robustness in deep learning", sections 3.3.4 and 3.4.2
and appendices 3.C and 3.F; Athalye, Carlini and Wagner (2018), "Obfuscated gradients give a false
sense of security", section 3. The thresholds are ours.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Float, Int

from robustjax import checks, keys
from robustjax.attacks import pgd, square
from robustjax.attacks.stepwise import as_partial
from robustjax.benchmark.batches import BatchedFunction
from robustjax.losses import cross_entropy
from robustjax.metrics import correct, input_gradient
from robustjax.threat import ThreatModel
from robustjax.threat import check as check_threat


class MaskingReport(NamedTuple):
    """What ``masking_report`` has seen; accuracies, confidences and shares lie in [0, 1].

    A confidence is the mean of the largest probability, ``>= 1 / K`` for ``K`` classes.

    Attributes:
      nonzero_entries: entries of an example's input gradient that are not zero; their mean.
      nonzero_share: the same over the size of an example.
      clean_accuracy: without attack.
      pgd_accuracy: under PGD on the model itself.
      unbounded_accuracy: under the same PGD in a ball that holds the whole box.
      transfer_accuracy: on what PGD finds on the source model; None without one.
      square_accuracy: under Square Attack.
      clean_confidence: on the inputs.
      noise_confidence: on inputs with uniform noise of the threat model.
      pgd1_confidence: on what one step of PGD finds.
      vanishing_gradients: ``nonzero_share`` is below its threshold.
      withstands_unbounded: ``unbounded_accuracy`` is above its threshold.
      transfer_is_stronger: ``transfer_accuracy`` is below ``pgd_accuracy``, beyond the tolerance.
      overconfident: all three confidences are above their threshold.
      search_is_stronger: ``square_accuracy`` is below ``pgd_accuracy``, beyond the tolerance.
    """

    nonzero_entries: float
    nonzero_share: float
    clean_accuracy: float
    pgd_accuracy: float
    unbounded_accuracy: float
    transfer_accuracy: float | None
    square_accuracy: float
    clean_confidence: float
    noise_confidence: float
    pgd1_confidence: float
    vanishing_gradients: bool
    withstands_unbounded: bool
    transfer_is_stronger: bool
    overconfident: bool
    search_is_stronger: bool

    @property
    def signs(self) -> tuple[str, ...]:
        """The names of the flags that are raised; empty for a model without a sign of masking."""
        return tuple(name for name in FLAGS if getattr(self, name))


FLAGS = tuple(name for name, kind in MaskingReport.__annotations__.items() if kind is bool)


def masking_report(
    logits_fn: Callable[[Array], Array],
    key: Array,
    x: Float[ArrayLike, "n h w c"],
    y: Int[ArrayLike, " n"],
    threat: ThreatModel,
    *,
    source_logits_fn: Callable[[Array], Array] | None = None,
    steps: int = 20,
    step_size: float | None = None,
    queries: int = 100,
    gradient_above: float = 1e-6,
    least_nonzero: float = 0.5,
    most_unbounded: float = 0.1,
    most_confident: float = 0.99,
    tolerance: float = 0.01,
    batch_size: int = 128,
    mesh: Mesh | None = None,
) -> MaskingReport:
    """Five measurements that tell a robust model from one that masks its gradients.

    A sign is no proof: a standard model that is very sure of itself has small gradients too. Nor is
    the absence of signs one of robustness.

    Args:
      logits_fn: ``(n, h, w, c) -> (n, K)``, in evaluation mode and float32; a function, or from
        ``robustjax.models.eval_logits``, whose checkpoints share one compilation.
      key: one key. Example i draws from its place in ``x``.
      x: images in the box of the threat model.
      y: labels ``(n,)``.
      threat: l_inf or l_2 ball, one ``eps``, and a finite box.
      source_logits_fn: another model of the same task, for the transfer attack.
      steps: of PGD, which starts uniformly in the ball, ``>= 1``.
      step_size: of PGD, also in the unbounded attack, in input units; default ``eps / 4``, the
        published 2/255 for 8/255. In the unbounded attack it is the start that goes far.
      queries: of Square Attack, ``>= 1``.
      gradient_above: what counts as not zero in the gradient of an example's own cross-entropy.
      least_nonzero: ``vanishing_gradients`` below this share. Published, of 3072 entries: 3072 for
        adversarial training, 3069 for SOAR from PGD-1 points, 1043 (0.34) for masking SOAR.
      most_unbounded: ``withstands_unbounded`` above this accuracy. Published: 0 for SOAR.
      most_confident: ``overconfident`` above it on all three kinds of inputs. Published, clean and
        PGD-1: 0.703 and 0.655 for adversarial training, 0.981 and 0.968 for standard training,
        0.977 and 0.979 for SOAR from PGD-1 points, 0.9999 and 0.9999 for masking SOAR.
      tolerance: by how much accuracy under transfer or search may fall below that under PGD.
      batch_size: examples at a time, over all devices; divisible by their number.
      mesh: devices; default all.

    Raises:
      ValueError: an argument is out of range or of another kind, images are not finite or not in
        the box, or labels are no classes of the model.

    Source: Ma (2025), table 3.1 (confidence; its PGD-1 has radius and step eps here, which the text
    leaves open), appendix 3.C (transfer), section 3.4.2 (search), appendix 3.F (the others).
    """
    checks.function("logits_fn", logits_fn)
    keys.check_one(key)
    check_threat(threat)
    checks.integer("steps", steps, at_least=1)
    checks.integer("queries", queries, at_least=1)
    checks.number("gradient_above", gradient_above, at_least=0)
    for name, value in (
        ("least_nonzero", least_nonzero),
        ("most_unbounded", most_unbounded),
        ("most_confident", most_confident),
        ("tolerance", tolerance),
    ):
        checks.number(name, value, at_least=0, at_most=1)
    if jnp.ndim(threat.eps):
        raise ValueError(f"eps must be one number, got shape {jnp.shape(threat.eps)}")
    if not np.isfinite([np.min(threat.lower), np.max(threat.upper)]).all():
        raise ValueError(f"threat must have a finite box, got {threat.lower} to {threat.upper}")
    x, y = np.asarray(x), np.asarray(y)
    checks.batch(x, y)
    threat.check_inputs(x)
    x, y = x.astype(np.float32), y.astype(np.int32)
    num_classes = jax.eval_shape(logits_fn, jax.ShapeDtypeStruct(x.shape, x.dtype)).shape[-1]
    checks.labels("y", y, num_classes=num_classes)
    if step_size is None:
        step_size = threat.eps / 4
    checks.number("step_size", step_size, at_least=0)

    measure = _measure(steps, queries, batch_size, mesh)
    source = None if source_logits_fn is None else as_partial(source_logits_fn)
    fixed = measure.place((as_partial(logits_fn), source, threat, step_size, gradient_above, key))
    rows = measure(fixed, (), (x, y, np.arange(len(x), dtype=np.int32)))
    mean = {name: float(np.mean(values, dtype=np.float64)) for name, values in rows.items()}
    transfer = mean.pop("transfer_accuracy", None)
    share = mean["nonzero_entries"] / x[0].size
    confidences = [mean[f"{kind}_confidence"] for kind in ("clean", "noise", "pgd1")]
    floor = mean["pgd_accuracy"] - tolerance - 1e-9
    return MaskingReport(
        **mean,
        nonzero_share=share,
        transfer_accuracy=transfer,
        vanishing_gradients=share < least_nonzero,
        withstands_unbounded=mean["unbounded_accuracy"] > most_unbounded,
        transfer_is_stronger=transfer is not None and transfer < floor,
        overconfident=min(confidences) > most_confident,
        search_is_stronger=mean["square_accuracy"] < floor,
    )


@functools.lru_cache(maxsize=8)
def _measure(steps: int, queries: int, batch_size: int, mesh: Mesh | None) -> BatchedFunction:
    """The measurements of each example; one program for all models, thresholds and radii."""

    def measure(fixed: tuple, numbers: tuple, rows: tuple) -> dict[str, Array]:
        del numbers
        (logits_fn, source, threat, step_size, gradient_above, key), (x, y, index) = fixed, rows

        def own_keys(number: int) -> Array:
            return keys.per_example(jax.random.fold_in(key, number), index)

        def attacked(number: int, attack: Callable, model: Callable = logits_fn) -> Array:
            return correct(logits_fn(attack(model, own_keys(number), x, y)), y)

        def confidence(x: Array) -> Array:
            return jax.nn.softmax(logits_fn(x)).max(axis=-1)

        box = jnp.broadcast_to(jnp.asarray(threat.upper - threat.lower, x.dtype), x.shape[1:])
        unbounded = dataclasses.replace(threat, eps=threat.norm.value(box))
        of_threat, of_box = (pgd(t, steps=steps, step_size=step_size) for t in (threat, unbounded))
        one_step = pgd(threat, steps=1, step_size=threat.eps)
        gradient = input_gradient(logits_fn, x, y)
        found = {
            "nonzero_entries": jnp.sum(
                jnp.abs(gradient) > gradient_above, axis=range(1, x.ndim), dtype=jnp.float32
            ),
            "clean_accuracy": correct(logits_fn(x), y),
            "pgd_accuracy": attacked(0, of_threat),
            "unbounded_accuracy": attacked(1, of_box),
            "square_accuracy": attacked(2, square(threat, queries=queries)),
            "clean_confidence": confidence(x),
            "noise_confidence": confidence(threat.sample(own_keys(3), x)),
            "pgd1_confidence": confidence(one_step(logits_fn, own_keys(4), x, y)),
        }
        if source is not None:
            # The keys of the white-box attack: the model as its own source gives the same accuracy.
            found["transfer_accuracy"] = attacked(0, of_threat, source)
        return found

    return BatchedFunction(measure, batch_size=batch_size, mesh=mesh)


def interpolation_losses(
    logits_fn: Callable[[Array], Array],
    x: Float[Array, "n ..."],
    x_adv: Float[Array, "n ..."],
    y: Array,
    *,
    points: int = 21,
    loss: Callable[[Array, Array], Any] = cross_entropy,
) -> Float[Array, "points n"]:
    """The loss of each example on the way from ``x`` to ``x_adv``, ``(points, n)``.

    Of a confident model it is flat at ``x``, where gradient and curvature tell nothing of the rise
    that follows. ``losses[0] - 2 * losses[1] + losses[2]`` is the second difference at ``x``.

    Args:
      logits_fn: ``(n, ...) -> (n, K)``.
      x: where the way begins.
      x_adv: where it ends, ``(n, ...)``.
      y: labels ``(n,)``.
      points: evenly spaced, both ends included, ``>= 2``.
      loss: ``loss(logits, y) -> (n,)``.

    Raises:
      ValueError: shapes do not fit or ``points < 2``.

    Source: Ma (2025), section 3.3.4, whose alpha is 1 at ``x`` although its loss rises with it.
    """
    checks.function("logits_fn", logits_fn)
    checks.batch(x, y)
    checks.same_shape("x_adv", x_adv, "x", x)
    checks.integer("points", points, at_least=2)

    def at(t: Array) -> Array:
        # Not x + t (x_adv - x): both ends are exact.
        values = loss(logits_fn((1 - t) * x + t * x_adv), y)
        return checks.per_example("loss(logits, y)", values, x.shape[0])

    return jax.lax.map(at, jnp.linspace(0, 1, points, dtype=x.dtype))
