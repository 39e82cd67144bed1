"""Memory of a program, estimated from its trace without compiling or allocating."""

import math
from collections import Counter
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
    that reads it; a result takes the place of a donated argument like it. That is what a program
    takes without fusion and without work space: a compiler does with less, by fusing and
    recomputing, or takes more. Nothing is computed or allocated: the arguments may be
    ``jax.ShapeDtypeStruct``. If all that ``fn`` does is what ``jax.shard_map`` divides over
    devices, it is what one device takes.

    Args:
      fn: any traceable function.
      *args: its arguments, arrays or shapes.
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    donated = [False] * len(jaxpr.invars)
    while (wrapped := _wrapped(jaxpr)) is not None:
        inside = wrapped.params.get("donated_invars", donated)
        donated = [one or other for one, other in zip(donated, inside, strict=True)]
        (jaxpr,) = inner_programs(wrapped.params)
    given, results = {*jaxpr.invars}, {*_variables(jaxpr.outvars)}
    free = [_kind(v) for v, is_donated in zip(jaxpr.invars, donated, strict=True) if is_donated]
    placed = Counter(free) & Counter(_kind(variable) for variable in results - given)
    spared = sum(math.prod(shape) * dtype.itemsize for shape, dtype in placed.elements())
    return _bytes(given | results) - spared + _work(jaxpr)


def _wrapped(jaxpr: core.Jaxpr) -> core.JaxprEqn | None:
    """The only thing that a program does, if that is to call another one.

    The arguments of ``shard_map`` are whole arrays, those of the program in it one device's.
    """
    if [eqn.primitive.name for eqn in jaxpr.eqns] not in (["jit"], ["pjit"], ["shard_map"]):
        return None
    (eqn,) = jaxpr.eqns
    same = [*eqn.invars] == [*jaxpr.invars] and [*eqn.outvars] == [*jaxpr.outvars]
    return eqn if same else None


def _work(jaxpr: core.Jaxpr) -> int:
    """The most that a program holds at once beyond its arguments and results."""
    constants = {*jaxpr.constvars}
    kept = {*constants, *jaxpr.invars, *_variables(jaxpr.outvars)}
    last = {variable: i for i, eqn in enumerate(jaxpr.eqns) for variable in _variables(eqn.invars)}
    alive = most = 0
    for i, eqn in enumerate(jaxpr.eqns):
        made = {*eqn.outvars} - kept
        inside = [_work(program) + _slices(eqn, program) for program in inner_programs(eqn.params)]
        most = max(most, alive + _bytes(made) + max(inside, default=0))
        done = {variable for variable in _variables(eqn.invars) if last[variable] == i} - kept
        alive += _bytes(made & last.keys()) - _bytes(done)
    return most + _bytes(constants)


def _slices(eqn: core.JaxprEqn, program: core.Jaxpr) -> int:
    """What one round of a ``scan`` reads from stacked arguments and makes of stacked results."""
    if eqn.primitive.name != "scan":
        return 0
    carried = eqn.params["num_carry"]
    read = {*program.invars[eqn.params["num_consts"] + carried :]}
    return _bytes(read | ({*_variables(program.outvars[carried:])} - {*program.invars}))


def _kind(variable: core.Var) -> tuple[tuple[int, ...], Any]:
    return variable.aval.shape, variable.aval.dtype


def _variables(atoms: Any) -> list[core.Var]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _bytes(variables: set[core.Var]) -> int:
    # Tokens of effects have no shape, and take nothing.
    shaped = (variable.aval for variable in variables if hasattr(variable.aval, "shape"))
    return sum(aval.size * aval.dtype.itemsize for aval in shaped)
