"""Speed measurements against peers: an entry point per part, its JSON files under results/.

- ``attacks``: PGD and adversarial training against an unrolled loop and against PyTorch, and what
  XLA compiles in a training run (``compilations``)

A speed is a ratio of times that were taken in turn, in one process on one machine (``timing``).
The same work in PyTorch is in ``torch_peers``: ``pip install robustjax[parity]``.
"""
