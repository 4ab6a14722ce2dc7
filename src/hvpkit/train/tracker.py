"""The ends of the Hessian's spectrum in the course of training."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from hvpkit._utils.checkpoints import check_identity, digest
from hvpkit._utils.files import atomic_write, beside, check_file, reason
from hvpkit._utils.random import resolve_seed
from hvpkit._utils.ranks import whole
from hvpkit._utils.typing import LossFn, Seed, Tree
from hvpkit._utils.validation import (
    check_choice,
    check_count,
    check_flag,
    check_function,
    check_monitor,
    check_positive,
    check_tolerance,
)
from hvpkit.curvature.batches import MODES
from hvpkit.curvature.constructors import hessian
from hvpkit.curvature.functional import grad
from hvpkit.curvature.operator import CurvatureOperator
from hvpkit.curvature.param_selection import check_selection
from hvpkit.curvature.preconditioning import coordinates_of
from hvpkit.curvature.preconditioning import precondition as scaled
from hvpkit.data import as_data, digest_of
from hvpkit.errors import RemoteError, UnsavedWarning
from hvpkit.extreme import METHODS, extreme_eigenvalues, top_eigenvalues
from hvpkit.objective import from_module
from hvpkit.results.eigen import EigenResult, ExtremeResult
from hvpkit.results.recycled import RecycledSpace
from hvpkit.solvers.common.request import check_atol
from hvpkit.solvers.driver import Monitor
from hvpkit.solvers.recycling import follow_top
from hvpkit.train.data_parallel import buffers_of_first, share_among_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = 1
"""Version of the lines in a tracker's file."""

Result = ExtremeResult | EigenResult
"""The result of a measurement."""

MakeObjective = Callable[[Any], tuple[LossFn, Tree]]
"""Makes a loss function and its parameters of a tracker's argument."""


class Alignment(NamedTuple):
    """The span of a measurement's k eigenvectors beside what came before.

    Attributes:
        overlap: with the span of the measurement before: the mean squared cosine between the two, from 0 to 1; NaN if
            its vectors are not known.
        gradient_share: of the gradient's squared norm, the part that lies in the span.
    """

    overlap: float
    gradient_share: float


class SpectrumTracker:
    """A tracker of extreme eigenvalues of the full-data Hessian, called in a training loop: of both ends, or of k.

    Every measurement starts from random vectors: as a start, eigenvectors of an earlier measurement save no passes,
    because directions outside of them have to be excluded as well. Of the k largest eigenvalues each measurement
    recycles the matvecs of those before (:func:`hvpkit.follow_top`), for a fraction of the passes at the same
    confidence. The training is not changed: neither the parameters, nor ``.grad``, ``train()/eval()`` or the global
    generator.

    Args:
        loss_fn: ``loss_fn(params, batch)``, or an :class:`hvpkit.Objective`; the tracker is called with ``params``.
            For a module, which is trained in place, use :meth:`for_module`.
        data: all examples of the Hessian, as for :func:`hvpkit.hessian`.
        every: measure at the first of every so many calls; of steps, if calls give their ``step``.
        k: number of pairs at the ends that ``which`` says, by :func:`hvpkit.top_eigenvalues`, the largest with
            ``method="auto"`` by :func:`hvpkit.follow_top`; None: both ends, one pair each, by
            :func:`hvpkit.extreme_eigenvalues`.
        which: with ``k``: ``"LA"`` the largest, ``"SA"`` the smallest, ``"BE"`` half from each end.
        precondition: a torch optimizer, or another D of :func:`hvpkit.precondition`, as it is at each measurement: the
            spectrum that an adaptive optimizer feels. Vectors and gradients are then in its coordinates.
        tol: relative error of both eigenvalues.
        atol: size up to which a value counts as zero, as for :func:`hvpkit.extreme_eigenvalues`.
        method, ncv, offload, certify: as for :func:`hvpkit.extreme_eigenvalues`. The k largest by
            :func:`hvpkit.follow_top` are always certified.
        max_matvecs: the most passes over the data for a measurement; the values found by then are recorded.
        time_limit: the most seconds for a measurement; the values found by then are recorded.
        batch_size, wrt, mode: as for :func:`hvpkit.hessian`.
        seed: of random vectors and samples; each measurement derives its own seed from it.
        path: a file of JSON lines, one for each measurement, written at once, with a checksum and the identity of the
            tracker: digests of the data and of the arguments that change the question. If it exists, the tracker
            continues after the measurements in it. Measurements that are replaced, as training has gone back, are kept
            in a file beside it, ``path`` with ``.replaced``, with an :class:`hvpkit.UnsavedWarning`. A write that
            fails is one too: the training goes on, and the next measurement writes all. The matvecs that are recycled
            lie beside it as well, ``path`` with ``.space``: some 40 vectors, so that a continued tracker has the same
            numbers; without that file the next measurement takes more passes.
        monitor: called during a solve, as for :func:`hvpkit.extreme_eigenvalues`.

    Attributes:
        results: pairs of a step and its result, in order; results read from a file have empty vectors.
        alignments: with ``k``, an :class:`Alignment` by step: which vectors stay, and how much of the gradient is in
            their span.

    Raises:
        TypeError, ValueError: an argument of another type or out of its range, named; a file that is damaged, of
            another version or another tracker, not a tracker's, or that cannot be written.

    Cost:
        A measurement costs one :func:`hvpkit.extreme_eigenvalues`, with ``k`` one :func:`hvpkit.top_eigenvalues` and a
        gradient; a ``path``, a pass that reads the data.

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
        k: int | None = None,
        which: str = "LA",
        precondition: Tree | Optimizer | None = None,
        tol: float = 1e-2,
        atol: float | None = None,
        method: str = "auto",
        ncv: int | None = None,
        offload: bool = False,
        certify: bool = False,
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
        if k is not None:
            check_count("k", k, 1)
        check_choice("which", which, ("LA", "SA", "BE"))
        check_tolerance("tol", tol)
        if atol is not None:
            check_atol(atol)
        if ncv is not None:
            check_count("ncv", ncv, 1)
        for name, flag in (("offload", offload), ("certify", certify)):
            check_flag(name, flag)
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
        self._solve |= {
            "ncv": ncv,
            "offload": offload,
            "certify": certify,
            "max_matvecs": max_matvecs,
            "time_limit": time_limit,
        }
        self._path = None if path is None else check_file("path", path).absolute()
        self._identity: dict[str, Any] = {}
        self._replaced: list[tuple[int, Result]] = []
        self._num_parameters: int | None = None
        self._k, self._which, self._scale = k, which, precondition
        self._recycles = k is not None and which == "LA" and method == "auto"
        self._space: RecycledSpace | None = None
        self.results: list[tuple[int, Any]] = []
        self.alignments: dict[int, Alignment] = {}
        if self._path is not None:
            self._identity = {
                "data": digest_of(self._data),
                "wrt": None if wrt is None else repr(wrt),
                "method": str(method),
                "seed": self._seed,
            }
            if k is not None:
                self._identity |= {"k": k, "which": which}
            if precondition is not None:
                self._identity["precondition"] = type(precondition).__name__
            if self._data.ranks is not None:
                self._data.ranks.meet(
                    "SpectrumTracker"
                )  # the first one may still write what another one is to read
            self.results, self.alignments = _read(self._path, self._identity)
            if self.results:
                self._num_calls = self.results[-1][0] + 1
                self._space = _read_space(self._path) if self._recycles else None
            if self._space is not None:
                self._num_parameters = len(self._space.vectors)

    def share(self, model: nn.Module) -> None:
        """Share the work of each measurement among all processes, as of data-parallel training of ``model``.

        Each of them calls it, and then the tracker, at the same steps; each has all the data, and the first one writes
        the file. Buffers of a module are those of the first process. Alone, a process goes on as before.

        Raises:
            ValueError: the processes do not have the same data.
        """
        self._data = share_among_all(self._data, model)

    @classmethod
    def for_module(
        cls, criterion: Callable[..., Tensor] | None, data: object, *, batchnorm: str = "eval", **options: Any
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

    def __call__(self, params: Any, *, step: int | None = None) -> Any:
        """Measure, if a measurement is due; return its result, or None.

        The result is an :class:`hvpkit.ExtremeResult`, with ``k`` an :class:`hvpkit.EigenResult`.

        Args:
            params: the current parameters, or the module.
            step: of training; by default calls are counted. If training has gone back to an earlier step, the
                measurements from there on are replaced.

        Raises:
            ValueError: another number of parameters than before; also as :func:`hvpkit.hessian`.
        """
        step = self._num_calls if step is None else check_count("step", step, 0)
        self._num_calls = step + 1
        if step % self._every:
            return None
        ranks = self._data.ranks
        with buffers_of_first(params, ranks) if isinstance(params, nn.Module) else nullcontext():
            loss_fn, values = self._objective(params)
        H = hessian(loss_fn, values, self._data, **self._hessian)
        if self._num_parameters not in (None, H.n):
            raise ValueError(
                f"params has {H.n} parameters in all, and {self._num_parameters} in the last measurement; "
                "make another tracker"
            )
        self._num_parameters = H.n
        kept = [pair for pair in self.results if pair[0] < step]
        if len(kept) < len(self.results):
            self._space = None  # of steps that are replaced
        ex = self._measure(H, step, self._seed + len(kept), kept)
        replaced, self.results = self.results[len(kept) :], [*kept, (step, ex)]
        self._save_space()
        if self._path is not None and (ranks is None or ranks.is_first):
            try:
                self._replaced += replaced
                self._keep(self._path)
                self.save()
            except OSError as error:
                warnings.warn(
                    f"path: {self._path} could not be written ({reason(error)}); the measurement at step {step} is in "
                    "results, and the next one writes all",
                    UnsavedWarning,
                    stacklevel=2,
                )
        return ex

    def _measure(
        self, H: CurvatureOperator, step: int, seed: int, before: list[tuple[int, Result]]
    ) -> Result:
        """Solve at a step; with ``k``, also compare the vectors with those before and with the gradient."""
        asked = H if self._scale is None else scaled(H, self._scale)
        if self._k is None:
            return extreme_eigenvalues(asked, seed=seed, **self._solve)
        if self._recycles:
            options = {name: self._solve[name] for name in self._solve.keys() - {"method", "certify"}}
            found, self._space = follow_top(asked, self._k, self._space, seed=seed, **options)
        else:
            found = top_eigenvalues(asked, self._k, which=self._which, seed=seed, **self._solve)
        origin, overlap = H.origin, math.nan
        assert origin is not None
        gradient = H.flatten(grad(origin.loss_fn, origin.params, origin.data))
        if self._scale is not None:
            gradient = coordinates_of(asked, gradient)
        vectors = whole(found.vectors)
        if before and len(before[-1][1].vectors) == H.n:
            cosines = whole(before[-1][1].vectors).mT @ vectors
            overlap = float(cosines.square().sum()) / max(1, vectors.shape[1])
        size = float(gradient.square().sum())
        share = float((vectors.mT @ gradient).square().sum()) / size if size else 0.0
        self.alignments = {at: known for at, known in self.alignments.items() if at < step}
        self.alignments[step] = Alignment(overlap, share)
        return found

    def save(self) -> None:
        """Write the results to ``path``; every measurement does, but for one whose write failed.

        Raises:
            OSError: the file cannot be written.
        """
        if self._path is not None:
            _write(self._path, _lines(self.results, self.alignments, self._identity))

    @property
    def records(self) -> list[dict[str, Any]]:
        """One flat dict for each measurement: step, values, intervals and residuals, passes, seconds, status.

        With ``k``, values are named by their place, ``eigenvalue_0`` the smallest of them.
        """
        alignments = {step: known._asdict() for step, known in self.alignments.items()}
        return [{"step": step, **_flat(ex), **alignments.get(step, {})} for step, ex in self.results]

    def __repr__(self) -> str:
        if not self.results:
            return "<SpectrumTracker: no measurements>"
        step, ex = self.results[-1]
        if isinstance(ex, ExtremeResult):
            values = f"smallest {ex.smallest.value:.6g}, largest {ex.largest.value:.6g}"
        else:
            values = ", ".join(f"{value:.6g}" for value in ex.values.tolist())
        return f"<SpectrumTracker: {len(self.results)} measurements; at step {step}: {values}>"

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

    def plot(self, ax: Axes | None = None, *, unit: str = "training step") -> Axes:
        """Draw the eigenvalues over training, with their intervals; needs ``hvpkit[plots]``.

        ``unit`` is what steps count, as ``"epoch"``.
        """
        from hvpkit import plots  # matplotlib is an extra

        return plots.training(self.results, unit=unit, ax=ax)

    def _save_space(self) -> None:
        """Write the matvecs that are recycled beside ``path``: of several ranks, all together."""
        if self._path is None or self._space is None:
            return
        try:
            self._space.save(beside(self._path, "space"))
        except (OSError, ValueError, RemoteError) as error:
            warnings.warn(
                f"path: what is recycled could not be written beside {self._path} ({error}); a continued tracker "
                "takes more passes for its first measurement",
                UnsavedWarning,
                stacklevel=3,
            )

    def _keep(self, path: Path) -> None:
        """Add measurements that are replaced to the file beside."""
        replaced = self._replaced
        if not replaced:
            return
        kept = beside(path, "replaced")
        warnings.warn(
            f"path: training has gone back to step {replaced[0][0]}, or {path} is of an earlier run: "
            f"{len(replaced)} measurements from there on are replaced, and kept in {kept}",
            UnsavedWarning,
            stacklevel=3,
        )
        before = kept.read_text(encoding="utf-8") if kept.exists() else ""
        _write(kept, before + _lines(replaced, {}, self._identity))
        self._replaced = []


def _lines(
    results: list[tuple[int, Result]], alignments: dict[int, Alignment], identity: dict[str, Any]
) -> str:
    """Return a line of JSON for each measurement, with a checksum."""
    lines = []
    for step, ex in results:
        record = {"step": step, **ex.to_dict(), "tracker": {"format": FORMAT, **identity}}
        if step in alignments:
            values = alignments[step]._asdict().items()
            record["alignment"] = {name: value if math.isfinite(value) else None for name, value in values}
        lines.append(json.dumps({**record, "checksum": digest(record)}) + "\n")
    return "".join(lines)


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _read_space(path: Path) -> RecycledSpace | None:
    """Return the matvecs that are recycled; None, with a warning, if their file is damaged."""
    file = beside(path, "space")
    try:
        return RecycledSpace.load(file) if file.exists() else None
    except (OSError, ValueError) as error:
        warnings.warn(f"path: nothing is recycled from {file}: {error}", UnsavedWarning, stacklevel=4)
        return None


def _read(path: Path, identity: dict[str, Any]) -> tuple[list[tuple[int, Result]], dict[int, Alignment]]:
    """Return the measurements in a file; none if there is no file.

    Raises:
        ValueError: the file is not a tracker's, is damaged, of another version, or of another tracker.
    """
    if not path.exists():
        return [], {}
    found: list[tuple[int, Result]] = []
    alignments: dict[int, Alignment] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
            checksum, theirs = record.pop("checksum"), dict(record["tracker"])
            version = theirs.pop("format")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"path: line {number} of {path} is damaged, or {path} is not a file that SpectrumTracker wrote "
                f"({error!r}); restore it from a copy, or name another file"
            ) from error
        if checksum != digest(record):
            raise ValueError(
                f"path: line {number} of {path} is damaged (its checksum does not fit); restore it from a copy, or "
                "delete the lines from there on to measure them again"
            )
        if version != FORMAT:
            raise ValueError(
                f"path: {path} is of another version of hvpkit (format {version!r}; this one has {FORMAT}); continue "
                "it with that version, or name another file"
            )
        check_identity("path", path, theirs, identity)
        step, kind = int(record["step"]), EigenResult if "k" in identity else ExtremeResult
        found.append((step, kind.from_dict(record)))
        if "alignment" in record:
            known = record["alignment"]
            alignments[step] = Alignment(
                **{name: math.nan if value is None else value for name, value in known.items()}
            )
    return found, alignments


def _unused(_params: Tree, _batch: Any) -> Tensor:
    """Stand in for a loss function where a module and a criterion make one at each call."""
    raise AssertionError


def _flat(ex: Result) -> dict[str, Any]:
    record: dict[str, Any] = {}
    if isinstance(ex, ExtremeResult):
        pairs = {"smallest": ex.smallest, "largest": ex.largest}
    else:
        pairs = {f"eigenvalue_{place}": ex.pair(place) for place in range(len(ex.values))}
    for name, pair in pairs.items():
        record |= {
            name: pair.value,
            f"{name}_lower": pair.interval.lower,
            f"{name}_upper": pair.interval.upper,
            f"{name}_kind": pair.interval.kind,
            f"{name}_residual_norm": pair.residual_norm,
        }
    return record | {"passes": ex.num_matvecs, "seconds": ex.seconds, "status": str(ex.status)}
