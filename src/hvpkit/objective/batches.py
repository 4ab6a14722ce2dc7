"""Split a batch into the inputs of a model and the targets of a criterion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from hvpkit._utils.typing import Batch
from hvpkit._utils.validation import check_count

TARGET_KEYS = ("targets", "target", "labels", "label")
"""Keys under which a batch that is a dict may hold its targets."""

Targets: TypeAlias = str | Sequence[str] | int | None
"""The keys of the targets, or how many elements at the end of a tuple; None: one, or the input itself."""


def check_targets(targets: Targets) -> int | tuple[str, ...] | None:
    """Return the number of targets or their keys; raise TypeError or ValueError for anything else."""
    if targets is None or isinstance(targets, str):
        return None if targets is None else (targets,)
    if isinstance(targets, int):
        return check_count("targets", targets, 0)
    if not isinstance(targets, Sequence) or not all(isinstance(key, str) for key in targets):
        raise TypeError(f"targets must be keys of a batch, or a number, got {targets!r}")
    return tuple(targets)


def split_batch(
    batch: Batch, targets: int | tuple[str, ...] | None, *, inputs_as_targets: bool = True
) -> tuple[tuple[Any, ...], dict[str, Any], list[Any]]:
    """Return the positional inputs and the keyword inputs of the model, and the targets.

    Args:
        batch: as :func:`hvpkit.from_module` takes them.
        targets: as :func:`check_targets` returns them.
        inputs_as_targets: one tensor alone is input and target.
    """
    if isinstance(batch, Mapping):
        keys = targets
        if targets is None:
            keys = tuple(key for key in TARGET_KEYS if key in batch)
        if (
            isinstance(keys, tuple)
            and (targets is not None or len(keys) == 1)
            and all(k in batch for k in keys)
        ):
            inputs = {key: value for key, value in batch.items() if key not in keys}
            return (), inputs, [batch[key] for key in keys]
        if targets == 0:
            return (), dict(batch), []
    elif not isinstance(targets, tuple):
        whole = (batch,) if isinstance(batch, Tensor) else tuple(batch)
        if targets is None and len(whole) == 1 and inputs_as_targets:
            return whole, {}, [whole[0]]
        count = 1 if targets is None else targets
        if len(whole) > count:
            return whole[: len(whole) - count], {}, [*whole[len(whole) - count :]]
    found = (
        f"a dict with the keys {', '.join(map(str, batch))}"
        if isinstance(batch, Mapping)
        else type(batch).__name__
    )
    raise ValueError(
        "data: a batch for from_module must be (*inputs, targets), or a dict with one of the keys "
        f"{', '.join(TARGET_KEYS)}, got {found}; say by from_module(..., targets=) which keys the targets are, or how "
        "many at the end of a tuple; for any other write hvpkit.Objective(forward, output_loss)"
    )
