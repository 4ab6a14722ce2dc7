"""Preflight: a few matvecs, and an inspection of the modules, before an operator is trusted."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from numbers import Number

import torch
from torch import Tensor
from torch.utils import _pytree

from hvpkit._utils.random import normal_vector, resolve_seed
from hvpkit._utils.ranks import call_on_first
from hvpkit._utils.typing import Batch, Seed
from hvpkit.autodiff.captured import captured_parameters
from hvpkit.autodiff.exact import exact_derivatives
from hvpkit.autodiff.pytree import batch_size, flatten, plain, unflatten
from hvpkit.curvature.operator import CurvatureOperator
from hvpkit.data import Data, as_data
from hvpkit.diagnostics.finite_differences import DIFFERENCES, matvec_by_differences
from hvpkit.diagnostics.known_causes import find_suspects, held
from hvpkit.errors import UnstableDataError
from hvpkit.objective import Objective
from hvpkit.operators.base import LinearOperator
from hvpkit.results.saving import Result
from hvpkit.results.tables import Columns
from hvpkit.solvers.driver import full_precision

OK, FAILED, NOT_APPLICABLE = "ok", "failed", "not applicable"

PREREQUISITES = ("data order", "finite", "repeatable")
CHECKS = (*PREREQUISITES, "linear", "symmetric", "differences", "batching", "constants")

NUM_VECTORS = 4
"""Random vectors in the first matvec; they make six pairs. By feel."""

NUM_EXAMPLES = 16
"""Examples on which derivatives are compared with finite differences. By feel."""

NOISE = 10.0
"""How many times the measured rounding a figure may be. By feel."""

TOO_ROUGH = 0.1
"""The threshold above which a check does not apply. By feel."""

ERRORS = (ArithmeticError, RuntimeError, TypeError, ValueError)
NO_DATA = "this operator does not tell its loss and data"
NO_DIFFERENCES = "a Fisher matrix does not tell which targets were drawn"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: its name.
        figure: the measured value, 0 at best; NaN where the check does not apply.
        threshold: the largest value that passes; NaN where the check does not apply.
        verdict: ``"ok"``, ``"failed"`` or ``"not applicable"``.
        detail: what was checked, or why it was not.
        suspects: if failed, the known causes: modules, else the parameters with the largest error, the loss or the
            data.
        mend: if failed, the remedy.
    """

    check: str
    figure: float
    threshold: float
    verdict: str
    detail: str
    suspects: tuple[str, ...] = ()
    mend: str = ""


@dataclass(frozen=True, repr=False)
class Report(Result):
    """The result of :func:`check`; prints as a table.

    Attributes:
        operator: ``repr`` of the operator.
        findings: one for each check.
    """

    operator: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """True if no check failed."""
        return not self._failed()

    def _failed(self) -> list[str]:
        return [finding.check for finding in self.findings if finding.verdict == FAILED]

    def _columns(self) -> Columns:
        names = [field.name for field in fields(Finding)]
        return {name: [getattr(finding, name) for finding in self.findings] for name in names}

    def __repr__(self) -> str:
        return f"<Report: {', '.join(self._failed()) + ' failed' if self._failed() else 'ok'}>"

    def __str__(self) -> str:
        lines = [f"{self.operator}: {'ok' if self.ok else 'FAILED'}"]
        for f in self.findings:
            known = f.verdict != NOT_APPLICABLE
            figures = f"{f.figure:8.1e} of {f.threshold:7.1e}" if known else ""
            lines.append(f"  {f.check:<12}{figures:<21}{f.verdict:<16}{f.detail}")
            if f.suspects:
                more = f" and {len(f.suspects) - 4} more" if len(f.suspects) > 4 else ""
                lines.append(f"    suspected: {', '.join(f.suspects[:4])}{more}")
                lines.append(f"    mend: {f.mend}")
        return "\n".join(lines)


@full_precision
def check(H: LinearOperator, *, seed: Seed = 0, monitor: Callable[[Finding], object] | None = None) -> Report:
    r"""Check that an operator is symmetric, and the curvature that it says it is.

    With random vectors v, w, relative to the norm of matvecs, and with the relative precision :math:`\epsilon` of the
    dtype:

    ===========  ===============================================================  ===================================
    check        figure                                                           at most
    ===========  ===============================================================  ===================================
    data order   share of the batches that a second pass gives otherwise          0
    finite       share of the entries of products that are NaN or infinite        0
    repeatable   difference of the same matvec, made twice                        :math:`\epsilon^{1/2}`
    linear       :math:`\|H(v + w) - Hv - Hw\|`, the rounding of matvecs          :math:`\epsilon^{1/2}`
    symmetric    :math:`|w'Hv - v'Hw|`, root mean square over pairs: estimates    :math:`\epsilon^{2/3}`
                 :math:`\|H - H'\|_F` over :math:`\|H\|_F`
    differences  distance from the matvec by central differences of first         :math:`\epsilon^{1/2}`, and not
                 derivatives, made in float64, on 16 examples at random           less than :math:`6\cdot10^{-6}`
    batching     distance from the matvec over batches of another size            :math:`\epsilon^{2/3}`
    constants    number of parameters that the loss depends on and that are not   0
                 in ``params``
    ===========  ===============================================================  ===================================

    Where ``H.precision`` is worse than the dtype's, as by finite differences, repeatable and linear allow ten times as
    much, up to 0.01. Symmetric, differences and batching allow ten times the measured rounding, differences also four
    times the change with another step; where this is more than 0.1, a check does not apply. Data order, differences,
    batching and constants need the loss and the data: a :class:`hvpkit.CurvatureOperator`, whose terms are checked
    together. Where one of the first three fails, those after it do not apply.

    Args:
        H: the operator.
        seed: of vectors and of examples.
        monitor: called with each :class:`hvpkit.Finding`, when it is made.

    Returns:
        A report: ``ok``, and ``findings`` with figures, thresholds and verdicts. A check that failed names its known
        causes, by the types of the modules that the loss holds, and the remedy.

    Raises:
        TypeError: ``H`` is no :class:`hvpkit.LinearOperator`.

    Cost:
        7 full-data products, and two passes that only read the data. ``check(H.sample(1000, 0))`` checks a random
        part of it.

    Example:
        >>> import torch, hvpkit as hk
        >>> report = check(hk.aslinearoperator(torch.tensor([[1.0, 2.0], [3.0, 4.0]])))
        >>> report.ok, report
        (False, <Report: symmetric failed>)
    """
    if isinstance(H, CurvatureOperator):
        H.check_whole("check")
    findings: list[Finding] = []
    for finding in _findings(H, resolve_seed(seed)):
        findings.append(finding)
        if finding.verdict == FAILED:
            findings[-1] = _with_causes(finding, H)
        if monitor is not None:
            call_on_first(H.space.ranks, monitor, findings[-1])
        if finding.verdict == FAILED and finding.check in PREREQUISITES:
            break
    why = f"{findings[-1].check} failed"
    findings += [_not_applicable(name, why) for name in CHECKS[len(findings) :]]
    return Report(repr(H)[1:-1], tuple(findings))


def _findings(H: LinearOperator, seed: int) -> Iterator[Finding]:
    """Run the checks in the order of ``CHECKS``; stop iterating after a prerequisite that failed."""
    yield _data_order(H)
    random_vector = partial(normal_vector, H.n, dtype=H.dtype, device=H.device, seed=seed)
    vectors = torch.stack([random_vector(stream=stream) for stream in range(NUM_VECTORS)], dim=1)
    images = H.product(vectors)
    scale = _norm(H, images) / NUM_VECTORS**0.5
    bad = float((~torch.isfinite(images)).double().mean())
    yield _finding(
        "finite", bad, 0.0, H.blame(vectors) if bad else f"{NUM_VECTORS} products{_zero_rows(H, images)}"
    )

    eps = torch.finfo(H.dtype).eps
    digits = max(eps**0.5, min(NOISE * H.precision, TOO_ROUGH / NOISE))
    v, image = vectors[:, :1], images[:, :1]
    again = _ratio(_norm(H, H.product(v) - image), scale)
    yield _finding("repeatable", again, digits, "a product made twice")

    difference = H.product(vectors.sum(dim=1, keepdim=True)) - images.sum(dim=1, keepdim=True)
    rounding = max(_ratio(_norm(H, difference), scale * NUM_VECTORS**0.5), H.precision)
    yield _finding(
        "linear", rounding, digits, f"product with a sum of {NUM_VECTORS} vectors, and H.precision"
    )

    noise = NOISE * max(again, rounding)
    inner = H.space.dots(vectors.mT.double(), images.double())
    asymmetry = float(torch.linalg.matrix_norm(inner - inner.mT)) / (NUM_VECTORS * (NUM_VECTORS - 1)) ** 0.5
    allowed = max(eps ** (2 / 3), noise)
    yield _finding("symmetric", _ratio(asymmetry, scale), allowed, f"{NUM_VECTORS} vectors, each with each")
    yield _differences(H, v, max(eps**0.5, noise), seed)
    yield _batching(H, v, image, allowed)
    yield _constants(H)


def _zero_rows(H: LinearOperator, images: Tensor) -> str:
    """Return a remark that names the parameters whose rows are all zero: the loss may not use them."""
    if H.layout is None:
        return ""
    rows = zip(H.layout.names, (images == 0).all(dim=1).split(H.layout.numels), strict=True)
    zero = [name for name, part in rows if len(part) and bool(part.all())]
    more = f" and {len(zero) - 3} more" if len(zero) > 3 else ""
    return f"; zero in all rows of {', '.join(zero[:3])}{more}" if zero else ""


def _finding(check: str, figure: float, threshold: float, detail: str) -> Finding:
    if threshold > TOO_ROUGH:
        return _not_applicable(
            check, "the rounding of products, or kinks of the loss, leave no digits to tell by"
        )
    return Finding(check, figure, threshold, OK if figure <= threshold else FAILED, detail)


def _not_applicable(check: str, why: str) -> Finding:
    return Finding(check, math.nan, math.nan, NOT_APPLICABLE, why)


def _norm(H: LinearOperator, vectors: Tensor) -> float:
    """Return the Frobenius norm of ``[n, k]``, summed in float64."""
    return float(H.space.norm(vectors.double().reshape(-1)))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (math.inf if part else 0.0)


def _data_order(H: LinearOperator) -> Finding:
    """Check that two passes over the data give the same batches."""
    if not isinstance(H, CurvatureOperator):
        return _not_applicable("data order", NO_DATA)
    num_changed = num_batches = 0
    try:
        for data in {id(term.problem.data): term.problem.data for _, term in H.terms}.values():
            first, second = ([_digest(batch) for batch in data] for _ in range(2))
            num_changed += sum(one != other for one, other in itertools.zip_longest(first, second))
            num_batches += len(first)
    except UnstableDataError as error:
        return _finding("data order", 1.0, 0.0, str(error))
    return _finding("data order", num_changed / num_batches, 0.0, f"{num_batches} batches, read twice")


def _digest(batch: Batch) -> bytes:
    digest = hashlib.blake2b()
    for leaf in _pytree.tree_leaves(plain(batch)):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(leaf, str | bytes | Number):  # in a batch that is read whole
            digest.update(repr(leaf).encode())
    return digest.digest()


def _differences(H: LinearOperator, v: Tensor, allowed: float, seed: int) -> Finding:
    """Compare the matvec with differences of first derivatives."""
    if not isinstance(H, CurvatureOperator):
        return _not_applicable("differences", NO_DATA)
    if any(term.kind not in DIFFERENCES for _, term in H.terms):
        return _not_applicable("differences", NO_DIFFERENCES)
    try:
        if H.sample is not None and H.num_examples > NUM_EXAMPLES:
            H = H.sample(NUM_EXAMPLES, seed)
        v = _without_constants(H, v)
        image = H.product(v)[:, 0].double()
        expected, unsettled, scale = _expected(H, v[:, 0])
    except ERRORS as error:
        return _not_applicable(
            "differences", f"the loss does not take {NUM_EXAMPLES} examples in float64: {error}"
        )
    allowed = max(allowed, torch.finfo(torch.float64).eps ** (1 / 3), 4 * _ratio(unsettled, scale))
    detail = f"{H.num_examples} examples, against float64"
    finding = _finding("differences", _ratio(_norm(H, image - expected), scale), allowed, detail)
    layout = H.terms[0][1].problem.layout
    errors = [float(torch.linalg.vector_norm(leaf)) for leaf in layout.split(image - expected)]
    furthest = layout.names[errors.index(max(errors))]
    return replace(finding, suspects=(furthest,)) if finding.verdict == FAILED else finding


def _without_constants(H: CurvatureOperator, v: Tensor) -> Tensor:
    """Set the entries of constants, such as padding, to zero: their rows are zero, and differences would move them."""
    images = torch.stack([term.product(v) for _, term in H.terms])
    return torch.where((images == 0).all(dim=0) & images.any(), 0, v)


def _expected(H: CurvatureOperator, v: Tensor) -> tuple[Tensor, float, float]:
    """Return the matvec by differences, how far it depends on their step, and the norm of its terms together."""
    expected = H.sigma * v.double()
    unsettled, scale = 0.0, _norm(H, expected)
    for coefficient, term in H.terms:
        scale_of = torch.ones_like(v) if term.scale is None else term.scale
        matvec, moved = matvec_by_differences(term.kind, term.problem, scale_of * v)
        matvec, moved = scale_of.double() * matvec, moved * float(scale_of.max())
        expected = expected + coefficient * matvec
        unsettled += abs(coefficient) * moved
        scale += abs(coefficient) * _norm(H, matvec)
    return expected, unsettled, scale


def _batching(H: LinearOperator, v: Tensor, image: Tensor, allowed: float) -> Finding:
    """Compare the matvec with that over batches of another size, with a ragged last one."""
    if not isinstance(H, CurvatureOperator):
        return _not_applicable("batching", NO_DATA)
    losses = [term.problem.loss_fn for _, term in H.terms]
    if any(objective.batchnorm == "batch" for loss_fn in losses for objective in held(loss_fn, Objective)):
        return _not_applicable("batching", 'batchnorm="batch" goes by the batch that an example is in')
    if H.data.whole:
        return _not_applicable("batching", "batches are read whole, and cannot be cut otherwise")
    total, size = H.num_examples, _first_size(H.data)
    other = _other_size(size, total)
    if _first_size(as_data(H.data, batch_size=other)) == size:
        return _not_applicable("batching", f"{total} examples, {size} in a batch, cannot be cut otherwise")
    try:
        again = H.rebatched(other).product(v)
    except ERRORS as error:
        return _not_applicable("batching", f"the loss does not take batches of {other}: {error}")
    figure = _ratio(_norm(H, again - image), _norm(H, image))
    finding = _finding("batching", figure, allowed, f"{total} examples in batches of {size} and of {other}")
    moved = finding.verdict == FAILED and not _same_examples(H.data, as_data(H.data, batch_size=other))
    return replace(finding, suspects=("data",)) if moved else finding


def _same_examples(one: Data, other: Data) -> bool:
    """Return True if both begin with the same examples, as far as their first batches tell."""
    first, second = (flatten(next(iter(data)))[0] for data in (one, other))
    size = min(len(first[0]), len(second[0]))
    return all(torch.equal(a[:size], b[:size]) for a, b in zip(first, second, strict=True))


def _constants(H: LinearOperator) -> Finding:
    """Check that the loss depends on no parameters other than those that it is differentiated by."""
    if not isinstance(H, CurvatureOperator):
        return _not_applicable("constants", NO_DATA)
    names: dict[str, None] = {}
    for _, term in H.terms:
        problem = term.problem
        points = [leaf.detach().requires_grad_() for leaf in problem.leaves]
        with exact_derivatives(points[0].device), torch.enable_grad():
            value = problem.loss_fn(unflatten(points, problem.layout.spec), next(iter(problem.data)))
        names |= dict.fromkeys(captured_parameters(problem.loss_fn, value, points))
    finding = _finding(
        "constants", float(len(names)), 0.0, "parameters beside params, in the first batch's loss"
    )
    return replace(finding, suspects=tuple(names))


def _first_size(data: Data) -> int:
    return batch_size(next(iter(data)))


def _other_size(size: int, total: int) -> int:
    """Return another batch size, if possible ragged and without a batch of one, which has no statistics."""
    others = [*range(size - 1, 1, -1), *range(size + 1, min(size + 3, total))]
    whole = [other for other in others if total % other != 1 and (other > size or size % other != 1)]
    return min(whole, key=lambda other: total % other == 0, default=size)


def _with_causes(finding: Finding, H: LinearOperator) -> Finding:
    """Add suspects and remedy to a finding that failed."""
    losses = [term.problem.loss_fn for _, term in H.terms] if isinstance(H, CurvatureOperator) else []
    suspects, mend = find_suspects(finding.check, *losses)
    others = {"data order": "data", "linear": "precision"}
    where = others.get(finding.check, "loss_fn" if losses else H.name)
    return replace(finding, suspects=suspects or finding.suspects or (where,), mend=mend)
