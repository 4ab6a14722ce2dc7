"""The small projected problem: Ritz values, which of them are wanted, and how far off they may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvpkit._utils.validation import check_choice

WHICH = ("LA", "SA", "LM", "BE")


@dataclass(frozen=True)
class Ritz:
    r"""Ritz pairs of an operator on an orthonormal basis V, on the CPU in float64.

    With :math:`A V = V T + F B`, F orthonormal and orthogonal to V, and :math:`T s_i = \theta_i s_i`, the
    residual of the Ritz vector :math:`V s_i` is :math:`F B s_i`.

    Attributes:
        values: ascending ``[m]``.
        coefficients: columns ``s_i``, ``[m, m]``.
        residual_norms: ``||B s_i||``, ``[m]``.
        asymmetry: the largest entry of ``|V'AV - (V'AV)'|``.
    """

    values: Tensor
    coefficients: Tensor
    residual_norms: Tensor
    asymmetry: float

    @property
    def norm(self) -> float:
        """The largest absolute Ritz value, which no operator norm is below."""
        return float(self.values.abs().max()) if len(self.values) else 0.0


def ritz(projected: Tensor, coupling: Tensor) -> Ritz:
    """Ritz pairs from ``V'AV`` ``[m, m]``, symmetric up to rounding, and ``B`` ``[f, m]``."""
    symmetric = (projected + projected.mT) / 2
    values, coefficients = torch.linalg.eigh(symmetric)
    asymmetry = float((projected - projected.mT).abs().max()) if len(values) else 0.0
    residual_norms = torch.linalg.vector_norm(coupling @ coefficients, dim=0)
    return Ritz(values, coefficients, residual_norms, asymmetry)


def select(values: Tensor, k: int, which: str) -> list[int]:
    """Indices, ascending, of the ``k`` wanted among ascending ``values``, as SciPy's ``which`` means it.

    ``"LA"``: the largest; ``"SA"``: the smallest; ``"LM"``: the largest in magnitude; ``"BE"``: half from
    each end, the odd one from the high end.

    Example:
        >>> import torch
        >>> values = torch.tensor([-3.0, -1.0, 0.0, 2.0, 4.0])
        >>> [select(values, 3, which) for which in ("LA", "SA", "LM", "BE")]
        [[2, 3, 4], [0, 1, 2], [0, 3, 4], [0, 3, 4]]
    """
    m = len(values)
    k = min(k, m)
    if which == "LM":
        return sorted(torch.argsort(values.abs(), descending=True, stable=True)[:k].tolist())
    num_low = num_at_low_end(k, which)
    return [*range(num_low), *range(m - (k - num_low), m)]


def num_at_low_end(k: int, which: str) -> int:
    """How many of ``k`` wanted values lie at the low end (``"LM"`` does not say: all may)."""
    return {"LA": 0, "SA": k, "BE": k // 2, "LM": k}[check_choice("which", which, WHICH)]


def most_at_one_end(k: int, which: str) -> int:
    """How many of ``k`` wanted values may lie at the same end."""
    return k - k // 2 if which == "BE" else k
