"""Entry points of training with few attack steps: command lines, tiny runs of single studies."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import command_line, soar
from experiments import fast_adversarial_training as fast


def parse(module, *words):
    return command_line.parse_settings(words, module.Settings, module.PRESETS)[0]


@pytest.mark.parametrize("module", [fast, soar], ids=["fast", "soar"])
def test_dry_run(module, capsys, tmp_path):
    assert parse(module) == module.PRESETS["small"]
    module.main(parse(module, "--dry_run", f"--workdir={tmp_path / 'w'}"))
    assert "Dry run" in capsys.readouterr().out
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "module, words, message",
    [
        (fast, ("--epochs=7", "--evaluations=2"), r"epochs \(7\) must be divisible"),
        (fast, ("--eps=0",), "eps must be > 0, got 0"),
        (soar, ("--seeds=0",), "seeds must be >= 1, got 0"),
        (soar, ("--study=attack",), "study"),
    ],
)
def test_refusals(module, words, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        parse(module, *words)


TINY = ("--train_size=64", "--test_size=16", "--noassert_claims")


def test_a_tiny_study_of_the_weight_of_grad_align(tmp_path, capsys):
    settings = parse(fast, *TINY, "--study=weight", "--epochs=2", "--evaluations=1",
                     f"--workdir={tmp_path / 'w'}")  # fmt: skip
    fast.main(settings)
    assert "a moderate weight is better than none" in capsys.readouterr().out
    results = json.loads((tmp_path / "w/results.json").read_text())["weight"]["results"]
    assert np.shape(results["filter_norm"]) == (6, 1, 4)
    assert np.isfinite(results["alignment"]).all()
    assert (tmp_path / "w/weight.png").stat().st_size > 5000
    # A run does not depend on those beside it; without weight it is FGSM training.
    alone = fast.train(settings, "FGSM + GradAlign", settings.eps, 1.0, seeds=0)
    np.testing.assert_allclose(alone.filter_norm[0], results["filter_norm"][3], rtol=1e-4)
    plain = fast.train(settings, "FGSM", settings.eps, 0.0, seeds=0)
    np.testing.assert_allclose(plain.filter_norm[0], results["filter_norm"][0], rtol=1e-4)


def test_a_tiny_run_of_soar(tmp_path, capsys, monkeypatch):
    chosen = {name: soar.METHODS[name] for name in ("standard", "SOAR, PGD-1")}
    monkeypatch.setattr(soar, "METHODS", chosen)
    settings = parse(soar, *TINY, "--study=samples", "--epochs=2", "--seeds=2",
                     f"--workdir={tmp_path / 'w'}")  # fmt: skip
    soar.main(settings)
    out = capsys.readouterr().out
    assert "vectors z" in out
    found = json.loads((tmp_path / "w/results.json").read_text())["methods"]
    assert set(found) == set(chosen)
    for values in found.values():
        assert np.shape(values["loss"]) == (2, 3)
        assert (np.array(values["confidence"]) >= 0.1).all()
        assert (np.array(values["nonzero"]) <= 64).all()
    with pytest.raises(ValueError, match="already holds a run"):
        soar.main(dataclasses.replace(settings, dry_run=False))


def test_claims_of_soar_compare_what_they_say():
    mean = {m: {"pgd": 0.2, "nonzero": 50.0, "confidence": 0.9} for m in soar.METHODS}
    mean["SOAR, PGD-1"] = {"pgd": 0.5, "nonzero": 60.0, "confidence": 0.8}
    mean["SOAR, zero"] = {"pgd": 0.1, "nonzero": 40.0, "confidence": 0.95}
    mean["FOAR, PGD-1"] = {"pgd": 0.3, "nonzero": 50.0, "confidence": 0.9}
    assert [claim.holds for claim in soar._claims(mean)] == [True] * 6 + [None]
    mean["SOAR, PGD-1"]["pgd"] = 0.15
    assert soar._claims(mean)[0].holds is False
