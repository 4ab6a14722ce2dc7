"""A callback for PyTorch Lightning that tracks the spectrum; needs ``lightning``."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from hvpkit._utils.validation import check_choice
from hvpkit.train.tensorboard import scalars
from hvpkit.train.tracker import SpectrumTracker


class SpectrumCallback(Callback):
    """A callback that calls a tracker before the first step and then every few epochs or steps.

    The measurement goes to all loggers of the trainer, under ``spectrum/...``: files in CSV, TensorBoard, Weights &
    Biases (``WandbLogger(offline=True)`` without a network), MLflow and others. It also goes into ``callback_metrics``,
    so that ``EarlyStopping`` and ``ModelCheckpoint`` can watch it. With several processes, all share the work of a
    measurement and have its result: each has all the data of the tracker, and holds the whole module, as with DDP;
    of ``fully_shard`` it is gathered.

    A resumed run continues with the next measurement; with a ``path``, so does the tracker's record.

    Args:
        tracker: made by :meth:`~hvpkit.train.SpectrumTracker.for_module`. Its criterion gets the output of
            the module's ``forward``. It measures every ``every`` epochs or steps.
        per: ``"epoch"`` or ``"step"``: the unit of ``every`` and of the records. An epoch that was cut short counts.
            Steps are those of the optimizer, as ``trainer.global_step`` counts them.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Cost:
        That of :class:`~hvpkit.train.SpectrumTracker`.

    Example:
        >>> from torch.nn import functional as F
        >>> x, y = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 2
        >>> callback = SpectrumCallback(SpectrumTracker.for_module(F.cross_entropy, (x, y), every=2))
        >>> trainer = Trainer(max_epochs=10, callbacks=[callback])  # doctest: +SKIP
        >>> trainer.fit(module, train_dataloaders=loader)  # doctest: +SKIP
    """

    def __init__(self, tracker: SpectrumTracker, *, per: str = "epoch") -> None:
        if not isinstance(tracker, SpectrumTracker):
            raise TypeError(f"tracker must be a SpectrumTracker, got {type(tracker).__name__}")
        self.tracker, self.per = tracker, check_choice("per", per, ("epoch", "step"))
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        self.tracker.share(pl_module)
        if trainer.global_step == 0:
            self._measure(trainer, pl_module, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_batch: Any, **_more: Any
    ) -> None:
        # with accumulated gradients, not every batch makes a step
        if self.per == "step" and trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self._measure(trainer, pl_module, trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.per == "epoch":
            self._measure(trainer, pl_module, trainer.current_epoch + 1)

    def _measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if self.tracker(pl_module, step=step) is None:
            return
        # not by pl_module.log, which drops values between the trainer's log_every_n_steps
        values = scalars(self.tracker.records[-1])
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.log_metrics(values, step=trainer.global_step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
