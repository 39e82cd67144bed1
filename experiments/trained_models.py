"""Models that an earlier run trained, from its folder."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import choices, fine_tuning, training_run
from experiments.training_settings import Settings
from robustjax import checks, data, models, training
from robustjax.benchmark import import_torch
from robustjax.training import checkpoint, report


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A trained model and what it was trained on.

    Attributes:
      logits_fn: in evaluation mode and float32; a ``jax.tree_util.Partial`` over its parameters.
      settings: of the training run.
      step: training step of the checkpoint.
      name: for tables.
    """

    logits_fn: Callable
    settings: Settings
    step: int
    name: str


def load(
    directory: str | Path, which: str = "best", *, data_dir: str | None = None
) -> TrainedModel:
    """Reads a checkpoint of ``experiments.adversarial_training``.

    Args:
      directory: the folder of one model, ``WORKDIR/OBJECTIVE``.
      which: ``"best"`` on the validation set or ``"last"``.
      data_dir: where TFDS sets are prepared, if the model was trained on one.

    Raises:
      ValueError: there is no such run, or its checkpoints are damaged.
    """
    checks.choice("which", which, ("best", "last"))
    settings, parts, state = _restored(Path(directory), which, data_dir)
    return TrainedModel(
        models.eval_logits(parts.exact_model.apply, state.params, state.model_state),
        settings,
        int(state.step),
        f"{settings.objective[0]} {settings.model}, {which}",
    )


def variables(
    directory: str | Path, which: str = "last", *, data_dir: str | None = None
) -> tuple[Any, Any]:
    """Parameters and statistics of a checkpoint, to train on from; see ``load``."""
    checks.choice("which", which, ("best", "last"))
    _, _, state = _restored(Path(directory), which, data_dir)
    return state.params, state.model_state


def encoder(settings: Settings, facts: choices.DataFacts) -> tuple[Any, Any]:
    """What ``settings.pretrained`` holds, without the last layer: parameters and statistics.

    Raises:
      ValueError: the file or the run cannot be read, or is of another network.
    """
    module = training_run.module_of(settings, facts, jnp.float32)
    image = jax.ShapeDtypeStruct((1, *facts.image_shape), jnp.float32)
    shapes = jax.eval_shape(models.from_linen(module).init, jax.random.key(0), image)
    if Path(settings.pretrained).is_dir():
        params, model_state = variables(settings.pretrained, data_dir=settings.data_dir)
        params = fine_tuning.without_head(params)
    else:
        imported, params, model_state = import_torch.convert(
            import_torch.read_state_dict(settings.pretrained),
            module,
            image_channels=facts.image_shape[-1],
            image_size=facts.image_shape[0],
            head=False,
        )
        if imported != module:
            raise ValueError(
                f"pretrained must hold no normalisation of its own, got {settings.pretrained}"
            )
    wanted = (fine_tuning.without_head(shapes[0]), shapes[1])
    if jax.tree.map(jnp.shape, (params, model_state)) != jax.tree.map(jnp.shape, wanted):
        raise ValueError(
            f"pretrained must be a {settings.model} of these settings, got another network in "
            f"{settings.pretrained}"
        )
    return params, model_state


def _restored(
    directory: Path, which: str, data_dir: str | None
) -> tuple[Settings, training_run.Parts, training.TrainState]:
    settings = dataclasses.replace(read_settings(directory), data_dir=data_dir)
    objective = settings.objective[0]
    test = training_run.load_split(settings, "test")
    facts = training_run.facts_of(settings, test)._replace(train_size=settings.batch_size)
    parts = training_run.build(settings, objective, facts)
    image = jnp.zeros((1, *facts.image_shape))
    params, model_state = jax.jit(parts.model.init)(jax.random.key(0), image)
    like = training.create_state(
        params, model_state, parts.optimizer, jax.random.key(0), oracle=parts.oracle
    )
    if not (directory / "checkpoints").is_dir():
        raise ValueError(f"{directory} must hold checkpoints/, got a folder without")
    metric = training_run.selection_metric(settings, objective)
    with checkpoint.open_checkpoints(
        directory / "checkpoints", best_metric=metric, read_only=True
    ) as manager:
        step = manager.best_step() if which == "best" else manager.latest_step()
        return settings, parts, checkpoint.restore(manager, like, step=step)


def read_settings(directory: str | Path) -> Settings:
    """The settings of the run in a folder.

    Raises:
      ValueError: there is no such run.
    """
    path = Path(directory) / report.CONFIG
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{directory} must be the folder WORKDIR/OBJECTIVE of a training run: "
            f"{path.name} cannot be read"
        ) from error
    fields = {field.name for field in dataclasses.fields(Settings)}
    if not isinstance(values, dict) or not set(values) <= fields or "objective" not in values:
        raise ValueError(f"{path} must hold the settings of a training run")
    return Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def evaluation_set(settings: Settings, split: str, examples: int) -> data.Dataset:
    """The first examples of a split of the run's data set, in memory.

    Raises:
      ValueError: the set is not there, or has fewer examples.
    """
    source = training_run.squared(settings, training_run.load_split(settings, split))
    checks.integer("examples", examples, at_least=1, at_most=len(source))
    part = source.subset(np.arange(examples))
    return part if isinstance(part, data.Dataset) else data.materialise(part)
