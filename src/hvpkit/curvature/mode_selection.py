"""Choice of the AD mode and the arithmetic of matvecs, and measurement of their errors."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvpkit._utils.validation import check_choice
from hvpkit.autodiff.exact import FLOAT32_BACKENDS, Autocast
from hvpkit.autodiff.pytree import join
from hvpkit.curvature.batches import BatchCurvature, Leaves, LinearMap
from hvpkit.curvature.derivative_check import LARGEST_GAP, SURE, Comparison, compare, norm
from hvpkit.errors import DerivativeWarning

ARITHMETICS = ("native", "bf16", "tf32")

DIFFERENCES = "finite-difference"

CLEARLY_FASTER = 1.2
"""How many times faster than the preferred mode the other must be to be chosen, in each round. By feel."""

ROUNDS = 5
"""Rounds of timing, at most: one in which the other mode is not clearly faster ends them. By feel."""

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
        refuted: modes whose matvecs are wrong.
        warning: a doubt about the derivatives that the user must know of.
    """

    mode: str
    reason: str | None
    arithmetic: str
    precision: float = 0.0
    refuted: tuple[str, ...] = ()
    warning: str | None = None


def choose_recipe(
    batch: BatchCurvature,
    draw: Draw,
    mode: str,
    arithmetic: str,
    in_float64: Callable[[], BatchCurvature] | None = None,
) -> Recipe:
    """Choose the mode where it is ``"auto"``, and measure the error of matvecs, by trials on one batch.

    Args:
        batch: the trial examples.
        draw: random vectors.
        mode: ``"auto"`` or one of :data:`hvpkit.curvature.batches.MODES`.
        arithmetic: one of :data:`ARITHMETICS`.
        in_float64: makes the same batch in float64; None: it is.

    Warns:
        DerivativeWarning: a mode is wrong and there is no other exact one, or may be wrong.

    Raises:
        ArithmeticError: no mode can be trusted.
    """
    recipe = Recipe(mode, None, arithmetic)
    if mode == "auto":
        recipe = _choose_mode(batch, draw, arithmetic, in_float64 or (lambda: batch))
    error = recipe.precision
    if recipe.mode == "finite-difference":
        if arithmetic != "native":
            raise ValueError(
                f"arithmetic={arithmetic!r} leaves finite differences no digits; take 'native', or another mode "
                f"({recipe.reason or 'this one was asked for'})"
            )
        error = max(error, _error_of_differences(batch, draw))
    elif arithmetic != "native":
        error = _error_of_arithmetic(batch, draw(0), recipe.mode, arithmetic)
    if recipe.warning is not None:
        warnings.warn(f"mode='auto': {recipe.warning}", DerivativeWarning, stacklevel=4)
    return replace(recipe, precision=error)


def _choose_mode(
    batch: BatchCurvature, draw: Draw, arithmetic: str, in_float64: Callable[[], BatchCurvature]
) -> Recipe:
    """Choose the mode for matvecs in this arithmetic.

    Of the two exact ones reverse over reverse is preferred on a CPU and forward over reverse elsewhere, unless the
    other is clearly faster. They must agree to half the dtype's digits; where they do not, or only one works, finite
    differences are the judge. These are chosen where neither exact mode has all derivatives, or all right.

    Raises:
        ArithmeticError: no mode can be trusted.
    """
    v, lowered = draw(0), batch if arithmetic == "native" else _LoweredBatch(batch, arithmetic)
    exact = ("reverse-over-reverse", "forward-over-reverse")
    preferred, other = exact if v[0].device.type == "cpu" else exact[::-1]
    found: dict[str, Tensor] = {}
    failed: dict[str, str] = {}
    for mode in (preferred, other):
        try:
            matvec = join(batch.linearize(mode)([v])[0])
            if lowered is not batch:
                lowered.linearize(mode)([v])
            found[mode] = matvec
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            failed[mode] = f"{mode} does not work here ({str(error).splitlines()[0]:.120})"
    if failed:
        compared = compare(batch, in_float64, v, draw(1), found)
        if not found:
            why = ", and ".join(failed.values())
            _check_symmetric(compared, why, preferred)
            return Recipe(DIFFERENCES, f"{DIFFERENCES}: {why}", arithmetic)
        return _judge_alone(batch, v, compared, next(iter(found)), "".join(failed.values()), arithmetic)
    if not any(bool(torch.isfinite(matvec).all()) for matvec in found.values()):
        reason = f"{preferred}: no exact mode gives finite numbers here"  # the first matvec names the batch
        return Recipe(preferred, reason, arithmetic)
    distance = _relative_distance(found[preferred], found[other])
    if not distance <= torch.finfo(v[0].dtype).eps ** 0.5:
        compared = compare(batch, in_float64, v, draw(1), found)
        return _arbitrate(batch, v, compared, found, distance, arithmetic)
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
    reason = f"{chosen}: {rest} takes {ratio:.2g} times as long, and agrees to {distance:.0e}"
    return Recipe(chosen, reason, arithmetic)


def _judge_alone(
    batch: BatchCurvature, v: Leaves, compared: Comparison, mode: str, failed: str, arithmetic: str
) -> Recipe:
    """Judge the only exact mode that works by finite differences."""
    gap = compared.relative(compared.off[mode])
    if compared.agrees(mode):
        verdict = f"it agrees with finite differences to {gap:.0e}"
        if not compared.decisive:
            verdict = "finite differences are too rough to check it"
        return Recipe(mode, f"{mode}: {failed}; {verdict}", arithmetic)
    if compared.in_float64 and compared.decisive:
        wrong = f"{mode} is wrong by {gap:.0e} here, as finite differences say, and {failed}"
        return _fall_back(batch, v, compared, wrong, (mode,), arithmetic)
    doubt = (
        f"{mode} differs from finite differences by {gap:.0e}, which err by {compared.relative(compared.error):.0e} "
        "and may cross kinks of the loss"
    )
    warning = (
        f"{failed}, and {doubt}: {mode} is used unchecked. Where its derivatives are in doubt, compare with "
        f"mode={DIFFERENCES!r} and parameters and data in float64"
    )
    return Recipe(mode, f"{mode}: {failed}; {doubt}", arithmetic, warning=warning)


def _arbitrate(
    batch: BatchCurvature,
    v: Leaves,
    compared: Comparison,
    found: dict[str, Tensor],
    distance: float,
    arithmetic: str,
) -> Recipe:
    """Resolve disagreeing exact modes by finite differences."""
    preferred, other = found
    differ = f"{preferred} and {other} differ by {distance:.0e}"
    off, right = compared.off, [mode for mode in found if compared.agrees(mode)]
    if len(right) == 1:
        (chosen,) = right
        wrong = other if chosen == preferred else preferred
        if SURE * off[chosen] <= off[wrong] or (compared.decisive and math.isnan(off[wrong])):
            _check_symmetric(
                compared, f"{differ}, and only {chosen} agrees with finite differences", preferred
            )
            reason = f"{chosen}: {wrong} is wrong by {distance:.0e} here, as finite differences say"
            return Recipe(chosen, reason, arithmetic, refuted=(wrong,))
    elif right and (distance <= LARGEST_GAP or (compared.in_float64 and compared.decisive)):
        # Both derivatives are right, and one of them, at least, is rounded.
        errors = {mode: norm(matvec - compared.expected) for mode, matvec in found.items()}
        if SURE * errors[other] <= errors[preferred]:
            reason = f"{preferred} differs by {distance:.0e}, further from finite differences"
            return Recipe(other, f"{other}: {reason}", arithmetic)
        reason = f"{other} differs by {distance:.0e}, less than finite differences can tell here"
        return Recipe(preferred, f"{preferred}: {reason}", arithmetic)
    elif not right and compared.in_float64 and compared.decisive:
        wrong = f"{differ}, and both from finite differences"
        return _fall_back(batch, v, compared, wrong, (preferred, other), arithmetic)
    error = compared.relative(compared.error)
    raise ArithmeticError(
        f"mode='auto': no mode can be trusted here. Products {differ}, and finite differences, which err by "
        f"{error:.0e} in {_name(compared.expected)}, cannot tell which is right: a function in the loss has a wrong "
        "derivative, another value in each call, or too few digits. Convert parameters and data to float64, correct "
        "that function, or name a mode that you trust"
    )


def _fall_back(
    batch: BatchCurvature,
    v: Leaves,
    compared: Comparison,
    wrong: str,
    refuted: tuple[str, ...],
    arithmetic: str,
) -> Recipe:
    """Take finite differences where no exact mode is right, if they are a symmetric matrix and have the digits.

    Raises:
        ArithmeticError: they do not.
    """
    _check_symmetric(compared, wrong, refuted[0])
    native = join(batch.linearize(DIFFERENCES)([v])[0])
    error = compared.relative(norm(native - compared.expected))
    if not error <= LARGEST_GAP:
        raise ArithmeticError(
            f"mode='auto': {wrong}. Finite differences would do, but err by {error:.0e} in {_name(native)}; convert "
            f"parameters and data to float64, or correct the function in the loss whose derivative is wrong. "
            f"mode={DIFFERENCES!r} takes them as they are"
        )
    warning = (
        f"{wrong}: a function in the loss has a wrong second derivative, or detaches a value. mode={DIFFERENCES!r} is "
        f"used, which needs first derivatives only; correct that function for exact products. Where values are meant "
        f"to be constants, name the mode, as mode={refuted[0]!r}"
    )
    return Recipe(DIFFERENCES, f"{DIFFERENCES}: {wrong}", arithmetic, error, refuted, warning)


def _check_symmetric(compared: Comparison, why: str, mode: str) -> None:
    """Raise ArithmeticError if the gradient is that of no loss, as far as differences in float64 tell."""
    if compared.symmetric or not (compared.in_float64 and compared.decisive):
        return
    raise ArithmeticError(
        f"mode='auto': {why}. The gradient is the gradient of no loss: by finite differences of it, its Jacobian H is "
        f"not symmetric, w'(H v) and v'(H w) differ by {compared.relative(compared.asymmetry):.0e} of |H v|. A "
        "backward in the loss is not the derivative of its forward, as in a gradient reversal layer, or a value is "
        f"detached; correct that, or leave it out. Where it is meant so, name the mode, as mode={mode!r}"
    )


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


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
