"""Gradient oracles: how the gradient is computed, ``(init, oracle)`` with ``oracle(loss_fn)``.

- ``plain``: ``plain`` (the gradient of the mean loss), ``Oracle``
"""

from robustjax.gradients.plain import Oracle, plain

__all__ = ["Oracle", "plain"]
