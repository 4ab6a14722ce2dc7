"""The curvature of a loss along one direction, by forward mode alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hvpkit._utils.typing import Batch, LossFn, Tree
from hvpkit._utils.validation import check_like
from hvpkit.autodiff.exact import exact_derivatives
from hvpkit.autodiff.forward_mode import jvp
from hvpkit.autodiff.overrides import FunctionOverrides, Table, replaced
from hvpkit.autodiff.pytree import batch_size, check_params, unflatten
from hvpkit.curvature.batches import INDEPENDENT, Leaves, check_losses
from hvpkit.data import prepare
from hvpkit.objective import check_loss_fn, normalized_in_batch


def quadratic_form(loss_fn: LossFn, params: Tree, batch: Batch, v: Tree) -> Tensor:
    r"""Return the second derivative of each example's loss along ``v``, :math:`v^\top \nabla^2 \ell_i(p)\, v`.

    Forward mode over forward mode: no backward pass, and no graph of activations in memory.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``, or their mean as a 0-d tensor.
        params: as in :func:`hvpkit.hvp`.
        batch: as in :func:`hvpkit.hvp`.
        v: as in :func:`hvpkit.hvp`.

    Returns:
        ``[B]``, or 0-d where the loss is.

    Raises:
        TypeError: as :func:`hvpkit.hvp`.
        ValueError: as :func:`hvpkit.hvp`; a function that torch gets wrong in forward mode over itself (determinants,
            linear systems, any ``torch.autograd.Function``).
        NotImplementedError: a function without forward mode, or without it twice.

    Cost:
        About 4 forward passes.

    Example:
        >>> import torch
        >>> quadratic_form(lambda p, x: (x * p) ** 3, torch.tensor(1.0), torch.tensor([1.0, 2.0]), torch.tensor(1.0))
        tensor([ 6., 48.])
    """
    check_loss_fn(loss_fn, params)
    layout, leaves = check_params(params, finite=False)
    direction = [check_like(leaf, leaves[0]) for leaf in layout.leaves(v)]
    examples, size = prepare(batch), batch_size(batch)
    loss_fn = normalized_in_batch(loss_fn, examples)

    def losses(leaves: Leaves) -> Tensor:
        found = loss_fn(unflatten(leaves, layout.spec), examples)
        check_losses(found, size)
        return found

    def first_derivatives(leaves: Leaves) -> Tensor:
        return _along(losses, leaves, direction, strict=True)

    with (
        exact_derivatives(leaves[0].device),
        FunctionOverrides(FORWARD_TWICE),
        replaced(torch.autograd.Function, "apply", _refused("a torch.autograd.Function")),
        torch.no_grad(),
    ):
        try:
            return _along(first_derivatives, leaves, direction)
        except NotImplementedError as error:
            error.add_note(
                "hvpkit: quadratic_form differentiates forward twice; the inner product of v and hvp may do"
            )
            raise


def _along(
    function: Callable[[Leaves], Tensor], leaves: Leaves, v: Leaves, *, strict: bool = False
) -> Tensor:
    try:
        derivative: Tensor = jvp(function, (leaves,), (v,), strict=strict)[1]
    except RuntimeError as error:
        if "strict=True" in str(error):
            raise ValueError(INDEPENDENT) from error
        raise
    return derivative


# Functions that torch gets wrong in forward mode over itself, because its rules take intermediate results for
# constants, or for which it has no rule.


def _standard(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centered = x - x.mean(dims, keepdim=True)
    return centered * (centered.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scaled = x if weight is None else x * weight
    return scaled if bias is None else scaled + bias


def _by_channel(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (-1, *(1,) * (x.ndim - 2))
    return _affine(x, *(t if t is None else t.view(shape) for t in (weight, bias)))


def _layer_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _affine(_standard(input, tuple(range(-len(normalized_shape), 0)), eps), weight, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _by_channel(_standard(input, (0, *range(2, input.ndim)), eps), weight, bias)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _by_channel(_standard(input, tuple(range(2, input.ndim)), eps), weight, bias)


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    return _stored(input * torch.sigmoid(input), input, inplace)


def _mish(input: Tensor, inplace: bool = False) -> Tensor:
    return _stored(input * torch.tanh(F.softplus(input)), input, inplace)


def _stored(result: Tensor, input: Tensor, inplace: bool) -> Tensor:
    return input.copy_(result) if inplace else result


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    halves = input.chunk(2, dim)
    return halves[0] * torch.sigmoid(halves[1])


def _refused(name: str) -> Callable[..., Tensor]:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise ValueError(
            f"loss_fn calls {name}, which torch gets wrong in forward mode over itself; for norms call those of "
            "torch.nn.functional, else take the inner product of v and hvpkit.hvp"
        )

    return refuse


_WRONG = {
    Tensor: "det logdet slogdet cholesky_inverse",
    torch.linalg: "det slogdet solve solve_ex tensorsolve householder_product",
    torch: "det logdet slogdet cholesky_inverse "
    "layer_norm native_layer_norm batch_norm native_batch_norm instance_norm",
}

FORWARD_TWICE: Table = {
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.silu: _silu,
    F.mish: _mish,
    F.glu: _glu,
    **{getattr(where, name): _refused(name) for where, names in _WRONG.items() for name in names.split()},
}
"""Replacements under which forward mode over forward mode is right, or refused."""
