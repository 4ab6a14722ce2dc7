r"""ABSA: batch sizes that grow where the landscape gets flatter, with adversarial examples.

Method: SGD with momentum. After each epoch the largest eigenvalue of the Hessian is measured. Once it has fallen by a
factor alpha since it last made the batch grow, or once kappa epochs have passed without growth, the batch size is
multiplied by beta, and the learning rate with it. A share of each batch is moved by FGSM to where its loss is higher,
:math:`x + \epsilon \operatorname{sign} \nabla_x \ell`, against the sharp minima that large batches find; the share
decays with each growth.

Cost: an epoch is a pass of gradients, those of the adversarial share twice; the eigenvalue takes 14 products or more
over the examples it is measured on. Memory: parameters, their velocity and a gradient; a microbatch's activations.
Source: Yao, Gholami, Arfeen, Liaw, Gonzalez, Keutzer, Mahoney, arXiv:1810.01021; FGSM: Goodfellow, Shlens, Szegedy,
ICLR 2015, arXiv:1412.6572.

Departures from the paper:
1. An eigenvalue that is not positive has no ratio to an earlier one: it starts no growth and is no reference.
2. The learning rate follows the growth that took place, which is less than beta where the largest batch size is met.
3. An epoch's examples are dealt out evenly to as few batches as hold them, so that none is small or left out.
4. All eigenvalues are measured on the same examples, so that their ratio is not that of two samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hvpkit._utils.random import generator, resolve_seed
from hvpkit._utils.typing import Batch, LossFn, Seed, Tree
from hvpkit._utils.validation import check_choice, check_count, check_positive
from hvpkit.autodiff.exact import exact_derivatives
from hvpkit.autodiff.pytree import Layout, check_params, flatten, snapshot, unflatten
from hvpkit.autodiff.pytree import batch_size as count_examples
from hvpkit.curvature.batches import MODES, all_finite, check_loss, gradient_of, loss_shares, sum_over
from hvpkit.curvature.constructors import hessian
from hvpkit.curvature.functional import loss
from hvpkit.data import Data, as_data
from hvpkit.data.sources import IterableBatches, WholeBatches
from hvpkit.errors import NonFiniteError
from hvpkit.operators.base import LinearOperator
from hvpkit.results.eigen import Status
from hvpkit.solvers.lanczos import lanczos


@dataclass(frozen=True)
class AbsaState:
    """The controller between two epochs. Made by :func:`absa_init`; the last eight fields stay as they were given.

    Attributes:
        batch_size, lr, adversarial_share: for the next epoch.
        reference: the eigenvalue when it last made the batch grow, at first the first one; None before that.
        num_waited: epochs since the batch last grew.
        num_epochs: so far.
    """

    batch_size: int
    lr: float
    adversarial_share: float
    reference: float | None
    num_waited: int
    num_epochs: int
    alpha: float
    beta: float
    kappa: int
    max_batch_size: int
    share_decay: float
    adversarial_epochs: int | None
    lr_decay: float
    lr_decay_epochs: tuple[int, ...]


def absa_init(
    batch_size: int,
    lr: float,
    *,
    alpha: float = 2.0,
    beta: float = 2.0,
    kappa: int = 10,
    max_batch_size: int = 16384,
    adversarial_share: float = 0.2,
    share_decay: float = 2.0,
    adversarial_epochs: int | None = None,
    lr_decay: float = 0.2,
    lr_decay_epochs: Sequence[int] = (),
) -> AbsaState:
    """The controller before the first epoch.

    Args:
        batch_size: of the first epoch.
        lr: learning rate of the first epoch.
        alpha: the batch grows when the eigenvalue has fallen by this factor, more than 1.
        beta: by which factor it grows, more than 1; it grows by one example at least.
        kappa: after so many epochs without growth it grows anyway.
        max_batch_size: where growth ends.
        adversarial_share: of each batch, in [0, 1].
        share_decay: each growth divides the share by this, at least 1.
        adversarial_epochs: after so many epochs the share is 0; the paper takes half of all.
        lr_decay: factor on the learning rate after each of ``lr_decay_epochs``.
        lr_decay_epochs: counted from 1.

    Raises:
        TypeError, ValueError: an argument of another type or out of its range, named.

    Example:
        >>> state = absa_init(128, 0.1)
        >>> for eigenvalue in (40.0, 30.0, 19.0):
        ...     state = absa_update(state, eigenvalue)
        >>> state.batch_size, state.lr, state.adversarial_share, state.reference
        (256, 0.2, 0.1, 19.0)
    """
    check_count("batch_size", batch_size, 1)
    check_count("max_batch_size", max_batch_size, batch_size)
    check_count("kappa", kappa, 1)
    for name, value in (("lr", lr), ("lr_decay", lr_decay)):
        check_positive(name, value)
    for name, factor in (("alpha", alpha), ("beta", beta)):
        if check_positive(name, factor) <= 1:
            raise ValueError(f"{name} must be more than 1, got {factor}")
    if check_positive("share_decay", share_decay) < 1:
        raise ValueError(f"share_decay must be at least 1, got {share_decay}")
    if not 0 <= adversarial_share <= 1:
        raise ValueError(f"adversarial_share must be between 0 and 1, got {adversarial_share}")
    if adversarial_epochs is not None:
        check_count("adversarial_epochs", adversarial_epochs, 0)
    for epoch in lr_decay_epochs:
        check_count("lr_decay_epochs", epoch, 1)
    return AbsaState(
        batch_size,
        float(lr),
        0.0 if adversarial_epochs == 0 else float(adversarial_share),
        reference=None,
        num_waited=0,
        num_epochs=0,
        alpha=alpha,
        beta=beta,
        kappa=kappa,
        max_batch_size=max_batch_size,
        share_decay=share_decay,
        adversarial_epochs=adversarial_epochs,
        lr_decay=lr_decay,
        lr_decay_epochs=tuple(lr_decay_epochs),
    )


def absa_update(state: AbsaState, eigenvalue: float) -> AbsaState:
    """The controller after an epoch at whose end the largest eigenvalue was measured; example: :func:`absa_init`.

    Raises:
        ValueError: ``eigenvalue`` is NaN or infinite.
    """
    if not math.isfinite(eigenvalue):
        raise ValueError(f"eigenvalue must be finite, got {eigenvalue}: did the training diverge?")
    reference = state.reference
    if reference is None and eigenvalue > 0:
        reference = eigenvalue
    state = replace(
        state, reference=reference, num_epochs=state.num_epochs + 1, num_waited=state.num_waited + 1
    )
    fallen = reference is not None and 0 < eigenvalue <= reference / state.alpha
    if state.batch_size < state.max_batch_size and (fallen or state.num_waited >= state.kappa):
        grown = max(round(state.batch_size * state.beta), state.batch_size + 1)
        grown = min(grown, state.max_batch_size)
        state = replace(
            state,
            batch_size=grown,
            lr=state.lr * grown / state.batch_size,
            adversarial_share=state.adversarial_share / state.share_decay,
            reference=eigenvalue if fallen else reference,
            num_waited=0,
        )
    if state.num_epochs in state.lr_decay_epochs:
        state = replace(state, lr=state.lr * state.lr_decay)
    if state.adversarial_epochs is not None and state.num_epochs >= state.adversarial_epochs:
        state = replace(state, adversarial_share=0.0)
    return state


def fgsm(loss_fn: LossFn, params: Tree, batch: Batch, epsilon: float) -> Batch:
    r"""The batch with its first tensor moved to :math:`x + \epsilon \operatorname{sign} \nabla_x \ell`.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``, or their mean.
        params: tree of floating tensors.
        batch: tree of tensors, the first of which is the input and floating. Others stay.
        epsilon: how far each entry moves.

    Raises:
        ValueError: the first tensor is not floating.

    Cost:
        A gradient.

    Example:
        >>> import torch
        >>> loss_fn = lambda p, batch: (batch[0] @ p - batch[1]) ** 2
        >>> fgsm(loss_fn, torch.tensor([1.0, -1.0]), (torch.tensor([[2.0, 0.0]]), torch.tensor([1.0])), 0.5)
        (tensor([[ 2.5000, -0.5000]]), tensor([1.]))
    """
    (inputs, *others), spec = flatten(batch, name="batch")
    if not inputs.is_floating_point():
        raise ValueError(
            f"batch: the first tensor must be the input, and floating, to be moved; got {inputs.dtype}. Put the "
            "input first, or train with adversarial_share=0"
        )
    with torch.enable_grad():
        point = inputs.detach().requires_grad_()
        total = loss_fn(params, unflatten([point, *others], spec)).sum()
        (slope,) = torch.autograd.grad(total, point)
    return unflatten([inputs + epsilon * slope.sign(), *others], spec)


@dataclass(frozen=True)
class AbsaEpoch:
    """What an epoch was trained with, and what it came to.

    Attributes:
        batch_size, lr, adversarial_share: of the epoch.
        num_steps: updates of the parameters.
        loss: mean over all examples after it, none of them moved.
        eigenvalue: the largest of the Hessian after it.
    """

    batch_size: int
    lr: float
    adversarial_share: float
    num_steps: int
    loss: float
    eigenvalue: float


@dataclass(frozen=True)
class AbsaResult:
    """Where training stands after an epoch: all that a later call needs to go on.

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
    r"""Trains by SGD with momentum under the controller ``state``.

    BatchNorm needs an objective with ``batchnorm="batch"``, as buffers stay as they are: on running statistics from
    before the training nothing would be normalised.

    With the gradient g of a batch: :math:`v \leftarrow \mu v + g + \lambda p`, :math:`p \leftarrow p - \eta v`.

    Args:
        loss_fn: ``loss_fn(params, batch)``: losses ``[B]``, or their mean as a 0-d tensor. Pure.
        params: tree of floating tensors, the start. It stays as it is.
        data: tensors, a Dataset or a DataLoader of one: see :func:`hvpkit.as_data`. Each epoch has an order of its own.
        state: from :func:`absa_init`. Growth ends at the number of examples, if not before.
        num_epochs: in all, those of ``resume`` among them.
        momentum: :math:`\mu`, in [0, 1).
        weight_decay: :math:`\lambda`.
        epsilon: how far FGSM moves each entry of an input, the first tensor of a batch.
        hessian_examples: on how many examples eigenvalues are measured, the same ones each time; None: on all.
        tol: relative error of the eigenvalues.
        mode: of Hessian products, as in :func:`hvpkit.hvp`.
        microbatch_size: the most examples put through at once; by default the loader's own, else 256.
        seed: of orders, adversarial examples and solves; the same seed gives the same bits.
        monitor: called with the result so far after each epoch. What it raises ends the training.
        resume: a result to go on from, in the place of ``params`` and ``state``, with the same other arguments to the
            same bits as if there had been no break.

    Returns:
        The parameters, with all that a later call needs to go on, and the history.

    Raises:
        TypeError, ValueError: an argument of another type or out of its range, named; data that cannot be read in any
            order; what :func:`hvpkit.hessian` refuses.
        NonFiniteError: the training diverged.

    Cost:
        An epoch: a gradient of all examples and one more of the adversarial share, a loss of all examples, and
        14 Hessian products or more over ``hessian_examples``.

    Source:
        Yao et al., arXiv:1810.01021.

    Example:
        >>> import torch, hvpkit as hk
        >>> x = torch.linspace(-1, 1, 64)[:, None]
        >>> loss_fn = lambda p, batch: (torch.tanh(batch[0] * p["w"]) @ p["v"] - batch[1]) ** 2
        >>> params = {"w": torch.linspace(-2, 2, 8), "v": torch.zeros(8)}
        >>> found = absa(loss_fn, params, (x, x[:, 0] ** 3), absa_init(8, 0.05, kappa=5), num_epochs=15)
        >>> [epoch.batch_size for epoch in found.history][::5], found.history[-1].loss < 0.01
        ([8, 16, 32], True)
    """
    if not isinstance(state, AbsaState):
        raise TypeError(f"state must come from absa_init(...), got {type(state).__name__}")
    check_count("num_epochs", num_epochs, 0)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    for name, value in (("weight_decay", weight_decay), ("epsilon", epsilon)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    for name, count in (("hessian_examples", hessian_examples), ("microbatch_size", microbatch_size)):
        if count is not None:
            check_count(name, count, 1)
    check_positive("tol", tol)
    check_choice("mode", mode, ("auto", *MODES))
    number = resolve_seed(seed)
    layout, leaves = check_params(params)
    device = leaves[0].device
    examples = as_data(data, batch_size=microbatch_size, device=device)
    if isinstance(examples.source, IterableBatches | WholeBatches):
        raise ValueError("data must be readable in any order: pass tensors, a Dataset or a DataLoader of one")
    N = examples.num_examples
    if state.batch_size > N:
        raise ValueError(f"state.batch_size must be at most the {N} examples of data, got {state.batch_size}")
    with exact_derivatives(device):
        check_loss(next(loss_shares(loss_fn, layout, examples)), leaves)
    if resume is not None:
        layout.leaves(resume.params, name="resume.params")
        run = resume
    else:
        start, still = [snapshot(leaf) for leaf in leaves], [torch.zeros_like(leaf) for leaf in leaves]
        state = replace(state, max_batch_size=min(state.max_batch_size, N))
        run = AbsaResult(unflatten(start, layout.spec), unflatten(still, layout.spec), state, ())
    measured = torch.randperm(N, generator=generator(number))[:hessian_examples]
    while (epoch := 1 + len(run.history)) <= num_epochs:
        used, source = run.state, generator(number, epoch)
        attacked = _attacked(loss_fn, used.adversarial_share, epsilon, source)
        batches = torch.randperm(N, generator=source).tensor_split(math.ceil(N / used.batch_size))
        with exact_derivatives(device):
            chosen = (examples.restrict(indices) for indices in batches)
            run = _train(attacked, layout, chosen, run, momentum, weight_decay)
        after = float(loss(loss_fn, run.params, examples))
        H = hessian(loss_fn, run.params, examples.restrict(measured), mode=mode)
        eigenvalue = _largest_eigenvalue(H, tol, number)
        entry = AbsaEpoch(used.batch_size, used.lr, used.adversarial_share, len(batches), after, eigenvalue)
        run = replace(run, state=absa_update(used, eigenvalue), history=(*run.history, entry))
        if monitor is not None:
            monitor(run)
    return run


def _attacked(loss_fn: LossFn, share: float, epsilon: float, source: torch.Generator) -> LossFn:
    """The loss with a share of each batch, chosen at random, moved by FGSM."""

    def attacked(params: Tree, batch: Batch) -> Tensor:
        size = count_examples(batch)
        chosen = torch.randperm(size, generator=source)[: round(share * size)]
        if len(chosen):
            (inputs, *others), spec = flatten(batch)
            chosen = chosen.to(inputs.device)
            few = unflatten([tensor[chosen] for tensor in (inputs, *others)], spec)
            moved = flatten(fgsm(loss_fn, params, few, epsilon))[0][0]
            batch = unflatten([inputs.index_copy(0, chosen, moved), *others], spec)
        return loss_fn(params, batch)

    return attacked


def _train(
    loss_fn: LossFn,
    layout: Layout,
    batches: Iterable[Data],
    run: AbsaResult,
    momentum: float,
    weight_decay: float,
) -> AbsaResult:
    """The run with the parameters and the velocity after a step for each batch."""
    leaves, velocity = layout.leaves(run.params), layout.leaves(run.velocity)
    for batch in batches:
        slopes = sum_over(loss_shares(loss_fn, layout, batch), partial(gradient_of, leaves=leaves))
        old = zip(leaves, velocity, slopes, strict=True)
        velocity = [momentum * v + slope + weight_decay * p for p, v, slope in old]
        leaves = [p - run.state.lr * v for p, v in zip(leaves, velocity, strict=True)]
    if not all_finite(leaves):
        raise NonFiniteError(
            f"the parameters are not finite after epoch {1 + len(run.history)}, at the learning rate "
            f"{run.state.lr:g}: lower lr, or beta by which it grows"
        )
    return replace(run, params=unflatten(leaves, layout.spec), velocity=unflatten(velocity, layout.spec))


def _largest_eigenvalue(H: LinearOperator, tol: float, seed: int) -> float:
    found = lanczos(H, which="LA", tol=tol, seed=seed)
    if found.status is Status.NON_FINITE:
        raise NonFiniteError(f"the largest eigenvalue of the Hessian: {found.message}")
    return float(found.values[-1])
