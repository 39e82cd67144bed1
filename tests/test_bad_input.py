"""Wrong calls: each gives one sentence, in a ``ValueError``, with the argument and what came."""

import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from experiments import adversarial_training, choices, command_line, launch
from robustjax import (
    attacks,
    checks,
    data,
    gradients,
    keys,
    losses,
    metrics,
    models,
    objectives,
    optim,
    parallel,
    training,
)
from robustjax.norms import L1, L2, LInf, Lp
from robustjax.threat import ThreatModel
from robustjax.training import NonFiniteLoss, checkpoint, feed, report

KEY, RAW = jax.random.key(0), np.array([0, 7], np.uint32)
THREE_KEYS = jax.random.split(KEY, 3)
THREAT = ThreatModel(LInf(), 0.1)
X, Y = jnp.full((2, 2, 2, 1), 0.5), jnp.array([0, 1])
LOGITS = jnp.array([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, 1.0]])
PARAMS = {"w": jnp.ones((4, 3))}
BATCH = {"image": X, "label": Y, "index": jnp.arange(2)}
SGD = optax.sgd(0.1)
STATE = training.create_state(PARAMS, {}, SGD, KEY)
MESH = parallel.device_mesh()

IMAGES, LABELS = np.full((8, 2, 2, 1), 0.5, np.float32), np.zeros(8, np.int32)
NAN = np.where(np.arange(8).reshape(8, 1, 1, 1) == 3, np.nan, IMAGES)
EVAL_BATCH = {"image": IMAGES, "label": LABELS, "index": np.arange(8), "mask": np.ones(8, bool)}

SMALL = adversarial_training.PRESETS["small"]


def linear(x):
    return x.reshape(len(x), -1)[:, :3]


def mean_loss(logits, y):
    return losses.cross_entropy(logits, y).mean()


def model_fn(params, model_state, x, train, key):
    return x.reshape(len(x), -1) @ params["w"], model_state


def sums(params, model_state, x, train, key):
    return x.sum((1, 2, 3)), model_state


def two_classes(params, model_state, x, train, key):
    return x.reshape(len(x), -1)[:, :2], model_state


def attack(threat=THREAT, *, x=X, y=Y, key=KEY, logits_fn=linear, **options):
    return attacks.pgd(threat, **{"steps": 1, **options})(logits_fn, key, x, y)


def aux_attack():
    return attacks.pgd(THREAT, steps=1, has_aux=True)


def step(objective=None, *, loss=losses.cross_entropy, model_fn=model_fn, drop=None, **changes):
    objective = objectives.standard(loss) if objective is None else objective
    batch = {name: value for name, value in (BATCH | changes).items() if name != drop}
    return training.train_step(model_fn, objective, SGD)(STATE, batch)


def evaluate(attacks=None, *, model_fn=model_fn, key=KEY, drop=None, **changes):
    batch = {name: value for name, value in (EVAL_BATCH | changes).items() if name != drop}
    return training.make_evaluator(model_fn, attacks or {})(PARAMS, {}, key, [EVAL_BATCH, batch])


def evaluate_none():
    return training.make_evaluator(model_fn, {})(PARAMS, {}, KEY, [])


def device_step():
    return training.train_step(model_fn, objectives.standard(), SGD, axis_name=parallel.AXIS)


def resident(batch_size, key=KEY):
    return feed.resident(device_step(), dataset(), key=key, batch_size=batch_size, mesh=MESH)


def streamed(rows, count=1, *, images=IMAGES):
    batch = {"image": images[:rows], "label": LABELS[:rows], "index": np.arange(rows)}
    options = {"steps_per_epoch": 4, "mesh": MESH}
    advance = feed.streamed(device_step(), lambda at: iter([batch]), **options)
    return advance(parallel.replicate(STATE, MESH), 0, 0, count)


def fit(loss=1.0, **options):
    def advance(state, epoch, first, count):
        return state, {"loss": np.full(count, loss)}

    return training.fit(
        STATE, advance, **{"epochs": 1, "steps_per_epoch": 2, "dispatch": 1, **options}
    )


def saved(folder, *, damage="", metric="clean"):
    with checkpoint.open_checkpoints(folder, best_metric=metric) as manager:
        checkpoint.save(manager, STATE, {"clean": 0.5})
        manager.wait_until_finished()
        manager.best_step()
    for path in (folder / "0" / damage).rglob("*") if damage else ():
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return folder


def restore(folder, *, params=PARAMS, optimizer=SGD, at=None):
    like = training.create_state(params, {}, optimizer, KEY)
    with checkpoint.open_checkpoints(folder, best_metric="clean") as manager:
        return checkpoint.restore(manager, like, step=at)


def enter(folder, *, resume=True, eps=0.1, **files):
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_bytes(text)
    return report.open_workdir(folder, {"eps": eps}, resume=resume)


def read_metrics(folder, *lines):
    (folder / report.METRICS).write_bytes(b"\n".join(lines) + b"\n")
    return report.MetricsWriter(folder)


def below_a_file(folder):
    (folder / "file").write_text("")
    return folder / "file" / "run"


def dataset(image=IMAGES, label=LABELS, num_classes=3):
    return data.Dataset(image, label, num_classes, "tiny")


def host_batches(**options):
    return data.host_batches(dataset(), **{"batch_size": 4, "seed": 0, **options})


def npz(folder, split="train", **arrays):
    np.savez(folder / "a.npz", **arrays)
    return data.load(f"npz:{folder / 'a.npz'}", split, validation_size=2)


def image_folder(folder, **shapes):
    for name, shape in shapes.items():
        path = folder / "train" / "cat" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if shape is None:
            path.write_text("no image")
        else:
            Image.fromarray(np.zeros(shape, np.uint8)).save(path)
    return data.load(f"folder:{folder}", "train", validation_size=0)


def apply(module, x=None, *, train=False, key=KEY):
    x = jnp.zeros((2, 4, 4, 3)) if x is None else x
    model = models.from_linen(module)
    return model.apply(*model.init(KEY, x), x, train, key)


def settings(**changes):
    return dataclasses.replace(SMALL, **changes)


def parse(*words):
    return command_line.parse_settings(
        words, adversarial_training.Settings, adversarial_training.PRESETS
    )


def join(**hosts):
    launch.join(command_line.Common(**hosts))


def main(folder, *words):
    fitting = ("--batch_size=96", "--test_batch_size=96", "--dataset=digits", "--model=linear")
    return adversarial_training.main(parse(*fitting, f"--workdir={folder / 'run'}", *words)[0])


# name: (wrong call, what the message must match); a call is given an empty folder.
# fmt: off
CHECKS = {
    "many numbers": (lambda _: checks.number("eps", -np.ones((40, 40)), at_least=0),
                     r"eps must be >= 0, got -1\.0"),
    "words": (lambda _: checks.number("eps", ["a"] * 99), r"eps must be a number, got \['a', 'a'"),
    "flag as number": (lambda _: checks.number("eps", True), "eps must be a number, got True"),
    "array as integer": (lambda _: checks.integer("steps", np.arange(200)),
                         r"steps must be an integer, got array\(\[ 0, 1"),
    "list as choice": (lambda _: checks.choice("norm", ["l2"], ("linf", "l2")),
                       r"norm must be one of 'linf', 'l2', got \['l2'\]"),
}
KEYS = {
    "raw": (lambda _: attack(key=RAW), r"key must be a typed key .* got array\(\[0, 7\].*uint32"),
    "number": (lambda _: attack(key=0), "key must be a typed key .* got 0"),
    "wrong number": (lambda _: attack(key=THREE_KEYS),
                     r"key must be one key or one per example, \(2,\), got shape \(3,\)"),
    "several for a data set": (lambda _: keys.per_example(THREE_KEYS, jnp.arange(2)),
                               r"key must be a single key, got shape \(3,\)"),
    "float index": (lambda _: keys.per_example(KEY, jnp.arange(2.0)),
                    r"index must be integers of shape \(n,\), got float32\(2,\)"),
    "fold in one": (lambda _: keys.fold_in(KEY, 1), r"keys must have shape \(n,\), got \(\)"),
    "fold in negative": (lambda _: keys.fold_in(THREE_KEYS, -1), "data must be >= 0, got -1"),
    "fold in fraction": (lambda _: keys.fold_in(THREE_KEYS, 1.5),
                         r"data must be an integer, got 1\.5"),
    "of a state": (lambda _: training.create_state(PARAMS, {}, SGD, RAW),
                   r"key must be a typed key .* got array\(\[0, 7\]"),
    "several of a state": (lambda _: training.create_state(PARAMS, {}, SGD, THREE_KEYS),
                           r"key must be a single key, got shape \(3,\)"),
    "of an evaluation": (lambda _: evaluate(key=RAW),
                         r"key must be a typed key .* got array\(\[0, 7\]"),
    "of an order": (lambda _: data.epoch_batches(RAW, 0, 8, 2),
                    r"key must be a typed key .* got array\(\[0"),
    "of a sample": (lambda _: THREAT.sample(THREE_KEYS, X), r"key must .* \(2,\), got shape \(3,"),
}
GEOMETRY = {
    "eps < 0": (lambda _: ThreatModel(LInf(), -0.1), r"eps must be >= 0, got -0\.1"),
    "eps NaN": (lambda _: ThreatModel(LInf(), float("nan")), "eps must be a number, got nan"),
    "eps infinite": (lambda _: ThreatModel(L2(), float("inf")), "eps must be finite, got inf"),
    "eps text": (lambda _: ThreatModel(L2(), "8/255"), "eps must be a number, got '8/255'"),
    "eps matrix": (lambda _: ThreatModel(L2(), np.ones((2, 2))), r"eps must .* shape \(2, 2\)"),
    "many eps < 0": (lambda _: ThreatModel(L2(), -np.ones(500)), r"eps must be >= 0, got -1\.0"),
    "eps for others": (lambda _: attack(ThreatModel(LInf(), jnp.full(3, 0.1)), step_size=0.1),
                       r"eps must be one number or one per example, \(2,\), got shape \(3,\)"),
    "box upside down": (lambda _: ThreatModel(LInf(), 0.1, 1.0, 0.0),
                        r"lower must be < upper, got 1\.0 and 0\.0"),
    "norm by name": (lambda _: ThreatModel("linf", 0.1), "norm must be a norm .* got 'linf'"),
    "norm class": (lambda _: ThreatModel(LInf, 0.1), "norm must be a norm .* got <class"),
    "p = 1": (lambda _: Lp(1), "p must lie strictly between 1 and inf, got 1"),
    "p text": (lambda _: Lp("2"), "p must be a number, got '2'"),
    "radius < 0": (lambda _: L1().project(jnp.ones(3), -1.0), r"radius must be >= 0, got -1\.0"),
    "t < 0": (lambda _: L2().prox(jnp.ones(3), -2), "t must be >= 0, got -2"),
    "radii for others": (lambda _: L2().project(jnp.ones((3, 2)), jnp.ones(2), batch_ndim=1),
                         r"radius must .* batch shape \(3,\), got \(2,\)"),
    "integer vector": (lambda _: L2().value(jnp.arange(3)), "vector must be floating.* int32"),
    "no batch axes": (lambda _: L2().value(jnp.ones(3), batch_ndim=2),
                      r"leaves must share 2 leading batch axes, got shapes \[\(3,\)\]"),
    "nothing to sample": (lambda _: L2().sample_ball(KEY, jnp.ones(0), 1.0),
                          "like must hold at least one .* got 0"),
    "shapes": (lambda _: THREAT.project(X, X[:1]), r"x_adv must .* of x, \(1, .* got \(2, 2"),
    "integers": (lambda _: THREAT.project(X.astype(int), X.astype(int)), "x must be .* got int32"),
    "sizes for others": (lambda _: THREAT.step(X, X, X, jnp.ones(3)),
                         r"size must be .* \(2,\), got shape \(3,\)"),
    "no exact projection": (lambda _: ThreatModel(Lp(3), 0.1).project_exact(X, X),
                            "project_exact knows the norms linf, l2 and l1, got l3"),
    "norm of a descent": (lambda _: optim.steepest_descent("l2", 0.1), "norm must .* got 'l2'"),
    "learning rate < 0": (lambda _: optim.sign_gd(-0.1), r"learning_rate must be >= 0, got -0\.1"),
}
LOSSES = {
    "vector of logits": (lambda _: losses.cross_entropy(LOGITS[0], Y),
                         r"logits must be .* \(n, K\), got float32\(4,\)"),
    "integer logits": (lambda _: losses.margin(LOGITS.astype(int), Y), "logits must .* int32"),
    "list of logits": (lambda _: losses.cross_entropy([[1.0, 2.0]], Y[:1]),
                       r"logits must be an array, got list \[\[1\.0"),
    "one class": (lambda _: losses.cross_entropy(LOGITS[:, :1], Y),
                  "logits must have at least 2 classes, got K = 1"),
    "labels of others": (lambda _: losses.cross_entropy(LOGITS, Y[:1]),
                         r"y must have shape \(2,\), .* got \(1,\)"),
    "float labels": (lambda _: losses.margin(LOGITS, Y * 1.0), "y must be integer .* float32"),
    "label K": (lambda _: losses.cross_entropy(LOGITS, Y + 3), r"y must lie in 0 \.\. 3, got 4"),
    "label -1": (lambda _: losses.margin(LOGITS, Y - 1), r"y must lie in 0 \.\. 3, got -1"),
    "target K": (lambda _: losses.dlr_targeted(LOGITS, Y, Y + 3), r"target must lie in .* got 4"),
    "targets of others": (lambda _: losses.cw_targeted(LOGITS, Y[:1]),
                          r"target must have shape \(2,\), .* got \(1,\)"),
    "K = 2 for DLR": (lambda _: losses.dlr(LOGITS[:, :2], Y),
                      "logits must have at least 3 classes, got K = 2"),
    "K = 3 for DLR": (lambda _: losses.dlr_targeted(LOGITS[:, :3], Y, Y),
                      "logits must have at least 4 classes, got K = 3"),
    "confidence < 0": (lambda _: losses.cw(LOGITS, Y, -1.0), r"confidence must be >= 0, got -1"),
    "KL of others": (lambda _: losses.kl_divergence(LOGITS, LOGITS[:1]),
                     r"reference must have the shape of logits, \(2, 4\), got \(1, 4\)"),
    "KL of vectors": (lambda _: losses.kl_divergence(LOGITS[0], LOGITS[0]),
                      r"logits must have shape \(n, K\), got \(4,\)"),
    "guard < 0": (lambda _: losses.boosted_cross_entropy(LOGITS, Y, guard=-1e-4),
                  r"guard must be >= 0, got -0\.0001"),
    "label K, boosted": (lambda _: losses.boosted_cross_entropy(LOGITS, Y + 3),
                         r"y must lie in 0 \.\. 3, got 4"),
    "correct": (lambda _: metrics.correct(LOGITS, Y + 3), r"y must lie in 0 \.\. 3, got 4"),
    "accuracy of others": (
        lambda _: metrics.instantaneous_accuracy(jnp.zeros((3, 2), int), jnp.zeros(1, int)),
        r"prediction must have shape \(iterates, 1\), got \(3, 2\)"),
    "accuracy of scores": (
        lambda _: metrics.cumulative_accuracy(jnp.zeros((3, 2), int), jnp.zeros(2)),
        r"reference must be integers of shape \(n,\), got float32\(2,\)"),
}
ATTACKS = {
    "threat by name": (lambda _: attack("linf"), "threat must be a ThreatModel.* got 'linf'"),
    "norm as threat": (lambda _: attacks.fgsm(LInf()), r"threat must be .* got LInf\(\)"),
    "eps as threat": (lambda _: attacks.fgsm_rs(0.1), r"threat must be .* got 0\.1"),
    "steps < 0": (lambda _: attack(steps=-1), "steps must be >= 0, got -1"),
    "steps 1.5": (lambda _: attack(steps=1.5), r"steps must be an integer, got 1\.5"),
    "no restarts": (lambda _: attack(restarts=0), "restarts must be >= 1, got 0"),
    "step size < 0": (lambda _: attacks.bim(THREAT, steps=1, step_size=-0.1),
                      r"step_size must be >= 0, got -0\.1"),
    "step sizes for others": (lambda _: attack(step_size=jnp.ones(1)),
                              r"step_size must be .* \(2,\), got shape \(1,\)"),
    "rule and step size": (lambda _: attack(step_rule=SGD, step_size=0.1),
                           r"step_size must be left out when a step_rule is given, got 0\.1"),
    "number as rule": (lambda _: attack(step_rule=0.1), r"step_rule must be an optax .* got 0\.1"),
    "loss by name": (lambda _: attack(loss="dlr"), "loss must be a function, got 'dlr'"),
    "mean as loss": (lambda _: attack(loss=mean_loss),
                     r"loss\(logits, y\) must have one entry per example, \(2,\), got \(\)"),
    "start": (lambda _: attack(start="x"), "start must be one of 'zero', 'uniform', got 'x'"),
    "start elsewhere": (lambda _: attack(start=lambda keys, x: x[:1]),
                        r"x_adv must have the shape of x, .* got \(1, 2, 2, 1\)"),
    "noise < 0": (lambda _: attacks.gaussian_start(-1), "scale must be >= 0, got -1"),
    "iterate": (lambda _: attack(iterate="first"), "iterate must be .* 'best', got 'first'"),
    "select": (lambda _: attack(select="all"), "select must be .* 'any', got 'all'"),
    "targeted by name": (lambda _: attacks.least_likely("bim"),
                         "targeted_attack must be a function, got 'bim'"),
    "flat input": (lambda _: attack(x=X.ravel()), r"x must be a batch .* got float32\(8,\)"),
    "integer images": (lambda _: attack(x=jnp.zeros((2, 2, 2, 1), jnp.uint8)),
                       r"x must be a batch of floating-point inputs .* got uint8\(2, 2, 2, 1\)"),
    "empty batch": (lambda _: attack(x=X[:0], y=Y[:0]),
                    r"x must hold at least one example, got shape \(0, 2, 2, 1\)"),
    "box violated": (lambda _: attack(x=X * 255), r"x must lie in \[0, 1\], got .* to 127\.5"),
    "NaN": (lambda _: attack(x=X.at[1].set(jnp.nan)), "x must be finite, got NaN .* example 1"),
    "labels of others": (lambda _: attack(y=Y[:1]), r"y must .* example, 2, got shape \(1,\)"),
    "float labels": (lambda _: attack(y=Y * 1.0), "y must be integer labels .* got float32"),
    "label K": (lambda _: attack(y=Y + 2), r"y must lie in 0 \.\. 2, got 3"),
    "K = 2 for DLR": (lambda _: attack(logits_fn=lambda x: linear(x)[:, :2], loss=losses.dlr),
                      "logits must have at least 3 classes, got K = 2"),
    "parameters as model": (lambda _: attack(logits_fn=PARAMS), r"logits_fn must .* got \{'w'"),
    "sums as logits": (lambda _: attack(logits_fn=lambda x: x.sum((1, 2, 3))),
                       r"logits must be .* \(n, K\), got float32\(2,\)"),
    "model with state": (lambda _: attack(logits_fn=lambda x: (linear(x), {})),
                         "logits must be an array, got tuple"),
}
OBJECTIVES = {
    "attack by name": (lambda _: objectives.madry("pgd"), "attack must be a function, got 'pgd'"),
    "loss by name": (lambda _: objectives.standard("ce"), "loss must be a function, got 'ce'"),
    "attack mode": (lambda _: objectives.madry(attack, attack_mode="test"),
                    "attack_mode must be one of 'eval', 'train', got 'test'"),
    "beta < 0": (lambda _: objectives.trades(attack, beta=-6), "beta must be >= 0, got -6"),
    "MART attack by name": (lambda _: objectives.mart("pgd"),
                            "attack must be a function, got 'pgd'"),
    "MART beta < 0": (lambda _: objectives.mart(attack, beta=-6), "beta must be >= 0, got -6"),
    "MART guard < 0": (lambda _: objectives.mart(attack, guard=-1), "guard must be >= 0, got -1"),
    "MART attack mode": (lambda _: objectives.mart(attack, attack_mode="test"),
                         "attack_mode must be one of 'eval', 'train', got 'test'"),
    "MART attack on logits": (lambda _: step(objectives.mart(objectives.trades_attack(THREAT))),
                              r"reference must have the shape of logits, \(2, 3\), got \(2,\)"),
    "stages by name": (lambda _: objectives.stages("madry"),
                       "loss_fn must be a function, got 'madry'"),
    "outer by name": (lambda _: objectives.outer_only("madry"),
                      "loss_fn must be a function, got 'madry'"),
    "one mode": (
        lambda _: objectives.stages(lambda p, s, k, b: None).outer({}, {}, KEY, {}, train=False),
        "loss_fn must have an argument train to be run in evaluation mode"),
    "KL direction": (lambda _: objectives.trades(attack, kl_direction="forward"),
                     "kl_direction must be one of 'clean_to_adversarial', .* got 'forward'"),
    "attack on labels": (lambda _: step(objectives.trades(attacks.fgsm(THREAT))),
                         r"y must have shape \(2,\), .* got \(2, 3\)"),
    "attack on logits": (lambda _: step(objectives.madry(objectives.trades_attack(THREAT))),
                         r"reference must have the shape of logits, \(2, 3\), got \(2,\)"),
    "attack with trace": (lambda _: step(objectives.madry(aux_attack())),
                          "result of attack, must be an array, got tuple"),
    "mean as loss": (lambda _: step(loss=mean_loss),
                     r"losses of the objective must have one entry .* \(2,\), got \(\)"),
    "constant as schedule": (lambda _: objectives.scheduled(objectives.standard, 0.1),
                             r"schedule must be a function, got 0\.1"),
    "no step": (lambda _: objectives.scheduled(objectives.standard, abs)(model_fn)({}, {}, KEY, {}),
                "batch must hold step, got nothing"),
    "eps of a schedule": (
        lambda _: step(objectives.scheduled(
            lambda eps: objectives.madry(attacks.fgsm(ThreatModel(LInf(), eps))), lambda s: -0.1)),
        r"eps must be >= 0, got -0\.1"),
}
TRAINING = {
    "no index": (lambda _: step(drop="index"), "batch must hold .* index, got image, label"),
    "integer images": (lambda _: step(image=jnp.zeros((2, 2, 2, 1), jnp.uint8)),
                       "image must be a batch of floating-point inputs .* got uint8"),
    "empty batch": (lambda _: step(**{name: v[:0] for name, v in BATCH.items()}),
                    r"image must hold at least one example, got shape \(0, 2"),
    "float labels": (lambda _: step(label=Y * 1.0), "label must be integer .* got float32"),
    "labels of others": (lambda _: step(label=Y[:1]), r"label must .* got shape \(1,\)"),
    "index of others": (lambda _: step(index=Y[:1]), r"index must .* \(2,\), got \(1,\)"),
    "sums as logits": (lambda _: step(model_fn=sums), r"logits must .* got float32\(2,\)"),
    "model by name": (lambda _: step(model_fn="cnn"), "model_fn must be a function, got 'cnn'"),
    "objective by name": (lambda _: step("madry"), "objective must be a function, got 'madry'"),
    "number as optimizer": (lambda _: training.create_state(PARAMS, {}, 0.1, KEY),
                            r"optimizer must be an optax gradient transform, got 0\.1"),
    "uncalled oracle": (
        lambda _: training.train_step(
            model_fn, objectives.standard(), SGD, oracle=gradients.plain),
        "oracle must be an Oracle such as .* got <function plain"),
    "no devices": (lambda _: parallel.device_mesh([]), r"devices must hold .* got \[\]"),
    "odd batch": (lambda _: resident(4),
                  r"batch_size \(4\) must be divisible by the number of devices \(8\)"),
    "large batch": (lambda _: resident(16), "batch_size must be <= .* examples, 8, got 16"),
    "raw order key": (lambda _: resident(8, RAW), r"key must be a typed key .* got array\(\[0, 7"),
    "odd stream": (lambda _: streamed(4), r"batch size \(4\) must be divisible by .* \(8\)"),
    "integer stream": (lambda _: streamed(8, images=IMAGES.astype(np.int32)),
                       "images must be uint8, int16 or floating-point, got int32"),
    "short stream": (lambda _: streamed(8, 3), "batches_from must give .* got only 1 of 3"),
    "NaN loss": (lambda _: fit(np.nan), "loss at step 1 must be finite, got nan"),
    "infinite loss": (lambda _: fit(np.inf, epochs=2), "loss at step 1 must be finite, got inf"),
    "epochs < 0": (lambda _: fit(epochs=-1), "epochs must be >= 0, got -1"),
    "no dispatch": (lambda _: fit(dispatch=0), "dispatch must be >= 1, got 0"),
    "no limit": (lambda _: training.steps_per_dispatch(4, 0), "limit must be >= 1, got 0"),
}
EVALUATION = {
    "attack named clean": (lambda _: evaluate({"clean": attack}), "attacks must not hold 'clean'"),
    "list of attacks": (lambda _: evaluate([attack]), r"attacks must map .* got \[<function"),
    "attack by name": (lambda _: evaluate({"a": "pgd"}), "attack a must be a function, got 'pgd'"),
    "attack with trace": (lambda _: evaluate({"a": aux_attack()}),
                          "result of attack a, must be an array, got tuple"),
    "NaN": (lambda _: evaluate(image=NAN), "images must be finite, got NaN .* in example 3"),
    "box violated": (lambda _: evaluate(image=IMAGES * 255),
                     r"images must lie in \[0, 1\], got values from 127\.5"),
    "integer images": (lambda _: evaluate(image=IMAGES.astype(np.uint8)),
                       r"images must be floating-point in \[0, 1\], got uint8"),
    "other images": (lambda _: evaluate(image=IMAGES[:, :1]),
                     r"images must have the shape of the first batch, .* got \(8, 1, 2, 1\)"),
    "odd batch": (lambda _: training.make_evaluator(model_fn, {})(
                      PARAMS, {}, KEY, [{name: v[:3] for name, v in EVAL_BATCH.items()}]),
                  r"batch_size \(3\) must be divisible by the number of devices \(8\)"),
    "no batch": (lambda _: evaluate_none(), "batches must hold at least one batch, got none"),
    "no mask": (lambda _: evaluate(drop="mask"), "batch must hold .* mask, got image, label, ind"),
    "integer mask": (lambda _: evaluate(mask=LABELS), "mask must be bool, got int32"),
    "label K": (lambda _: evaluate(label=LABELS + 3), r"label must lie in 0 \.\. 2, got 3"),
    "labels of others": (lambda _: evaluate(label=LABELS[:4]), r"label must .* got \(4,\)"),
    "sums as logits": (lambda _: evaluate(model_fn=sums),
                       r"model_fn must return logits \(n, K\), got shape \(8,\)"),
    "K = 2 for DLR": (
        lambda _: evaluate({"a": attacks.pgd(THREAT, steps=1, loss=losses.dlr)},
                           model_fn=two_classes),
        "logits must have at least 3 classes, got K = 2"),
    "panel of NaN": (lambda _: training.adversarial_panel(linear, attack, KEY, X * jnp.nan, Y),
                     "x must be finite, got NaN .* in example 0"),
}
FILES = {
    "no checkpoint": (lambda tmp: restore(tmp), "no checkpoint of step None .* holds none"),
    "other step": (lambda tmp: restore(saved(tmp), at=7), "no checkpoint of step 7 .* holds 0"),
    "other shapes": (lambda tmp: restore(saved(tmp), params={"w": jnp.ones((5, 3))}),
                     r"0 is .* of another model: params\.w must be float32\(5, 3\), got .*\(4, 3"),
    "other names": (lambda tmp: restore(saved(tmp), params={"v": PARAMS["w"]}),
                    r"another model: params\.v must be float32\(4, 3\), got nothing"),
    "other optimizer": (lambda tmp: restore(saved(tmp), optimizer=optax.adam(0.1)),
                        r"another model: opt_state\.0\.count must be int32\(\), got nothing"),
    "corrupt arrays": (lambda tmp: restore(saved(tmp, damage="default")),
                       r"checkpoint .*/0 is damaged or of another model: "),
    "corrupt metrics": (lambda tmp: restore(saved(tmp, damage="metrics")),
                        r"no checkpoint of step None in .* which holds none"),
    "metric that is not there": (lambda tmp: saved(tmp, metric="pgd"),
                                 "metrics must hold pgd, got clean"),
    "best mode": (lambda tmp: checkpoint.open_checkpoints(tmp, best_metric="a", best_mode="big"),
                  "best_mode must be one of 'max', 'min', got 'big'"),
    "checkpoints below a file": (
        lambda tmp: checkpoint.open_checkpoints(below_a_file(tmp), best_metric="a"),
        "directory .*/file/run cannot be written: Not a directory"),
    "workdir below a file": (lambda tmp: enter(below_a_file(tmp)),
                             "workdir .*/file/run cannot be written: Not a directory"),
    "workdir in a store": (
        lambda tmp: report.open_workdir("gs://bucket/run", {}, resume=True),
        "workdir must be a folder of a file system; one that all hosts have mounted, if there "
        "are several; got gs://bucket/run"),
    "foreign workdir": (lambda tmp: enter(tmp, thesis_tex=b"x"),
                        r"workdir .* must be empty or hold a run .* got .* 'thesis\.tex'"),
    "used workdir": (lambda tmp: enter(tmp, config_json=b"{}", resume=False),
                     r"workdir .* already holds a run"),
    "other settings": (lambda tmp: enter(tmp, config_json=b'{"eps": 0.2}'),
                       r"workdir .* holds a run with eps=0\.2, got eps=0\.1"),
    "long settings": (
        lambda tmp: enter(tmp, config_json=json.dumps({"eps": "a" * 900}).encode()),
        r"workdir .* holds a run with eps='aaa.*, got eps=0\.1"),
    "config cut off": (lambda tmp: enter(tmp, config_json=b'{"eps":'),
                       r"config\.json must be a JSON object, got '\{\"eps\":'"),
    "config not an object": (lambda tmp: enter(tmp, config_json=b"[1]"),
                             r"config\.json must be a JSON object, got '\[1\]'"),
    "config not text": (lambda tmp: enter(tmp, config_json=b"\xff\xfe"),
                        r"config\.json must be a JSON object, got "),
    "metrics damaged inside": (
        lambda tmp: read_metrics(tmp, b'{"step": 1, "split": "a"}', b'{"st', b"{}"),
        r"metrics\.jsonl line 2 must be a JSON object, got '\{\"st'"),
    "metrics not text": (lambda tmp: read_metrics(tmp, b"\x00\xff", b"{}"),
                         r"metrics\.jsonl line 1 must be a JSON object, got "),
    "metrics without step": (lambda tmp: read_metrics(tmp, b'{"split": "a"}', b"{}"),
                             r"metrics\.jsonl line 1 must hold step, split, got split"),
    "metrics with text as step": (
        lambda tmp: read_metrics(tmp, b'{"step": "a", "split": "a"}', b"{}"),
        r"step in .*metrics\.jsonl line 1 must be an integer, got 'a'"),
    "metrics nowhere": (lambda tmp: report.MetricsWriter(tmp / "no"),
                        "workdir .*/no cannot be written: No such file"),
}
DATA = {
    "integer images": (lambda _: dataset(IMAGES.astype(int)), "image must be uint8 .* got int64"),
    "NaN": (lambda _: dataset(NAN.astype(np.float32)), "image must be finite, got NaN .* 3"),
    "box violated": (lambda _: dataset(IMAGES * 4), r"image must lie in \[0, 1\], got .* from 2"),
    "one image": (lambda _: dataset(IMAGES[0]), "label must have one entry per image, 2, got 8"),
    "no image": (lambda _: dataset(IMAGES[:0], LABELS[:0]), r"image must .* got shape \(0, 2"),
    "label K": (lambda _: dataset(label=LABELS + 3), r"label must lie in 0 \.\. 2, got 3"),
    "label -1": (lambda _: dataset(label=LABELS - 1), r"label must lie in 0 \.\. 2, got -1"),
    "float labels": (lambda _: dataset(label=LABELS * 1.0), "label must be integers .* float64"),
    "labels of others": (lambda _: dataset(label=LABELS[:3]), "label must .* image, 8, got 3"),
    "no classes": (lambda _: dataset(num_classes=0), "num_classes must be >= 1, got 0"),
    "integers as floats": (lambda _: data.as_float(IMAGES.astype(int)),
                           "images must be uint8, int16 or floating-point, got int64"),
    "large batch": (lambda _: data.steps_per_epoch(8, 9),
                    "batch_size must be <= the number of examples, 8, got 9"),
    "epoch < 0": (lambda _: data.epoch_order(KEY, -1, 8), "epoch must be >= 0, got -1"),
    "odd share": (lambda _: host_batches(process_count=3, process_index=0),
                  r"batch_size \(4\) must be divisible by process_count \(3\)"),
    "process": (lambda _: host_batches(process_count=2, process_index=2),
                "process_index must be <= 1, got 2"),
    "seed < 0": (lambda _: host_batches(seed=-1), "seed must be >= 0, got -1"),
    "no batch size": (lambda _: data.eval_batches(dataset(), 0), "batch_size must be >= 1, got 0"),
    "padding < 0": (lambda _: data.crop_and_flip(-4), "padding must be >= 0, got -4"),
    "all held out": (lambda _: data.hold_out(LABELS, 8), "validation_size must .* 8, got 8"),
    "unknown set": (lambda _: data.load("mnits5k", "train"),
                    "name must be 'digits', 'mnist5k', .* got 'mnits5k'"),
    "missing set": (lambda _: data.load("cifar10", "train", data_dir="nowhere"),
                    "'cifar10' is not prepared in nowhere: prepare it with python -c .*cifar10"),
    "split": (lambda _: data.load("digits", "valid"), "split must be .* 'test', got 'valid'"),
    "fixed split": (lambda _: data.load("digits", "train", validation_size=9),
                    "validation_size must be None for 'digits', .* got 9"),
    "data_dir": (lambda _: data.load("digits", "train", data_dir="d"), "data_dir is .* got d"),
    "missing file": (lambda tmp: data.load(f"npz:{tmp}/b.npz", "test"), r"npz .* got .*b\.npz"),
    "file without labels": (lambda tmp: npz(tmp, x_train=IMAGES),
                            r"a\.npz must hold both x_train and y_train, lacks y_train"),
    "file of others": (lambda tmp: npz(tmp, scores=IMAGES), r"a\.npz must hold .* got scores"),
    "file with objects": (lambda tmp: npz(tmp, x_train=np.array([{}]), y_train=LABELS),
                          r"a\.npz must be an \.npz archive of plain arrays, but: Object arrays"),
    "file in bytes": (lambda tmp: npz(tmp, x_train=IMAGES * 255, y_train=LABELS),
                      r"x_train in .*a\.npz must lie in \[0, 1\], got values from 127\.5"),
    "file without split": (lambda tmp: npz(tmp, "test", x_train=IMAGES, y_train=LABELS),
                           r"split must be .*a\.npz' can give, got 'test'"),
    "missing folder": (lambda tmp: data.load(f"folder:{tmp}/no", "train"),
                       "image folder must exist, got .*/no"),
    "empty folder": (lambda tmp: image_folder(tmp), "must hold the folders train.* got nothing"),
    "no image in it": (lambda tmp: image_folder(tmp, a=None), r"a\.png must be a readable 8-bit"),
    "images of two sizes": (lambda tmp: image_folder(tmp, a=(2, 2), b=(3, 3)),
                            r"images must have one shape .* got uint8\(2, 2, 3\) and uint8\(3, 3"),
}
MODELS = {
    "no train": (lambda _: models.from_linen(nn.Dense(3)), "module .* train .* Dense has inputs"),
    "train = 1": (lambda _: apply(models.Linear(3), train=1), "train must be True .* got 1"),
    "raw key": (lambda _: apply(models.Linear(3), train=True, key=RAW),
                r"key must be a typed key .* got array\(\[0, 7\]"),
    "integer images": (lambda _: apply(models.Linear(3), jnp.zeros((2, 4, 4, 3), int)),
                       "x must be floating-point, .* got int32"),
    "no classes": (lambda _: apply(models.Linear(0)), "num_classes must be >= 1, got 0"),
    "std = 0": (lambda _: apply(models.Linear(3, std=0.0)), r"std must be > 0, got 0\.0"),
    "means of others": (lambda _: apply(models.Linear(3, mean=(1.0, 2.0))),
                        r"mean must be .* of the 3 channels, got shape \(2,\)"),
    "convolution": (lambda _: apply(models.SmallCNN(3, conv="fast")),
                    "conv must be one of 'canonical', 'plain', got 'fast'"),
    "flat images": (lambda _: apply(models.Conv(3, 3), jnp.zeros((2, 4))), "module .* train"),
    "normalisation": (lambda _: apply(models.ResNet((1,), width=2, norm="layer")),
                      "norm must be one of 'batch', 'group', 'none', got 'layer'"),
    "block": (lambda _: apply(models.ResNet((1,), block="wide")), "block must be .* got 'wide'"),
    "depth": (lambda _: apply(models.WideResNet(29, 1)), r"depth must be 6 n \+ 4 .* got 29"),
    "widening": (lambda _: apply(models.WideResNet(10, 0)), "widen_factor must be >= 1, got 0"),
    "dropout": (lambda _: apply(models.WideResNet(10, 1, dropout_rate=1.0)),
                r"dropout_rate must be < 1, got 1\.0"),
    "wrong logits": (lambda _: models.from_function(lambda p, x: x).apply({}, {}, X, False, None),
                     r"must return logits \(n, K\) with n = 2, got shape \(2, 2, 2, 1\)"),
    "no init": (lambda _: models.from_function(linear).init(KEY, X), "init must be given"),
    "channels": (lambda _: models.canonical_conv(
                     X, jnp.zeros((1, 1, 3, 2)), (1, 1), "SAME",
                     dimension_numbers=("NHWC", "HWIO", "NHWC")),
                 "rhs must have 1 input channels, got 3"),
}
# "see --help" follows these on the command line.
FLAGS = {
    "--norm=l3": r"--norm=l3: .*<linf\|l2\|l1>",
    "--model=resnet": r"--model=resnet: .*<linear\|mlp\|small_cnn\|",
    "--optimizer=lion": r"--optimizer=lion: .*<sgd\|mgnc\|sngm\|adam\|",
    "--schedule=step": r"--schedule=step: .*<constant\|piecewise\|",
    "--attack=apgd": r"--attack=apgd: .*<fgsm\|fgsm_rs\|pgd",
    "--precision=fp8": r"--precision=fp8: .*<float32\|bfloat16>",
    "--preset=big": r"--preset=big: .*<small\|paper>",
    "--objective=clean": "--objective=clean: must be of standard, madry, trades, .*got 'clean'",
    "--objective=": "--objective=: must name at least one of standard, madry, trades",
    "--objective=madry,madry": "objective must name each one once, got madry,madry",
    "--atack=pgd": "unknown flag --atack, did you mean --attack",
    "--eps=big": "--eps=big: must be a number or a fraction, got 'big'",
    "--eps=-8/255": r"eps must be >= 0, got -0\.03",
    "--eps=nan": "eps must be a number, got nan",
    "--epochs=1.5": r"--epochs=1\.5: must be a whole number, got '1\.5'",
    "--epochs=-1": "epochs must be >= 0, got -1",
    "--milestones=a,b": "--milestones=a,b: must be a whole number, got 'a'",
    "--milestones=90,75": r"milestones must rise from 1 on, got \(90, 75\)",
    "--resume=maybe": "--resume=maybe: must be true or false, got 'maybe'",
    "--batch_size=0": "batch_size must be >= 1, got 0",
    "--test_batch_size=0": "test_batch_size must be >= 1, got 0",
    "--attack_steps=-1": "attack_steps must be >= 0, got -1",
    "--attack_step_size=-1": r"attack_step_size must be >= 0, got -1\.0",
    "--test_restarts=0": "test_restarts must be >= 1, got 0",
    "--dispatch=0": "dispatch must be >= 1, got 0",
    "--checkpoint_every=0": "checkpoint_every must be >= 1, got 0",
    "--learning_rate=0": r"learning_rate must be > 0, got 0\.0",
    "--momentum=1": r"momentum must be < 1, got 1\.0",
    "--weight_decay=-1": r"weight_decay must be >= 0, got -1\.0",
    "--width=0": "width must be >= 1, got 0",
    "--seed=-1": "seed must be >= 0, got -1",
    "--validation_size=-1": "validation_size must be >= 0, got -1",
    "--join_timeout=0": "join_timeout must be >= 1, got 0",
    "--heartbeat_timeout=0": "heartbeat_timeout must be >= 1, got 0",
    "--save_every=-1": "save_every must be >= 0, got -1",
    "digits": "arguments must be flags .* got 'digits'",
}
EXPERIMENTS = {
    **{word: (lambda _, word=word: parse(word), pattern) for word, pattern in FLAGS.items()},
    "setting by name": (lambda _: settings(norm="l7"), "norm must be .* 'l1', got 'l7'"),
    "attack by name": (
        lambda _: choices.make_attack("apgd", THREAT, steps=1, step_size=0.1, start="zero"),
        "attack must be one of 'fgsm', .* got 'apgd'"),
    "optimizer by name": (
        lambda _: choices.make_optimizer(
            "lion", abs, momentum=0.9, weight_decay=0.0, max_norm=1.0),
        "optimizer must be one of 'sgd', .* got 'lion'"),
    "batch larger than the set": (lambda tmp: main(tmp, "--batch_size=8000"),
                                  "batch_size must be <= .* examples, 1297, got 8000"),
    "batch for other devices": (lambda tmp: main(tmp, "--batch_size=12"),
                                r"batch_size \(12\) must be .* devices \(8\), as 8 and 16 are"),
    "processes without an address": (lambda _: join(num_processes=2, process_id=0),
                                     "coordinator_address must be given, .* got None"),
    "address without processes": (lambda _: join(coordinator_address="127.0.0.1:1"),
                                  "num_processes must be given, .* got None"),
    "address without a port": (
        lambda _: join(coordinator_address="here", num_processes=2, process_id=0),
        "coordinator_address must be HOST:PORT, got here"),
    "process of a smaller cluster": (
        lambda _: join(coordinator_address="127.0.0.1:1", num_processes=2, process_id=2),
        "process_id must be <= 1, got 2"),
    "nobody at the address": (
        lambda _: join(coordinator_address="127.0.0.1:1", num_processes=2, process_id=1,
                       join_timeout=1),
        "coordinator_address 127.0.0.1:1 did not answer for 1 seconds"),
    "no cluster": (lambda _: join(distributed=True), "distributed needs coordinator_address"),
    "all held out": (lambda tmp: main(tmp, "--dry_run", "--dataset=cifar10",
                                      "--validation_size=60000"),
                     "validation_size must be <= 49999, got 60000"),
}
# fmt: on
ROOMS = {
    "checks": CHECKS,
    "keys": KEYS,
    "geometry": GEOMETRY,
    "losses": LOSSES,
    "attacks": ATTACKS,
    "objectives": OBJECTIVES,
    "training": TRAINING,
    "evaluation": EVALUATION,
    "files": FILES,
    "data": DATA,
    "models": MODELS,
    "experiments": EXPERIMENTS,
}
CASES = [
    pytest.param(*case, id=f"{room}: {name}")
    for room, cases in ROOMS.items()
    for name, case in cases.items()
]


# The storage library leaves reads behind that nobody waits for when one of them fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("call, pattern", CASES)
def test_a_wrong_call_is_refused_in_one_sentence(call, pattern, plain_calls, tmp_path):
    with pytest.raises(ValueError, match=pattern) as caught:
        call(tmp_path)
    message = str(caught.value)
    assert type(caught.value) in (ValueError, NonFiniteLoss)
    assert "\n" not in message
    assert len(message) < 300


def test_a_refused_run_leaves_no_folder(plain_calls, tmp_path):
    with pytest.raises(ValueError, match="batch_size"):
        main(tmp_path, "--batch_size=12")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("word", ["--norm=l3", "--seed=-1", "digits", "--data_dir=nowhere"])
def test_the_command_line_exits_with_the_sentence(word, plain_calls, monkeypatch, capsys):
    fitting = ("--batch_size=96", "--test_batch_size=96", "--dataset=digits")
    monkeypatch.setattr(sys, "argv", ["program", *fitting, word])
    monkeypatch.setattr(gc, "freeze", lambda: None)  # it would keep what all the tests have made
    with pytest.raises(SystemExit) as caught:
        command_line.run(
            adversarial_training.main,
            adversarial_training.Settings,
            adversarial_training.PRESETS,
            adversarial_training.__doc__,
        )
    assert re.fullmatch(r"error: .*(l3|-1|digits|nowhere).*", caught.value.code)
    assert capsys.readouterr() == ("", "")


def test_a_process_ends_with_status_1_and_no_traceback(tmp_path):
    program = [sys.executable, "-m", "experiments.adversarial_training"]
    process = subprocess.run(
        [*program, "--dataset=digits", f"--workdir={below_a_file(tmp_path)}"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1
    sentence = r"error: workdir .*/file/run cannot be written: Not a directory"
    assert re.fullmatch(sentence, process.stderr.strip())
