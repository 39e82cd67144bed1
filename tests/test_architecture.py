"""The shape of the house: imports point one way, public names exist and are documented."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import robustjax

PACKAGE = Path(robustjax.__file__).parent
FOUNDATION = {
    "checks",
    "keys",
    "norms",
    "threat",
    "lp",
    "frequency",
    "dct",
    "fourier_norms",
    "hyperplane",
    "spectral",
    "lipschitz",
    "parallel",
}
SIDE = {"optim", "models", "data", "metrics", "theory"}
# Each room may import from those before it, and the chain from the side rooms.
CHAIN = ["losses", "attacks", "objectives", "gradients", "training", "benchmark"]
ALLOWED = {
    "checks": set(),
    "keys": {"checks"},
    "lp": {"checks"},
    "frequency": {"checks"},
    "hyperplane": {"checks", "lp"},
    "parallel": {"checks"},
    "norms": {"checks", "lp"},
    "fourier_norms": {"checks", "lp", "frequency", "norms"},
    "dct": {"checks", "keys", "frequency", "norms"},
    "spectral": {"checks", "keys", "norms"},
    "lipschitz": {"checks", "keys", "norms", "spectral"},
    "threat": {"checks", "keys", "norms", "lp"},
    **{room: FOUNDATION - {"threat", "hyperplane", "parallel"} | {"losses"} for room in SIDE},
    **{room: FOUNDATION | SIDE | set(CHAIN[:i]) for i, room in enumerate(CHAIN)},
}
ALLOWED["losses"] = FOUNDATION


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "robustjax" and rest:
                yield rest.split(".")[0]
            elif top in ("experiments", "tests", "benchmarks"):
                yield top


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    room = room_of(path)
    rooms = {name for name in imported_rooms(path) if name != room}
    assert rooms <= ALLOWED[room], f"{room} must not import {rooms - ALLOWED[room]}"


def test_every_room_is_placed():
    assert {room_of(path) for path in FILES} == set(ALLOWED)


MODULES = ["robustjax"] + [
    info.name for info in pkgutil.walk_packages([str(PACKAGE)], prefix="robustjax.")
]


@pytest.mark.parametrize("name", MODULES)
def test_public_names_exist_and_are_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    for public in getattr(module, "__all__", []):
        thing = getattr(module, public)
        ours = getattr(thing, "__module__", "").startswith("robustjax")
        if ours and (inspect.isfunction(thing) or inspect.isclass(thing)):
            assert inspect.getdoc(thing), f"{name}.{public} has no docstring"


def test_no_file_is_a_drawer():
    for path in FILES:
        assert path.name != "utils.py"
        assert len(path.read_text().splitlines()) <= 420, f"{path.name} wants to be two files"
