"""Worlds in which accuracy and robustness are at odds, and how much data robustness needs.

- ``FeatureWorld``: one feature that is right with probability ``p`` and cannot be turned, and many
  weak ones that an attack turns: what makes a rule accurate makes it vulnerable.
- ``stripe_errors``: the Bayes rule is always right and never robust, a constant rule is half right
  and as robust as can be.
- ``gaussian_errors``, ``sample_mean_errors``: two Gaussians, for which one example is enough to be
  right, but not to be robust.
- ``half_space_error``: under an isotropic Gaussian the boundary is near, whatever the dimension.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import norm as gaussian

from robustjax import checks
from robustjax.norms import LInf, Norm


class FeatureWorld(NamedTuple):
    """Labels +-1 alike likely; ``x_1 = y`` with probability ``p``, else ``-y``; and
    ``x_2 .. x_{d+1} ~ N(eta y, 1)``.

    Attributes:
      p: how often the robust feature is right, in [1/2, 1).
      eta: mean of the others, ``> 0``.
      d: how many others, ``>= 1``.

    Source: Tsipras, Santurkar, Engstrom, Turner and Madry (2019), "Robustness may be at odds with
    accuracy", section 2.1.
    """

    p: float
    eta: float
    d: int

    def check(self) -> "FeatureWorld":
        """The world, or a ValueError that names what is out of range."""
        checks.number("p", self.p, at_least=0.5, below=1)
        checks.number("eta", self.eta, above=0)
        checks.integer("d", self.d, at_least=1)
        return self

    def sample(
        self, rng: np.random.Generator, n: int
    ) -> tuple[Float[np.ndarray, "n d1"], Float[np.ndarray, " n"]]:
        """``n`` inputs, the robust feature first, and their labels -1 and 1."""
        self.check()
        y = rng.choice([-1.0, 1.0], size=checks.integer("n", n, at_least=1))
        first = np.where(rng.random(n) < self.p, y, -y)
        rest = self.eta * y[:, None] + rng.normal(size=(n, self.d))
        return np.concatenate([first[:, None], rest], axis=1), y

    def mean_accuracy(self, eps: float = 0.0) -> float:
        """Accuracy of the sign of the mean of ``x_2 .. x_{d+1}`` under l_inf attacks of size eps.

        ``Phi((eta - eps) sqrt(d))``: it rises to 1 with ``d`` at eps = 0 and falls to 0 at
        eps = 2 eta.
        """
        self.check()
        checks.number("eps", eps, at_least=0)
        return float(gaussian.cdf((self.eta - eps) * np.sqrt(self.d)))

    def first_accuracy(self, eps: float = 0.0) -> float:
        """Accuracy of the sign of ``x_1``: ``p`` for eps below 1, with and without attack.

        An attack of size 1 can make it 0, of which no rule is right.
        """
        self.check()
        return self.p if checks.number("eps", eps, at_least=0) < 1 else 0.0

    def robust_bound(self, accuracy: float) -> float:
        """No rule of so much accuracy has more under l_inf attacks of size 2 eta (theorem 2.1).

        ``p / (1 - p) (1 - accuracy)``, at most 1.
        """
        self.check()
        checks.number("accuracy", accuracy, at_least=0, at_most=1)
        return min(1.0, self.p / (1 - self.p) * (1 - accuracy))


class Errors(NamedTuple):
    """Shares of wrong answers.

    Attributes:
      natural: on inputs as they are.
      robust: on attacked ones.
    """

    natural: float
    robust: float


def stripe_errors(width: float, eps: float, *, rule: str = "bayes") -> Errors:
    """Errors on ``x`` uniform in [0, 1), whose label changes after each interval of some width.

    Every point that is nearer than eps to a change of the label can be attacked:
    ``((m - 2) min(1, 2 eps / width) + 2 min(1, eps / width)) / m`` of them with ``m = 1 / width``
    intervals. At eps = width the Bayes rule is always wrong.

    Args:
      width: of an interval; ``1 / width`` is an even number.
      eps: size of the attack, ``>= 0``; inputs stay in [0, 1).
      rule: ``"bayes"``, or ``"constant"``, which is wrong on half of the inputs in any case.

    Raises:
      ValueError: an argument is out of range, or the number of intervals is not even.

    Source: Zhang, Yu, Jiao, Xing, El Ghaoui and Jordan (2019), "Theoretically principled trade-off
    between robustness and accuracy", section 2.3.
    """
    checks.number("width", width, above=0, at_most=0.5)
    checks.number("eps", eps, at_least=0)
    checks.choice("rule", rule, ("bayes", "constant"))
    m = round(1 / width)
    if m % 2 or abs(m * width - 1) > 1e-9:
        raise ValueError(f"1 / width must be an even number, got {1 / width}")
    if rule == "constant":
        return Errors(0.5, 0.5)
    inner, outer = min(1.0, 2 * eps / width), min(1.0, eps / width)
    return Errors(0.0, ((m - 2) * inner + 2 * outer) / m)


def gaussian_errors(
    w: Float[np.ndarray, " d"],
    theta: Float[np.ndarray, " d"],
    std: float,
    eps: float,
    *,
    norm: Norm | None = None,
) -> Errors:
    """Errors of ``sign(w.x)`` for ``x ~ N(y theta, std^2 I)``.

    ``Phi(-w.theta / (std ||w||_2))``, and ``Phi((eps ||w||_* - w.theta) / (std ||w||_2))`` under
    attack, with the dual norm.

    Args:
      w: the rule, not zero.
      theta: mean of the examples of label 1.
      std: their standard deviation, ``> 0``.
      eps: size of the attack, ``>= 0``.
      norm: of the attack; default l_inf.

    Raises:
      ValueError: an argument is out of range.

    Source: Schmidt, Santurkar, Tsipras, Talwar and Madry (2018), "Adversarially robust
    generalization requires more data", section 2.
    """
    checks.number("std", std, above=0)
    checks.number("eps", eps, at_least=0)
    w, theta = np.asarray(w, np.float64), np.asarray(theta, np.float64)
    length = np.linalg.norm(w)
    checks.number("the length of w", float(length), above=0)
    dual = float((LInf() if norm is None else norm).dual.value(w))
    natural = gaussian.cdf(-(w @ theta) / (std * length))
    robust = gaussian.cdf((eps * dual - w @ theta) / (std * length))
    return Errors(float(natural), float(robust))


def sample_mean_errors(
    rng: np.random.Generator,
    theta: Float[np.ndarray, " d"],
    std: float,
    eps: float,
    *,
    examples: int,
    draws: int = 100,
    norm: Norm | None = None,
) -> Errors:
    """Mean of ``gaussian_errors`` of ``w = mean_i y_i x_i``, which is ``N(theta, std^2 / n I)``.

    With ``||theta||_2 = sqrt(d)`` and ``std`` of order ``d^(1/4)``, one example makes the natural
    error small; the robust one needs of the order of ``eps^2 sqrt(d)`` of them.

    Args:
      rng: of the training sets.
      theta: mean of the examples of label 1.
      std: their standard deviation, ``> 0``.
      eps: size of the attack, ``>= 0``.
      examples: of each training set, ``>= 1``.
      draws: training sets, ``>= 1``.
      norm: of the attack; default l_inf.

    Source: as ``gaussian_errors``, theorems 4 to 6.
    """
    checks.integer("examples", examples, at_least=1)
    checks.integer("draws", draws, at_least=1)
    theta = np.asarray(theta, np.float64)
    found = []
    for _ in range(draws):
        w = theta + std / np.sqrt(examples) * rng.normal(size=theta.shape)
        found.append(gaussian_errors(w, theta, std, eps, norm=norm))
    return Errors(*np.mean(found, axis=0).tolist())


def half_space_error(radius: float, *, offset: float = 0.0, lipschitz: float = 1.0) -> float:
    """How likely a point is within a radius of the boundary ``v.z = offset``, ``v`` of length 1.

    For ``z ~ N(0, I)`` the distance is ``|N(0, 1) - offset|`` in every dimension:
    ``Phi(offset + r) - Phi(offset - r)``. If inputs are ``x = g(z)`` with a Lipschitz generator, a
    perturbation of ``x`` of the given size is enough where one of ``z`` of size
    ``radius / lipschitz`` is.

    Args:
      radius: l_2 size of the perturbation of ``x``, ``>= 0``.
      offset: distance of the boundary from the origin.
      lipschitz: constant of the generator, ``> 0``.

    Raises:
      ValueError: an argument is out of range.

    Source: Fawzi, Fawzi and Fawzi (2018), "Adversarial vulnerability for any classifier",
    theorem 1, which for half-spaces is an equality.
    """
    r = checks.number("radius", radius, at_least=0) / checks.number("lipschitz", lipschitz, above=0)
    return float(gaussian.cdf(offset + r) - gaussian.cdf(offset - r))
