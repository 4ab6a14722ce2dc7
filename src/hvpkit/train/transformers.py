"""A callback for Hugging Face's ``Trainer`` that tracks the spectrum; needs ``transformers[torch]``."""

from __future__ import annotations

import copy
import math
from inspect import unwrap
from typing import Any

from transformers import Trainer, TrainerCallback

from hvpkit._utils.validation import check_choice
from hvpkit.train.tensorboard import scalars
from hvpkit.train.tracker import SpectrumTracker


class SpectrumCallback(TrainerCallback):
    """A callback that calls a tracker before the first step and then every few epochs or steps.

    The measurement goes to ``trainer.log``, under ``spectrum/...``: into the log history, which checkpoints hold, and
    to every service that the trainer reports to: TensorBoard, Weights & Biases, MLflow and others, by ``report_to`` of
    its arguments. Offline, ``WANDB_MODE=offline`` or a folder in ``MLFLOW_TRACKING_URI`` keep it there. With several
    processes, all share the work of a measurement and have its result: each has all the data of the tracker, and holds
    the whole model, as with DDP; of ``fully_shard`` it is gathered. Under ``bf16`` or ``fp16`` the Hessian is that of
    the weights as they are kept, in float32.

    A resumed run continues with the next measurement; with a ``path``, so does the tracker's record.

    Args:
        tracker: made by :meth:`~hvpkit.train.SpectrumTracker.for_module`. Its criterion is one of :mod:`hvpkit.hf`, or
            a function of the model's output for a batch without labels, usually an object with ``logits``. It measures
            every ``every`` epochs or steps.
        trainer: the trainer; pass the callback to its ``add_callback``.
        per: ``"epoch"`` or ``"step"``: the unit of ``every`` and of the records. An epoch that was cut short counts.
            Steps are those of the optimizer, as ``trainer.state.global_step`` counts them.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Cost:
        That of :class:`~hvpkit.train.SpectrumTracker`.

    Example:
        >>> import torch
        >>> import hvpkit as hk
        >>> tokens = {"input_ids": torch.ones(8, 6, dtype=torch.int64), "labels": torch.arange(8) % 2}
        >>> tracker = SpectrumTracker.for_module(hk.hf.classification_loss, tokens, every=50)
        >>> trainer = Trainer(model, args, train_dataset=dataset)  # doctest: +SKIP
        >>> trainer.add_callback(SpectrumCallback(tracker, trainer, per="step"))  # doctest: +SKIP
    """

    def __init__(self, tracker: SpectrumTracker, trainer: Trainer, *, per: str = "epoch") -> None:
        if not isinstance(tracker, SpectrumTracker):
            raise TypeError(f"tracker must be a SpectrumTracker, got {type(tracker).__name__}")
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
        self.tracker, self.trainer, self.per = tracker, trainer, check_choice("per", per, ("epoch", "step"))

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        model: Any = self.trainer.model
        self.tracker.share(model)
        if self.trainer.state.global_step == 0:
            self._measure(0)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.per == "step":
            self._measure(self.trainer.state.global_step)

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        if self.per == "epoch":
            self._measure(math.ceil(self.trainer.state.epoch or 0))

    def _measure(self, step: int) -> None:
        trainer = self.trainer
        if self.tracker(_in_full_precision(trainer.model), step=step) is not None:
            should_log = trainer.control.should_log
            trainer.log(scalars(self.tracker.records[-1]))
            trainer.control.should_log = (
                should_log  # log() resets it, and the loss of this step is still to be logged
            )


def _in_full_precision(model: Any) -> Any:
    """Return the module without the autocast that accelerate adds to its ``forward``: too coarse for a Hessian."""
    if "_original_forward" not in vars(model) or unwrap(model.forward) is not unwrap(type(model).forward):
        return model
    plain = copy.copy(model)  # shares all tensors
    del plain.forward, plain._original_forward
    return plain
