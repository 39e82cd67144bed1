"""Standard and adversarial training of a residual network in plain PyTorch, on any device.

As a PyTorch user would write it: images stay on the device as uint8, are gathered, padded, cropped
and mirrored there; SGD with momentum; ``torch.autocast`` for bfloat16.
"""

import contextlib
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import torch_peers


def device() -> str:
    """Where PyTorch runs: on the GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def trainer(
    network: nn.Module,
    image: np.ndarray,
    label: np.ndarray,
    *,
    memory_format: torch.memory_format,
    batch_size: int,
    attack: Mapping[str, float] | None,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    bfloat16: bool,
    compiled: bool,
) -> Callable[[int], float]:
    """``advance(count) -> mean loss`` makes so many steps.

    Args:
      network: trained in place, in training mode; attacked in evaluation mode.
      image: images ``(N, h, w, c)`` uint8.
      label: labels ``(N,)``.
      memory_format: of images and weights.
      batch_size: examples of a step.
      attack: ``eps``, ``step_size`` and ``steps`` of l_inf PGD; None: standard training.
      learning_rate: of SGD, constant.
      momentum: of SGD.
      weight_decay: of SGD.
      bfloat16: computes in it, with float32 weights.
      compiled: with ``torch.compile``, which compiles at the first steps.
    """
    where = device()
    network = network.to(where, memory_format=memory_format)
    forward = torch.compile(network) if compiled else network
    x_all = torch.tensor(image, device=where).permute(0, 3, 1, 2)
    y_all = torch_peers.labels(label).to(where)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        fused=True,
    )
    order: list[Tensor] = []

    def advance(count: int) -> float:
        loss_sum = torch.zeros((), device=where)
        for _ in range(count):
            if not order:
                whole = len(label) // batch_size * batch_size
                order.extend(torch.randperm(len(label), device=where)[:whole].split(batch_size))
            rows = order.pop()
            x = crop_and_flip(x_all[rows] / 255, padding=4).contiguous(memory_format=memory_format)
            y = y_all[rows]
            with torch.autocast(where, torch.bfloat16) if bfloat16 else contextlib.nullcontext():
                if attack is not None:
                    network.eval()
                    x = torch_peers.pgd(forward, x, y, **attack)
                    network.train()
                loss = F.cross_entropy(forward(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach()
        return float(loss_sum) / count  # waits for the device

    network.train()
    return advance


def crop_and_flip(x: Tensor, padding: int) -> Tensor:
    """Each image ``(n, c, h, w)`` cropped at random from its padded self, and mirrored or not."""
    n, _, h, w = x.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), device=x.device)
    rows = top + torch.arange(h, device=x.device)
    columns = left + torch.arange(w, device=x.device)
    mirrored = torch.rand(n, 1, device=x.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(x, (padding,) * 4)
    examples = torch.arange(n, device=x.device)[:, None, None]
    # Indices that surround a slice put its axis last.
    return padded[examples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
