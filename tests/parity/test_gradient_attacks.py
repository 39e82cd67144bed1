"""FGSM, BIM and PGD take the steps of ``foolbox`` and ``torchattacks``, from the same start.

Every iterate is compared: each peer is run once for each number of steps.

Known differences of convention, none of which moves an iterate by more than rounding here:

- Loss: ``torchattacks`` takes the mean of the batch, ``foolbox`` and we the sum; steepest steps do
  not see the factor.
- l_2 step: ours is zero where the gradient is, and has no constant in the denominator;
  ``torchattacks`` divides by ``norm + 1e-10``, ``foolbox`` by ``max(norm, 1e-12)``. An example that
  is classified with certainty takes a shorter step there, most of all with ``torchattacks``, whose
  mean over the batch makes gradients smaller. The examples here are chosen not to be such.
- l_2 projection: all three scale the perturbation into the ball and then clip to the box.
- Random starts have other laws (in the l_2 ball ``torchattacks`` draws the radius uniformly, which
  is not uniform in the ball) and other generators. Here the same start is handed to all.
- Of ``foolbox``, ``rel_stepsize`` is relative to eps; the absolute one is used here.
- At ``sign(0) = 0`` all three leave a pixel where it is. Where a gradient is so near to zero that
  rounding decides about its sign, nobody is right: such examples, about one in ten, are left out.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity import networks
from robustjax import attacks, losses
from robustjax.norms import L2, LInf
from robustjax.threat import ThreatModel

torch = pytest.importorskip("torch", reason=networks.INSTALL)
eagerpy = pytest.importorskip("eagerpy", reason=networks.INSTALL)
foolbox = pytest.importorskip("foolbox", reason=networks.INSTALL)
torchattacks = pytest.importorskip("torchattacks", reason=networks.INSTALL)

N, STEPS = 40, 7
SMALLEST = 1e-3  # entry of a gradient by which an example counts as one that has a gradient
# norm, radius, length of a step: the ball is reached and the projection acts.
THREATS = {"linf": (LInf(), 0.1, 0.03), "l2": (L2(), 1.5, 0.4)}


def to_torch(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).contiguous()


def from_torch(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def batch(trained):
    """Test images of which the network is not so certain that gradients underflow."""
    x, y = trained.image[: 4 * N], trained.label[: 4 * N]
    size = np.abs(gradient(trained, x, y)).max((1, 2, 3))
    x, y = x[size > SMALLEST][:N], y[size > SMALLEST][:N]
    assert len(y) == N
    return x, y


def gradient(trained, x, y):
    return np.asarray(_gradient(trained.logits_fn, jnp.asarray(x), y))


@functools.partial(jax.jit, static_argnums=0)
def _gradient(logits_fn, x, y):
    return jax.grad(lambda x: losses.cross_entropy(logits_fn(x), y).sum())(x)


def starts(x, norm, eps):
    """A start in the ball and the box, off the clean images, that does not come from a peer."""
    draw = np.random.default_rng(0)
    if isinstance(norm, LInf):
        delta = draw.uniform(-eps, eps, x.shape)
    else:
        delta = draw.normal(size=x.shape)
        delta *= 0.7 * eps / np.linalg.norm(delta.reshape(len(x), -1), axis=1)[:, None, None, None]
    return np.clip(x + delta, 0, 1).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run_ours(logits_fn, norm, steps, x, y, eps, size, start):
    threat = ThreatModel(norm, eps)
    attack = attacks.pgd(threat, steps=steps, step_size=size, start=lambda keys, x: start)
    return attack(logits_fn, jax.random.key(0), x, y)


def iterates(trained, x, y, norm, eps, size, start):
    """Our iterates after ``1 .. STEPS`` steps of PGD; the last is also that of one run."""

    def run(steps, start):
        return np.asarray(run_ours(trained.logits_fn, norm, steps, x, y, eps, size, start))

    chain = [start]
    for _ in range(STEPS):
        chain.append(run(1, chain[-1]))
    kept = well_posed(trained, chain[:-1], y, norm)
    np.testing.assert_allclose(run(STEPS, start)[kept], chain[-1][kept], rtol=0, atol=1e-6)
    return chain[1:], kept


def well_posed(trained, points, y, norm):
    """Examples at whose iterates no sign of a gradient's entry, which l_inf steps take, is open."""
    kept = np.ones(len(y), bool)
    for x in points if norm.name == "linf" else ():
        size = np.abs(gradient(trained, x, y))
        smallest = np.where(size > 0, size, np.inf).min((1, 2, 3))
        kept &= smallest > 2e-7 * size.max((1, 2, 3))
    assert kept.mean() > 0.75
    return kept


def foolbox_iterates(trained, x, y, norm, eps, size, start):
    base = {
        "linf": foolbox.attacks.LinfProjectedGradientDescentAttack,
        "l2": foolbox.attacks.L2ProjectedGradientDescentAttack,
    }[norm.name]

    class FromStart(base):
        def get_random_start(self, x0, epsilon):
            return eagerpy.astensor(to_torch(start))

    return [
        run_foolbox(
            FromStart(abs_stepsize=size, steps=steps, random_start=True), trained, x, y, eps
        )
        for steps in range(1, STEPS + 1)
    ]


def run_foolbox(attack, trained, x, y, eps):
    model = foolbox.PyTorchModel(trained.network, bounds=(0, 1), device="cpu")
    criterion = foolbox.criteria.Misclassification(torch.tensor(y, dtype=torch.long))
    return from_torch(attack.run(model, to_torch(x), criterion, epsilon=eps))


def compiled(attack, trained, x, y):
    return jax.jit(lambda x: attack(trained.logits_fn, jax.random.key(0), x, y))(jnp.asarray(x))


def torchattacks_iterates(trained, x, y, norm, eps, size, start, monkeypatch):
    attack = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm.name]
    # It draws a perturbation in place: uniform numbers for l_inf; for l_2 a direction, scaled to a
    # uniform length. The perturbation of the start takes their place.
    delta = to_torch(start) - to_torch(x)
    length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    def uniform_(tensor, low, high):
        return tensor.copy_(delta if norm.name == "linf" else length / eps)

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform_)
    monkeypatch.setattr(torch.Tensor, "normal_", lambda tensor: tensor.copy_(delta))
    options = {"eps": eps, "alpha": size, "random_start": bool(delta.any())}
    labels = torch.tensor(y, dtype=torch.long)
    return [
        from_torch(attack(trained.network, steps=steps, **options)(to_torch(x), labels))
        for steps in range(1, STEPS + 1)
    ]


def assert_same(ours, theirs, kept, x):
    """Equal iterates; that they move and differ from each other makes the comparison mean much."""
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine[kept], other[kept], rtol=0, atol=1e-5)
        assert np.abs(mine - x).max((1, 2, 3)).min() > 1e-2
    for one, after in itertools.pairwise(ours):
        assert np.abs(one - after).max() > 1e-3


@pytest.mark.parametrize("threat", THREATS)
def test_pgd_from_a_start_in_the_ball(trained, batch, monkeypatch, threat):
    norm, eps, size = THREATS[threat]
    x, y = batch
    run = (trained, x, y, norm, eps, size, starts(x, norm, eps))
    ours, kept = iterates(*run)
    assert_same(ours, foolbox_iterates(*run), kept, x)
    assert_same(ours, torchattacks_iterates(*run, monkeypatch), kept, x)


@pytest.mark.parametrize("threat", THREATS)
def test_bim(trained, batch, monkeypatch, threat):
    norm, eps, size = THREATS[threat]
    x, y = batch
    ours, kept = iterates(trained, x, y, norm, eps, size, x)
    bim = attacks.bim(ThreatModel(norm, eps), steps=STEPS, step_size=size)
    last = np.asarray(compiled(bim, trained, x, y))
    np.testing.assert_allclose(ours[-1][kept], last[kept], rtol=0, atol=1e-6)

    attack = {
        "linf": foolbox.attacks.LinfBasicIterativeAttack,
        "l2": foolbox.attacks.L2BasicIterativeAttack,
    }[threat]
    theirs = [
        run_foolbox(attack(abs_stepsize=size, steps=steps, random_start=False), trained, x, y, eps)
        for steps in range(1, STEPS + 1)
    ]
    assert_same(ours, theirs, kept, x)
    if threat == "linf":
        labels = torch.tensor(y, dtype=torch.long)
        theirs = [
            from_torch(
                torchattacks.BIM(trained.network, eps=eps, alpha=size, steps=steps)(
                    to_torch(x), labels
                )
            )
            for steps in range(1, STEPS + 1)
        ]
    else:  # torchattacks has BIM for l_inf alone; PGDL2 without a random start is it for l_2
        theirs = torchattacks_iterates(trained, x, y, norm, eps, size, x, monkeypatch)
    assert_same(ours, theirs, kept, x)


@pytest.mark.parametrize("threat", THREATS)
def test_fgsm(trained, batch, threat):
    norm, eps, _ = THREATS[threat]
    x, y = batch
    ours = [np.asarray(compiled(attacks.fgsm(ThreatModel(norm, eps)), trained, x, y))]
    kept = well_posed(trained, [x], y, norm)
    attack = {
        "linf": foolbox.attacks.LinfFastGradientAttack,
        "l2": foolbox.attacks.L2FastGradientAttack,
    }[threat]
    theirs = run_foolbox(attack(random_start=False), trained, x, y, eps)
    assert_same(ours, [theirs], kept, x)
    if threat == "linf":
        attack = torchattacks.FGSM(trained.network, eps=eps)
        theirs = from_torch(attack(to_torch(x), torch.tensor(y, dtype=torch.long)))
        assert_same(ours, [theirs], kept, x)


def test_the_copies_of_the_network_agree(trained):
    ours = np.asarray(trained.logits_fn(jnp.asarray(trained.image)))
    theirs = trained.network(to_torch(trained.image)).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert (ours.argmax(1) == trained.label).mean() > 0.9
