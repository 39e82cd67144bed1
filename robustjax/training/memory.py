"""Memory of a training step, estimated from shapes without compiling or allocating."""

from collections.abc import Callable
from typing import Any

import jax


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays (or shapes) of a tree; typed keys count with their data."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def residual_bytes(fn: Callable, *args: Any) -> int:
    """Bytes that differentiation of ``fn`` for its first argument keeps from the forward pass.

    It is what the trace of ``jax.vjp`` holds: activations, and the arguments that the backward pass
    reads again. A compiler can only do with less, by recomputing, or with more, for work space; the
    peak of a training step is about this and its state, gradients and optimizer's updates.

    Args:
      fn: any function that is differentiable for its first argument.
      *args: its arguments, arrays or shapes.
    """

    def pull_back(first, *others):
        return jax.vjp(lambda first: fn(first, *others), first)[1]

    return tree_bytes(jax.eval_shape(pull_back, *args))
