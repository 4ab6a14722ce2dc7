r"""The Knee learning rate schedule: warm up, explore at the peak rate, decay to zero.

Source: Iyer, Thejas, Kwatra, Ramjee and Sivathanu, "Wide-minima Density Hypothesis and the Explore-Exploit
Learning Rate Schedule", JMLR 24(65), 2023, arXiv:2003.03977. They argue that wide minima are rare among narrow ones,
so that the rate has to stay high for long enough to find one before it decays.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hvpkit._utils.validation import check_count, check_positive


def knee_lr(
    step: float, *, peak_lr: float, warmup_steps: int = 0, explore_steps: int, total_steps: int
) -> float:
    r"""Return the learning rate of the Knee schedule at a step.

    With w warm-up, e explore and T total steps, and the peak rate :math:`\eta`, the t-th step, t = ``step`` + 1, has
    the rate

    .. math::
        \eta(t) = \begin{cases}
            \eta \, t / w & t \le w \\
            \eta & w < t \le w + e \\
            \eta \, (T - t) / (T - w - e) & w + e < t \le T \\
            0 & t > T
        \end{cases}

    So warm-up starts at the peak over w, and a decay ends with the rate zero in the last step, as in the published
    scheduler, whose count of steps also starts from 1.

    Args:
        step: number of steps done so far, from 0; with one call per epoch, of epochs. Need not be whole.
        peak_lr: the highest rate.
        warmup_steps: w.
        explore_steps: e. About half of the total in the paper.
        total_steps: T, at least w + e.

    Raises:
        TypeError, ValueError: an argument that is no such number, named.

    Source:
        Iyer et al., JMLR 24(65), 2023, arXiv:2003.03977.

    Example:
        >>> [knee_lr(step, peak_lr=1.0, warmup_steps=2, explore_steps=2, total_steps=8) for step in range(8)]
        [0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if isinstance(step, bool) or not isinstance(step, Real):
        raise TypeError(f"step must be a number, got {step!r} of type {type(step).__name__}")
    if not step >= 0:
        raise ValueError(f"step must be at least 0, got {step}")
    check_positive("peak_lr", peak_lr)
    knee = check_count("warmup_steps", warmup_steps, 0) + check_count("explore_steps", explore_steps, 0)
    if check_count("total_steps", total_steps, 1) < knee:
        raise ValueError(
            f"total_steps must be at least warmup_steps + explore_steps = {knee}, got {total_steps}"
        )
    number = step + 1
    if number <= warmup_steps:
        return peak_lr * number / warmup_steps
    if number <= knee:
        return peak_lr
    return peak_lr * max(total_steps - number, 0.0) / max(total_steps - knee, 1)


class KneeLR(LRScheduler):
    r"""The Knee schedule as a PyTorch scheduler.

    After s calls of ``step()`` each group has the rate ``knee_lr(s, ...)`` with its own peak. Factors that other
    schedulers of a chain, or the caller, apply to a rate are kept: the schedule multiplies the current rate by its own
    ratio of new to old.

    Args:
        optimizer: whose groups' rates are set.
        peak_lr: one for all groups, or a sequence of one for each; by default each group's initial rate.
        warmup_steps: as in :func:`knee_lr`.
        explore_steps: as in :func:`knee_lr`.
        total_steps: as in :func:`knee_lr`.
        last_epoch: the last step done, for an optimizer that was under a schedule before; -1 at the beginning.
            ``load_state_dict`` is the other way to continue.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Source:
        Iyer et al., JMLR 24(65), 2023, arXiv:2003.03977.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=1.0)
        >>> scheduler = KneeLR(optimizer, explore_steps=1, total_steps=3)
        >>> for _ in range(3):
        ...     rate = scheduler.get_last_lr()
        ...     optimizer.step()
        ...     scheduler.step()
        ...     print(rate)
        [1.0]
        [0.5]
        [0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        peak_lr: float | Sequence[float] | None = None,
        warmup_steps: int = 0,
        explore_steps: int,
        total_steps: int,
        last_epoch: int = -1,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        groups = optimizer.param_groups
        if peak_lr is None:
            peak_lr = [float(group.get("initial_lr", group["lr"])) for group in groups]
        elif not isinstance(peak_lr, Sequence):
            peak_lr = [peak_lr] * len(groups)
        if len(peak_lr) != len(groups):
            raise ValueError(
                f"peak_lr must be one rate, or one for each of the {len(groups)} parameter groups; got {len(peak_lr)}"
            )
        self.peak_lrs = list(peak_lr)
        self.warmup_steps, self.explore_steps, self.total_steps = warmup_steps, explore_steps, total_steps
        self._rates(0)  # refuses bad arguments before the optimizer is changed
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rates at ``last_epoch``, given the groups' current ones. Called by ``step()``."""
        rates = self._rates(self.last_epoch)
        if self.last_epoch == 0 or not hasattr(self, "_last_lr"):
            return [*rates]
        changes = zip(rates, self._rates(self.last_epoch - 1), self.optimizer.param_groups, strict=True)
        # If nobody else has changed the rate, the factor is exactly 1, so that rounding does not accumulate.
        return [rate * float(group["lr"] / before) if before else rate for rate, before, group in changes]

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        return [*self._rates(self.last_epoch)]  # called by torch if step() is given an epoch

    def _rates(self, step: int) -> list[float]:
        steps = {name: getattr(self, name) for name in ("warmup_steps", "explore_steps", "total_steps")}
        return [knee_lr(step, peak_lr=peak, **steps) for peak in self.peak_lrs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a ``state_dict()``; the optimizer's own state may be loaded before, after, or not at all.

        A group's rate that nobody has changed since this scheduler set it becomes the saved scheduler's last one.
        """
        groups = self.optimizer.param_groups
        own = [bool(group["lr"] == last) for group, last in zip(groups, self.get_last_lr(), strict=True)]
        super().load_state_dict(state_dict)
        for group, last, mine in zip(groups, self.get_last_lr(), own, strict=True):
            if mine and isinstance(group["lr"], Tensor):
                group["lr"].fill_(last)
            elif mine:
                group["lr"] = last
