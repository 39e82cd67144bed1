"""The README's examples run as they stand, in order."""

import re
from pathlib import Path

import jax.numpy as jnp

README = Path(__file__).parents[1] / "README.md"


def test_the_python_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    namespace = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert "robust accuracy: " in capsys.readouterr().out
    threat, x, x_adv = (namespace[name] for name in ("threat", "x", "x_adv"))
    assert bool(threat.contains(x_adv, x).all())
    assert int(namespace["state"].step) == 1
    assert jnp.isfinite(namespace["metrics"]["loss"])
    assert jnp.isfinite(x_adv).all()
    result = namespace["result"]
    assert result.clean_accuracy == 1 >= result.robust_accuracy
    assert [record.name for record in result.attacks] == ["apgd-ce", "apgd-t", "fab-t", "square"]


def test_every_path_and_command_it_names_is_there():
    text = README.read_text()
    root = README.parent
    for module in set(re.findall(r"python -m ((?:experiments|benchmarks)\.\w+)", text)):
        assert (root / (module.replace(".", "/") + ".py")).exists(), module
    for room in re.findall(r"`robustjax\.(\w+)`", text):
        assert (root / "robustjax" / room).exists() or (root / f"robustjax/{room}.py").exists()
