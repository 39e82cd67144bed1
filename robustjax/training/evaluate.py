"""Accuracy of a model on a data set, clean and under attacks, in one compiled function."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from robustjax import checks, data, keys, parallel
from robustjax.attacks import Attack
from robustjax.metrics.accuracy import correct
from robustjax.objectives import ModelFn

Evaluator = Callable[..., dict[str, np.ndarray]]


def make_evaluator(
    model_fn: ModelFn, attacks: Mapping[str, Attack], mesh: Mesh | None = None
) -> Evaluator:
    """Compiles the evaluation once, for fixed batch shapes.

    The model runs in evaluation mode and float32 with the highest matrix-product precision. Each
    example's random numbers come from its index in the data set, so that the result depends
    neither on the batch size nor on the devices.

    Args:
      model_fn: ``model_fn(params, model_state, x, train, key)``; give one that computes in
        float32: lower precision overstates robustness.
      attacks: name to ``attack(logits_fn, keys, x, y) -> x_adv``. ``"clean"`` is always there.
      mesh: devices to split batches over; default all.

    Returns:
      ``evaluate(params, model_state, key, batches) -> {name: correct (n,) bool}``, where batches
      are as from ``robustjax.data.eval_batches``: all of one shape, with a ``mask`` of which rows
      count. Each host passes all batches and gets the whole result.

    Raises:
      ValueError: an attack is named ``"clean"`` or is no function; of a call: no batches, batches
        that lack a field or differ in shape, a batch size not divisible by the number of devices,
        images that are not finite or not in [0, 1], waveforms not in [-1, 1], labels that are not
        classes of the model.
    """
    if not isinstance(attacks, Mapping):
        raise ValueError(f"attacks must map names to functions, got {checks.shown(attacks)}")
    if "clean" in attacks:
        raise ValueError("attacks must not hold 'clean': that is the name of the unattacked input")
    for name, attack in attacks.items():
        checks.function(f"attack {name}", attack)
    mesh = parallel.device_mesh() if mesh is None else mesh

    def judge(params: Any, model_state: Any, key: Array, batch: dict[str, Array]):
        def logits_fn(x):
            return model_fn(params, model_state, x, False, None)[0]

        x, y = batch["image"], batch["label"]
        with jax.default_matmul_precision("highest"):
            verdicts = {"clean": correct(logits_fn(x), y)}
            for number, (name, attack) in enumerate(attacks.items()):
                attack_keys = keys.per_example(jax.random.fold_in(key, number), batch["index"])
                x_adv = attack(logits_fn, attack_keys, x, y)
                checks.same_shape(f"x_adv, the result of attack {name},", x_adv, "images", x)
                verdicts[name] = correct(logits_fn(x_adv), y)
        return verdicts

    split = parallel.SPLIT
    compiled = parallel.parallel(
        judge, mesh, in_specs=(*[parallel.REPLICATED] * 3, split), out_specs=split
    )

    def class_count(params: Any, model_state: Any, x: np.ndarray) -> int:
        logits, _ = jax.eval_shape(
            lambda params, model_state, x: model_fn(params, model_state, x, False, None),
            params,
            model_state,
            x,
        )
        if logits.ndim != 2:
            raise ValueError(f"model_fn must return logits (n, K), got shape {logits.shape}")
        return logits.shape[1]

    def evaluate(
        params: Any, model_state: Any, key: Array, batches: Iterable[dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        key = parallel.replicate(keys.check_one(key), mesh)
        verdicts, masks = [], []
        for batch in batches:
            checks.fields("batch", batch, ("image", "label", "index", "mask"))
            data.check_values("images", batch["image"])
            if not masks:
                first, classes = batch["image"], class_count(params, model_state, batch["image"])
            checks.same_shape("images", batch["image"], "the first batch", first)
            parallel.local_batch_size(len(first), mesh)
            checks.labels("label", batch["label"], num_classes=classes)
            for name in ("label", "index", "mask"):
                checks.per_example(name, batch[name], len(first))
            if batch["mask"].dtype != bool:
                raise ValueError(f"mask must be bool, got {batch['mask'].dtype}")
            masks.append(batch["mask"])
            share = {name: batch[name] for name in ("image", "label", "index")}
            share = jax.tree.map(lambda x: x[parallel.own_rows(len(x), mesh)], share)
            verdicts.append(compiled(params, model_state, key, parallel.split(share, mesh)))
        if not masks:
            raise ValueError("batches must hold at least one batch, got none")
        mask = np.concatenate(masks)
        verdicts = [parallel.to_host(v) for v in verdicts]
        names = ("clean", *attacks)
        return {name: np.concatenate([v[name] for v in verdicts])[mask] for name in names}

    evaluate.compiled = compiled
    return evaluate


def adversarial_panel(
    logits_fn: Callable[[Array], Array], attack: Attack, key: Array, x: Array, y: Array
) -> dict[str, np.ndarray]:
    """Clean and adversarial images with the predictions at both, for a figure.

    Returns:
      ``image``, ``adversarial`` ``(n, h, w, c)``; ``label``, ``prediction``,
      ``adversarial_prediction`` ``(n,)``.

    Raises:
      ValueError: ``x`` are no images in [0, 1], or the attack does not return such images alone.
    """
    checks.images("x", x)
    x_adv = jax.jit(lambda key, x, y: attack(logits_fn, key, x, y))(key, x, y)
    checks.same_shape("x_adv, the result of attack,", x_adv, "x", x)
    predict = jax.jit(lambda x: jnp.argmax(logits_fn(x), axis=-1))
    return {
        "image": np.asarray(x),
        "adversarial": np.asarray(x_adv),
        "label": np.asarray(y),
        "prediction": np.asarray(predict(x)),
        "adversarial_prediction": np.asarray(predict(x_adv)),
    }
