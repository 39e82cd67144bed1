"""Optax transforms: what is done with a gradient once it is there.

* ``steepest``: steepest descent in a norm (gradient descent, signGD, coordinate descent).
"""

from robustjax.optim.steepest import sign_gd, steepest_descent

__all__ = ["sign_gd", "steepest_descent"]
