r"""Adversarial examples by the fast gradient sign method (FGSM).

Cost: a gradient by the inputs.
Source: Goodfellow, Shlens, Szegedy, ICLR 2015, arXiv:1412.6572.
"""

from __future__ import annotations

import torch

from hvpkit._utils.typing import Batch, LossFn, Tree
from hvpkit._utils.validation import check_function, check_non_negative
from hvpkit.autodiff.pytree import flatten, unflatten


def fgsm(loss_fn: LossFn, params: Tree, batch: Batch, epsilon: float) -> Batch:
    r"""Return the batch with its first tensor moved to :math:`x + \epsilon \operatorname{sign} \nabla_x \ell`.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``, or their mean.
        params: tree of floating tensors.
        batch: tree of tensors. The first one is the input, and floating; the others are not changed.
        epsilon: how far each entry is moved.

    Raises:
        TypeError, ValueError: ``epsilon`` is no number of at least 0; the first tensor is not floating.

    Cost:
        A gradient.

    Example:
        >>> import torch
        >>> loss_fn = lambda p, batch: (batch[0] @ p - batch[1]) ** 2
        >>> fgsm(loss_fn, torch.tensor([1.0, -1.0]), (torch.tensor([[2.0, 0.0]]), torch.tensor([1.0])), 0.5)
        (tensor([[ 2.5000, -0.5000]]), tensor([1.]))
    """
    check_function("loss_fn", loss_fn, "loss_fn(params, batch)", 2)
    check_non_negative("epsilon", epsilon)
    (inputs, *others), spec = flatten(batch, name="batch")
    if not inputs.is_floating_point():
        raise ValueError(
            f"batch: the first tensor must be the input, and floating, to be moved; got {inputs.dtype}. Put the "
            "input first, or train with adversarial_share=0"
        )
    with torch.enable_grad():
        point = inputs.detach().requires_grad_()
        total = loss_fn(params, unflatten([point, *others], spec)).sum()
        (gradient,) = torch.autograd.grad(total, point)
    return unflatten([inputs + epsilon * gradient.sign(), *others], spec)
