"""Speed measurements against peers: an entry point per part, its JSON files under results/.

- ``attacks``: the entry point for ``pgd``, ``demo_training`` (both against PyTorch) and
  ``compilations`` (what XLA compiles in a training run)
- ``training``: the entry point for images per second of training, the share of the device's peak
  (``peak``) that it uses, what the host adds, and where the time goes (``op_profile``)
- ``input_pipeline``: the entry point for images per second that the host reads
- ``compilation_cache``: the entry point for the second start of a run
- ``outer_optimizers``: the entry point for the outer step of adversarial training
- ``objectives``: the entry point for the cost of a step of every objective
- ``timing``: times taken in turn, ratios, the machine; ``agreement``: that the work is the same
- ``torch_peers``, ``torch_training``: the same work in PyTorch, which
  ``pip install robustjax[parity]`` installs

A speed is a ratio of times that were taken in turn, in one process on one machine.
"""
