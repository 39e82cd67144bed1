"""Memory of a program, estimated from its trace without compiling or allocating."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from robustjax.training.flops import inner_programs


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays (or shapes) of a tree; typed keys count with their data."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def peak_bytes(fn: Callable, *args: Any) -> int:
    """Bytes of what is there at once when ``fn`` is computed one operation after another.

    Arguments and results are there all along, any other value from its operation to the last one
    that reads it. That is what a program takes without fusion and without work space: a compiler
    does with less, by fusing and recomputing, or takes more. Nothing is computed or allocated: the
    arguments may be ``jax.ShapeDtypeStruct``. Of a function that ``jax.shard_map`` divides over
    devices it is what one device takes.

    Args:
      fn: any traceable function.
      *args: its arguments, arrays or shapes.
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    # What jit and shard_map wrap: the arguments of shard_map are whole arrays, those inside it one
    # device's.
    while [eqn.primitive.name for eqn in jaxpr.eqns] in (["jit"], ["pjit"], ["shard_map"]):
        (jaxpr,) = inner_programs(jaxpr.eqns[0].params)
    return _bytes(_kept(jaxpr)) + _work(jaxpr)


def _work(jaxpr: core.Jaxpr) -> int:
    """The most that a program holds at once beyond its arguments and results."""
    kept = _kept(jaxpr)
    last = {variable: i for i, eqn in enumerate(jaxpr.eqns) for variable in _variables(eqn.invars)}
    alive = most = 0
    for i, eqn in enumerate(jaxpr.eqns):
        made = {*eqn.outvars} - kept
        inside = max((_work(program) for program in inner_programs(eqn.params)), default=0)
        most = max(most, alive + _bytes(made) + inside)
        done = {variable for variable in _variables(eqn.invars) if last[variable] == i} - kept
        alive += _bytes(made & last.keys()) - _bytes(done)
    return most


def _kept(jaxpr: core.Jaxpr) -> set[core.Var]:
    return {*jaxpr.constvars, *jaxpr.invars, *_variables(jaxpr.outvars)}


def _variables(atoms: Any) -> list[core.Var]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _bytes(variables: set[core.Var]) -> int:
    # Tokens of effects have no shape, and take nothing.
    shaped = (variable.aval for variable in variables if hasattr(variable.aval, "shape"))
    return sum(aval.size * aval.dtype.itemsize for aval in shaped)
