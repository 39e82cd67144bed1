"""Where the time of a compiled program goes, by kinds of operations, from a profiler trace.

The trace has the time of every instruction of the program, by name; the program's text tells what
each name is. Gradients of convolutions are told apart by the names of their primitives
(``robustjax.models.canonical_conv``).
"""

import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from robustjax.training import report

# Their time is that of what they contain.
CONTAINERS = ("while", "conditional", "call")
MOVES = {"copy", "transpose", "bitcast", "reshape", "parameter", "constant", "tuple",
         "get-tuple-element", "broadcast", "convert"}  # fmt: skip
REDUCTIONS = ("reduce", "reduce-window", "all-reduce")


class Instruction(NamedTuple):
    """One line of a compiled program.

    Attributes:
      opcode: as ``convolution``, ``fusion``, ``custom-call``.
      scope: where in the traced function it comes from.
      called: names of the computations that it contains.
      target: of a custom call.
    """

    opcode: str
    scope: str
    called: tuple[str, ...]
    target: str


class Work(NamedTuple):
    """What an instruction does.

    Attributes:
      kind: as ``convolutions, forward``.
      place: the layer, as ``stage1_block2/conv1``.
    """

    kind: str
    place: str


UNKNOWN = Work("other", "")


def works(text: str) -> dict[str, Work]:
    """What every instruction of a compiled program does, by name; containers are left out.

    Args:
      text: ``compiled.as_text()``.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    inside: dict[str, Instruction] = {}
    for line in text.splitlines():
        if opening := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            inside = computations.setdefault(opening[1], {})
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)$", line):
            inside[found[1]] = _instruction(found[2])
    return {
        name: _work(instruction, computations)
        for computation in computations.values()
        for name, instruction in computation.items()
        if instruction.opcode not in CONTAINERS
    }


def _instruction(rest: str) -> Instruction:
    # The result's shape comes first, in parentheses if it is a tuple: the opcode is the first word
    # that is followed by an opening parenthesis after it.
    opcode = re.search(r"(?:^|[\s)}])([a-z][\w-]*)\(", rest)
    scope = re.search(r'op_name="([^"]*)"', rest)
    target = re.search(r'custom_call_target="([^"]*)"', rest)
    called = re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)", rest)
    return Instruction(
        opcode[1] if opcode else "",
        scope[1] if scope else "",
        tuple(called),
        target[1] if target else "",
    )


def _work(instruction: Instruction, computations: Mapping[str, Any]) -> Work:
    parts = [instruction]
    for name in instruction.called if instruction.opcode == "fusion" else ():
        parts += computations.get(name, {}).values()
    for part in parts:
        if part.opcode == "convolution" or "conv" in part.target.lower():
            return Work(_convolution(part), _place(part.scope))
    return Work(_kind(parts), _place(instruction.scope))


def _place(scope: str) -> str:
    """A scope such as ``jit(f)/while/body/jvp(Net)/block/conv/canonical_conv/...``: the layer."""
    layers = scope.split("canonical_conv")[0].rpartition(")/")[2].strip("/").split("/")
    return "/".join(part for part in layers if part not in ("while", "body", "closed_call"))


def _kind(parts: Sequence[Instruction]) -> str:
    opcodes = {part.opcode for part in parts} - {"fusion"}
    if "dot" in opcodes or any(re.search("gemm|matmul|dot", p.target.lower()) for p in parts):
        return "matrix products"
    if any(opcode.startswith(REDUCTIONS) for opcode in opcodes):
        return "reductions"
    if opcodes <= MOVES:
        return "copies and transposes"
    if opcodes & {"rng-bit-generator", "shift-right-logical"}:
        return "random numbers"
    if opcodes & {"gather", "scatter", "dynamic-slice", "dynamic-update-slice", "pad", "reverse"}:
        return "slices and gathers"
    return "element-wise"


def _convolution(part: Instruction) -> str:
    """By the primitive, by cuDNN's name, or by autodiff's scope."""
    scope, target = part.scope, part.target.lower()
    if "kernel_gradient" in scope or "backwardfilter" in target:
        return "convolutions, weight gradient"
    if "input_gradient" in scope or "backwardinput" in target:
        return "convolutions, input gradient"
    if "transpose(" in scope and "canonical_conv" not in scope:
        return "convolutions, gradients"
    return "convolutions, forward"


def measure(run: Callable[[], Any], work_of: Mapping[str, Work]) -> dict[str, Any]:
    """Runs ``run`` once under the profiler, after a warm-up.

    Args:
      run: returns when its work is done.
      work_of: from ``works``.

    Returns:
      ``seconds`` in which at least one instruction ran, ``shares`` of them by kind, the largest
      first (instructions that run at the same time share it), and the ``top`` instructions.
    """
    run()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        intervals = list(_intervals(jax.profiler.ProfileData.from_file(str(file)), work_of))
    by_name = shared_time(intervals)
    total = sum(by_name.values())
    by_kind: dict[str, float] = {}
    for name, seconds in by_name.items():
        kind = work_of.get(name, UNKNOWN).kind
        by_kind[kind] = by_kind.get(kind, 0.0) + seconds
    return {
        "seconds": total,
        "shares": {k: v / total for k, v in sorted(by_kind.items(), key=lambda item: -item[1])},
        "top": {
            name: {**work_of.get(name, UNKNOWN)._asdict(), "share": by_name[name] / total}
            for name in sorted(by_name, key=by_name.__getitem__, reverse=True)[:10]
        },
    }


def _intervals(
    profile: jax.profiler.ProfileData, work_of: Mapping[str, Work]
) -> Iterable[tuple[str, float, float]]:
    """``(instruction, beginning, end)`` in seconds, of accelerators if there are any."""
    planes = list(profile.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    begun: dict[Any, tuple[str, float, float]] = {}
    ends: dict[Any, float] = {}
    for plane in devices or planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    name = str(stats["hlo_op"])
                    if name not in work_of and not devices:
                        continue  # a container, or another program
                    at = event.start_ns / 1e9
                    begun[stats.get("_p", object())] = (name, at, at + event.duration_ns / 1e9)
                elif event.name.startswith("end: "):
                    # On CPU an instruction may go on in other threads after its call returned.
                    ends[stats.get("_c")] = event.end_ns / 1e9
    for producer, (name, start, end) in begun.items():
        yield name, start, max(end, ends.get(producer, end))


def shared_time(intervals: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Seconds of each name; a moment at which several run counts for each in equal parts."""
    edges = []
    for number, (name, start, end) in enumerate(intervals):
        edges += [(start, 1, number, name), (end, 0, number, name)]
    running: dict[int, str] = {}
    seconds: dict[str, float] = {}
    last = 0.0
    for at, opens, number, name in sorted(edges):
        for other in running.values():
            seconds[other] = seconds.get(other, 0.0) + (at - last) / len(running)
        last = at
        if opens:
            running[number] = name
        else:
            running.pop(number, None)
    return seconds


def print_table(title: str, profile: Mapping[str, Any]) -> None:
    """Prints the shares by kind, and the instructions that take longest."""
    rows = [[kind, f"{100 * share:.1f} %"] for kind, share in profile["shares"].items()]
    report.print_table(f"{title}: {profile['seconds']:.3f} s", ["kind", "share of time"], rows)
    top = (
        f"{v['place'] or name} ({v['kind']}) {100 * v['share']:.1f} %"
        for name, v in profile["top"].items()
    )
    report.print_lines("longest: " + "; ".join(list(top)[:5]))
