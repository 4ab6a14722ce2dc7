"""Choice of the AD mode and the arithmetic of matvecs, and measurement of their errors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpkit._utils.validation import check_choice
from hvpkit.autodiff.exact import FLOAT32_BACKENDS, Autocast
from hvpkit.autodiff.pytree import join
from hvpkit.curvature.batches import BatchCurvature, Leaves, LinearMap

ARITHMETICS = ("native", "bf16", "tf32")

CLEARLY_FASTER = 1.2
"""How many times faster than the preferred mode the other must be to be chosen, in each round. By feel."""

ROUNDS = 5
"""Rounds of timing, at most: one in which the other mode is not clearly faster ends them. By feel."""

SURE = 4.0
"""Ratio of the gap between two modes to the error of one that makes finite differences decisive. By feel."""

Draw = Callable[[int], Leaves]
"""From the number of a random stream to a random vector."""


@dataclass(frozen=True)
class Recipe:
    """The mode and the arithmetic of matvecs.

    Attributes:
        mode: one of :data:`hvpkit.curvature.batches.MODES`.
        reason: the mode and why it was chosen; None: it was asked for.
        arithmetic: one of :data:`ARITHMETICS`.
        precision: measured relative error of matvecs; 0: rounding in the dtype.
    """

    mode: str
    reason: str | None
    arithmetic: str
    precision: float


def choose_recipe(batch: BatchCurvature, draw: Draw, mode: str, arithmetic: str) -> Recipe:
    """Choose the mode where it is ``"auto"``, and measure the error of matvecs, by trials on one batch."""
    reason = None
    if mode == "auto":
        mode, reason = _choose_mode(batch, draw, arithmetic)
    error = 0.0
    if mode == "finite-difference":
        if arithmetic != "native":
            raise ValueError(
                f"arithmetic={arithmetic!r} leaves finite differences no digits; take 'native', or another mode "
                f"({reason or 'this one was asked for'})"
            )
        error = _error_of_differences(batch, draw)
    elif arithmetic != "native":
        error = _error_of_arithmetic(batch, draw(0), mode, arithmetic)
    return Recipe(mode, reason, arithmetic, error)


def _choose_mode(batch: BatchCurvature, draw: Draw, arithmetic: str) -> tuple[str, str]:
    """Choose the mode for matvecs in this arithmetic; return it and why.

    Of the two exact ones reverse over reverse is preferred on a CPU and forward over reverse elsewhere, unless the
    other is clearly faster. They must agree to half the dtype's digits; where they do not, finite differences
    decide. Finite differences are chosen where neither exact mode has all derivatives.

    Raises:
        ArithmeticError: the modes disagree, and finite differences are sure that both are wrong.
    """
    v, lowered = draw(0), batch if arithmetic == "native" else _LoweredBatch(batch, arithmetic)
    exact = ("reverse-over-reverse", "forward-over-reverse")
    preferred, other = exact if v[0].device.type == "cpu" else exact[::-1]
    found: dict[str, Tensor] = {}
    failed: dict[str, str] = {}
    for mode in (preferred, other):
        try:
            found[mode] = join(batch.linearize(mode)([v])[0])
            if lowered is not batch:
                lowered.linearize(mode)([v])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            failed[mode] = f"{mode} does not work here ({str(error).splitlines()[0]:.120})"
    if failed:
        chosen = next(iter(found), "finite-difference")
        return chosen, f"{chosen}: {', and '.join(failed.values())}"
    distance = _relative_distance(found[preferred], found[other])
    if not distance <= torch.finfo(v[0].dtype).eps ** 0.5:
        return _arbitrate(batch, draw, found, distance)
    seconds = dict.fromkeys(found, math.inf)
    chosen, rest = other, preferred
    for _ in range(ROUNDS):
        for mode in found:
            begin = time.perf_counter()
            float(lowered.linearize(mode)([v])[0][0].sum())  # waits for the device
            seconds[mode] = min(seconds[mode], time.perf_counter() - begin)
        if seconds[preferred] <= CLEARLY_FASTER * seconds[other]:
            chosen, rest = preferred, other
            break
    ratio = seconds[rest] / seconds[chosen]
    return chosen, f"{chosen}: {rest} takes {ratio:.2g} times as long, and agrees to {distance:.0e}"


def _arbitrate(
    batch: BatchCurvature, draw: Draw, found: dict[str, Tensor], distance: float
) -> tuple[str, str]:
    """Resolve disagreeing AD modes by finite differences."""
    expected, error = _differences(batch, draw)
    (preferred, a), (other, b) = found.items()
    gap = float(torch.linalg.vector_norm(a - b))
    off = {mode: float(torch.linalg.vector_norm(matvec - expected)) for mode, matvec in found.items()}
    for right, wrong in ((preferred, other), (other, preferred)):
        if SURE * off[right] <= gap or (math.isfinite(off[right]) and not math.isfinite(off[wrong])):
            return right, f"{right}: {wrong} is wrong by {distance:.0e} here, as finite differences say"
    if not SURE * error <= gap:
        reason = f"{other} differs by {distance:.0e}, less than finite differences can tell here"
        return preferred, f"{preferred}: {reason}"
    raise ArithmeticError(
        f"mode='auto': no mode can be trusted here. Products {preferred} and {other} differ by {distance:.0e}, and "
        "both from finite differences: some function in the loss has a wrong derivative, or another value in each call"
    )


def _differences(batch: BatchCurvature, draw: Draw) -> tuple[Tensor, float]:
    """Return the matvec with ``draw(0)`` by finite differences, and its error: the deviation from linearity."""
    v, w = draw(0), draw(1)
    total = [a + b for a, b in zip(v, w, strict=True)]
    linear = batch.linearize("finite-difference")
    first, second, both = (join(leaves) for leaves in linear([v, w, total]))
    return first, float(torch.linalg.vector_norm(both - first - second))


def _error_of_differences(batch: BatchCurvature, draw: Draw) -> float:
    matvec, error = _differences(batch, draw)
    least: float = torch.finfo(matvec.dtype).eps ** (2 / 3)
    return max(least, error / (float(torch.linalg.vector_norm(matvec)) or 1.0))


def _error_of_arithmetic(batch: BatchCurvature, v: Leaves, mode: str, arithmetic: str) -> float:
    try:
        lowered = join(_LoweredBatch(batch, arithmetic).linearize(mode)([v])[0])
    except RuntimeError as error:
        error.add_note(
            f"hvpkit: arithmetic={arithmetic!r} with mode={mode!r}; another mode may do, or 'native'"
        )
        raise
    return _relative_distance(lowered, join(batch.linearize(mode)([v])[0]))


@dataclass(frozen=True, eq=False)
class _LoweredBatch:
    """The curvature of one batch in less than native arithmetic."""

    batch: BatchCurvature
    arithmetic: str

    def linearize(self, mode: str) -> LinearMap:
        def matvecs(vectors: Sequence[Leaves], *, retain_graph: bool = False) -> list[Leaves]:
            with lower_precision(self.arithmetic, vectors[0][0].device):
                return self.batch.linearize(mode)(vectors, retain_graph=retain_graph)

        return matvecs


def _relative_distance(a: Tensor, b: Tensor) -> float:
    scale = max(float(torch.linalg.vector_norm(a)), float(torch.linalg.vector_norm(b)))
    return float(torch.linalg.vector_norm(a - b)) / (scale or 1.0)


def check_arithmetic(arithmetic: str, like: Tensor) -> None:
    """Raise ValueError if there is no such arithmetic for parameters of this dtype and device."""
    check_choice("arithmetic", arithmetic, ARITHMETICS)
    if arithmetic != "native" and like.dtype != torch.float32:
        raise ValueError(f"arithmetic={arithmetic!r} is for parameters in float32, got {like.dtype}")
    if arithmetic == "tf32" and like.device.type != "cuda":
        raise ValueError(f"arithmetic='tf32' needs a CUDA device, got {like.device}; take 'native' or 'bf16'")


@contextmanager
def lower_precision(arithmetic: str, device: torch.device) -> Iterator[None]:
    """Compute float32 matrix products and convolutions in this arithmetic inside."""
    kinds = FLOAT32_BACKENDS["cuda"] if arithmetic == "tf32" else ()
    settings = [kind.fp32_precision for kind in kinds]
    # A cache of converted weights would outlive the transform that they belong to.
    with Autocast(device.type, torch.bfloat16, enabled=arithmetic == "bf16", cache_enabled=False):
        try:
            for kind in kinds:
                kind.fp32_precision = "tf32"
            yield
        finally:
            for kind, setting in zip(kinds, settings, strict=True):
                kind.fp32_precision = setting
