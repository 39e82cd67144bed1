"""The speed of reading: images per second and core of the host, against what training needs.

  python -m benchmarks.input_pipeline                    some 2 minutes on 2 cores
  python -m benchmarks.input_pipeline --needed=3000      cores that feed so many images per second

arrays         an .npz archive of 32x32 images, held in the host's memory
array_record   a set prepared by TensorFlow Datasets, 32x32 images in PNG, read by random access
jpeg           a folder of 256x256 JPEG files: decoded, a random rectangle of each scaled to 224x224

All go through ``robustjax.data.host_batches``, which stacks uint8 batches and reads ahead in
threads; further augmentation is part of the training step, on the device. Images per core are
those per second of processor time, over all threads: what else the machine does changes them
little. The data are made on the spot, in a temporary folder.

What training needs is ``--needed``, or is read from the results of ``benchmarks.training``.
"""

import dataclasses
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks import prepared_images, timing
from experiments import command_line
from experiments.command_line import setting
from robustjax import checks, data
from robustjax.benchmark import environment as machine
from robustjax.training import report

ROOT = Path(__file__).parent.parent
KINDS = ("arrays", "array_record", "jpeg")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, how often, and where the result goes."""

    # fmt: off
    only: tuple[str, ...] = setting(KINDS, "what is read", "run", choices=KINDS)
    examples: int = setting(4096, "small images in a set", "run", unit="examples")
    files: int = setting(1024, "JPEG files", "run", unit="examples")
    file_size: int = setting(256, "side of their images", "run", unit="pixels")
    crop_size: int = setting(224, "side of what is made of them", "run", unit="pixels")
    batch_size: int = setting(64, "images in a batch", "run", unit="examples")
    batches: int = setting(32, "batches in a measurement", "run")
    threads: tuple[int, ...] = setting((0, 2, 8), "batches read at once; 0: one by one", "run")
    rounds: int = setting(3, "measurements of each", "run")
    needed: float | None = setting(
        None, "images per second that training takes; None: those of the newest results", "run")
    results: str = setting("benchmarks/results", "folder of the results of training", "run")
    out: str | None = setting(
        "benchmarks/results/input-pipeline.json", "JSON file, or None", "run")
    # fmt: on

    def __post_init__(self):
        command_line.check_choices(self)
        for name in ("examples", "files", "file_size", "crop_size", "batch_size", "batches",
                     "rounds"):  # fmt: skip
            checks.integer(name, getattr(self, name), at_least=1)
        for threads in self.threads:
            checks.integer("threads", threads)
        if self.batch_size > min(self.examples, self.files):
            raise ValueError(
                "batch_size must be <= examples and files, got "
                f"{self.batch_size}, {self.examples} and {self.files}"
            )
        if self.needed is not None:
            checks.number("needed", self.needed, above=0)


PRESETS = {
    "full": Settings(),
    "quick": Settings(
        examples=16, files=8, file_size=16, crop_size=12, batch_size=4, batches=2, threads=(0, 2),
        rounds=1, out=None,
    ),
}  # fmt: skip


def main(settings: Settings) -> dict[str, Any]:
    """Measures, prints the tables, writes the JSON file; returns what it holds."""
    results: dict[str, Any] = {
        "environment": machine.environment(),
        "settings": dataclasses.asdict(settings),
        "runs": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for kind in settings.only:
            source = SOURCES[kind](settings, Path(folder))
            if source is None:
                report.print_lines(f"{kind} is left out: pip install 'robustjax[tfds]'")
                continue
            crop = data.random_resized_crop(settings.crop_size) if kind == "jpeg" else None
            results["runs"][kind] = measure(source, crop, settings)
    results["needed"] = needed(settings)
    results["environment"]["load_average_1_minute_after"] = timing.load()
    _print(results)
    if settings.out is not None:
        Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
        report.write_json(settings.out, results)
        report.print_lines(f"written: {settings.out}")
    return results


def measure(source: Any, crop: Callable | None, settings: Settings) -> dict[str, Any]:
    """Seconds, of the clock and of the processor, of so many batches, for each number of threads.

    Args:
      source: data set or source.
      crop: random transform of the examples, or None.
      settings: sizes and rounds.

    Returns:
      By number of threads the ``images_per_second`` of the clock and ``per_core``, medians over the
      rounds, and ``bytes`` of an image on its way to the device. ``per_core`` of all is the largest
      one, for threads can only cost processor time.
    """
    images = settings.batches * settings.batch_size
    seconds: dict[int, list[float]] = {threads: [] for threads in settings.threads}
    processor: dict[int, list[float]] = {threads: [] for threads in settings.threads}
    for number in range(settings.rounds + 1):
        for threads in settings.threads:
            *spent, size = _read(source, crop, settings, threads)
            if number:  # the first one is the warm-up
                seconds[threads].append(spent[0])
                processor[threads].append(spent[1])
    found = {
        threads: {
            "seconds": seconds[threads],
            "processor_seconds": processor[threads],
            "images_per_second": images / statistics.median(seconds[threads]),
            "per_core": images / statistics.median(processor[threads]),
        }
        for threads in settings.threads
    }
    per_core = max(one["per_core"] for one in found.values())
    return {"threads": found, "per_core": per_core, "bytes": size}


def _read(
    source: Any, crop: Callable | None, settings: Settings, threads: int
) -> tuple[float, float, int]:
    """Seconds of the clock and of the processor, and bytes of an image."""
    began, processor = time.perf_counter(), time.process_time()
    stream = data.host_batches(
        source,
        batch_size=settings.batch_size,
        seed=0,
        process_index=0,
        process_count=1,
        random_transform=crop,
        to_float=False,
        num_threads=threads,
        prefetch=threads,
    )
    for _ in range(settings.batches):
        batch = next(stream)
    # Batches that were read ahead in vain count as if they were not there: with threads, both
    # numbers are a little too low.
    spent = time.perf_counter() - began, time.process_time() - processor
    stream.close()
    return *spent, batch["image"][0].nbytes


def needed(settings: Settings) -> dict[str, float]:
    """Images per second that training takes, by the name of the run."""
    if settings.needed is not None:
        return {"needed": settings.needed}
    rates = {}
    for file in sorted(Path(settings.results).glob("training-*.json")):
        device = file.stem.removeprefix("training-")
        for run in json.loads(file.read_text())["runs"]:
            rates[f"{device}: {run['title']}"] = run["images_per_second"]
    return rates


def _arrays(settings: Settings, folder: Path) -> Any:
    file = folder / "drawn.npz"
    image = prepared_images.images(settings.examples, 32)
    label = np.arange(len(image)) % prepared_images.NUM_CLASSES
    np.savez(file, x_train=image, y_train=label, x_test=image[:1], y_test=label[:1])
    return data.load_source(f"npz:{file}", "train", validation_size=0)


def _array_record(settings: Settings, folder: Path) -> Any:
    if any(importlib.util.find_spec(m) is None for m in ("tensorflow", "tensorflow_datasets")):
        return None
    # In a process of its own, which alone imports TensorFlow.
    subprocess.run(
        [sys.executable, "-m", "benchmarks.prepared_images", str(folder), str(settings.examples),
         "32"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )  # fmt: skip
    return data.load_source(prepared_images.NAME, "train", data_dir=folder, validation_size=0)


def _jpeg(settings: Settings, folder: Path) -> Any:
    for i in range(settings.files):
        place = folder / "files" / "train" / str(i % prepared_images.NUM_CLASSES)
        place.mkdir(parents=True, exist_ok=True)
        (image,) = prepared_images.images(1, settings.file_size, seed=i)
        Image.fromarray(image).save(place / f"{i}.jpg", quality=90)
    return data.load_source(f"folder:{folder / 'files'}", "train", validation_size=0)


SOURCES = {"arrays": _arrays, "array_record": _array_record, "jpeg": _jpeg}


def _print(results: dict[str, Any]) -> None:
    rows = []
    for kind, run in results["runs"].items():
        for threads, found in run["threads"].items():
            rows.append([
                f"{kind}, {threads} threads",
                f"{found['images_per_second']:,.0f}",
                f"{found['per_core']:,.0f}",
                f"{run['bytes'] * found['images_per_second'] / 2**20:,.0f}",
            ])  # fmt: skip
    report.print_table(
        f"Reading, {results['environment']['cores']} cores",
        ["what", "images/s", "images/s per core", "MiB/s to the device"],
        rows,
    )
    rows = [
        [
            name,
            f"{rate:,.1f}",
            *(f"{rate / run['per_core']:,.2f}" for run in results["runs"].values()),
        ]
        for name, rate in results["needed"].items()
    ]
    if rows:
        columns = ["training", "images/s", *(f"cores, {kind}" for kind in results["runs"])]
        report.print_table("Cores of the host that feed it", columns, rows)
    else:
        report.print_lines("What training needs: --needed, or run python -m benchmarks.training")
    if "jpeg" in results["runs"]:
        per_core = results["runs"]["jpeg"]["per_core"]
        wanted = (f"{rate:,} images/s: {rate / per_core:.1f}" for rate in (500, 1000, 3000))
        report.print_lines("cores for JPEG files at " + ", ".join(wanted))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    command_line.run(main, Settings, PRESETS, __doc__)
