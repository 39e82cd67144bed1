"""Batches and the devices that they are split over, each of which gets as many examples."""

import jax


def for_evaluation(size: int, devices: int | None = None) -> int:
    """``size``, or the next larger number that the devices divide.

    No result depends on it: whoever evaluates fills up the last batch and drops what was added, and
    an example's random numbers come from its place in the set.

    Args:
      size: examples at a time, as asked for.
      devices: how many there are; ``None``: all of all hosts.
    """
    devices = jax.device_count() if devices is None else devices
    return -(-size // devices) * devices


def misfit(size: int, devices: int | None = None, *, name: str = "batch_size") -> str | None:
    """What is wrong with a batch size in training, and the nearest that fit; ``None`` if it fits.

    Args:
      size: of a global batch. A larger or smaller one would train another network, so that it is
        never rounded.
      devices: how many there are; ``None``: all of all hosts.
      name: of the setting.
    """
    devices = jax.device_count() if devices is None else devices
    if size % devices == 0:
        return None
    above = for_evaluation(size, devices)
    near = f"{above - devices} and {above} are" if size > devices else f"{above} is"
    return f"{name} ({size}) must be divisible by the number of devices ({devices}), as {near}"


def check_training(size: int, devices: int | None = None, *, name: str = "batch_size") -> None:
    """Refuses a batch size in training that the devices do not divide; see ``misfit``.

    Raises:
      ValueError: naming the size, the number of devices and the nearest sizes that fit.
    """
    found = misfit(size, devices, name=name)
    if found is not None:
        raise ValueError(found)
