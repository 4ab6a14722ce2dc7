"""Curvature in the geometry of a diagonal: what adaptive optimizers feel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from hvpkit._utils.typing import Tree
from hvpkit.curvature.operator import CurvatureOperator
from hvpkit.curvature.optimizer_scale import optimizer_scale
from hvpkit.operators.algebra import Scaled
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.interop import aslinearoperator
from hvpkit.operators.vectors import as_columns


def precondition(H: LinearOperator, scale: Tree | Optimizer) -> LinearOperator:
    r"""Return :math:`D^{-1/2} H D^{-1/2}` for a positive diagonal D.

    Its eigenvalues are those of :math:`D^{-1} H`: a step :math:`\theta - \eta D^{-1} g` is to it what gradient descent
    is to H, and the largest one is the sharpness that an adaptive optimizer feels. With a preconditioner that changes
    slowly, training by full batches settles where it is :math:`2 / \eta` for RMSprop (and, D = 1, for gradient
    descent), and :math:`(2 + 2 \beta_1) / ((1 - \beta_1)\, \eta)` for Adam: :math:`38 / \eta` for
    :math:`\beta_1 = 0.9`.

    Args:
        H: symmetric operator.
        scale: D: a tensor or NumPy array ``[n]``, a tree like the parameters, or an optimizer of ``torch.optim``: what
            it divides its mean of gradients by, :math:`\sqrt{\hat v} + \epsilon` for Adam, by its state of now; see
            :mod:`hvpkit.curvature.optimizer_scale` for Adam, AdamW, NAdam, Adamax, RAdam, RMSprop, Adagrad and SGD.
            Learning rate, weight decay and momentum are not in it. Its parameters are found by their values: make H
            after the optimizer's last step.

    Returns:
        The operator; of a :class:`hvpkit.CurvatureOperator` another one, which can be sampled, checked, shifted and
        added, and which :func:`hvpkit.extreme_eigenvalues` treats as it treats H.

    Raises:
        TypeError: an optimizer whose formula is not known, or for an operator that is not over parameters.
        ValueError: D of another shape, dtype or device, or not positive; parameters that the optimizer lacks, or has no
            state for, named.

    Cost:
        Two multiplications of a vector by a diagonal for each matvec.

    Source:
        Cohen et al., arXiv:2103.00065 and arXiv:2207.14484 (where D is ours times :math:`1 - \beta_1^t`).

    Example:
        >>> import torch, hvpkit as hk
        >>> A = hk.aslinearoperator(torch.diag(torch.tensor([1.0, 8.0])))
        >>> hk.precondition(A, torch.tensor([1.0, 4.0])) @ torch.ones(2)
        tensor([1., 2.])
    """
    H = aslinearoperator(H)
    if isinstance(H, CurvatureOperator):
        H.check_whole("precondition")
    if isinstance(scale, Optimizer):
        D, name = optimizer_scale(H, scale), type(scale).__name__
    else:
        columns, _ = as_columns(H, scale, "scale")
        if columns.shape[1] != 1:
            raise ValueError(f"scale must be one vector [{H.n}], got {columns.shape[1]} columns")
        D, name = columns[:, 0].double(), "a diagonal"
    smallest = float(D.min())
    if not smallest > 0:
        where = _name_of(H, int(D.argmin()))
        raise ValueError(f"scale must be positive, got {smallest:.3g}{where}; add an epsilon")
    root = D.rsqrt().to(H.dtype)
    named = f"{H.name} preconditioned by {name}"
    return H.scaled(root, named) if isinstance(H, CurvatureOperator) else Scaled.of(H, root, named)


def coordinates_of(H: LinearOperator, gradient: Tensor) -> Tensor:
    """Return :math:`D^{-1/2} g` for a gradient ``[n]``: the gradient in the coordinates of a preconditioned Hessian."""
    (_, term), *_ = H.terms if isinstance(H, CurvatureOperator) else ((1.0, H),)
    scale = getattr(term, "scale", None)
    return gradient if scale is None else scale * gradient


def _name_of(H: LinearOperator, place: int) -> str:
    """Return the parameter of a place of a vector, in words; nothing where there are none."""
    if H.layout is None:
        return f" at {place}"
    ends = torch.tensor(H.layout.numels, device="cpu").cumsum(0)
    leaf: Tensor = torch.searchsorted(ends, place, right=True)
    return f" for {H.layout.names[int(leaf)]!r}"
