"""The controller of ABSA: batch size and learning rate of the next epoch, from the largest Hessian eigenvalue.

Source and departures: :mod:`hvpkit.train.absa_training`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hvpkit._utils.validation import check_count, check_number, check_positive, check_type


@dataclass(frozen=True)
class AbsaState:
    """The controller between two epochs. Made by :func:`absa_init`; the last eight fields are its options.

    Attributes:
        batch_size, lr, adversarial_share: for the next epoch.
        reference: the eigenvalue at the last growth that a fall of it caused; before that the first one, or None.
        num_waited: epochs since the batch last grew.
        num_epochs: epochs so far.
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
    """Make the controller for the first epoch.

    Args:
        batch_size: of the first epoch.
        lr: learning rate of the first epoch.
        alpha: the batch grows when the eigenvalue has fallen by this factor; more than 1.
        beta: factor of growth, more than 1; the batch grows by one example at least.
        kappa: epochs without growth after which the batch grows in any case.
        max_batch_size: the largest batch size.
        adversarial_share: share of adversarial examples in each batch, in [0, 1].
        share_decay: divisor of the share at each growth, at least 1.
        adversarial_epochs: number of epochs after which the share is 0; the paper takes half of all epochs.
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
    if not 0 <= check_number("adversarial_share", adversarial_share) <= 1:
        raise ValueError(f"adversarial_share must be between 0 and 1, got {adversarial_share}")
    if adversarial_epochs is not None:
        check_count("adversarial_epochs", adversarial_epochs, 0)
    if not isinstance(lr_decay_epochs, Sequence):
        raise TypeError(f"lr_decay_epochs must be a list of epochs, as [30, 60], got {lr_decay_epochs!r}")
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
    """Return the controller for the next epoch, from the largest eigenvalue after the last; see :func:`absa_init`.

    Raises:
        TypeError: ``state`` does not come from :func:`absa_init`, or ``eigenvalue`` is no number.
        ValueError: ``eigenvalue`` is NaN or infinite.
    """
    check_type("state", state, AbsaState, "absa_init(...)")
    if not math.isfinite(check_number("eigenvalue", eigenvalue)):
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
