"""The benchmarks run, time in the order they say, and their peers compute what we compute."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    agreement,
    attacks,
    compilation_cache,
    input_pipeline,
    op_profile,
    outer_optimizers,
    timing,
    training,
)
from benchmarks import objectives as objectives_benchmark
from robustjax import losses, models
from robustjax.benchmark import compilation


def test_a_quick_run_writes_everything_it_measures(tmp_path, capsys):
    out = tmp_path / "results" / "attacks.json"
    settings = attacks.Settings(quick=True, without_torch=True, rounds=2, out=str(out))
    results = attacks.main(settings)
    assert json.loads(out.read_text()).keys() == results.keys()
    assert {"cpu", "cores", "device", "date", "versions", "load_average_1_minute"} <= results[
        "environment"
    ].keys()
    assert results["environment"]["versions"]["jax"] == jax.__version__
    assert results["sizes"]["rounds"] == 2

    (pgd,) = results["pgd"]
    runs = {"scan", "unrolled", "scan_plain", "unrolled_plain", "scan_on_all_devices"}
    assert pgd["width"] == 2
    assert pgd["seconds"].keys() == pgd["median_seconds"].keys() == runs
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in pgd["seconds"].values())
    assert pgd["compile_seconds"].keys() == runs
    assert min(pgd["compile_seconds"].values()) > 0
    assert pgd["ratios"].keys() == {"scan / unrolled", "plain scan / scan"}
    # The five programs are one attack, and it does raise the loss.
    loss = pgd["agreement"]["loss"]
    np.testing.assert_allclose([loss[name] for name in runs], loss["scan"], rtol=1e-3)
    assert loss["scan"] > loss["clean"]

    assert results["training"]["steps"] == 2
    trace = results["training"]["agreement"]["loss_and_robust_accuracy"]
    assert results["training"]["seconds"].keys() == trace.keys()
    assert trace.keys() == {"robustjax", "robustjax_on_all_devices"}
    assert len(trace["robustjax"]) == 4
    # One step on one device or on eight is the same step.
    np.testing.assert_allclose(*trace.values(), rtol=1e-3)

    counted = results["compilations"]
    assert counted["total"] == sum(v["programs"] for v in counted["by_name"].values())
    # One program of the step; one of validation and one of the test, which have other attacks.
    assert counted["by_name"]["jit(steps)"]["programs"] == 1
    assert counted["by_name"]["jit(judge)"]["programs"] == 2
    assert len(counted["step_cache_sizes"]) == 1
    assert counted["evaluator_cache_sizes"] == [1, 1]
    assert "scan / unrolled" in capsys.readouterr().out


def test_a_quick_run_of_the_outer_optimizers(tmp_path, capsys):
    out = tmp_path / "results" / "outer.json"
    settings = outer_optimizers.Settings(quick=True, only=("outer",), rounds=2, out=str(out))
    results = outer_optimizers.main(settings)
    assert json.loads(out.read_text()).keys() == results.keys()
    assert results["environment"]["load_average_1_minute_after"] >= 0

    n = outer_optimizers.QUICK.batch_size
    passes = {
        name: (counted["passes"], counted["batches"])
        for name, counted in results["backward_passes"].items()
    }
    assert passes == {
        **dict.fromkeys(("MSGD", "MGNC", "SNGM"), (1, 1)),
        # Those for the norms are of 16 examples, of one, and of all.
        **dict.fromkeys(("F-ENGM", "ENGM, ghost"), (n // 16 + 1, 2)),
        "ENGM, vmap": (n + 1, 2),
        "ENGM, vjp": (n + 1, n + 1),
        **dict.fromkeys(("A-ENGM (refresh)", "A-ENGM, train (refresh)"), (n // 16 + 2, 3)),
        **dict.fromkeys(("A-ENGM (no refresh)", "A-ENGM, train (no refresh)"), (2, 2)),
        **dict.fromkeys(("N-ENGM", "N-ENGM, train"), (2, 2)),
    }

    (run,) = results["runs"]
    assert (run["part"], run["norm"]) == ("outer", "batch")
    methods = {*passes} - {"ENGM, vjp"}
    assert run["seconds"].keys() == methods | {"A-ENGM", "A-ENGM, train"}
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in run["seconds"].values())
    assert run["memory"].keys() == {name for name in run["seconds"] if "refresh" not in name}
    assert run["ratios"].keys() == run["memory"].keys() - {"MSGD"}
    assert {ratio["to"] for ratio in run["ratios"].values()} == {"MSGD"}
    assert run["slow"]["seconds"].keys() == {"MSGD", "ENGM, vjp"}
    for memory in (*run["memory"].values(), *run["slow"]["memory"].values()):
        kinds = memory["arguments"] + memory["results"] + memory["temporary"]
        assert memory["total"] == kinds - memory["shared"] > 0
    # The optimizers keep no more than MSGD does.
    assert run["memory"]["SNGM"]["arguments"] == run["memory"]["MSGD"]["arguments"]
    assert "F-ENGM" in capsys.readouterr().out


def test_a_quick_run_of_the_objectives(tmp_path, capsys, monkeypatch):
    names = ("standard", "FGSM", "FGSM + GradAlign")
    chosen = {name: objectives_benchmark.OBJECTIVES[name] for name in names}
    monkeypatch.setattr(objectives_benchmark, "OBJECTIVES", chosen)
    monkeypatch.setitem(sys.modules, "benchmarks.torch_objectives", None)  # as if without torch
    quick = objectives_benchmark.PRESETS["quick"]
    out = tmp_path / "objectives.json"
    results = objectives_benchmark.main(dataclasses.replace(quick, out=str(out)))
    assert json.loads(out.read_text())["passes"] == results["passes"]
    assert results["passes"]["FGSM"] == {"forward": 2, "backward": 2, "tangent": 0}
    assert results["predicted"]["FGSM"]["published"] == 2
    assert results["ratios"]["standard / standard"]["median"] == 1
    assert set(results["compilations"].values()) == {1}
    assert results["agreement_with_torch"] == {}
    printed = capsys.readouterr().out
    assert "aim 2.5" in printed and "No comparison with PyTorch" in printed


def test_the_peers_of_the_objectives_compute_what_ours_do(monkeypatch):
    peers = pytest.importorskip("benchmarks.torch_objectives")
    names = ("FGSM + GradAlign", "SOAR, PGD-1")
    chosen = {name: objectives_benchmark.OBJECTIVES[name] for name in names}
    monkeypatch.setattr(objectives_benchmark, "OBJECTIVES", chosen)
    settings = objectives_benchmark.PRESETS["quick"]
    model = models.from_linen(
        models.PreActResNet(settings.stages, width=settings.width, norm="none")
    )
    draw = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(draw.random((2, 4, 4, 3), np.float32)),
        "label": jnp.arange(2, dtype=jnp.int32),
        "index": jnp.arange(2, dtype=jnp.int32),
    }
    params, _ = agreement.random_variables(model, batch["image"])
    steps, agreements = objectives_benchmark._torch_steps(peers, settings, model, params, batch)
    assert agreements.keys() == {title for runs in steps.values() for title in runs}
    assert max(found["gradient_difference"] for found in agreements.values()) < 1e-3
    for runs in steps.values():
        for step in runs.values():
            step()  # with fresh random numbers


def test_a_method_with_an_interval_counts_as_its_mean_step():
    seconds = {
        "MSGD": [1.0, 1.0],
        "A-ENGM (refresh)": [51.0, 101.0],
        "A-ENGM (no refresh)": [1.0, 2.0],
    }
    averaged = outer_optimizers.averaged_over_tau(seconds)
    assert [*averaged] == [*seconds, "A-ENGM"]
    np.testing.assert_allclose(averaged["A-ENGM"], [100 / 50, 199 / 50])


@pytest.mark.parametrize(
    "settings",
    [{"rounds": 0}, {"norms": ("layer",)}, {"only": ("inner",)}],
    ids=["rounds", "norms", "only"],
)
def test_a_wrong_setting_of_the_outer_optimizers_is_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        outer_optimizers.Settings(quick=True, **settings)


def test_runs_are_timed_in_turn_after_a_warm_up():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = timing.interleaved(runs, rounds=3)
    assert calls == list("abc") * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_ratio_is_taken_in_each_round_and_to_the_faster_peer():
    # The machine is ten times slower in the second round.
    seconds = {"ours": [2.0, 20.0, 2.0], "slow": [4.0, 40.0, 5.0], "fast": [1.0, 10.0, 1.6]}
    summary = timing.summary(
        seconds, {"ratio": ("ours", ["slow", "fast"]), "left out": ("ours", [])}
    )
    assert summary["median_seconds"] == {"ours": 2.0, "slow": 5.0, "fast": 1.6}
    assert summary["ratios"] == {
        "ratio": {"to": "fast", "median": 2.0, "min": 1.25, "max": 2.0},
    }


def test_compilations_are_counted_by_function():
    def thrice(x):
        return 3 * x

    compiled = jax.jit(thrice)
    x, y = jnp.ones(3), jnp.ones(4)
    with compilation.compilations() as seen:
        compiled(x), compiled(x), compiled(y)
    compiled(jnp.ones(5))
    assert [name for name, _ in seen] == ["jit(thrice)"] * 2


def test_without_torch_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "benchmarks.torch_peers", raising=False)
    monkeypatch.delattr("benchmarks.torch_peers", raising=False)
    with pytest.raises(ValueError, match=r"robustjax\[parity\].*--without_torch"):
        attacks.main(attacks.Settings(quick=True))


@pytest.mark.parametrize(
    "settings",
    [{"rounds": 0}, {"widths": (0,)}, {"only": ("everything",)}],
    ids=["rounds", "widths", "only"],
)
def test_a_wrong_setting_is_refused(settings):
    name = next(iter(settings))
    with pytest.raises(ValueError, match=name):
        attacks.main(attacks.Settings(quick=True, without_torch=True, **settings))


@pytest.mark.parametrize("name", ["PreActResNet", "SmallCNN"])
def test_the_peer_in_torch_has_our_logits_and_our_attack(name):
    pytest.importorskip("torch")
    from benchmarks import torch_peers

    channels = {"PreActResNet": 3, "SmallCNN": 1}[name]
    if name == "PreActResNet":
        module, network = models.PreActResNet((2, 1), width=2), torch_peers.PreActResNet((2, 1), 2)
    else:
        module, network = models.SmallCNN(), torch_peers.SmallCNN(8)
    model = models.from_linen(module)
    x = jnp.asarray(np.random.default_rng(0).random((4, 8, 8, channels), np.float32))
    y = jnp.arange(4)
    variables = agreement.random_variables(model, x)
    logits_fn = jax.jit(models.eval_logits(model.apply, *variables))
    network = torch_peers.load_flax(network, *variables).eval().requires_grad_(False)
    for memory_format in torch_peers.FORMATS.values():
        peer = network.to(memory_format=memory_format)
        images = torch_peers.images(x, memory_format)
        np.testing.assert_allclose(peer(images).numpy(), logits_fn(x), rtol=1e-4, atol=1e-4)
        x_adv = torch_peers.pgd(
            peer, images, torch_peers.labels(y), eps=0.1, step_size=0.1, steps=1, start=images
        )
        gradient = jax.grad(lambda x: losses.cross_entropy(logits_fn(x), y).sum())(x)
        ours = jnp.clip(x + 0.1 * jnp.sign(gradient), 0, 1)
        equal = np.isclose(x_adv.permute(0, 2, 3, 1).numpy(), ours, atol=1e-5)
        assert equal.mean() > 0.98  # the sign of a gradient that is almost zero may differ


def test_weights_of_another_network_are_refused():
    pytest.importorskip("torch")
    from benchmarks import torch_peers

    model = models.from_linen(models.PreActResNet((1, 1), width=2))
    variables = agreement.random_variables(model, jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"params must have the shapes of the peer"):
        torch_peers.load_flax(torch_peers.PreActResNet((1, 1), 3), *variables)
    with pytest.raises(ValueError, match=r"params must have the layers of the peer"):
        torch_peers.load_flax(torch_peers.PreActResNet((1, 1), 2), variables[0], {})


def test_a_quick_run_of_training(tmp_path, capsys):
    out = tmp_path / "results" / "training.json"
    results = training.main(
        training.Settings(
            size="quick", objective=("madry",), without_torch=True, profile=True, out=str(out)
        )
    )
    assert json.loads(out.read_text()).keys() == results.keys()
    rate = results["peak"]["float32"]["rate"]
    (run,) = results["runs"]
    assert (run["batch_size"], run["steps"]) == (8, 2)
    assert run["seconds"].keys() == {"loop", "program"}
    assert run["images_per_second"] == 8 * 2 / run["median_seconds"]["loop"]
    np.testing.assert_allclose(
        run["utilisation"], run["flops_per_step"] * run["images_per_second"] / 8 / rate
    )
    # Ten gradients for the input (forward and back), then forward and a gradient for the weights.
    assert run["flops_per_step"] == 22 * 2 * 8 * (8 * 8 * 3) * 10
    assert run["compile_seconds"] < run["first_seconds"]
    np.testing.assert_allclose(sum(run["profile"]["shares"].values()), 1)
    assert "matrix products" in run["profile"]["shares"]
    assert "utilisation" in capsys.readouterr().out


@pytest.mark.parametrize("settings", [{"model": "vgg8"}, {"rounds": 0}, {"batch_sizes": (0,)}])
def test_a_wrong_setting_of_training_is_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        training.Settings(size="quick", **settings)


def test_a_profile_tells_the_gradients_of_a_convolution_apart():
    def loss(x, kernel):
        y = models.canonical_conv(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return (y**2).sum()

    arrays = jnp.ones((2, 6, 6, 4)), jnp.ones((3, 3, 4, 4))
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile()
    works = op_profile.works(compiled.as_text())
    kinds = {work.kind for work in works.values()}
    convolutions = {f"convolutions, {k}" for k in ("forward", "input gradient", "weight gradient")}
    assert convolutions <= kinds
    profile = op_profile.measure(lambda: jax.block_until_ready(compiled(*arrays)), works)
    assert convolutions <= profile["shares"].keys() <= kinds
    np.testing.assert_allclose(sum(profile["shares"].values()), 1)


def test_a_moment_is_shared_by_what_runs_in_it():
    shared = op_profile.shared_time([("a", 0.0, 4.0), ("b", 1.0, 3.0), ("a", 1.0, 2.0)])
    # 1 s of a; a second of a, a and b; a second of a and b; 1 s of a.
    np.testing.assert_allclose([shared["a"], shared["b"]], [1 + 2 / 3 + 1 / 2 + 1, 1 / 3 + 1 / 2])


def test_a_quick_run_of_the_input_pipeline(tmp_path, capsys):
    quick = input_pipeline.PRESETS["quick"]
    rates = {"runs": [{"title": "a run", "images_per_second": 50.0}]}
    (tmp_path / "training-cpu.json").write_text(json.dumps(rates))
    out = tmp_path / "input.json"
    results = input_pipeline.main(
        dataclasses.replace(quick, only=("arrays", "jpeg"), results=str(tmp_path), out=str(out))
    )
    assert json.loads(out.read_text())["needed"] == results["needed"] == {"cpu: a run": 50.0}
    # uint8 on the way to the device: 32x32, and the crops of the files.
    assert {k: run["bytes"] for k, run in results["runs"].items()} == {
        "arrays": 3 * 32**2, "jpeg": 3 * quick.crop_size**2
    }  # fmt: skip
    for run in results["runs"].values():
        assert run["threads"].keys() == {*quick.threads}
        assert run["per_core"] == max(one["per_core"] for one in run["threads"].values()) > 0
    cores = 50 / results["runs"]["jpeg"]["per_core"]
    assert f"{cores:,.2f}" in capsys.readouterr().out


def test_the_first_step_comes_without_heavy_imports_and_from_the_cache(tmp_path, monkeypatch):
    flags = "--objective=standard --dataset=digits --model=linear --dispatch=1 --batch_size=96"
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    flags = [*flags.split(), f"--compilation_cache={tmp_path / 'cache'}"]
    found, again = (
        compilation_cache.started([*flags, f"--workdir={tmp_path / name}"])
        for name in ("first", "second")
    )
    assert found["heavy"] == []
    assert found["programs"] == again["programs"] > found["read"] == 0
    assert again["read"] == again["programs"]
    parts = [found[part] for part in compilation_cache.PARTS]
    assert min(parts) > 0
    assert found["interpreter"] + found["imports"] < found["total"]

    starts = iter([10.0, 2.0, 30.0, 5.0, 20.0, 5.0])
    monkeypatch.setattr(
        compilation_cache, "started", lambda flags: {**found, "total": next(starts)}
    )
    settings = compilation_cache.Settings(rounds=3, only=("demo",), out=None)
    demo = compilation_cache.main(settings)["runs"]["demo"]
    assert demo["faster"] == 5  # of 5, 6 and 4
    assert demo["faster_by_medians"] == 4  # 20 and 5 seconds


def test_the_peer_crops_windows_and_is_led_astray_by_an_attack():
    torch = pytest.importorskip("torch")
    from benchmarks import torch_peers, torch_training

    x = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4) + 1
    padded = torch.nn.functional.pad(x, (1,) * 4)
    for image, around in zip(torch_training.crop_and_flip(x, 1), padded, strict=True):
        windows = [around[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
        assert any(torch.equal(image, w) or torch.equal(image, w.flip(2)) for w in windows)

    draw = np.random.default_rng(0)
    loss = {}
    for name, attack in {"clean": None, "pgd": {"eps": 0.5, "step_size": 0.1, "steps": 3}}.items():
        torch.manual_seed(0)
        loss[name] = torch_training.trainer(
            torch_peers.PreActResNet((1,), 4),
            draw.integers(0, 256, (8, 8, 8, 3), np.uint8),
            np.arange(8) % 10,
            memory_format=torch.channels_last,
            batch_size=4,
            attack=attack,
            learning_rate=0.01,
            momentum=0.9,
            weight_decay=0.0,
            bfloat16=False,
            compiled=False,
        )(2)
    assert loss["pgd"] > loss["clean"] > 0
