"""Both ends of the Hessian's spectrum in the course of training."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hvpkit._utils.files import atomic_write
from hvpkit._utils.random import resolve_seed
from hvpkit._utils.typing import LossFn, Seed, Tree
from hvpkit._utils.validation import (
    check_choice,
    check_count,
    check_function,
    check_monitor,
    check_path,
    check_positive,
    check_tolerance,
)
from hvpkit.curvature.batches import MODES
from hvpkit.curvature.constructors import hessian
from hvpkit.curvature.param_selection import check_selection
from hvpkit.data import as_data
from hvpkit.extreme import METHODS, extreme_eigenvalues
from hvpkit.objective import from_module
from hvpkit.results.eigen import ExtremeResult
from hvpkit.solvers.common.request import check_atol
from hvpkit.solvers.driver import Monitor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MakeObjective = Callable[[Any], tuple[LossFn, Tree]]
"""Makes a loss function and its parameters of a tracker's argument."""


class SpectrumTracker:
    """A tracker of both extreme eigenvalues of the full-data Hessian, called in a training loop.

    Every measurement starts from random vectors: eigenvectors of an earlier measurement save no passes, because
    directions outside of them have to be excluded as well. The training is not changed: neither the parameters, nor
    ``.grad``, ``train()/eval()`` or the global generator.

    Args:
        loss_fn: ``loss_fn(params, batch)``, or an :class:`hvpkit.Objective`; the tracker is called with ``params``.
            For a module, which is trained in place, use :meth:`for_module`.
        data: all examples of the Hessian, as for :func:`hvpkit.hessian`.
        every: measure at the first of every so many calls; of steps, if calls give their ``step``.
        tol: relative error of both eigenvalues.
        atol: size up to which a value counts as zero, as for :func:`hvpkit.extreme_eigenvalues`.
        method: as for :func:`hvpkit.extreme_eigenvalues`.
        max_matvecs: the most passes over the data for a measurement; the values found by then are recorded.
        time_limit: the most seconds for a measurement; the values found by then are recorded.
        batch_size, wrt, mode: as for :func:`hvpkit.hessian`.
        seed: of random vectors and samples; each measurement derives its own seed from it.
        path: a file of JSON lines, one for each measurement, written at once. If it exists, the tracker continues
            after the measurements in it.
        monitor: called during a solve, as for :func:`hvpkit.extreme_eigenvalues`.

    Attributes:
        results: pairs of a step and its result, in order; results read from a file have empty vectors.

    Raises:
        TypeError, ValueError: an argument of another type or out of its range, named; a file not written by a tracker.

    Cost:
        A measurement costs one :func:`hvpkit.extreme_eigenvalues`.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 2
        >>> tracker = SpectrumTracker.for_module(F.cross_entropy, (x, y), every=10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for step in range(30):
        ...     ex = tracker(model, step=step)
        ...     optimizer.zero_grad()
        ...     F.cross_entropy(model(x), y).backward()
        ...     optimizer.step()
        >>> [record["step"] for record in tracker.records]
        [0, 10, 20]
    """

    def __init__(
        self,
        loss_fn: LossFn,
        data: object,
        *,
        every: int = 1,
        tol: float = 1e-2,
        atol: float | None = None,
        method: str = "auto",
        max_matvecs: float | None = None,
        time_limit: float | None = None,
        batch_size: int | None = None,
        wrt: Any = None,
        mode: str = "auto",
        seed: Seed = 0,
        path: str | os.PathLike[str] | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        if isinstance(loss_fn, nn.Module):
            raise TypeError(
                "loss_fn must be a function of (params, batch), not a module; for a module that is trained in place "
                "use SpectrumTracker.for_module(criterion, data)"
            )
        check_function("loss_fn", loss_fn, "loss_fn(params, batch)", 2)
        check_count("every", every, 1)
        check_tolerance("tol", tol)
        if atol is not None:
            check_atol(atol)
        for name, limit in (("max_matvecs", max_matvecs), ("time_limit", time_limit)):
            if limit is not None:
                check_positive(name, limit)
        if wrt is not None:
            check_selection(wrt)
        check_choice("mode", mode, ("auto", *MODES))
        check_monitor(monitor)
        check_choice("method", method, METHODS)
        self._objective: MakeObjective = lambda params: (loss_fn, params)
        self._data = as_data(data, batch_size=batch_size)
        self._every, self._seed, self._num_calls = every, resolve_seed(seed), 0
        self._hessian: dict[str, Any] = {"wrt": wrt, "mode": mode}
        self._solve: dict[str, Any] = {"tol": tol, "atol": atol, "method": method, "monitor": monitor}
        self._solve |= {"max_matvecs": max_matvecs, "time_limit": time_limit}
        self._path = None if path is None else check_path("path", path)
        self._num_parameters: int | None = None
        self.results: list[tuple[int, ExtremeResult]] = []
        if self._path is not None:
            self._read(self._path)

    @classmethod
    def for_module(
        cls, criterion: Callable[..., Tensor], data: object, *, batchnorm: str = "eval", **options: Any
    ) -> SpectrumTracker:
        """Make a tracker that is called with a module, whose parameters and buffers it takes at each call.

        Args:
            criterion: as for :func:`hvpkit.from_module`.
            batchnorm: as for :func:`hvpkit.from_module`.
            data: all examples, in batches ``(*inputs, targets)`` or dicts, as for :func:`hvpkit.from_module`.
            options: the other arguments of :class:`SpectrumTracker`.
        """
        tracker = cls(_unused, data, **options)
        tracker._objective = lambda model: from_module(model, criterion, batchnorm=batchnorm)
        return tracker

    def __call__(self, params: Any, *, step: int | None = None) -> ExtremeResult | None:
        """Measure, if a measurement is due; return its result, or None.

        Args:
            params: the current parameters, or the module.
            step: of training; by default calls are counted. If training has gone back to an earlier step, the
                measurements from there on are dropped.

        Raises:
            ValueError: another number of parameters than before; also as :func:`hvpkit.hessian`.
        """
        step = self._num_calls if step is None else check_count("step", step, 0)
        self._num_calls = step + 1
        if step % self._every:
            return None
        loss_fn, values = self._objective(params)
        H = hessian(loss_fn, values, self._data, **self._hessian)
        if self._num_parameters not in (None, H.n):
            raise ValueError(
                f"params has {H.n} parameters in all, and {self._num_parameters} in the last measurement; "
                "make another tracker"
            )
        self._num_parameters = H.n
        kept = [pair for pair in self.results if pair[0] < step]
        ex = extreme_eigenvalues(H, seed=self._seed + len(kept), **self._solve)
        self.results = [*kept, (step, ex)]
        if self._path is not None:
            self._write(self._path)
        return ex

    @property
    def records(self) -> list[dict[str, Any]]:
        """One flat dict for each measurement: step, both values, intervals and residuals, passes, seconds, status."""
        return [{"step": step, **_flat(ex)} for step, ex in self.results]

    def to_frame(self) -> Any:
        """Return the records as a ``pandas.DataFrame``.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise ImportError(
                "to_frame needs pandas: pip install pandas; records has the same as dicts"
            ) from error
        return DataFrame(self.records)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw both ends over training, with their intervals; needs ``hvpkit[plots]``."""
        from hvpkit import plots  # matplotlib is an extra

        return plots.training(self.results, ax=ax)

    def _write(self, path: Path) -> None:
        lines = [json.dumps({"step": step, **ex.to_dict()}) + "\n" for step, ex in self.results]
        with atomic_write(path) as draft:
            draft.write_text("".join(lines), encoding="utf-8")

    def _read(self, path: Path) -> None:
        if not path.parent.is_dir():
            raise ValueError(f"path: there is no folder {path.parent}; make it first")
        if not path.exists():
            return
        try:
            entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            self.results = [(int(entry["step"]), ExtremeResult.from_dict(entry)) for entry in entries]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"path: {path} is not a file that SpectrumTracker wrote ({error})") from error
        if self.results:
            self._num_calls = self.results[-1][0] + 1


def _unused(_params: Tree, _batch: Any) -> Tensor:
    """Stand in for a loss function where a module and a criterion make one at each call."""
    raise AssertionError


def _flat(ex: ExtremeResult) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name, pair in (("smallest", ex.smallest), ("largest", ex.largest)):
        record |= {
            name: pair.value,
            f"{name}_lower": pair.interval.lower,
            f"{name}_upper": pair.interval.upper,
            f"{name}_kind": pair.interval.kind,
            f"{name}_residual_norm": pair.residual_norm,
        }
    return record | {"passes": ex.num_matvecs, "seconds": ex.seconds, "status": str(ex.status)}
