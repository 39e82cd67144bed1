"""Speed measurements against peers: an entry point per part, its JSON files under results/.

- ``attacks``: the entry point for ``pgd``, ``training`` (both against PyTorch) and
  ``compilations`` (what XLA compiles in a training run)
- ``outer_optimizers``: the entry point for the outer step of adversarial training
- ``objectives``: the entry point for the cost of a step of every objective
- ``timing``: times taken in turn, ratios, the machine; ``agreement``: that the work is the same
- ``torch_peers``: the same work in PyTorch, which ``pip install robustjax[parity]`` installs

A speed is a ratio of times that were taken in turn, in one process on one machine.
"""
