"""Measurements of a tracker as scalars, for TensorBoard and whatever else draws curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class ScalarWriter(Protocol):
    """What ``torch.utils.tensorboard.SummaryWriter`` is, as far as it is needed here."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a measurement under the names that they are logged by, all in the group ``spectrum``.

    Args:
        record: one of :attr:`hvpkit.train.SpectrumTracker.records`.

    Returns:
        For both ends the value, the interval and the residual norm; passes over the data, and seconds. A bound that
        is not known is infinite.

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
    """Writes the :func:`scalars` of a measurement at its step.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or anything with its ``add_scalar``.
        record: one of :attr:`hvpkit.train.SpectrumTracker.records`: the last one while training, or each of them
            after it.

    Example:
        >>> class Printer:
        ...     def add_scalar(self, tag, scalar_value, global_step):
        ...         print(global_step, tag, scalar_value)
        >>> write_scalars(Printer(), {"step": 3, "largest": 2.5, "status": "converged"})
        3 spectrum/largest 2.5
    """
    for tag, value in scalars(record).items():
        writer.add_scalar(tag, value, record["step"])
