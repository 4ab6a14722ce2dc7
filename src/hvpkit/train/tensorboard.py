"""A tracker's measurements as scalars, for TensorBoard and other loggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class ScalarWriter(Protocol):
    """The part of ``torch.utils.tensorboard.SummaryWriter`` that is used here."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a measurement by their names in a log, all in the group ``spectrum``.

    Args:
        record: one of :attr:`hvpkit.train.SpectrumTracker.records`.

    Returns:
        Value, interval and residual norm of both ends; passes over the data, and seconds. An unknown bound is
        infinite.

    Example:
        >>> scalars({"step": 3, "largest": 2.5, "largest_kind": "exact", "passes": 12})
        {'spectrum/largest': 2.5, 'spectrum/passes': 12.0}
    """
    return {
        f"spectrum/{name}": float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float)
    }


def write_scalars(writer: ScalarWriter, record: Mapping[str, Any]) -> None:
    """Write the :func:`scalars` of a measurement at its step.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or anything with its ``add_scalar``.
        record: one of :attr:`hvpkit.train.SpectrumTracker.records`: the last one during training, or each of
            them afterwards.

    Example:
        >>> class Printer:
        ...     def add_scalar(self, tag, scalar_value, global_step):
        ...         print(global_step, tag, scalar_value)
        >>> write_scalars(Printer(), {"step": 3, "largest": 2.5, "status": "converged"})
        3 spectrum/largest 2.5
    """
    for tag, value in scalars(record).items():
        writer.add_scalar(tag, value, record["step"])
