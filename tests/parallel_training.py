"""The same runs on any devices: seven ways to train, with BatchNorm, and AutoAttack.

Imported by test_multihost.py, and run by it as one of two processes:

  python parallel_training.py PROCESS PROCESSES PORT FILE
"""

import functools
import os
import sys

if __name__ == "__main__":
    PROCESS, PROCESSES, PORT = map(int, sys.argv[1:4])
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 // PROCESSES}"

import jax

if __name__ == "__main__":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{PORT}", PROCESSES, PROCESS)

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

from robustjax import attacks, data, gradients, models, objectives, parallel, training
from robustjax.benchmark import auto_attack
from robustjax.norms import LInf
from robustjax.threat import ThreatModel
from robustjax.training import feed

KEY = jax.random.key(0)
THREAT = ThreatModel(LInf(), 0.1)
STEPS, BATCH = 3, 16
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 48).astype(np.int32)
IMAGES = (RNG.random((48, 6, 6, 1)) * 0.5 + 0.2 * LABELS[:, None, None, None]).astype(np.float32)
WEIGHTS = tuple(RNG.normal(size=shape).astype(np.float32) for shape in ((36, 12), (12, 4)))
EPS = 0.03  # the targeted APGD breaks some that APGD does not, and some stand
DATASET = data.Dataset(IMAGES, LABELS, 3, "noise")
STATISTICS = {"separate": None, "synchronised": parallel.AXIS}


class Network(nn.Module):
    """Dense layers with BatchNorm between them."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(12, name="first")(x.reshape(len(x), -1))
        x = x[:, None, None, :]
        x = models.feature_norm("batch", x, train=train, axis_name=self.axis_name, name="norm")
        x = x[:, 0, 0, :]
        return nn.Dense(3, name="head")(nn.softplus(x))


def soar():
    attack, radius = objectives.evaluation_point(THREAT)
    return objectives.penalized(
        objectives.madry(attack), objectives.soar(radius), weight=0.1, at="adversarial"
    )


def grad_align():
    fast = objectives.madry(attacks.fgsm(THREAT))
    return objectives.penalized(fast, objectives.grad_align(THREAT.eps), weight=0.2)


def madry():
    return objectives.madry(attacks.pgd(THREAT, steps=2, step_size=0.05))


METHODS = {
    "standard": lambda: (objectives.standard(), None),
    "madry": lambda: (madry(), None),
    "trades with awp": lambda: (
        objectives.trades(objectives.trades_attack(THREAT, steps=2), beta=6.0),
        gradients.awp(0.01, axis_name=parallel.AXIS),
    ),
    "engm": lambda: (madry(), gradients.engm(0.5)),
    "a_engm": lambda: (madry(), gradients.a_engm(0.5, tau=2, axis_name=parallel.AXIS)),
    "soar": lambda: (soar(), None),
    "grad_align": lambda: (grad_align(), None),
}


def train(method, statistics, mesh):
    """Every number of the state, and the loss of each step."""
    model = models.from_linen(Network(STATISTICS[statistics]))
    objective, oracle = METHODS[method]()
    optimizer = optax.sgd(0.2, momentum=0.9)
    step = training.train_step(
        model.apply, objective, optimizer, oracle=oracle, axis_name=parallel.AXIS
    )
    # Parameters need no axis; outside of the mesh there is none.
    variables = models.from_linen(Network()).init(KEY, jnp.asarray(IMAGES[:1]))
    state = training.create_state(*variables, optimizer, KEY, oracle=oracle)
    advance = feed.resident(step, DATASET, key=KEY, batch_size=BATCH, mesh=mesh)
    state, metrics = advance(parallel.replicate(state, mesh), 0, 0, STEPS)
    kept = parallel.to_host((state.params, state.model_state, state.opt_state))
    flat = [np.ravel(leaf).astype(np.float32) for leaf in jax.tree.leaves(kept)]
    return np.concatenate([*flat, np.ravel(parallel.to_host(metrics)["loss"])])


def network(weights, x):
    """Two layers."""
    return jax.nn.softplus((x - 0.5).reshape(len(x), -1) @ weights[0]) @ weights[1]


def attacked(mesh):
    """AutoAttack, short, on a small network: which examples stand, and where they went."""
    ensemble = {
        "apgd-ce": functools.partial(attacks.apgd, steps=1),
        "apgd-t": functools.partial(attacks.apgd_targeted, targets=2, steps=2),
        "fab-t": functools.partial(attacks.fab_targeted, targets=3, steps=3, early_stop=True),
        "square": functools.partial(attacks.square, queries=40),
    }
    logits_fn = jax.tree_util.Partial(network, WEIGHTS)
    labels = np.asarray(logits_fn(IMAGES)).argmax(axis=1).astype(np.int32)
    evaluate = auto_attack(ensemble, batch_size=16, mesh=mesh)
    result = evaluate(logits_fn, ThreatModel(LInf(), EPS), KEY, IMAGES, labels)
    queries = result.states["square"][0].queries
    stood = [record.robust_accuracy for record in result.attacks]
    return {"robust": result.robust, "x_adv": result.x_adv, "queries": np.asarray(queries),
            "stood": np.asarray(stood)}  # fmt: skip


if __name__ == "__main__":
    mesh = parallel.device_mesh()
    found = {
        f"{method}/{statistics}": train(method, statistics, mesh)
        for method in METHODS
        for statistics in STATISTICS
    }
    np.savez(sys.argv[4], **found, **attacked(mesh))
