"""Comparison of exact matvecs with differences of the gradient, which need no second derivative.

Differences in float32 cannot refute a mode: their step is so long that it crosses thousands of kinks, as those of
ReLU, whose sum looks like a curvature of its own, the same with other steps. So the comparison is made in float64
wherever the loss runs in it, with a step that contains few kinks; those that it does contain show in the error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hvpkit.autodiff.pytree import join
from hvpkit.curvature.batches import BatchCurvature, Leaves

SURE = 4.0
"""Multiple of the measured error of differences within which a deviation is no evidence. By feel."""

LARGEST_GAP = 0.01
"""Relative deviation above which a matvec is not used unless it is known to be right. By feel."""


@dataclass(frozen=True)
class Comparison:
    """Exact matvecs H v of one batch, against differences.

    Attributes:
        expected: H v by differences.
        error: norm of the error of ``expected``: its deviation from linearity, and its change with twice the step.
        asymmetry: ``|w'(H v) - v'(H w)|`` by differences, about ``|H - H'|_F`` for standard normal v and w.
        off: for each mode, the norm of its deviation from ``expected``.
        scale: the norm that deviations are relative to.
        in_float64: True if the comparison was made in float64, of modes as well.
    """

    expected: Tensor
    error: float
    asymmetry: float
    off: dict[str, float]
    scale: float
    in_float64: bool

    @property
    def decisive(self) -> bool:
        """True if the error of differences is small against ``LARGEST_GAP``."""
        return SURE * self.error <= LARGEST_GAP * self.scale

    @property
    def symmetric(self) -> bool:
        """True if the Jacobian of the gradient is symmetric, as far as differences tell: it is one of a loss."""
        return self.asymmetry <= SURE * self._allowed

    def agrees(self, mode: str) -> bool:
        """Return True if a mode deviates by no more than differences can err by."""
        return self.off[mode] <= self._allowed

    def relative(self, norm: float) -> float:
        """Return a norm relative to that of the matvecs."""
        return norm / (self.scale or 1.0)

    @property
    def _allowed(self) -> float:
        tolerance: float = torch.finfo(self.expected.dtype).eps ** (1 / 3)
        return SURE * self.error + tolerance * self.scale


def compare(
    batch: BatchCurvature,
    in_float64: Callable[[], BatchCurvature],
    v: Leaves,
    w: Leaves,
    found: dict[str, Tensor],
) -> Comparison:
    """Compare the matvecs with v that each mode gave, with standard normal v and w; in float64 if the loss runs in it.

    Cost:
        Ten gradients of the batch, or twenty, and a matvec by each mode.
    """
    try:
        wide, (v64, w64) = in_float64(), ([leaf.double() for leaf in vector] for vector in (v, w))
        if v[0].dtype != torch.float64:
            found64 = {mode: _again(wide, mode, v64, matvec) for mode, matvec in found.items()}
        else:
            found64 = found
        # First a step shorter than the eps^(1/3) of fewest errors, for kinks; too short for a rough gradient.
        eps = torch.finfo(torch.float64).eps
        short = _compare(wide, eps ** (1 / 2), v64, w64, found64)
        return short if short.decisive else _compare(wide, eps ** (1 / 3), v64, w64, found64)
    except Exception:  # a loss, or a device, may refuse float64 in any way
        if v[0].dtype == torch.float64:
            raise
        return _compare(batch, torch.finfo(v[0].dtype).eps ** (1 / 3), v, w, found)


def _again(batch: BatchCurvature, mode: str, v: Leaves, native: Tensor) -> Tensor:
    try:
        return join(batch.linearize(mode)([v])[0])
    except (RuntimeError, NotImplementedError):
        return native.double()


def _compare(
    batch: BatchCurvature, step: float, v: Leaves, w: Leaves, found: dict[str, Tensor]
) -> Comparison:
    problem: Any = batch
    total = [a + b for a, b in zip(v, w, strict=True)]
    linear, longer = (replace(problem, step=h).linearize("finite-difference") for h in (step, 2 * step))
    hv, hw, both, again = (join(leaves) for leaves in (*linear([v, w, total]), *longer([v])))
    errors = torch.tensor([norm(both - hv - hw), norm(again - hv)], device="cpu")
    return Comparison(
        expected=hv,
        error=float(errors.max()),  # NaN if one of them is
        asymmetry=abs(float(torch.dot(join(w), hv) - torch.dot(join(v), hw))),
        off={mode: norm(matvec - hv) for mode, matvec in found.items()},
        scale=norm(hv),
        in_float64=hv.dtype == torch.float64,
    )


def norm(vector: Tensor) -> float:
    """Return the Euclidean norm, summed in float64."""
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))
