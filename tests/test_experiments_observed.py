"""What a run says: before it starts, on its way, of itself to a profiler."""

import json
import time

import jax
import pytest

from experiments import adversarial_training, command_line, dry_run, fast_jobs
from robustjax.training import progress, report


def test_a_dry_run_of_imagenet_at_its_three_sizes():
    """A ResNet-50 of the published size; steps of 1,281,167 images that fill a batch."""
    found = {}
    for job in fast_jobs.jobs_of("imagenet", fast_jobs.BASE, 1):
        if job.labels[:2] == ("FGSM-RS", "2/255"):
            settings = job.settings
            cost = dry_run.cost(settings, "madry", dry_run.data_facts(settings))
            assert cost.parameters == 25_557_032
            assert cost.steps_per_epoch == 1_281_167 // settings.batch_size
            found[settings.image_size] = cost.flops / settings.batch_size, cost.memory
    assert list(found) == [128, 224, 288]
    # Forward and back to the input, then forward and back to input and weights, at 4.1 billion
    # multiplications and additions a pass at 224; convolutions grow with the area.
    flops = {size: each for size, (each, _) in found.items()}
    assert flops[224] == pytest.approx(5 * 2 * 4.1e9, rel=0.05)
    for size in (128, 288):
        assert flops[size] / flops[224] == pytest.approx((size / 224) ** 2, rel=0.05)
    # Activations, rather than parameters: most of it goes with images times area.
    assert all(memory > 20 * 4 * 25_557_032 for _, memory in found.values())


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """A short run with ``--profile``; ``(folder of its network, what it printed)``."""
    folder = tmp_path_factory.mktemp("observed") / "run"
    settings = command_line.parse_settings(
        ("--dataset=digits", "--model=mlp", "--width=8", "--objective=madry", "--epochs=3",
         "--attack_steps=1", "--validation_steps=1", "--test_steps=1", "--test_restarts=1",
         "--batch_size=96", "--test_batch_size=96", "--dispatch=4", "--checkpoint_every=1",
         "--profile", f"--workdir={folder}"),
        adversarial_training.Settings, adversarial_training.PRESETS,
    )[0]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr(report.Console, "print", lambda self, *words, **how: lines.extend(words))
        adversarial_training.main(settings)
    return folder / "madry", [line for line in lines if isinstance(line, str)]


def test_a_run_says_what_it_is_going_to_do(observed):
    _, lines = observed
    parameters = 64 * 8 + 8 + 8 * 8 + 8 + 8 * 10 + 10
    network, work, devices = lines[:3]
    assert network == (
        f"madry: mlp, {parameters} parameters; 1,297 training examples 8x8x1, batch 96"
    )
    # Forward and back for the attack, forward and back twice for the weights, where the first
    # layer needs no gradient for its input.
    products = 64 * 8 + 8 * 8 + 8 * 10
    flops = 2 * 96 * (2 * products + 3 * products - 64 * 8)
    assert work.startswith(f"  39 steps (3 epochs of 13 steps), {flops:.2e} FLOPs a step, about ")
    assert work.endswith(" MiB a device")
    count, kind = jax.device_count(), jax.devices()[0].device_kind
    assert devices == f"  {count} x {kind}, batch split into {count}, parameters replicated"


def test_a_run_says_how_fast_it_is(observed):
    _, lines = observed
    validated = [line for line in lines if line.startswith("madry ")]
    assert [line.split()[1] for line in validated] == ["13/39", "26/39", "39/39"]
    assert all("examples/s" in line and "<" in line for line in validated)
    assert validated[-1].endswith("<0:00")


def test_a_trace_is_left_for_tensorboard_and_perfetto(observed):
    folder, lines = observed
    assert list(folder.glob("profile/plugins/profile/*/*.xplane.pb"))
    assert list(folder.glob("profile/plugins/profile/*/perfetto_trace.json.gz"))
    assert f"trace: {folder / 'profile'}" in lines
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
    assert max(steps) == 39


@pytest.fixture
def clock(monkeypatch):
    """``clock.now`` is the time."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_log_has_a_line_a_minute_and_those_to_keep(clock, capsys):
    shown = progress.Progress(1000, label="madry")
    for step in range(1, 201):
        clock.now = step
        shown(step, {"loss": 0.5}, keep=step == 100)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["60/1000", "100/1000", "160/1000"]


def test_speed_is_of_training_and_the_time_left_of_all(clock, capsys):
    """Ten steps of 8 examples in 10 s; then 40 s of something else."""
    shown = progress.Progress(51, label="madry", examples_per_step=8)
    clock.now = 100.0  # compiled
    shown(1, {})
    clock.now = 110.0
    with shown.paused():
        clock.now = 150.0
    shown(11, {}, keep=True)
    out = capsys.readouterr().out
    assert "8 examples/s" in out
    assert out.endswith("2:30<3:20\n")  # 40 steps, 5 s each
