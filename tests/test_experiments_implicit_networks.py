"""Networks in the study of implicit robustness: exact where it can be, no training."""

import dataclasses
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import (
    choices,
    dry_run,
    fourier_zoo,
    implicit_network_jobs,
    implicit_networks,
    noisy_digits,
    training_run,
)
from experiments.implicit_networks import BETAS, TRAIN_EPS, ZOO_EPS, SmallNetworks, adam_pgd
from experiments.training_settings import Settings as Training
from robustjax import attacks, data, objectives
from robustjax.norms import LInf
from robustjax.threat import ThreatModel

TINY = SmallNetworks(seeds=2, epochs=1, train_size=64, test_size=60)
THREAT = ThreatModel(LInf(), 0.1)


def linear(x):
    w = jnp.linspace(-1, 1, 12).reshape(4, 3)
    return x.reshape(len(x), -1) @ w


X = jnp.full((2, 4), 0.5)
Y = jnp.array([0, 2])


def test_the_attack_of_the_evaluation_is_exact_on_linear_models():
    x_adv = adam_pgd(THREAT)(linear, jax.random.key(0), X, Y)
    np.testing.assert_allclose(jnp.abs(x_adv - X), 0.1, atol=1e-6)


def test_optax_sign_steps_are_those_of_pgd():
    """An optimizer in place of the steepest steps, in AT and in TRADES."""
    target, rule = linear(X), optax.chain(optax.scale_by_sign(), optax.scale(-0.03))
    for make, y in ((attacks.pgd, Y), (objectives.trades_attack, target)):
        plain = make(THREAT, steps=3, step_size=0.03)(linear, jax.random.key(0), X, y)
        own = make(THREAT, steps=3, step_rule=rule)(linear, jax.random.key(0), X, y)
        np.testing.assert_array_equal(own, plain)
        assert jnp.abs(plain - X).max() > 0.03


def test_adam_as_the_rule_of_a_training_attack():
    made = choices.make_attack("pgd", THREAT, steps=3, step_size=0.02, start="zero", rule="adam")
    own = attacks.pgd(THREAT, steps=3, step_rule=optax.adam(0.02), start="zero")
    one, other = (attack(linear, jax.random.key(0), X, Y) for attack in (made, own))
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(jnp.abs(one - X), 0.06, rtol=1e-3)  # a constant gradient


def test_rate_warmup():
    schedule = choices.make_schedule(
        "cosine", learning_rate=0.4, epochs=4, steps_per_epoch=5, milestones=(), decay=0.1, warmup=2
    )
    rates = [float(schedule(step)) for step in (0, 5, 10, 15, 20)]
    np.testing.assert_allclose(rates, [0, 0.2, 0.4, 0.2, 0], atol=1e-7)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rate_warmup": 3}, "rate_warmup must be below epochs and needs schedule cosine"),
        ({"rate_warmup": 120, "schedule": "cosine"}, "rate_warmup must be below epochs"),
        ({"attack_rule": "adam", "attack_step_size": None}, "attack_step_size must be given"),
    ],
)
def test_refused_settings(changes, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        Training(**changes)


def test_networks_are_trained_for_every_value_and_seed(monkeypatch):
    seen = []

    def train(recipe, knobs, task):
        seen.append((recipe, knobs))
        return types.SimpleNamespace(params={})

    monkeypatch.setattr(noisy_digits, "train", train)
    task = implicit_networks._task(TINY)
    implicit_networks._train(TINY, "trades", task, eps=0.1, beta=np.array([1.0, 2.0, 3.0]))
    recipe, knobs = seen[0]
    np.testing.assert_array_equal(knobs.seed, [0, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(knobs.beta, [1, 1, 2, 2, 3, 3])
    assert np.size(knobs.eps) == 1 and recipe.objective == "trades"
    noisy = implicit_networks._with_noise(task)
    implicit_networks._train(TINY._replace(epochs=16), "standard", noisy, eps=0.0)
    assert seen[1][0].epochs == 16 // implicit_networks.COPIES
    image = noisy.train["image"].reshape(8, 64, -1)
    assert 0.1 < (image - image[0])[1:].std() < 0.3 and image.min() >= 0


def constant_networks(count):
    """Network i answers i mod 10, whatever it sees."""
    params, _ = noisy_digits.MODEL.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    params = jax.tree.map(lambda leaf: np.zeros((count, *leaf.shape), np.float32), params)
    head = max(params)  # the last layer
    params[head]["bias"][np.arange(count), np.arange(count) % 10] = 1
    return params


def fake_training(monkeypatch):
    def train(small, objective, task, *, norm="linf", **knobs):
        count = max(np.size(value) for value in knobs.values())
        return constant_networks(count * small.seeds)

    monkeypatch.setattr(implicit_networks, "_train", train)
    label = np.asarray(implicit_networks._task(TINY).test["label"])
    return [100 * float(np.mean(label == k)) for k in range(10)]


def test_sweeps_measure_each_network_at_its_place(monkeypatch, tmp_path):
    share = fake_training(monkeypatch)
    study = implicit_networks.networks_eps(TINY)
    for found in (study.results["AT"], study.results["TRADES"]):
        for which in ("clean", "robust"):
            np.testing.assert_allclose(
                found[which], np.array(share + share[:2]).reshape(6, 2), rtol=1e-5
            )
    assert len(study.rows) == 2 * len(TRAIN_EPS)
    study = implicit_networks.networks_trades(TINY)
    assert study.results["clean"].shape == (len(BETAS), 2) and len(study.claims) == 4
    study.figure(tmp_path / "trades.png")
    assert all(claim.holds is None for claim in study.claims)
    assert (tmp_path / "trades.png").stat().st_size


def test_the_zoo_finds_the_largest_eps(monkeypatch, tmp_path):
    """Constant networks lose nothing to any attack."""
    share = fake_training(monkeypatch)
    study = implicit_networks.zoo(TINY)
    for of in study.results["curves"].values():
        for curve in of.values():
            expected = np.tile(np.array(share[:2])[:, None] / 100, len(ZOO_EPS))
            np.testing.assert_allclose(curve, expected, rtol=1e-5)
    for of in study.results["max_eps"].values():
        np.testing.assert_array_equal(list(of.values()), ZOO_EPS[-1])
    assert [row[0] for row in study.rows] == ["standard", "l_inf AT", "l_2 AT", "noise"]
    study.figure(tmp_path / "zoo.png")
    assert (tmp_path / "zoo.png").stat().st_size
    assert implicit_networks._largest(np.linspace(1, 0, len(ZOO_EPS))) == 0


def test_first_order_margins_are_exact_in_one_linear_region(tmp_path):
    study = implicit_networks.first_order(SmallNetworks(train_size=500, test_size=200))
    assert [claim.holds for claim in study.claims] == [True] * 4
    found = study.results["margins"]
    inside = found["correct"] & (1.01 * found["estimate"] < found["region"])
    assert inside.sum() >= 3
    assert (study.results["ratios"]["tanh"] > 1).all()  # saturation: robustness over-estimated
    assert (study.results["ratios"]["sinh"] < 1).all()
    np.testing.assert_allclose(found["attack"][inside], found["estimate"][inside], rtol=1e-3)
    study.figure(tmp_path / "margins.png")
    assert (tmp_path / "margins.png").stat().st_size


def test_published_networks(tmp_path):
    settings = types.SimpleNamespace(data_dir=None, seed=3)
    base = implicit_network_jobs.base_of(settings)
    made = implicit_network_jobs.jobs_of("networks_eps", base, 1, tmp_path)
    assert len(made) == 12 and len({job.settings.workdir for job in made}) == 12
    np.testing.assert_allclose([255 * job.settings.eps for job in made], 2 * [4, 8, 12, 16, 20, 24])
    assert {job.settings.seed for job in made} == {4}
    trades = implicit_network_jobs.jobs_of("networks_trades", base, 0, tmp_path)
    np.testing.assert_allclose([job.settings.beta for job in trades], 10.0 ** np.arange(-4, 5))
    for job in (made[0], made[6]):
        facts = dry_run.data_facts(job.settings)
        parts = training_run.build(job.settings, job.settings.objective[0], facts)
        assert parts.steps_per_epoch == 50_000 // 1024


def test_the_published_evaluation_of_the_zoo(tmp_path):
    settings = types.SimpleNamespace(
        data_dir=None, seed=0, zoo="models/cifar10", examples=1000, batch_size=100
    )
    found = implicit_network_jobs.zoo_settings(settings, tmp_path)
    assert found.methods == ("apgd-ce", "apgd-dlr") and found.steps == 20
    np.testing.assert_allclose(np.linspace(0, found.eps_max, found.eps_count) * 510, range(17))
    files = found.torch_files
    assert list(files) == list(fourier_zoo.SUPPORTED) and len(files) == 23
    assert files["Standard"] == "models/cifar10/Linf/Standard.pt"
    assert files["L2/Wu2020Adversarial"] == "models/cifar10/L2/Wu2020Adversarial.pt"


def test_the_published_networks_are_measured_and_tabulated(monkeypatch, tmp_path):
    settings = types.SimpleNamespace(data_dir=None, seed=0, seeds=2)
    monkeypatch.setattr(implicit_network_jobs.jobs, "trained", lambda job, study: {})
    monkeypatch.setattr(
        implicit_network_jobs, "_measured", lambda settings, job: {"clean": job.settings.beta}
    )
    study = implicit_network_jobs.run_study(settings, "networks_trades", tmp_path)
    assert study.columns == ["training", "varied", "clean"] and len(study.rows) == len(BETAS)
    assert study.rows[0][:2] == ["TRADES", "beta 0.0001"]


def test_the_last_checkpoint_is_attacked(monkeypatch, tmp_path):
    """A network that answers 3 whatever it sees, by the same route as the published ones."""

    def load(folder, which, *, data_dir):
        assert which == "last" and folder.name == "madry"
        bias = 1.0 * (jnp.arange(10) == 3)
        logits_fn = jax.tree_util.Partial(lambda bias, x: bias + 0 * x.sum((1, 2)), bias)
        return types.SimpleNamespace(logits_fn=logits_fn)

    monkeypatch.setattr(implicit_network_jobs.trained_models, "load", load)
    settings = types.SimpleNamespace(data_dir=None, examples=40, batch_size=16)
    base = dataclasses.replace(implicit_network_jobs.BASE, dataset="digits", validation_size=None)
    job = implicit_network_jobs.jobs_of("networks_eps", base, 0, tmp_path)[0]
    found = implicit_network_jobs._measured(settings, job)
    share = 100 * np.mean(data.load("digits", "test").label[:40] == 3)
    assert found == {"clean": pytest.approx(share), "Adam-PGD-40": pytest.approx(share)}


def test_the_table_of_the_zoo_has_all_networks(monkeypatch, tmp_path):
    settings = types.SimpleNamespace(
        data_dir=None, seed=0, zoo=str(tmp_path), examples=1000, batch_size=100
    )
    with pytest.raises(ValueError, match=r"without 23 of 23 .*Linf/Standard\.pt"):
        implicit_network_jobs.run_study(settings, "zoo", tmp_path)
    for path in fourier_zoo.parse(fourier_zoo.files_in(tmp_path)).values():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).touch()
    curve = {"fourier": {"max_eps": 1.5 / 255, "accuracy": [0.9, 0.1]}}

    def attack(settings):
        (name,) = settings.torch_files
        assert settings.resume and settings.workdir.endswith(name.replace("/", "_"))
        return {"models": {name.replace("/", "_"): curve}}

    monkeypatch.setattr(implicit_network_jobs.fourier_attack, "main", attack)
    rows = implicit_network_jobs.run_study(settings, "zoo", tmp_path).rows
    assert len(rows) == 25 and rows[0][-2:] == ["1.5/255", "10.0"]
    assert [row[0] for row in rows if row[3] == "not read here"] == [
        "Ding2020MMA", "Hendrycks2020AugMix_ResNeXt"
    ]  # fmt: skip


def test_studies_are_described():
    assert set(implicit_network_jobs.STUDIES) <= set(implicit_networks.STUDIES)
    assert all(study.__doc__ for study in implicit_networks.STUDIES.values())
