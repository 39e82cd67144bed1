"""Measurements of models, attacks and training runs.

- ``accuracy``: ``correct``, ``instantaneous_accuracy``, ``cumulative_accuracy``
"""

from robustjax.metrics.accuracy import correct, cumulative_accuracy, instantaneous_accuracy

__all__ = ["correct", "cumulative_accuracy", "instantaneous_accuracy"]
