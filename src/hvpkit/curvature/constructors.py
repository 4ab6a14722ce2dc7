"""Curvature of a loss over data: constructors of one operator class."""

from __future__ import annotations

from functools import partial
from typing import Any

from hvpkit._utils.random import resolve_seed
from hvpkit._utils.typing import LossFn, Seed, Tree
from hvpkit._utils.validation import check_choice, check_count
from hvpkit.autodiff.exact import exact_derivatives
from hvpkit.curvature.fisher import LIKELIHOODS, empirical_terms, find_likelihood, fisher_terms
from hvpkit.curvature.ggn import check_objective, ggn_terms
from hvpkit.curvature.operator import operator, origin_of
from hvpkit.curvature.param_selection import Selection
from hvpkit.curvature.products import Terms, hessian_terms
from hvpkit.objective import Objective
from hvpkit.operators.base import LinearOperator


def hessian(
    loss_fn: LossFn,
    params: Tree,
    data: object,
    *,
    wrt: Selection = None,
    batch_size: int | str | None = None,
    mode: str = "auto",
    arithmetic: str = "native",
    memory_limit: float | None = None,
    compile: bool = False,
    progress: bool = False,
) -> LinearOperator:
    r"""The Hessian of the mean loss over all examples, :math:`H = \frac1N \sum_i \nabla^2 \ell_i(p)`.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``, or their mean as a 0-d tensor. Pure.
        params: tree of floating tensors of one dtype and device, the point; a complex entry is two real coordinates.
        data: tensors, a Dataset, a DataLoader or a re-iterable of batches: see :func:`hvpkit.as_data`.
        wrt: glob or globs over dotted parameter names, or a predicate of a name: the block of the matrix
            that belongs to those parameters, the others held constant.
        batch_size: the most examples put through at once; memory grows with it, the product does not
            change beyond rounding. By default the loader's own, else 256. ``"auto"``: the fastest within
            ``memory_limit``, by trials with 16, 32, 64 ... examples.
        mode: how a product is made: one of :func:`hvpkit.hvp`, or ``"auto"``: the exact one that is the faster
            on the first examples, if both agree; ``H.mode`` is which, ``H.mode_reason`` why.
        arithmetic: ``"native"``, the parameters' dtype; ``"bf16"`` or ``"tf32"`` (CUDA only): matrix products and
            convolutions of float32 networks in fewer digits. The last products of a solve, and the values and
            residuals that it reports, are in native arithmetic all the same.
        memory_limit: bytes to hold between products, by the operator and its samples: the graph of the gradient of as
            many batches as fit, made in the second product and passed through again in those after, which takes two
            thirds of the work; in the mode ``"reverse-over-reverse"``. Given back when the operator is no longer
            used. By default a quarter of the memory that is free; 0: nothing is held.
        compile: make products by code that torch compiles, forward over reverse, once for a ``loss_fn`` and a
            batch size; that takes from seconds to a minute, and pays in long runs. Compared with the product as it is
            without, which stays in use, with a :class:`hvpkit.CompileWarning`, where torch cannot compile it.
        progress: show a bar over the batches of each product.

    Returns:
        A symmetric :class:`hvpkit.LinearOperator`; trees for ``@`` are shaped like ``params``, a dict of the
        chosen ones by dotted name where ``wrt`` is given. ``H.precision`` is the relative error of its products,
        measured on the first examples for finite differences and for less than native arithmetic.

    Raises:
        TypeError, ValueError: as :func:`hvpkit.hvp` and :func:`hvpkit.as_data`; ``wrt`` matches nothing; a
            last batch of one example under ``batchnorm="batch"``; arithmetic that the dtype, device or mode lacks.
        NonFiniteError: the loss of the first batch is not finite.
        ArithmeticError: ``mode="auto"``: the modes disagree, and finite differences agree with neither.

    Cost:
        A gradient of the first batch now, and four products with 32 of its examples, twelve at most. A product is a
        pass over the data at about 9 forward passes' work. ``[n, k]`` products read the data once, and share the
        forward and the first backward pass in the mode ``"reverse-over-reverse"``.

    Example:
        >>> import torch, hvpkit as hk
        >>> loss_fn = lambda p, batch: 0.5 * (batch @ p["w"]) ** 2 + p["b"] ** 2
        >>> params, data = {"w": torch.zeros(2), "b": torch.tensor(0.0)}, torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> hessian(loss_fn, params, data) @ torch.ones(3)
        tensor([2., 8., 2.])

        Both ends of the spectrum of each layer:

        >>> ends = {name: hk.extreme_eigenvalues(hk.hessian(loss_fn, params, data, wrt=name)) for name in params}
        >>> {name: round(ex.largest.value, 3) for name, ex in ends.items()}
        {'w': 8.0, 'b': 2.0}
    """
    origin, first = origin_of("hessian", loss_fn, params, data, wrt, batch_size, mode)
    return operator(origin, first, hessian_terms, batch_size, arithmetic, memory_limit, progress, compile)


def ggn(
    objective: Objective,
    params: Tree,
    data: object,
    *,
    wrt: Selection = None,
    batch_size: int | str | None = None,
    mode: str = "auto",
    arithmetic: str = "native",
    memory_limit: float | None = None,
    progress: bool = False,
) -> LinearOperator:
    r"""The generalised Gauss-Newton matrix of the mean loss, :math:`G = \frac1N \sum_i J_i^\top H_i J_i`.

    :math:`J_i` is the Jacobian of the outputs of example i, :math:`H_i` the Hessian of its loss by the outputs. G is
    positive semi-definite where the loss is convex in the outputs.

    Args:
        objective: a :class:`hvpkit.Objective`, as :func:`hvpkit.from_module` gives one.
        params: as in :func:`hessian`.
        data: as in :func:`hessian`.
        wrt: as in :func:`hessian`.
        batch_size: as in :func:`hessian`.
        arithmetic: as in :func:`hessian`.
        memory_limit: as in :func:`hessian`.
        progress: as in :func:`hessian`.
        mode: how J is multiplied with: one of :func:`hvpkit.ggnvp`, or ``"auto"`` as in :func:`hessian`.

    Returns:
        A symmetric :class:`hvpkit.LinearOperator`.

    Raises:
        TypeError, ValueError, NonFiniteError, ArithmeticError: as :func:`hvpkit.ggnvp` and :func:`hessian`.

    Cost:
        As :func:`hessian` now. A product is a pass over the data at about 6 forward passes' work and twice the
        loss of the outputs; for its memory see :func:`hvpkit.ggnvp`. ``[n, k]`` products share one forward pass.

    Source:
        Schraudolph, Neural Computation 14 (2002) 1723-1738, doi:10.1162/08997660260028683.

    Example:
        >>> import torch
        >>> objective = Objective(lambda p, batch: (batch @ p).exp(), lambda z, batch: z**2)
        >>> G = ggn(objective, torch.zeros(2), torch.tensor([[1.0, 2.0]]))
        >>> G @ torch.tensor([1.0, 0.0])
        tensor([2., 4.])
    """
    origin, first = origin_of("ggn", check_objective(objective), params, data, wrt, batch_size, mode)
    return operator(origin, first, ggn_terms, batch_size, arithmetic, memory_limit, progress)


def empirical_fisher(
    loss_fn: LossFn,
    params: Tree,
    data: object,
    *,
    wrt: Selection = None,
    batch_size: int | str | None = None,
    mode: str = "auto",
    arithmetic: str = "native",
    memory_limit: float | None = None,
    progress: bool = False,
) -> LinearOperator:
    r"""The second moment of the gradients of single examples, :math:`\frac1N \sum_i g_i g_i^\top`.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``. Pure.
        params: as in :func:`hessian`.
        data: as in :func:`hessian`.
        wrt: as in :func:`hessian`.
        batch_size: as in :func:`hessian`.
        arithmetic: as in :func:`hessian`.
        memory_limit: as in :func:`hessian`.
        progress: as in :func:`hessian`.
        mode: how inner products with gradients are made: see :func:`hvpkit.ggnvp`; or ``"auto"``.

    Returns:
        A symmetric, positive semi-definite :class:`hvpkit.LinearOperator`.

    Raises:
        ValueError: a 0-d loss, whose examples are not known apart.
        TypeError, ValueError, NonFiniteError, ArithmeticError: as :func:`hessian`.

    Cost:
        As :func:`hessian` now. A product is a pass over the data at about 6 forward passes' work.

    Example:
        >>> import torch
        >>> F = empirical_fisher(lambda p, batch: batch @ p, torch.zeros(2), torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        >>> F @ torch.ones(2)
        tensor([2., 3.])
    """
    origin, first = origin_of("empirical-fisher", loss_fn, params, data, wrt, batch_size, mode)
    return operator(origin, first, empirical_terms, batch_size, arithmetic, memory_limit, progress)


def fisher(
    objective: Objective,
    params: Tree,
    data: object,
    *,
    likelihood: str | None = None,
    num_samples: int | None = None,
    seed: Seed = 0,
    wrt: Selection = None,
    batch_size: int | str | None = None,
    mode: str = "auto",
    arithmetic: str = "native",
    memory_limit: float | None = None,
    progress: bool = False,
) -> LinearOperator:
    r"""The Fisher matrix of the model's own predictions, :math:`\frac1N \sum_i \mathbf E_{y \sim p(y|x_i)}\, g g^\top`.

    g is the gradient of the loss at a target y that the model itself predicts. The expectation, which is the
    generalised Gauss-Newton matrix here, is exact by default, or an unbiased mean over samples. Where an example has
    several predictions (tokens, pixels, labels), each is drawn, and counts as much as the loss weighs it.

    Args:
        objective: a :class:`hvpkit.Objective`, whose outputs are one tensor.
        params: as in :func:`hessian`.
        data: as in :func:`hessian`.
        wrt: as in :func:`hessian`.
        batch_size: as in :func:`hessian`.
        arithmetic: as in :func:`hessian`.
        memory_limit: as in :func:`hessian`.
        progress: as in :func:`hessian`.
        likelihood: of targets given the outputs: ``"categorical"`` (cross entropy of logits, their classes along the
            dimension 1 or the last), ``"bernoulli"`` (binary cross entropy of logits), ``"gaussian"`` (squared error);
            by default whichever the loss is of.
        num_samples: how many targets to draw for each prediction, the same in every product; None: the exact form.
        seed: of the samples.
        mode: how J is multiplied with: one of :func:`hvpkit.ggnvp`, or ``"auto"`` as in :func:`hessian`.

    Returns:
        A symmetric, positive semi-definite :class:`hvpkit.LinearOperator`.

    Raises:
        ValueError: the loss is of another likelihood, or of none of these.
        TypeError, ValueError, NonFiniteError, ArithmeticError: as :func:`hvpkit.ggnvp` and :func:`hessian`.

    Cost:
        As :func:`ggn`; samples take the memory of the outputs, each.

    Source:
        Kunstner, Balles and Hennig, NeurIPS 2019, arXiv:1905.12558.

    Example:
        >>> import torch
        >>> objective = Objective(lambda p, batch: batch @ p, lambda z, batch: 0.5 * z**2)
        >>> F = fisher(objective, torch.zeros(2), torch.tensor([[1.0, 2.0]]), likelihood="gaussian")
        >>> F @ torch.tensor([1.0, 0.0])
        tensor([1., 2.])
    """
    check_objective(objective)
    if likelihood is not None:
        check_choice("likelihood", likelihood, LIKELIHOODS)
    if num_samples is not None:
        check_count("num_samples", num_samples, 1)
    seed = resolve_seed(seed)
    origin, first = origin_of("fisher", objective, params, data, wrt, batch_size, mode)
    with exact_derivatives(origin.leaves[0].device):
        whole = check_objective(origin.loss_fn)
        found = find_likelihood(whole, origin.layout, origin.leaves, first, likelihood)
    terms: Terms[Any] = ggn_terms
    if num_samples is not None:
        terms = partial(fisher_terms, likelihood=found, num_samples=num_samples, seed=seed)
    return operator(origin, first, terms, batch_size, arithmetic, memory_limit, progress)
