"""The RobustBench contract: evaluations that can be cited, of any classifier.

- ``evaluate``: ``benchmark``, ``BenchmarkResult``: one call, one record
- ``auto_attack``: ``auto_attack``, ``ensemble``: the ensemble behind it
- ``masking``: ``masking_report``, ``MaskingReport``: signs of gradient masking;
  ``interpolation_losses``
- ``flags``: ``Flag``: signs that an evaluation cannot be trusted
- ``import_torch``: PyTorch checkpoints, of RobustBench's networks and vision transformers, as
  models of this library; ``state_dict`` reads their files
- ``chunks``, ``batches``: ``ChunkedAttack``, ``BatchedFunction``: attacks on whole data sets, on
  the examples that still stand
- ``state_file``, ``environment``, ``compilation``: what a long run leaves behind
"""

from robustjax.benchmark import import_torch
from robustjax.benchmark.auto_attack import (
    AttackRecord,
    AutoAttackResult,
    auto_attack,
    ensemble,
)
from robustjax.benchmark.batches import BatchedFunction
from robustjax.benchmark.chunks import ChunkedAttack
from robustjax.benchmark.evaluate import BenchmarkResult, benchmark
from robustjax.benchmark.flags import Flag
from robustjax.benchmark.masking import MaskingReport, interpolation_losses, masking_report

__all__ = [
    "AttackRecord",
    "AutoAttackResult",
    "BatchedFunction",
    "BenchmarkResult",
    "ChunkedAttack",
    "Flag",
    "MaskingReport",
    "auto_attack",
    "benchmark",
    "ensemble",
    "import_torch",
    "interpolation_losses",
    "masking_report",
]
