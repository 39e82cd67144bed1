"""Objectives with penalties on input gradients in plain PyTorch, by double backward.

Written as a PyTorch user would write them: eager mode, ``autograd.grad(create_graph=True)``, and no
gradient computed twice: that of FGSM serves the penalty at the same inputs too, and the loss shares
the penalty's forward pass. Means over the batch. Random numbers can be given, so that a comparison
has the same ones.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.torch_peers import load_flax

Draws = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Tensor, Tensor, Draws], Tensor]


class Block(nn.Module):
    """ReLU, 3x3 convolution, twice; the projection acts on the block's input."""

    def __init__(self, inputs: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        if stride != 1 or inputs != channels:
            self.shortcut_conv = nn.Conv2d(inputs, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        y = self.conv2(F.relu(self.conv1(F.relu(x))))
        return y + (self.shortcut_conv(x) if hasattr(self, "shortcut_conv") else x)


class PreActResNet(nn.Module):
    """Peer of ``robustjax.models.PreActResNet(norm="none")``."""

    def __init__(self, stage_sizes: Sequence[int], width: int = 64, num_classes: int = 10):
        super().__init__()
        self.stage_sizes = stage_sizes
        self.stem_conv = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = []
        inputs = width
        for stage, size in enumerate(stage_sizes):
            for block in range(size):
                channels = width * 2**stage
                name = f"stage{stage + 1}_block{block + 1}"
                stride = 2 if stage > 0 and block == 0 else 1
                self.add_module(name, Block(inputs, channels, stride))
                self.blocks.append(name)
                inputs = channels
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images ``(n, 3, h, w)``."""
        x = self.stem_conv(x)
        for name in self.blocks:
            x = getattr(self, name)(x)
        return self.head(x.mean((2, 3)))


def _gradient(model: nn.Module, x: Tensor, y: Tensor, *, create_graph: bool = True):
    """The mean loss, and the gradient of each example's own loss for its input."""
    x = x.detach().requires_grad_()
    loss = F.cross_entropy(model(x), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x, create_graph=create_graph)
    return loss / len(x), gradient


def _step(x: Tensor, start: Tensor, gradient: Tensor, eps: float, size: float) -> Tensor:
    z = torch.clamp(start + size * gradient.detach().sign(), x - eps, x + eps)
    return z.clamp(0, 1).detach()


def _uniform(x: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x).uniform_(-eps, eps)


def _norm(v: Tensor) -> Tensor:
    return v.flatten(1).norm(dim=1)


def standard(model: nn.Module, x: Tensor, y: Tensor, draws: Draws) -> Tensor:
    """The mean cross-entropy."""
    return F.cross_entropy(model(x), y)


def fgsm(eps: float) -> Loss:
    """FGSM adversarial training."""

    def loss(model: nn.Module, x: Tensor, y: Tensor, draws: Draws) -> Tensor:
        _, gradient = _gradient(model, x, y, create_graph=False)
        return F.cross_entropy(model(_step(x, x, gradient, eps, eps)), y)

    return loss


def fgsm_grad_align(eps: float, weight: float) -> Loss:
    """FGSM with GradAlign, whose gradient at ``x`` is a constant; draws ``eta``."""

    def loss(model: nn.Module, x: Tensor, y: Tensor, draws: Draws) -> Tensor:
        _, first = _gradient(model, x, y, create_graph=False)
        eta = draws["eta"] if draws else _uniform(x, eps)
        _, second = _gradient(model, x + eta, y)
        cosine = F.cosine_similarity(first.flatten(1), second.flatten(1), eps=1e-12)
        attacked = F.cross_entropy(model(_step(x, x, first, eps, eps)), y)
        return attacked + weight * (1 - cosine).mean()

    return loss


def fgsm_gradient_penalty(eps: float, weight: float) -> Loss:
    """FGSM with the squared l_2 norm of the gradient at ``x``."""

    def loss(model: nn.Module, x: Tensor, y: Tensor, draws: Draws) -> Tensor:
        _, gradient = _gradient(model, x, y)
        penalty = (gradient**2).flatten(1).sum(1).mean()
        return F.cross_entropy(model(_step(x, x, gradient, eps, eps)), y) + weight * penalty

    return loss


def fgsm_cure(eps: float, weight: float) -> Loss:
    """FGSM with CURE at the FGSM point."""

    def loss(model: nn.Module, x: Tensor, y: Tensor, draws: Draws) -> Tensor:
        _, gradient = _gradient(model, x, y)
        _, moved = _gradient(model, x + eps * gradient.detach().sign(), y)
        penalty = ((moved - gradient) ** 2).flatten(1).sum(1).mean()
        return F.cross_entropy(model(_step(x, x, gradient, eps, eps)), y) + weight * penalty

    return loss


def foar(eps: float) -> Loss:
    """FOAR at the clean inputs."""

    def loss(model: nn.Module, x: Tensor, y: Tensor, draws: Draws) -> Tensor:
        mean, gradient = _gradient(model, x, y)
        return mean + eps * gradient.abs().flatten(1).sum(1).mean()

    return loss


def soar(eps: float, h: float = 0.01) -> Loss:
    """SOAR at the PGD-1 point of half the radius; draws ``start``, ``z``, ``z_1``."""
    half = eps / 2

    def loss(model: nn.Module, x: Tensor, y: Tensor, draws: Draws) -> Tensor:
        start = draws["start"] if draws else (x + _uniform(x, half)).clamp(0, 1)
        z = draws["z"] if draws else torch.randn_like(x)
        z_1 = draws["z_1"] if draws else torch.randn(len(x))
        _, gradient = _gradient(model, start, y, create_graph=False)
        point = _step(x, start, gradient, half, half)
        mean, gradient = _gradient(model, point, y)
        length = _norm(z).view(-1, 1, 1, 1)
        _, moved = _gradient(model, point + h * z / length, y)
        upper = length / h * (moved - gradient) + z_1.view(-1, 1, 1, 1) * gradient
        lower = (gradient * z).flatten(1).sum(1) + z_1
        size = ((upper**2).flatten(1).sum(1) + lower**2 + 1e-12).sqrt()
        return mean + (x[0].numel() * half**2 + 1) / 2 * size.mean()

    return loss


def losses(*, eps: float, align_weight: float, cure_weight: float) -> dict[str, Loss]:
    """The objectives by the names that ``benchmarks.objectives`` gives them."""
    return {
        "standard": standard,
        "FGSM": fgsm(eps),
        "FGSM + GradAlign": fgsm_grad_align(eps, align_weight),
        "FGSM + CURE": fgsm_cure(eps, cure_weight),
        "FGSM + gradient penalty": fgsm_gradient_penalty(eps, 1.0),
        "FOAR": foar(eps),
        "SOAR, PGD-1": soar(eps),
    }


def gradient_difference(
    model: nn.Module, loss: Loss, x: Tensor, y: Tensor, draws: Draws, gradient: Any
) -> tuple[float, float]:
    """The loss, and how far its gradient is from another one, as a share of that one's l_2 norm.

    Args:
      model: network.
      loss: objective.
      x: images.
      y: labels.
      draws: random numbers of the objective.
      gradient: the other one, Flax parameters as for ``load_flax``.
    """
    value = loss(model, x, y, draws)
    ours = torch.autograd.grad(value, [*model.parameters()])
    structure = PreActResNet(model.stage_sizes, model.stem_conv.out_channels)
    theirs = load_flax(structure, gradient, {}).parameters()
    pairs = [
        (a.detach().flatten(), b.detach().flatten()) for a, b in zip(ours, theirs, strict=True)
    ]
    a, b = (torch.cat(leaves).double() for leaves in zip(*pairs, strict=True))
    return value.item(), float((a - b).norm() / b.norm())


def training_step(
    model: nn.Module, loss: Loss, x: Tensor, y: Tensor, learning_rate: float
) -> Callable[[], None]:
    """A step of SGD with momentum on one batch, with fresh random numbers; trains in place."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss(model, x, y, {}).backward()
        optimizer.step()

    return step
