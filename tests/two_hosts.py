"""One of the processes of a multi-host run: trains, evaluates, saves. Run by test_multihost.py.

Usage: python two_hosts.py PROCESS PROCESSES PORT FOLDER
"""

import json
import os
import sys
from pathlib import Path

PROCESS, PROCESSES, PORT = map(int, sys.argv[1:4])
FOLDER = Path(sys.argv[4])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 // PROCESSES}"

import jax  # noqa: E402

if PROCESSES > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{PORT}", PROCESSES, PROCESS)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from robustjax import data, models, parallel  # noqa: E402
from robustjax.attacks import pgd  # noqa: E402
from robustjax.norms import LInf  # noqa: E402
from robustjax.objectives import madry  # noqa: E402
from robustjax.threat import ThreatModel  # noqa: E402
from robustjax.training import (  # noqa: E402
    checkpoint,
    create_state,
    feed,
    fit,
    make_evaluator,
    report,
    train_step,
)

mesh = parallel.device_mesh()
train = data.load("digits", "train")
# 1,297 digits: each epoch leaves out 17 of them, others than the one before.
STEPS = len(train) // 64
threat = ThreatModel(LInf(), 0.1)
model = models.from_linen(models.MLP(features=(16,), num_classes=10))
optimizer = optax.adam(1e-2)
step = train_step(model.apply, madry(pgd(threat, steps=2)), optimizer, axis_name=parallel.AXIS)
key = jax.random.key(0)
params, model_state = model.init(key, jnp.zeros((1, 8, 8, 1)))


def fresh():
    return parallel.replicate(create_state(params, model_state, optimizer, key), mesh)


def weights(state):
    leaves = jax.tree.leaves(parallel.to_host(state.params))
    return [float(np.abs(leaf).sum()) for leaf in leaves]


results = {"devices": mesh.size, "local": len(mesh.local_devices)}
resident = feed.resident(step, train, key=key, batch_size=64, mesh=mesh)
with report.MetricsWriter(FOLDER) as writer:
    state = fit(
        fresh(),
        resident,
        epochs=2,
        steps_per_epoch=STEPS,
        dispatch=5,
        on_dispatch=lambda at, metrics: writer.write(at, "train", {"loss": metrics["loss"][-1]}),
    )
results["resident"] = weights(state)

with checkpoint.open_checkpoints(FOLDER / "checkpoints", best_metric="clean") as manager:
    checkpoint.save(manager, state, {"clean": 0.5})
    manager.wait_until_finished()
    results["restored"] = weights(checkpoint.restore(manager, fresh()))

streamed = feed.streamed(
    step,
    lambda start: data.host_batches(train, batch_size=64, seed=0, start_step=start),
    steps_per_epoch=STEPS,
    mesh=mesh,
)
after = fit(fresh(), streamed, epochs=2, steps_per_epoch=STEPS, dispatch=5)
results["streamed"] = weights(after)

evaluate = make_evaluator(model.apply, {"pgd": pgd(threat, steps=2)}, mesh)
batches = data.eval_batches(data.load("digits", "test"), 64)
verdicts = evaluate(state.params, state.model_state, key, batches)
results["verdicts"] = {name: correct.tolist() for name, correct in verdicts.items()}
(FOLDER / f"results-{PROCESS}.json").write_text(json.dumps(results))
