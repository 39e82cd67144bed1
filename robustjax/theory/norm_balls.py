"""Volumes of the unit balls of the norms, which tell how much a threat model lets an attack do."""

import math

import numpy as np

from robustjax import checks, norms
from robustjax.fourier_norms import FourierL1, FourierLInf
from robustjax.norms import L1, L2, LInf, Lp, Norm


def ball_volume(norm: Norm, d: int) -> float:
    """The volume of ``||v|| <= 1`` in d dimensions.

    ================  ==================================================
    norm              volume
    ================  ==================================================
    ``Lp``            ``(2 Gamma(1 + 1/p))^d / Gamma(1 + d/p)``
    ``LInf``          ``2^d``
    ``FourierLInf``   ``2^r (2 pi)^m``
    ``FourierL1``     ``2^r pi^m / d!``
    ================  ==================================================

    ``L1`` and ``L2`` are those of ``Lp``. Of the frequencies of real signals r are their own
    negative, which gives an interval, and m pairs are not: each gives a disc of radius ``sqrt(2)``,
    as ``|u_k|^2 + |u_-k|^2 = 2 |u_k|^2`` is the squared l_2 norm. In three dimensions the volumes
    of l_2, l_1, l_inf and Fourier-l_inf are ``4 pi / 3``, ``4 / 3``, 8 and, a cylinder, ``4 pi``.

    Args:
      norm: one of these, of all frequencies.
      d: dimension, ``>= 1``; for Fourier norms the length of a signal.

    Raises:
      ValueError: the norm is another, or ``d < 1``.

    Source: Faghri et al., "Bridging the gap between adversarial robustness and optimization bias"
    (2021), who show the balls; Wang, "Volumes of generalized unit balls" (2005), for l_p.
    """
    norms.check(norm)
    checks.integer("d", d, at_least=1)
    own = int(np.sum((-np.arange(d)) % d == np.arange(d)))
    pairs = (d - own) // 2
    match norm:
        case LInf():
            return 2.0**d
        case L1() | L2() | Lp():
            p = {L1(): 1.0, L2(): 2.0}.get(norm) or norm.p
            return (2 * math.gamma(1 + 1 / p)) ** d / math.gamma(1 + d / p)
        case FourierLInf(low=None, high=None):
            return 2.0**own * (2 * math.pi) ** pairs
        case FourierL1(low=None, high=None):
            return 2.0**own * math.pi**pairs / math.factorial(d)
    raise ValueError(f"norm must be an l_p norm or a Fourier norm of all frequencies, got {norm}")
