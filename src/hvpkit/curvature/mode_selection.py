"""How products are made: the mode that suits an operator, arithmetic of less precision, and what both err by."""

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
from hvpkit.curvature.products import Leaves, Linear, Term

ARITHMETICS = ("native", "bf16", "tf32")

CLEARLY_FASTER, ROUNDS = 1.2, 5
"""How many times faster than the usual mode the other must be, in each of so many rounds: no noise of timing is."""

Draw = Callable[[int], Leaves]
"""A random vector for each number."""


@dataclass(frozen=True)
class Recipe:
    """How products are made.

    Attributes:
        mode: of :data:`hvpkit.curvature.products.MODES`.
        reason: the mode and why it was chosen, or None: it was asked for.
        arithmetic: of :data:`ARITHMETICS`.
        precision: relative error of products, 0: rounding in the dtype.
    """

    mode: str
    reason: str | None
    arithmetic: str
    precision: float


def settle(term: Term, draw: Draw, mode: str, arithmetic: str) -> Recipe:
    """How to make products as ``term``, where ``mode`` may be ``"auto"``; chosen and measured by trials."""
    reason = None
    if mode == "auto":
        mode, reason = _choose_mode(term, draw, arithmetic)
    error = 0.0
    if mode == "finite-difference":
        if arithmetic != "native":
            raise ValueError(
                f"arithmetic={arithmetic!r} leaves finite differences no digits; take 'native', or another mode "
                f"({reason or 'this one was asked for'})"
            )
        error = _error_of_differences(term, draw)
    elif arithmetic != "native":
        error = _error_of_arithmetic(term, draw(0), mode, arithmetic)
    return Recipe(mode, reason, arithmetic, error)


def _choose_mode(term: Term, draw: Draw, arithmetic: str) -> tuple[str, str]:
    """The mode to make products as ``term`` in this arithmetic, and why.

    Of the two exact ones reverse over reverse is preferred on a CPU and forward over reverse elsewhere, unless the
    other is clearly faster. They must agree to half the dtype's digits; where they do not, finite differences say
    which is right. Finite differences are taken where neither exact mode has all derivatives.

    Raises:
        ArithmeticError: the modes disagree, and finite differences are sure that both are wrong.
    """
    v, made = draw(0), term if arithmetic == "native" else _lowered(term, arithmetic)
    exact = ("reverse-over-reverse", "forward-over-reverse")
    usual, other = exact if v[0].device.type == "cpu" else exact[::-1]
    found: dict[str, Tensor] = {}
    failed: dict[str, str] = {}
    for mode in (usual, other):
        try:
            found[mode] = join(term(mode)([v])[0])
            if made is not term:
                made(mode)([v])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            failed[mode] = f"{mode} does not work here ({str(error).splitlines()[0]:.120})"
    if failed:
        chosen = next(iter(found), "finite-difference")
        return chosen, f"{chosen}: {', and '.join(failed.values())}"
    apart = _apart(found[usual], found[other])
    if not apart <= torch.finfo(v[0].dtype).eps ** 0.5:
        return _arbitrate(term, draw, found, apart)
    seconds = dict.fromkeys(found, math.inf)
    chosen, rest = other, usual
    for _ in range(ROUNDS):
        for mode in found:
            begin = time.perf_counter()
            float(made(mode)([v])[0][0].sum())  # waits for the device
            seconds[mode] = min(seconds[mode], time.perf_counter() - begin)
        if seconds[usual] <= CLEARLY_FASTER * seconds[other]:
            chosen, rest = usual, other
            break
    ratio = seconds[rest] / seconds[chosen]
    return chosen, f"{chosen}: {rest} takes {ratio:.2g} times as long, and agrees to {apart:.0e}"


def _arbitrate(term: Term, draw: Draw, found: dict[str, Tensor], apart: float) -> tuple[str, str]:
    """Which of two products that disagree is the one that finite differences give."""
    expected, error = _differences(term, draw)
    (usual, a), (other, b) = found.items()
    gap = float(torch.linalg.vector_norm(a - b))
    off = {mode: float(torch.linalg.vector_norm(product - expected)) for mode, product in found.items()}
    for right, wrong in ((usual, other), (other, usual)):
        if 4 * off[right] <= gap or (math.isfinite(off[right]) and not math.isfinite(off[wrong])):
            return right, f"{right}: {wrong} is wrong by {apart:.0e} here, as finite differences say"
    if not 4 * error <= gap:
        return usual, f"{usual}: {other} differs by {apart:.0e}, less than finite differences can tell here"
    raise ArithmeticError(
        f"mode='auto': no mode can be trusted here. Products {usual} and {other} differ by {apart:.0e}, and both "
        "from finite differences: some function in the loss has a wrong derivative, or another value in each call"
    )


def _differences(term: Term, draw: Draw) -> tuple[Tensor, float]:
    """The product with ``draw(0)`` by finite differences, and its error: what they lack in being linear."""
    v, w = draw(0), draw(1)
    total = [a + b for a, b in zip(v, w, strict=True)]
    first, second, both = (join(leaves) for leaves in term("finite-difference")([v, w, total]))
    return first, float(torch.linalg.vector_norm(both - first - second))


def _error_of_differences(term: Term, draw: Draw) -> float:
    product, error = _differences(term, draw)
    least: float = torch.finfo(product.dtype).eps ** (2 / 3)
    return max(least, error / (float(torch.linalg.vector_norm(product)) or 1.0))


def _error_of_arithmetic(term: Term, v: Leaves, mode: str, arithmetic: str) -> float:
    try:
        product = join(_lowered(term, arithmetic)(mode)([v])[0])
    except RuntimeError as error:
        error.add_note(
            f"hvpkit: arithmetic={arithmetic!r} with mode={mode!r}; another mode may do, or 'native'"
        )
        raise
    return _apart(product, join(term(mode)([v])[0]))


def _lowered(term: Term, arithmetic: str) -> Term:
    def made(mode: str) -> Linear:
        def products(vectors: Sequence[Leaves], *, again: bool = False) -> list[Leaves]:
            with lower_precision(arithmetic, vectors[0][0].device):
                return term(mode)(vectors, again=again)

        return products

    return made


def _apart(a: Tensor, b: Tensor) -> float:
    scale = max(float(torch.linalg.vector_norm(a)), float(torch.linalg.vector_norm(b)))
    return float(torch.linalg.vector_norm(a - b)) / (scale or 1.0)


def check_arithmetic(arithmetic: str, like: Tensor) -> None:
    """A ValueError if there is no such arithmetic for parameters of this dtype and device."""
    check_choice("arithmetic", arithmetic, ARITHMETICS)
    if arithmetic != "native" and like.dtype != torch.float32:
        raise ValueError(f"arithmetic={arithmetic!r} is for parameters in float32, got {like.dtype}")
    if arithmetic == "tf32" and like.device.type != "cuda":
        raise ValueError(f"arithmetic='tf32' needs a CUDA device, got {like.device}; take 'native' or 'bf16'")


@contextmanager
def lower_precision(arithmetic: str, device: torch.device) -> Iterator[None]:
    """Inside, matrix products and convolutions in float32 are made in this arithmetic."""
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
