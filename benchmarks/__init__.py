"""Speed measurements against peers: one entry point per part, a JSON file of each under results/.

- ``attacks``: PGD and adversarial training against PyTorch, and compilations of a training run

A speed is a ratio of times that were taken in turn, in one process on one machine (``timing``).
The same work in PyTorch is in ``torch_peers``: ``pip install robustjax[parity]``.
"""
