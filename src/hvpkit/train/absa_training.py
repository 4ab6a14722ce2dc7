r"""ABSA: SGD with a batch size that grows as the loss gets flatter, with adversarial examples.

Method: SGD with momentum. After each epoch the largest eigenvalue of the Hessian is measured. If it has fallen by a
factor alpha since the batch last grew for this reason, or if kappa epochs have passed without growth, the batch size
and the learning rate are multiplied by beta (:mod:`hvpkit.train.absa_controller`). A share of each batch is replaced by
adversarial examples (:mod:`hvpkit.train.adversarial`), against the sharp minima that large batches find; the share
decreases with each growth.

Cost: an epoch is a pass of gradients, those of the adversarial share twice; the eigenvalue takes 14 matvecs or more
over the examples it is measured on. Memory: parameters, their velocity and a gradient; a microbatch's activations.
Source: Yao, Gholami, Arfeen, Liaw, Gonzalez, Keutzer, Mahoney, arXiv:1810.01021; FGSM: Goodfellow, Shlens, Szegedy,
ICLR 2015, arXiv:1412.6572.

Departures from the paper:
1. An eigenvalue that is not positive has no ratio to an earlier one: it causes no growth and is no reference.
2. The learning rate is multiplied by the actual growth, which is less than beta at the largest batch size.
3. An epoch's examples are divided evenly into as few batches as hold them, so that none is small or left out.
4. All eigenvalues are measured on the same examples, so that their ratio does not compare two samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hvpkit._utils.random import generator, resolve_seed
from hvpkit._utils.typing import Batch, LossFn, Seed, Tree
from hvpkit._utils.validation import (
    check_choice,
    check_count,
    check_monitor,
    check_non_negative,
    check_number,
    check_tolerance,
    check_type,
)
from hvpkit.autodiff.exact import exact_derivatives
from hvpkit.autodiff.pytree import Layout, check_params, flatten, snapshot, unflatten
from hvpkit.autodiff.pytree import batch_size as count_examples
from hvpkit.curvature.batch_means import check_batch_mean
from hvpkit.curvature.batch_sums import all_finite, sum_over
from hvpkit.curvature.batches import MODES, check_loss, gradient_of, loss_shares
from hvpkit.curvature.constructors import hessian
from hvpkit.curvature.functional import loss
from hvpkit.data import Data, as_data
from hvpkit.data.sources import IterableBatches, WholeBatches
from hvpkit.errors import NonFiniteError
from hvpkit.objective import check_loss_fn, normalized
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import Status
from hvpkit.solvers.lanczos import lanczos
from hvpkit.train.absa_controller import AbsaState, absa_update
from hvpkit.train.adversarial import fgsm


@dataclass(frozen=True)
class AbsaEpoch:
    """The settings of an epoch and its outcome.

    Attributes:
        batch_size, lr, adversarial_share: of the epoch.
        num_steps: updates of the parameters.
        loss: mean over all examples after the epoch, without adversarial ones.
        eigenvalue: the largest one of the Hessian after the epoch.
    """

    batch_size: int
    lr: float
    adversarial_share: float
    num_steps: int
    loss: float
    eigenvalue: float


@dataclass(frozen=True)
class AbsaResult:
    """The state of training after an epoch: all that a later call needs to continue.

    Attributes:
        params: tree of the parameters.
        velocity: tree of the momentum.
        state: of the controller, for the next epoch.
        history: one entry an epoch.
    """

    params: Tree
    velocity: Tree
    state: AbsaState
    history: tuple[AbsaEpoch, ...]


def absa(
    loss_fn: LossFn,
    params: Tree,
    data: object,
    state: AbsaState,
    *,
    num_epochs: int,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    epsilon: float = 0.005,
    hessian_examples: int | None = 1000,
    tol: float = 0.1,
    mode: str = "reverse-over-reverse",
    microbatch_size: int | None = None,
    seed: Seed = 0,
    monitor: Callable[[AbsaResult], object] | None = None,
    resume: AbsaResult | None = None,
) -> AbsaResult:
    r"""Train by SGD with momentum under the controller ``state``.

    A network with BatchNorm needs an objective with ``batchnorm="batch"``: buffers are not updated, so that running
    statistics would be those from before the training.

    With the gradient g of a batch: :math:`v \leftarrow \mu v + g + \lambda p`, :math:`p \leftarrow p - \eta v`.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``, or their mean as a 0-d tensor. Pure.
        params: tree of floating tensors, the start. It stays as it is.
        data: tensors, a Dataset or a DataLoader of one: see :func:`hvpkit.as_data`. Each epoch has an order of its own.
        state: from :func:`absa_init`. Growth ends at the number of examples, if not before.
        num_epochs: in total, those of ``resume`` included.
        momentum: :math:`\mu`, in [0, 1).
        weight_decay: :math:`\lambda`.
        epsilon: how far FGSM moves each entry of an input, the first tensor of a batch.
        hessian_examples: number of examples that eigenvalues are measured on, the same ones each time; None: all.
        tol: relative error of the eigenvalues.
        mode: of Hessian-vector products, as in :func:`hvpkit.hvp`.
        microbatch_size: the most examples in one forward pass; by default the loader's batch size, else 256.
        seed: of orders, adversarial examples and solves; the same seed gives the same bits.
        monitor: called with the result so far after each epoch; an exception that it raises ends the training.
        resume: a result to continue from, instead of ``params`` and ``state``; with the same other arguments the
            numbers are, to the bit, those of a run without a break.

    Returns:
        The parameters, with all that a later call needs to continue, and the history.

    Raises:
        TypeError, ValueError: an argument of another type or out of its range, named; data that cannot be read in any
            order; as :func:`hvpkit.hessian`.
        NonFiniteError: the training diverged.

    Cost:
        An epoch: a gradient of all examples and one more of the adversarial share, a loss of all examples, and
        14 matvecs or more over ``hessian_examples``.

    Source:
        Yao et al., arXiv:1810.01021.

    Example:
        >>> import torch
        >>> from hvpkit.train import absa_init
        >>> x = torch.linspace(-1, 1, 64)[:, None]
        >>> loss_fn = lambda p, batch: (torch.tanh(batch[0] * p["w"]) @ p["v"] - batch[1]) ** 2
        >>> params = {"w": torch.linspace(-2, 2, 8), "v": torch.zeros(8)}
        >>> found = absa(loss_fn, params, (x, x[:, 0] ** 3), absa_init(8, 0.05, kappa=5), num_epochs=15)
        >>> [epoch.batch_size for epoch in found.history][::5], found.history[-1].loss < 0.01
        ([8, 16, 32], True)
    """
    check_type("state", state, AbsaState, "absa_init(...)")
    if resume is not None:
        check_type("resume", resume, AbsaResult, "absa(...)")
    check_monitor(monitor, "monitor(result)")
    check_count("num_epochs", num_epochs, 0)
    if not 0 <= check_number("momentum", momentum) < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    for name, value in (("weight_decay", weight_decay), ("epsilon", epsilon)):
        check_non_negative(name, value)
    for name, count in (("hessian_examples", hessian_examples), ("microbatch_size", microbatch_size)):
        if count is not None:
            check_count(name, count, 1)
    check_tolerance("tol", tol)
    check_choice("mode", mode, ("auto", *MODES))
    number = resolve_seed(seed)
    check_loss_fn(loss_fn, params)
    layout, leaves = check_params(params)
    device = leaves[0].device
    examples = as_data(data, batch_size=microbatch_size, device=device)
    if isinstance(examples.source, IterableBatches | WholeBatches):
        raise ValueError("data must be readable in any order: pass tensors, a Dataset or a DataLoader of one")
    N = examples.num_examples
    if state.batch_size > N:
        raise ValueError(f"state.batch_size must be at most the {N} examples of data, got {state.batch_size}")
    loss_fn = normalized(loss_fn, examples)
    with exact_derivatives(device):
        check_loss(next(loss_shares(loss_fn, layout, examples)), leaves)
        check_batch_mean(loss_fn, params, examples, examples.first())
    if resume is not None:
        layout.leaves(resume.params, name="resume.params")
        run = resume
    else:
        start, zero = [snapshot(leaf) for leaf in leaves], [torch.zeros_like(leaf) for leaf in leaves]
        state = replace(state, max_batch_size=min(state.max_batch_size, N))
        run = AbsaResult(unflatten(start, layout.spec), unflatten(zero, layout.spec), state, ())
    measured = torch.randperm(N, generator=generator(number), device="cpu")[:hessian_examples]
    while (epoch := 1 + len(run.history)) <= num_epochs:
        used, source = run.state, generator(number, epoch)
        adversarial_loss = _with_adversarial_share(loss_fn, used.adversarial_share, epsilon, source)
        batches = torch.randperm(N, generator=source, device="cpu").tensor_split(
            math.ceil(N / used.batch_size)
        )
        with exact_derivatives(device):
            subsets = (examples.restrict(indices) for indices in batches)
            run = _train_epoch(adversarial_loss, layout, subsets, run, momentum, weight_decay)
        after = float(loss(loss_fn, run.params, examples))
        H = hessian(loss_fn, run.params, examples.restrict(measured), mode=mode)
        eigenvalue = _largest_eigenvalue(H, tol, number)
        entry = AbsaEpoch(used.batch_size, used.lr, used.adversarial_share, len(batches), after, eigenvalue)
        run = replace(run, state=absa_update(used, eigenvalue), history=(*run.history, entry))
        if monitor is not None:
            monitor(run)
    return run


def _with_adversarial_share(loss_fn: LossFn, share: float, epsilon: float, source: torch.Generator) -> LossFn:
    """Return the loss with a random share of each batch moved by FGSM."""

    def adversarial_loss(params: Tree, batch: Batch) -> Tensor:
        size = count_examples(batch)
        indices = torch.randperm(size, generator=source, device="cpu")[: round(share * size)]
        if len(indices):
            (inputs, *others), spec = flatten(batch)
            indices = indices.to(inputs.device)
            few = unflatten([tensor[indices] for tensor in (inputs, *others)], spec)
            moved = flatten(fgsm(loss_fn, params, few, epsilon))[0][0]
            batch = unflatten([inputs.index_copy(0, indices, moved), *others], spec)
        return loss_fn(params, batch)

    return adversarial_loss


def _train_epoch(
    loss_fn: LossFn,
    layout: Layout,
    batches: Iterable[Data],
    run: AbsaResult,
    momentum: float,
    weight_decay: float,
) -> AbsaResult:
    """Return the run with parameters and velocity after a step for each batch."""
    leaves, velocity = layout.leaves(run.params), layout.leaves(run.velocity)
    for batch in batches:
        shares = loss_shares(loss_fn, layout, batch)
        gradients = sum_over(shares, partial(gradient_of, leaves=leaves), leaves, batch.ranks)
        old = zip(leaves, velocity, gradients, strict=True)
        velocity = [momentum * v + g + weight_decay * p for p, v, g in old]
        leaves = [p - run.state.lr * v for p, v in zip(leaves, velocity, strict=True)]
    if not all_finite(leaves):
        raise NonFiniteError(
            f"the parameters are not finite after epoch {1 + len(run.history)}, at the learning rate "
            f"{run.state.lr:g}: lower lr, or the factor beta by which it grows"
        )
    return replace(run, params=unflatten(leaves, layout.spec), velocity=unflatten(velocity, layout.spec))


def _largest_eigenvalue(H: LinearOperator, tol: float, seed: int) -> float:
    found = lanczos(H, which="LA", tol=tol, seed=seed)
    if found.status is Status.NON_FINITE:
        raise NonFiniteError(f"the largest eigenvalue of the Hessian: {found.message}")
    return float(found.values[-1])
