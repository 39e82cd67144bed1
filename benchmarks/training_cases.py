"""What ``benchmarks.training`` measures: networks, sizes, and the training of one of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import agreement
from experiments import training_run
from experiments.training_settings import Settings as TrainingSettings
from robustjax import data, parallel, training
from robustjax.training import feed

OBJECTIVES = {"standard": "standard", "madry": "PGD-10"}
ATTACK = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 10}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One network over batch sizes.

    Attributes:
      model: name of it in ``experiments.choices``.
      width: of it; None is the published one.
      precision: dtype of the computation.
      batch_sizes: examples of a step.
      peer: whether PyTorch does the same, where it has the network.
    """

    model: str
    width: int | None
    precision: str
    batch_sizes: tuple[int, ...]
    peer: bool = False


@dataclasses.dataclass(frozen=True)
class Size:
    """How much work is measured.

    Attributes:
      sweeps: the networks.
      steps: training steps in a dispatch, by objective.
      dispatches: dispatches in a measurement.
      host_dispatches: in that of what the host adds.
      rounds: measurements of each run.
      matrices: rows of the square matrices whose product is the peak.
      image_size: side of the images.
    """

    sweeps: tuple[Sweep, ...]
    steps: dict[str, int]
    dispatches: int
    rounds: int
    matrices: tuple[int, ...]
    image_size: int = 32
    host_dispatches: int = 100


BATCHES = (128, 256, 512, 1024)
SIZES = {
    "small": Size(
        sweeps=(
            Sweep("preact_resnet18", 16, "float32", (32, 128), peer=True),
            Sweep("preact_resnet18", 16, "bfloat16", (32, 128)),
            Sweep("preact_resnet18", 64, "float32", (16, 64), peer=True),
            Sweep("preact_resnet18", 64, "bfloat16", (16, 64)),
            Sweep("wrn34", None, "float32", (4, 16)),
            Sweep("wrn34", None, "bfloat16", (4, 16)),
        ),
        steps={"standard": 2, "madry": 1},
        dispatches=2,
        rounds=3,
        matrices=(1024, 2048),
    ),
    "full": Size(
        sweeps=(
            Sweep("preact_resnet18", None, "float32", BATCHES, peer=True),
            Sweep("preact_resnet18", None, "bfloat16", BATCHES, peer=True),
            Sweep("wrn34", None, "float32", BATCHES),
            Sweep("wrn34", None, "bfloat16", BATCHES),
        ),
        steps={"standard": 20, "madry": 4},
        dispatches=4,
        rounds=5,
        matrices=(4096, 8192, 16384),
    ),
    "quick": Size(
        sweeps=(Sweep("linear", None, "float32", (8,)),),
        steps={"standard": 2, "madry": 1},
        dispatches=2,
        rounds=2,
        matrices=(64,),
        image_size=8,
        host_dispatches=4,
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One training to be measured."""

    sweep: Sweep
    objective: str
    batch_size: int

    @property
    def title(self) -> str:
        """As ``preact_resnet18 (16) float32, PGD-10, batch 32``."""
        width = "" if self.sweep.width is None else f" ({self.sweep.width})"
        return (
            f"{self.sweep.model}{width} {self.sweep.precision}, {OBJECTIVES[self.objective]}, "
            f"batch {self.batch_size}"
        )


class Run:
    """Our training of a case: the loop, and its compiled program alone, each with its state."""

    def __init__(self, case: Case, size: Size):
        self.per_dispatch = size.steps[case.objective]
        self.dispatches = size.dispatches
        self.steps = self.per_dispatch * self.dispatches
        side, n = size.image_size, case.batch_size * self.steps
        draw = np.random.default_rng(0)
        self.train = data.Dataset(
            draw.integers(0, 256, (n, side, side, 3), np.uint8),
            draw.integers(0, 10, n).astype(np.int32),
            10,
            "random",
        )
        self.settings = TrainingSettings(
            model=case.sweep.model,
            width=case.sweep.width,
            precision=case.sweep.precision,
            objective=(case.objective,),
            eps=ATTACK["eps"],
            attack_step_size=ATTACK["step_size"],
            attack_steps=ATTACK["steps"],
            learning_rate=1e-5,  # the losses of the peers stay those of the first weights
            schedule="constant",
            batch_size=case.batch_size,
        )
        facts = training_run.facts_of(self.settings, self.train)
        self.parts = training_run.build(self.settings, case.objective, facts)
        x = jnp.zeros((1, side, side, 3))
        self.variables = agreement.random_variables(self.parts.model, x)
        self.mesh = parallel.device_mesh(jax.devices()[:1])
        self.advance = feed.resident(
            self.parts.step,
            self.train,
            key=jax.random.key(1),
            batch_size=case.batch_size,
            mesh=self.mesh,
        )
        self.losses: list[float] = []
        self._epochs = 0
        self._of_loop, self._of_program = self._fresh(), self._fresh()
        self._arguments = (
            parallel.replicate({"image": self.train.image, "label": self.train.label}, self.mesh),
            {
                "step": parallel.replicate(np.arange(self.per_dispatch, dtype=np.int32), self.mesh),
                "index": parallel.split(
                    np.arange(self.per_dispatch * case.batch_size, dtype=np.int32).reshape(
                        self.per_dispatch, -1
                    ),
                    self.mesh,
                    parallel.SPLIT_SECOND,
                ),
            },
        )

    def _fresh(self) -> training.TrainState:
        state = training.create_state(
            *self.variables, self.parts.optimizer, jax.random.key(0), oracle=self.parts.oracle
        )
        return parallel.replicate(state, self.mesh)

    def loop(self) -> None:
        """One epoch of ``fit``, its metrics fetched."""
        self._epochs += 1
        found: list[np.ndarray] = []
        self._of_loop = training.fit(
            self._of_loop,
            self.advance,
            epochs=self._epochs,
            steps_per_epoch=self.steps,
            dispatch=self.per_dispatch,
            on_dispatch=lambda step, metrics: found.append(metrics["loss"]),
        )
        jax.block_until_ready(self._of_loop)
        self.losses.append(float(np.mean(found)))

    def program(self, dispatches: int | None = None) -> None:
        """As many calls of the compiled program, back to back.

        Always with the same arguments: after the first call they are of steps that are past, which
        are computed like any other, but not taken.
        """
        for _ in range(self.dispatches if dispatches is None else dispatches):
            self._of_program, _ = self.advance.compiled(self._of_program, *self._arguments)
        jax.block_until_ready(self._of_program)

    def text(self) -> str:
        """The compiled program; compiles it once more."""
        arguments = (self._of_program, *self._arguments)
        return self.advance.compiled.lower(*arguments).compile().as_text()

    def flops(self) -> int:
        """Of one step."""
        n = self.settings.batch_size
        batch = {
            "image": jax.ShapeDtypeStruct((1, n, *self.train.image.shape[1:]), jnp.float32),
            "label": jax.ShapeDtypeStruct((1, n), jnp.int32),
            "index": jax.ShapeDtypeStruct((1, n), jnp.int32),
        }
        # The step names the mesh axis, which vmap binds without devices.
        step = jax.vmap(self.parts.step, in_axes=(None, 0), axis_name=parallel.AXIS)
        return training.count_flops(step, self._of_loop, batch)
