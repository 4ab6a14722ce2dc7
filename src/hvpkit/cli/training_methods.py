"""Training of a classifier by one of four methods, epoch by epoch; a run continues from any epoch to the same bits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

import hvpkit as hk
from hvpkit._utils.random import generator
from hvpkit._utils.validation import check_choice, check_count, check_positive
from hvpkit.errors import NonFiniteError
from hvpkit.train import AbsaEpoch, AbsaResult, AbsaState, AdaHessian, KneeLR, absa, absa_init

LR = {"sgd": 0.1, "knee": 0.1, "adahessian": 0.15, "absa": 0.1}
"""Default learning rate of each method: AdaHessian's published one; for the others chosen by feel."""

MOMENTUM = 0.9
"""Of SGD, under every schedule; the usual value."""


@dataclass(frozen=True)
class Plan:
    """A training method and its options.

    Attributes:
        method: ``"sgd"`` with momentum, ``"knee"`` (the same under the Knee schedule, half of it at the peak),
            ``"adahessian"`` or ``"absa"``.
        epochs: in total; ABSA uses adversarial examples in the first half of them.
        lr: learning rate; its peak for the Knee schedule.
        batch_size: for ABSA that of the first epoch.
        weight_decay: as a penalty on the loss; decoupled for AdaHessian.
        lr_decay: factor on the learning rate after each of ``lr_decay_epochs``.
        lr_decay_epochs: counted from 1; none for the Knee schedule.
        seed: of the order of examples, and of the method's random numbers.
        augmentation: of training images: ``"shift"``, ``"shift and mirror"``, or None; not for ABSA.
    """

    method: str
    epochs: int
    lr: float
    batch_size: int
    weight_decay: float
    lr_decay: float
    lr_decay_epochs: tuple[int, ...]
    seed: int
    augmentation: str | None = None

    def __post_init__(self) -> None:
        check_choice("method", self.method, tuple(LR))
        check_count("epochs", self.epochs, 1)
        check_count("batch_size", self.batch_size, 1)
        check_positive("lr", self.lr)
        check_positive("lr_decay", self.lr_decay)
        if self.method == "knee" and self.lr_decay_epochs:
            raise ValueError(
                "lr_decay_epochs: the Knee schedule has its own decay; leave --lr-decay-epoch out"
            )
        if self.method == "absa" and self.augmentation:
            raise ValueError("augment: absa trains on images and adversarial ones; leave --augment out")


State = dict[str, Any]
"""A checkpoint of the training: tensors and plain data."""


def train_epochs(
    model: nn.Module, data: tuple[Tensor, Tensor], plan: Plan, saved: State | None
) -> Iterator[State]:
    """Train a model in place, and yield a checkpoint at the start and after each epoch.

    A later call continues from a checkpoint that it gets as ``saved``.

    Raises:
        NonFiniteError: the training diverged.
    """
    start = saved or {"epoch": 0, "losses": [], "model": model.state_dict()}
    model.load_state_dict(start["model"])
    yield start
    yield from (_with_absa if plan.method == "absa" else _with_optimizer)(model, data, plan, start)


def _with_optimizer(
    model: nn.Module, data: tuple[Tensor, Tensor], plan: Plan, saved: State
) -> Iterator[State]:
    x, y = data
    num_steps = math.ceil(len(x) / plan.batch_size)
    optimizer, scheduler = _optimizer(model, plan, num_steps)
    if saved["epoch"]:
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
    losses = list(saved["losses"])
    for epoch in range(saved["epoch"] + 1, plan.epochs + 1):
        model.train()
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        # batches of nearly equal size: none is too small for BatchNorm
        random = generator(plan.seed, epoch)
        for indices in torch.randperm(len(x), generator=random, device="cpu").tensor_split(num_steps):
            indices = indices.to(x.device)
            images = x[indices]
            if plan.augmentation:
                images = shifted(images, random, mirror="mirror" in plan.augmentation)
            optimizer.zero_grad()
            value = F.cross_entropy(model(images), y[indices])
            with warnings.catch_warnings():
                # torch warns of a reference cycle, which AdaHessian's step breaks
                warnings.filterwarnings("ignore", "Using backward", UserWarning)
                value.backward(create_graph=getattr(optimizer, "needs_graph", False))
            optimizer.step()
            scheduler.step()
            total += value.detach() * len(indices)
        losses.append(float(total) / len(x))
        if not all(bool(p.isfinite().all()) for p in model.parameters()) or not math.isfinite(losses[-1]):
            raise NonFiniteError(
                f"the training diverged in epoch {epoch} at the learning rate {plan.lr:g}: lower --lr"
            )
        yield {
            "epoch": epoch,
            "losses": list(losses),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }


def shifted(images: Tensor, random: torch.Generator, *, mirror: bool) -> Tensor:
    """Return images shifted by up to an eighth of their size, with zeros at the border; half of them mirrored."""
    size, pad = images.shape[-1], images.shape[-1] // 8
    down, across = torch.randint(2 * pad + 1, (2, len(images)), generator=random, device="cpu").to(
        images.device
    )
    windows = F.pad(images, (pad,) * 4).unfold(2, size, 1).unfold(3, size, 1)
    images = windows[torch.arange(len(images), device=images.device), :, down, across]
    if not mirror:
        return images
    chosen = torch.rand(len(images), generator=random, device="cpu").to(images.device) < 0.5
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor], batch_size: int = 1000) -> float:
    """Return the share of examples whose class the model gives, by running statistics; its mode is left as it was."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        pairs = zip(*(part.split(batch_size) for part in data), strict=True)
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs)
    model.train(was_training)
    return right / len(data[0])


def _optimizer(model: nn.Module, plan: Plan, num_steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Make the optimiser and its schedule, for ``num_steps`` steps an epoch."""
    optimizer: torch.optim.Optimizer
    if plan.method == "adahessian":
        optimizer = AdaHessian(model.parameters(), plan.lr, weight_decay=plan.weight_decay, seed=plan.seed)
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), plan.lr, momentum=MOMENTUM, weight_decay=plan.weight_decay
        )
    if plan.method == "knee":
        total = plan.epochs * num_steps
        return optimizer, KneeLR(optimizer, explore_steps=total // 2, total_steps=total)
    milestones = [epoch * num_steps for epoch in plan.lr_decay_epochs]
    return optimizer, MultiStepLR(optimizer, milestones, plan.lr_decay)


def _with_absa(model: nn.Module, data: tuple[Tensor, Tensor], plan: Plan, saved: State) -> Iterator[State]:
    objective, params = hk.from_module(model, F.cross_entropy, batchnorm="batch")
    start = absa_init(
        min(plan.batch_size, len(data[0])),
        plan.lr,
        adversarial_epochs=plan.epochs // 2,
        lr_decay=plan.lr_decay,
        lr_decay_epochs=plan.lr_decay_epochs,
    )
    run = _resumed(params, saved["absa"]) if saved["epoch"] else None
    for epoch in range(saved["epoch"] + 1, plan.epochs + 1):
        run = absa(
            objective,
            params,
            data,
            start,
            num_epochs=epoch,
            momentum=MOMENTUM,
            weight_decay=plan.weight_decay,
            seed=plan.seed,
            resume=run,
        )
        model.load_state_dict(run.params, strict=False)
        estimate_statistics(model, data[0])
        rest = {
            "velocity": run.velocity,
            "state": asdict(run.state),
            "history": [asdict(e) for e in run.history],
        }
        losses = [entry.loss for entry in run.history]
        yield {"epoch": epoch, "losses": losses, "model": model.state_dict(), "absa": rest}


def _resumed(params: dict[str, Tensor], rest: State) -> AbsaResult:
    history = tuple(AbsaEpoch(**entry) for entry in rest["history"])
    velocity = {name: rest["velocity"][name].to(start) for name, start in params.items()}
    return AbsaResult(params, velocity, AbsaState(**rest["state"]), history)


def estimate_statistics(model: nn.Module, x: Tensor, batch_size: int = 256) -> None:
    """Set BatchNorm's running statistics to their mean over batches of ``x``, by one pass.

    ABSA trains with the statistics of batches and does not update the running ones.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.train()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
    with torch.no_grad():
        for batch in x.tensor_split(math.ceil(len(x) / batch_size)):
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
