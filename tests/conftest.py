"""The suite runs on eight simulated CPU devices and checks every annotated shape at run time."""

import os
import tempfile

# A program that several tests, workers or child processes need is compiled once in a run. Whoever
# sets the variable keeps what was compiled for the next run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="robustjax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from jaxtyping import config, install_import_hook

install_import_hook("robustjax", "typechecker.check")

import pytest


@pytest.fixture
def plain_calls():
    """Calls without the run-time type checker, as users make them: our own errors show."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def pytest_terminal_summary(terminalreporter):
    """What the faults of tests/survival came to, wherever their tests ran."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    found = [value for r in reports for name, value in r.user_properties if name == "survival"]
    if found:
        terminalreporter.section("survival: fault, tried, survived, steps lost (most, in all)")
        for fault, tried, lost in found:
            terminalreporter.line(f"{fault:48} {tried:3} {tried:3}  {lost}")
