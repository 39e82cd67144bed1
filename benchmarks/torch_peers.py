"""The same networks, attack and training loop in plain PyTorch, with the same weights.

Written as a PyTorch user would write them: eager mode, ``NCHW``, gradients for the input alone
during an attack, the fused Adam. Layers bear the names of their Flax counterparts, by which
``load_flax`` copies parameters and statistics.
"""

import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from flax import traverse_util
from torch import Tensor, nn

FORMATS = {"torch": torch.contiguous_format, "torch_channels_last": torch.channels_last}


class PreActBlock(nn.Module):
    """Norm, ReLU, 3x3 convolution, twice; the projection acts on the block's input."""

    def __init__(self, inputs: int, channels: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        if stride != 1 or inputs != channels:
            self.shortcut_conv = nn.Conv2d(inputs, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        y = self.conv1(F.relu(self.norm1(x)))
        y = self.conv2(F.relu(self.norm2(y)))
        return y + (self.shortcut_conv(x) if hasattr(self, "shortcut_conv") else x)


class PreActResNet(nn.Module):
    """Peer of ``robustjax.models.PreActResNet`` with its default settings."""

    def __init__(self, stage_sizes: Sequence[int], width: int = 64, num_classes: int = 10):
        super().__init__()
        self.stem_conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.blocks = []
        inputs = width
        for stage, size in enumerate(stage_sizes):
            for block in range(size):
                channels = width * 2**stage
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"stage{stage + 1}_block{block + 1}"
                self.add_module(name, PreActBlock(inputs, channels, stride))
                self.blocks.append(name)
                inputs = channels
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images ``(n, 3, h, w)``."""
        x = self.stem_conv(x)
        for name in self.blocks:
            x = getattr(self, name)(x)
        return self.head(x.mean((2, 3)))


class SmallCNN(nn.Module):
    """Peer of ``robustjax.models.SmallCNN`` for square images, with its default widths."""

    def __init__(self, image_size: int, image_channels: int = 1, num_classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(image_channels, 16, 4, 2, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 4, 2, padding=1)
        self.features = (image_size // 4, image_size // 4, 32)
        self.dense = nn.Linear(math.prod(self.features), 100)
        self.head = nn.Linear(100, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images ``(n, c, h, w)``."""
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.head(F.relu(self.dense(x.flatten(1))))


def load_flax(
    module: nn.Module, params: Mapping[str, Any], model_state: Mapping[str, Any]
) -> nn.Module:
    """Copies Flax parameters and BatchNorm statistics into the peer of the same layer names.

    Raises:
      ValueError: the names or shapes are not those of the peer.
    """
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    state = {}
    for tree in (params, model_state.get("batch_stats", {})):
        for (*path, kind), value in traverse_util.flatten_dict(dict(tree)).items():
            layer = module.get_submodule(".".join(path))
            array = np.asarray(value)
            if kind == "kernel" and array.ndim == 4:
                array = array.transpose(3, 2, 0, 1)
            elif kind == "kernel" and path == ["dense"]:
                # Flax flattens HWC features, PyTorch CHW ones.
                array = array.reshape(*module.features, -1).transpose(3, 2, 0, 1)
                array = array.reshape(layer.out_features, -1)
            elif kind == "kernel":
                array = array.T
            state[".".join((*path, names.get(kind, kind)))] = torch.tensor(array)
    expected = {n for n in module.state_dict() if not n.endswith("num_batches_tracked")}
    if state.keys() != expected:
        different = sorted(state.keys() ^ expected)
        raise ValueError(f"params must have the layers of the peer, they differ in {different}")
    try:
        module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"params must have the shapes of the peer: {error}") from error
    return module


def images(x: Any, memory_format: torch.memory_format) -> Tensor:
    """Images ``NHWC`` as a tensor ``NCHW`` in a memory format."""
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)


def labels(y: Any) -> Tensor:
    """Labels as PyTorch wants them, int64."""
    return torch.tensor(np.asarray(y), dtype=torch.long)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    start: Tensor | None = None,
) -> Tensor:
    """l_inf PGD on the cross-entropy, from a uniform start or from ``start``."""
    if start is None:
        start = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    lower, upper = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    z = start
    for _ in range(steps):
        z = z.detach().requires_grad_()
        loss = F.cross_entropy(model(z), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, z)
        z = torch.clamp(z.detach() + step_size * gradient.sign(), lower, upper)
    return z.detach()


def adversarial_trainer(
    model: nn.Module,
    image: np.ndarray,
    label: np.ndarray,
    *,
    memory_format: torch.memory_format,
    batch_size: int,
    eps: float,
    step_size: float,
    attack_steps: int,
    warmup_steps: int,
    learning_rate: float,
    total_steps: int,
) -> Callable[[int], tuple[float, float]]:
    """``advance(count) -> (loss, robust accuracy)`` makes so many steps of adversarial training.

    Adam with a cosine schedule; eps and the step of the attack grow linearly over the warm-up;
    shuffled anew in each epoch.

    Args:
      model: network, trained in place.
      image: images ``(N, h, w, c)``, uint8 or float32 in [0, 1].
      label: labels ``(N,)``.
      memory_format: of images and weights.
      batch_size: examples of a step.
      eps: final radius.
      step_size: final length of a step of the attack.
      attack_steps: steps of the attack.
      warmup_steps: training steps until ``eps`` is reached; 0 for none.
      learning_rate: that of the first step.
      total_steps: training steps until the learning rate is 0.
    """
    model = model.to(memory_format=memory_format)
    x_all, y_all = images(image, memory_format), labels(label)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
    order: list[Tensor] = []
    done = 0

    def advance(count: int) -> tuple[float, float]:
        nonlocal done
        loss_sum = torch.zeros(())
        correct = torch.zeros((), dtype=torch.long)
        for _ in range(count):
            if not order:
                whole = len(label) // batch_size * batch_size
                order.extend(torch.randperm(len(label))[:whole].split(batch_size))
            rows = order.pop()
            x = x_all[rows] / 255 if x_all.dtype == torch.uint8 else x_all[rows]
            x = x.contiguous(memory_format=memory_format)
            y = y_all[rows]
            scale = min(done / warmup_steps, 1.0) if warmup_steps else 1.0
            x_adv = pgd(
                model, x, y, eps=scale * eps, step_size=scale * step_size, steps=attack_steps
            )
            optimizer.zero_grad()
            logits = model(x_adv)
            loss = F.cross_entropy(logits, y)
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.detach()
            correct += (logits.argmax(1) == y).sum()
            done += 1
        return float(loss_sum) / count, float(correct) / (count * batch_size)

    return advance


class ReferenceAutoAttack(NamedTuple):
    """What the reference implementation of AutoAttack found.

    Attributes:
      x_adv: images ``(n, h, w, c)``, the clean ones of examples that no attack broke.
      robust: examples ``(n,)`` that are classified rightly after all attacks.
      accuracy: robust accuracy after each attack by its name, ``"clean"`` first.
      seconds: time of each attack by its name; of one that had nothing left to do there is none.
      total_seconds: time of the whole evaluation, its checks of the model included.
    """

    x_adv: np.ndarray
    robust: np.ndarray
    accuracy: dict[str, float]
    seconds: dict[str, float]
    total_seconds: float


def reference_autoattack(
    model: nn.Module,
    x: Any,
    y: Any,
    norm: str,
    eps: float,
    version: str = "standard",
    attacks: Sequence[str] | None = None,
    seed: int = 0,
    *,
    batch_size: int = 500,
) -> ReferenceAutoAttack:
    """AutoAttack of its authors, from the package ``pyautoattack``.

    It runs the attacks one after the other, each on the examples that still stand, and starts the
    random numbers of every batch of every attack from the same seed.

    Args:
      model: logits of images ``(n, c, h, w)``, in evaluation mode.
      x: images ``(n, h, w, c)`` in [0, 1].
      y: labels ``(n,)``.
      norm: ``"linf"``, ``"l2"`` or ``"l1"``.
      eps: radius.
      version: ``"standard"``, ``"plus"`` or ``"rand"``; says restarts and target classes as well.
      attacks: names instead of those of the version, in this order, with its settings: among
        ``apgd-ce``, ``apgd-dlr``, ``apgd-t``, ``fab``, ``fab-t``, ``square``.
      seed: of PyTorch's global generator.
      batch_size: examples attacked at once.
    """
    import pyautoattack

    name = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    evaluation = pyautoattack.AutoAttack(
        model, norm=name, eps=eps, seed=seed, version=version, device="cpu"
    )
    if attacks is not None:
        # version="custom" would have five restarts of APGD and FAB where the standard has one.
        evaluation.attacks_to_run = list(attacks)
    images_, labels_ = images(x, torch.contiguous_format), labels(y)
    start, progress = time.perf_counter(), _Progress()
    logger = evaluation.logger
    level, propagate = logger.level, logger.propagate
    logger.addHandler(progress)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        adversarial, _ = evaluation.run_standard_evaluation(images_, labels_, batch_size=batch_size)
    finally:
        logger.removeHandler(progress)
        logger.setLevel(level)
        logger.propagate = propagate
    total_seconds = time.perf_counter() - start
    with torch.no_grad():
        robust = torch.cat(
            [
                model(z).argmax(1) == label
                for z, label in zip(
                    adversarial.split(batch_size), labels_.split(batch_size), strict=True
                )
            ]
        )
    return ReferenceAutoAttack(
        adversarial.permute(0, 2, 3, 1).numpy(),
        robust.numpy(),
        progress.accuracy,
        progress.seconds,
        total_seconds,
    )


class _Progress(logging.Handler):
    """Accuracies and times, which ``pyautoattack`` tells its log alone."""

    def __init__(self):
        super().__init__()
        self.accuracy: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self._began = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Reads one line of the log."""
        message = record.getMessage()
        if message.startswith("running "):
            self._began = record.created
        elif clean := re.fullmatch(r"initial accuracy: (.*)%", message):
            self.accuracy["clean"] = float(clean[1]) / 100
        elif after := re.fullmatch(r"robust accuracy after (\S+): (.*)% .*", message):
            name = after[1].lower()
            self.accuracy[name] = float(after[2]) / 100
            self.seconds[name] = record.created - self._began
