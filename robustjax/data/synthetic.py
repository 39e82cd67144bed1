"""Data from formulas: waveforms whose class is their pitch."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from robustjax import checks, keys
from robustjax.data.dataset import Dataset


def tones(
    key: Key[Array, ""],
    n: int,
    samples: int,
    classes: int,
    *,
    lowest: float = 0.02,
    highest: float = 0.2,
    amplitude: tuple[float, float] = (0.25, 0.75),
    noise: float = 0.1,
) -> Dataset:
    """Noisy sine waves ``a sin(2 pi f t + phase) + noise``, one frequency ``f`` for each class.

    The frequencies are spaced evenly on a logarithmic scale. Phases are uniform, so that no linear
    classifier can tell the classes apart. Classes are equally frequent, up to one example, and in
    random order.

    Args:
      key: One key.
      n: Number of waveforms, >= 1.
      samples: Their length, >= 2.
      classes: Number of classes, >= 2.
      lowest: Frequency of the first class, in cycles per sample, in (0, 1/2).
      highest: That of the last class, in (lowest, 1/2).
      amplitude: Smallest and largest amplitude, in [0, 1]; uniform between.
      noise: Standard deviation of the white noise, >= 0. What exceeds [-1, 1] is clipped.

    Returns:
      A data set of waveforms ``(n, samples, 1)``, float32 in [-1, 1].

    Raises:
      ValueError: An argument out of range.
    """
    keys.check_one(key)
    checks.integer("n", n, at_least=1)
    checks.integer("samples", samples, at_least=2)
    checks.integer("classes", classes, at_least=2)
    checks.number("lowest", lowest, above=0, below=0.5)
    checks.number("highest", highest, above=lowest, below=0.5)
    small, large = amplitude
    checks.number("amplitude", small, at_least=0)
    checks.number("amplitude", large, at_least=small, at_most=1)
    checks.number("noise", noise, at_least=0)

    parts = jax.random.split(key, 4)
    label = jax.random.permutation(parts[0], jnp.arange(n, dtype=jnp.int32) % classes)
    frequency = jnp.geomspace(lowest, highest, classes)[label]
    phase = jax.random.uniform(parts[1], (n, 1), maxval=2 * jnp.pi)
    size = jax.random.uniform(parts[2], (n, 1), minval=small, maxval=large)
    wave = size * jnp.sin(2 * jnp.pi * frequency[:, None] * jnp.arange(samples) + phase)
    wave = wave + noise * jax.random.normal(parts[3], wave.shape)
    image = np.asarray(jnp.clip(wave, -1, 1), np.float32)[..., None]
    return Dataset(image, np.asarray(label), classes, "tones")
