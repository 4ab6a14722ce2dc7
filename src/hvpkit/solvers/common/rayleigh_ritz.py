"""Ritz pairs, from the small projected problem or as vectors, and the choice of the wanted ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvpkit._utils.validation import check_choice

WHICH = ("LA", "SA", "LM", "BE")


@dataclass(frozen=True)
class RitzPairs:
    r"""Ritz pairs of an operator, ascending; numbers are float64 on the CPU.

    Attributes:
        values: Ritz values ``[m]``.
        vectors: unit columns: Ritz vectors ``[n, m]``, or their coefficients on an orthonormal basis ``[b, m]``.
        residual_norms: ``[m]``.
        asymmetry: the largest entry of ``|V'AV - (V'AV)'|`` for the basis V that they come from, where it is known.
    """

    values: Tensor
    vectors: Tensor
    residual_norms: Tensor
    asymmetry: float = 0.0

    @property
    def norm(self) -> float:
        """The largest absolute Ritz value: a lower bound of the operator's norm."""
        return float(self.values.abs().max()) if len(self.values) else 0.0

    def scaled(self, scale: float) -> RitzPairs:
        """Return the pairs of ``scale`` times the operator."""
        return replace(
            self,
            values=self.values * scale,
            residual_norms=self.residual_norms * scale,
            asymmetry=self.asymmetry * scale,
        )


def no_pairs(vectors: Tensor) -> RitzPairs:
    """Return no pair at all, in the space, dtype and device of ``vectors`` ``[n, p]``."""
    nothing = torch.zeros(0, dtype=torch.float64, device="cpu")
    return RitzPairs(nothing, vectors[:, :0], nothing)


def ritz(projected: Tensor, coupling: Tensor) -> RitzPairs:
    r"""Return Ritz pairs from ``V'AV`` ``[m, m]``, symmetric up to rounding, and ``B`` ``[f, m]``; on the CPU.

    With :math:`A V = V T + F B`, F orthonormal and orthogonal to V, and :math:`T s_i = \theta_i s_i`, the
    residual of the Ritz vector :math:`V s_i` is :math:`F B s_i`. The vectors are the coefficients :math:`s_i`.
    """
    values, coefficients = torch.linalg.eigh((projected + projected.mT) / 2)
    asymmetry = float((projected - projected.mT).abs().max()) if len(values) else 0.0
    residual_norms = torch.linalg.vector_norm(coupling @ coefficients, dim=0)
    return RitzPairs(values, coefficients, residual_norms, asymmetry)


def select(values: Tensor, k: int, which: str, sigma: float = 0.0) -> list[int]:
    """Return the ascending indices of the ``k`` wanted among ascending ``values``, for ``which`` as in SciPy.

    ``"LA"``: the largest; ``"SA"``: the smallest; ``"LM"``: the largest in magnitude; ``"BE"``: half from
    each end, the odd one from the high end; ``"CLOSEST"``: those closest to ``sigma``.

    Example:
        >>> import torch
        >>> values = torch.tensor([-3.0, -1.0, 0.0, 2.0, 4.0])
        >>> [select(values, 3, which) for which in ("LA", "SA", "LM", "BE")]
        [[2, 3, 4], [0, 1, 2], [0, 3, 4], [0, 3, 4]]
    """
    m = len(values)
    k = min(k, m)
    if which == "CLOSEST":
        return sorted(torch.argsort((values - sigma).abs(), stable=True)[:k].tolist())
    if which == "LM":
        return sorted(torch.argsort(values.abs(), descending=True, stable=True)[:k].tolist())
    num_low = num_at_low_end(k, which)
    return [*range(num_low), *range(m - (k - num_low), m)]


def num_at_low_end(k: int, which: str) -> int:
    """Return how many of ``k`` wanted values lie at the low end (``"LM"`` does not say: all may)."""
    return {"LA": 0, "SA": k, "BE": k // 2, "LM": k}[check_choice("which", which, WHICH)]


def most_at_one_end(k: int, which: str) -> int:
    """Return how many of ``k`` wanted values may lie at the same end."""
    return k - k // 2 if which == "BE" else k
