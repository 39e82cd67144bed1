"""Studies of SOAR and FOAR on digits: the exact ones as they are, the others at a tiny size."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import soar_diagnostics, soar_networks, soar_studies, soar_theory
from experiments.soar_studies import METHODS, STUDIES, Small
from robustjax.metrics import correct, input_gradient

TINY = Small(seeds=2, epochs=1, eps=0.15, train_size=64, test_size=16)


def test_networks_are_kept_and_differ():
    base, source = (soar_networks.standard(TINY, source=source) for source in (False, True))
    assert soar_networks.train(TINY, "standard") is base
    kernels = [networks.params["head"]["kernel"] for networks in (base, source)]
    kernels.append(
        soar_networks.initial(TINY, soar_networks.PERCEPTRON, 0).params["head"]["kernel"]
    )
    for i in range(3):
        assert kernels[i].shape == (2, 128, 10)
        assert (kernels[i] != kernels[i - 1]).any(axis=(1, 2)).all()
    assert (kernels[0][0] != kernels[0][1]).any()


def test_scaled_logits_have_the_same_predictions_and_no_gradients():
    networks = soar_networks.standard(TINY)
    x = soar_networks.load_task(TINY).test["image"]
    plain, scaled = (n.logits_fn(soar_networks.PERCEPTRON, 1)
                     for n in (networks, soar_diagnostics._scaled(networks)))  # fmt: skip
    np.testing.assert_allclose(scaled(x), soar_diagnostics.SCALE * plain(x), rtol=1e-4)
    seen = plain(x).argmax(axis=1)
    assert correct(scaled(x), seen).all()
    count = jax.jit(lambda logits_fn: jnp.count_nonzero(input_gradient(logits_fn, x, seen)))
    nonzero = [count(plain), count(scaled)]
    assert nonzero[0] > 0.9 * x.size
    assert nonzero[1] < 0.1 * x.size


def test_a_table_has_each_method_in_its_place(monkeypatch, tmp_path):
    def numbers(module, place, shared):
        return tuple((100 * field + place.network) / 2000 for field in range(11))

    monkeypatch.setattr(soar_studies, "_measure", numbers)
    monkeypatch.setattr(soar_studies, "train", lambda *arguments: soar_networks.standard(TINY))
    study = soar_studies.methods(TINY)
    assert [row[0] for row in study.rows] == list(METHODS)
    for i, method in enumerate(METHODS):
        for j, values in enumerate(study.results[method].values()):
            np.testing.assert_allclose(2000 * values, 100 * j + 2 * i + np.arange(2), rtol=1e-5)
    assert len(study.columns) == len(study.rows[0]) == 12
    study.figure(tmp_path / "methods.png")
    assert (tmp_path / "methods.png").stat().st_size > 5000


def test_claims_of_the_methods_compare_what_they_say():
    mean = {m: {"pgd": 0.2, "nonzero": 50.0, "confidence": 0.9, "transfer": 0.3} for m in METHODS}
    mean["SOAR, PGD-1"] = {"pgd": 0.5, "nonzero": 60.0, "confidence": 0.8, "transfer": 0.6}
    mean["SOAR, zero"] = {"pgd": 0.2, "nonzero": 40.0, "confidence": 0.95, "transfer": 0.2}
    mean["FOAR, PGD-1"] = {"pgd": 0.3, "nonzero": 50.0, "confidence": 0.9, "transfer": 0.3}
    assert [claim.holds for claim in soar_studies._claims(mean)] == [True] * 8 + [None]
    mean["SOAR, PGD-1"]["pgd"] = 0.15
    assert [soar_studies._claims(mean)[i].holds for i in (0, 1, 7)] == [False, False, False]


def test_passes_are_those_published():
    study = soar_theory.passes(TINY)
    assert len(study.rows) == 5
    assert study.claims[0].holds
    assert study.results["SOAR"]["counted"] == (3, 4)


def test_linear_regression(monkeypatch, tmp_path):
    monkeypatch.setattr(soar_theory, "DIMENSIONS", (100, 200))
    study = soar_theory.linear(TINY)
    assert [claim.holds for claim in study.claims] == [True] * 4
    assert len(study.rows) == 4
    study.figure(tmp_path / "linear.png")
    assert (tmp_path / "linear.png").stat().st_size > 5000


def test_evaluations_find_the_networks_and_their_seeds():
    def place(module, place, shared):
        return (place.network, place.seed)

    networks = dict.fromkeys("abc", soar_networks.standard(TINY))
    found = soar_networks.evaluate(TINY, place, networks, 0.1, seeds=1)
    assert {name: values[0].tolist() for name, values in found.items()} == {
        "a": [0], "b": [2], "c": [4]}  # fmt: skip
    found = soar_networks.evaluate(TINY, place, networks, 0.1)
    np.testing.assert_array_equal(found["b"], [[2, 3], [0, 1]])


def test_default_studies_exist():
    assert set(soar_studies.DEFAULT) <= set(STUDIES)
    assert all(study.__doc__ for study in STUDIES.values())
