"""AutoAttack and its members break what those of ``pyautoattack`` break.

Both attack the same trained network on 500 images. Our robust accuracy must not be more than 0.3
points higher than that of the reference implementation. How many examples get the same verdict is
recorded with each test (``pytest --junitxml``) and printed (``pytest -s``).

Random starts, and all of Square, draw other numbers than the reference does, which moves single
examples either way. The network and the radii are such that few examples stand: those that do cost
900 steps of APGD-T, 900 of FAB-T and 5,000 queries of Square, on either side.
"""

import jax
import numpy as np
import pytest

from parity import networks
from robustjax import parallel
from robustjax.benchmark import auto_attack, ensemble
from robustjax.norms import L2, LInf
from robustjax.threat import ThreatModel

torch = pytest.importorskip("torch", reason=networks.INSTALL)
pytest.importorskip("pyautoattack", reason=networks.INSTALL)

POINTS = 0.003  # by how much our robust accuracy may be the higher one
AGREEMENT = 0.97  # share of the examples with the same verdict, at least
NORMS = {"linf": LInf(), "l2": L2()}
EPS = {"linf": (0.11, 0.12, 0.13), "l2": (1.7, 1.8, 1.9)}
# Few images stand after the first attack: a batch of them is what the others take.
ONE = {"batch_size": 40, "mesh": parallel.device_mesh(jax.devices()[:1])}


def reference(subject, norm, eps, names=None):
    from benchmarks import torch_peers

    return torch_peers.reference_autoattack(
        subject.network, subject.image, subject.label, norm, eps, attacks=names
    )


def ours(evaluate, subject, norm, eps):
    threat = ThreatModel(NORMS[norm], eps)
    return evaluate(subject.logits_fn, threat, jax.random.key(0), subject.image, subject.label)


def tell(record_property, title, mine, theirs, agreement=None):
    """Records and prints two accuracies, and the share of equal verdicts where it is known."""
    text = f"robustjax {mine:.3f}, pyautoattack {theirs:.3f}"
    if agreement is not None:
        text += f", same verdict {agreement:.3f}"
    record_property(title, text)
    print(f"{title}: {text}")


@pytest.mark.parametrize("norm", NORMS)
def test_standard(tiny, norm, record_property):
    """The ensemble: no less than the reference after each attack in turn, and in all."""
    evaluate = auto_attack(**ONE)
    for eps in EPS[norm]:
        mine, theirs = ours(evaluate, tiny, norm, eps), reference(tiny, norm, eps)
        assert mine.clean_accuracy == pytest.approx(theirs.accuracy["clean"], abs=1e-4)
        assert [attack.name for attack in mine.attacks] == [*theirs.accuracy][1:]
        for attack in mine.attacks:
            after = theirs.accuracy[attack.name]
            tell(
                record_property,
                f"{norm} {eps}, up to {attack.name}",
                attack.robust_accuracy,
                after,
            )
            assert attack.robust_accuracy <= after + POINTS
        agreement = np.mean(mine.robust == theirs.robust)
        robust = mine.robust_accuracy, float(theirs.robust.mean())
        tell(record_property, f"{norm} {eps}, standard", *robust, agreement)
        assert robust[0] <= robust[1] + POINTS and agreement >= AGREEMENT
        assert 0.02 <= robust[0] <= 0.4  # else there is little to compare
        # Each side's network has the same opinion of our adversarial examples.
        images = torch.tensor(mine.x_adv).permute(0, 3, 1, 2)
        verdict = tiny.network(images).argmax(1).numpy() == tiny.label
        assert np.mean(verdict != mine.robust) <= POINTS


# APGD-CE is the first attack of the ensemble, whose accuracy after it is that of APGD-CE alone.
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["apgd-t", "fab-t", "square"])
def test_alone(tiny, norm, name, record_property):
    """An attack of the ensemble on all images, at the middle one of the radii."""
    evaluate = auto_attack({name: ensemble("standard", 10)[name]}, **ONE)
    eps = EPS[norm][1]
    mine, theirs = ours(evaluate, tiny, norm, eps), reference(tiny, norm, eps, (name,))
    agreement = np.mean(mine.robust == theirs.robust)
    robust = mine.robust_accuracy, float(theirs.robust.mean())
    tell(record_property, f"{norm} {eps}, {name} alone", *robust, agreement)
    assert robust[0] <= robust[1] + POINTS and agreement >= AGREEMENT
