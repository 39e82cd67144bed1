"""The entry point of the accuracy curves and traces: command line, dry run, a tiny run."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import attack_curves, attack_figures, command_line, evaluate
from robustjax.attacks.stepwise import StepwiseAttack
from robustjax.threat import ThreatModel

SETTINGS, PRESETS = attack_curves.Settings, attack_curves.PRESETS


def parse(*words):
    return command_line.parse_settings(words, SETTINGS, PRESETS)[0]


def test_flags_override_the_preset():
    assert parse() == PRESETS["small"]
    settings = parse(
        "--preset=paper", "--threat=l2", "--attacks=fab,cw", "--eps_max=3", "--eps_count=4",
        "--checkpoint=None", "--trace_eps=8/255",
    )  # fmt: skip
    assert settings == dataclasses.replace(
        PRESETS["paper"],
        threat="l2",
        attacks=("fab", "cw"),
        eps_max=3.0,
        eps_count=4,
        checkpoint=None,
        trace_eps=8 / 255,
    )
    assert settings.grid == [0, 1, 2, 3]


def test_the_setting_of_the_thesis():
    paper = PRESETS["paper"]
    assert (paper.trace_eps, paper.trace_step_size) == (0.1, 0.01)
    assert attack_curves.PAPER_MODEL.dataset == "cifar10"


@pytest.mark.parametrize(
    "words, message",
    [
        (("--attacks=bim",), "must be of fgsm, pgd, .* got 'bim'"),
        (("--attacks=cw",), "attacks must not name cw unless the threat is l2, got linf"),
        (("--threat=l1",), "attacks must not name square if the threat is l1"),
        (("--eps_count=1",), "eps_count must be >= 2, got 1"),
        (("--eps_max=0",), "eps_max must be > 0"),
        (("--trace_steps=0",), "trace_steps must be >= 1, got 0"),
    ],
)
def test_what_is_refused(words, message, plain_calls):
    with pytest.raises(ValueError, match=message):
        parse(*words)


def test_every_attack_is_built_and_drawn():
    settings = parse("--threat=l2", f"--attacks={','.join(attack_figures.STYLES)}", "--steps=3")
    made = attack_curves.attacks_of(settings, 5)
    assert {*made, "autoattack"} == set(attack_figures.STYLES)
    threat = ThreatModel(settings.norm, 1.0)
    assert made["apgd-t"](threat).rounds == 4  # as many as there are wrong classes
    assert all(
        isinstance(made[n](threat), StepwiseAttack) for n in made if n not in ("fgsm", "pgd")
    )
    assert len(set(attack_figures.STYLES.values())) == 8


@pytest.mark.parametrize("words", [(), ("--preset=paper", "--attacks=pgd,fab")])
def test_a_dry_run_counts_and_computes_nothing(words, capsys, tmp_path):
    attack_curves.main(parse(*words, "--dry_run", f"--workdir={tmp_path / 'w'}"))
    out = capsys.readouterr().out
    assert "FLOPs" in out and "Iter-LL-FGSM" in out
    assert ("11,173,962" if words else "autoattack") in out  # parameters of ResNet-18
    assert not (tmp_path / "w").exists()


def test_a_run_trains_attacks_and_reports(tmp_path, capsys, monkeypatch):
    # Batches that eight devices can share, and little to do.
    demo = dataclasses.replace(
        evaluate.DEMO, model="linear", batch_size=400, test_batch_size=400, attack="fgsm",
        test_steps=1, validation_steps=1,
    )  # fmt: skip
    monkeypatch.setattr(evaluate, "DEMO", demo)
    workdir = tmp_path / "run"
    settings = parse(
        f"--evaluation={tmp_path / 'evaluation'}", "--epochs=1", "--examples=24",
        "--batch_size=8", "--eps_count=3", "--attacks=fgsm,apgd-ce,square,deepfool",
        "--steps=5", "--queries=20", "--trace_steps=6", f"--workdir={workdir}",
    )  # fmt: skip
    assert 24 % jax.device_count() == 0
    results = attack_curves.main(settings)
    for name in ("config.json", "curves.png", "traces.png"):
        assert (workdir / name).stat().st_size > 0
    stored = json.loads((workdir / "results.json").read_text())
    assert stored["traces"] == results["traces"] and stored["examples"] == 24
    np.testing.assert_allclose(stored["eps"], [0, 0.15, 0.3])
    curves = {name: curve["accuracy"] for name, curve in results["curves"].items()}
    assert list(curves) == ["fgsm", "apgd-ce", "square", "deepfool"]
    for accuracies in curves.values():
        # At eps = 0 each has the clean accuracy; with APGD's 0.3 nothing of a linear model stands.
        assert len(accuracies) == 3
        assert accuracies[0] == pytest.approx(curves["fgsm"][0]) and accuracies[0] > 0.5
        assert accuracies == sorted(accuracies, reverse=True)
    assert curves["apgd-ce"][-1] == 0
    distance = np.array(results["curves"]["deepfool"]["distance"])
    np.testing.assert_allclose(curves["deepfool"], [(distance > e).mean() for e in stored["eps"]])
    assert set(results["traces"]) == {"Iter-FGSM", "Iter-LL-FGSM"}
    for trace in results["traces"].values():
        now, so_far = np.array(trace["instantaneous"]), np.array(trace["cumulative"])
        assert len(now) == len(so_far) == 7
        assert now[0] == so_far[0] == 1 and now[1] == so_far[1] and so_far[-1] < 1
        assert (so_far <= np.minimum.accumulate(now) + 1e-6).all() and (np.diff(so_far) <= 0).all()
    out = capsys.readouterr().out
    assert "robust accuracy (%) at eps" in out and "k=6" in out and "deepfool" in out

    # The network is there now: another run attacks it without training.
    again = dataclasses.replace(settings, attacks=("fgsm",), workdir=str(tmp_path / "again"))
    assert attack_curves.main(again)["curves"]["fgsm"]["accuracy"] == curves["fgsm"]
    assert "training images" not in capsys.readouterr().out
