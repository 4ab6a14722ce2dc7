"""Preflight: a few products, and one look at the modules, before an operator is trusted."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hvpkit._utils.random import normal_vector, resolve_seed
from hvpkit._utils.typing import Batch, Seed
from hvpkit.autodiff.captured import captured_parameters
from hvpkit.autodiff.exact import exact_derivatives
from hvpkit.autodiff.pytree import batch_size, flatten, join
from hvpkit.curvature.constructors import empirical_fisher, ggn, hessian
from hvpkit.data import Data, as_data
from hvpkit.diagnostics.finite_differences import DIFFERENCES, product_by_differences
from hvpkit.diagnostics.known_causes import find_suspects, held
from hvpkit.errors import UnstableDataError
from hvpkit.objective import Objective
from hvpkit.operators.base import LinearOperator, Origin
from hvpkit.solvers.driver import full_precision

OK, FAILED, NOT_APPLICABLE = "ok", "failed", "not applicable"

PREREQUISITES = ("data order", "finite", "repeatable")
CHECKS = (*PREREQUISITES, "linear", "symmetric", "differences", "batching", "constants")

NUM_VECTORS = 4
"""Random vectors in the first product; they make six pairs."""

NUM_EXAMPLES = 16
"""Of the data, how many are enough to see whether derivatives are right."""

NOISE = 10.0
"""How many times the rounding seen in products may be in a figure."""

TOO_ROUGH = 0.1
"""A threshold beyond which a check would say nothing."""

ERRORS = (ArithmeticError, RuntimeError, TypeError, ValueError)
NO_ORIGIN = "this operator does not tell its loss and data"
NO_SECOND_WAY = "a Fisher matrix does not tell which targets were drawn"


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        figure: what was measured, 0 at best; NaN where the check does not apply.
        threshold: the most that passes; NaN likewise.
        verdict: ``"ok"``, ``"failed"`` or ``"not applicable"``.
        detail: what was looked at, or why it was not.
        suspects: where it failed, what is known to fail so: modules, else the parameters that are furthest off,
            the loss or the data.
        mend: where it failed, what to do.
    """

    check: str
    figure: float
    threshold: float
    verdict: str
    detail: str
    suspects: tuple[str, ...] = ()
    mend: str = ""


@dataclass(frozen=True, repr=False)
class Report:
    """What :func:`check` found; prints as a table.

    Attributes:
        operator: what was looked at.
        findings: one for each check.
    """

    operator: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self._failed()

    def _failed(self) -> list[str]:
        return [finding.check for finding in self.findings if finding.verdict == FAILED]

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
def check(H: LinearOperator, *, seed: Seed = 0) -> Report:
    r"""Whether an operator is what solvers take it for: symmetric, and the curvature that it says it is.

    With random vectors v, w, relative to the length of products, and with the relative precision :math:`\epsilon` of
    the dtype:

    ===========  ===============================================================  ===================================
    check        figure                                                           at most
    ===========  ===============================================================  ===================================
    data order   share of the batches that a second pass gives otherwise          0
    finite       share of the entries of products that are NaN or infinite        0
    repeatable   difference of the same product, made twice                       :math:`\epsilon^{1/2}`
    linear       :math:`\|H(v + w) - Hv - Hw\|`, the rounding of products         :math:`\epsilon^{1/2}`
    symmetric    :math:`|w'Hv - v'Hw|`, root mean square over pairs: estimates    :math:`\epsilon^{2/3}`
                 :math:`\|H - H'\|_F` over :math:`\|H\|_F`
    differences  distance from the product by central differences of first        :math:`\epsilon^{1/2}`, and not
                 derivatives, made in float64, on 16 examples at random           less than :math:`6\cdot10^{-6}`
    batching     distance from the product over batches of another size           :math:`\epsilon^{2/3}`
    constants    number of parameters that the loss depends on and that are not   0
                 in ``params``
    ===========  ===============================================================  ===================================

    Where ``H.precision`` is less than the dtype's, as by finite differences, repeatable and linear allow ten times as
    much, up to 0.01. The last three allow ten times the rounding that was seen, differences also four times what
    another step changes; where this is more than 0.1, a check does not apply. Data order, differences, batching
    and constants need the loss and the data, which only operators of curvature tell. Where one of the first three
    fails, those after it do not apply.

    Args:
        H: the operator.
        seed: of vectors and of examples.

    Returns:
        A report: ``ok``, and ``findings`` with figures, thresholds and verdicts. A check that failed names what is
        known to fail so, by the types of the modules that the loss holds, and what to do.

    Raises:
        TypeError: ``H`` is no :class:`hvpkit.LinearOperator`.

    Cost:
        7 full-data products, and two passes that only read the data. ``check(H.sample(1000, 0))`` looks at a random
        part of it.

    Example:
        >>> import torch, hvpkit as hk
        >>> report = check(hk.aslinearoperator(torch.tensor([[1.0, 2.0], [3.0, 4.0]])))
        >>> report.ok, report
        (False, <Report: symmetric failed>)
    """
    findings: list[Finding] = []
    for finding in _findings(H, resolve_seed(seed)):
        findings.append(finding)
        if finding.verdict == FAILED:
            findings[-1] = _explained(finding, H)
            if finding.check in PREREQUISITES:
                break
    why = f"{findings[-1].check} failed"
    findings += [_skipped(name, why) for name in CHECKS[len(findings) :]]
    return Report(repr(H)[1:-1], tuple(findings))


def _findings(H: LinearOperator, seed: int) -> Iterator[Finding]:
    """The checks in the order of ``CHECKS``; after a prerequisite that failed, the next is not to be asked for."""
    yield _data_order(H.origin)
    random_vector = partial(normal_vector, H.n, dtype=H.dtype, device=H.device, seed=seed)
    vectors = torch.stack([random_vector(stream=stream) for stream in range(NUM_VECTORS)], dim=1)
    images = H.product(vectors)
    scale = _length(H, images) / NUM_VECTORS**0.5
    bad = float((~torch.isfinite(images)).double().mean())
    yield _judged("finite", bad, 0.0, H.blame(vectors) if bad else f"{NUM_VECTORS} products")

    eps = torch.finfo(H.dtype).eps
    digits = max(eps**0.5, min(NOISE * H.precision, TOO_ROUGH / NOISE))
    v, image = vectors[:, :1], images[:, :1]
    again = _ratio(_length(H, H.product(v) - image), scale)
    yield _judged("repeatable", again, digits, "a product made twice")

    difference = H.product(vectors.sum(dim=1, keepdim=True)) - images.sum(dim=1, keepdim=True)
    rounding = max(_ratio(_length(H, difference), scale * NUM_VECTORS**0.5), H.precision)
    yield _judged("linear", rounding, digits, f"product with a sum of {NUM_VECTORS} vectors, and H.precision")

    noise = NOISE * max(again, rounding)
    inner = H.space.dots(vectors.mT.double(), images.double())
    asymmetry = float(torch.linalg.matrix_norm(inner - inner.mT)) / (NUM_VECTORS * (NUM_VECTORS - 1)) ** 0.5
    allowed = max(eps ** (2 / 3), noise)
    yield _judged("symmetric", _ratio(asymmetry, scale), allowed, f"{NUM_VECTORS} vectors, each with each")
    yield _differences(H, v, max(eps**0.5, noise), seed)
    yield _batching(H, v, image, allowed)
    yield _constants(H.origin)


def _judged(check: str, figure: float, threshold: float, detail: str) -> Finding:
    if threshold > TOO_ROUGH:
        return _skipped(check, "the rounding of products, or kinks of the loss, leave no digits to tell by")
    return Finding(check, figure, threshold, OK if figure <= threshold else FAILED, detail)


def _skipped(check: str, why: str) -> Finding:
    return Finding(check, math.nan, math.nan, NOT_APPLICABLE, why)


def _length(H: LinearOperator, vectors: Tensor) -> float:
    """Frobenius norm of ``[n, k]``, summed in float64."""
    return float(H.space.norm(vectors.double().reshape(-1)))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (math.inf if part else 0.0)


def _data_order(origin: Origin | None) -> Finding:
    """Do two passes give the same batches?"""
    if origin is None:
        return _skipped("data order", NO_ORIGIN)
    try:
        first, second = ([_digest(batch) for batch in origin.data] for _ in range(2))
    except UnstableDataError as error:
        return _judged("data order", 1.0, 0.0, str(error))
    changed = sum(one != other for one, other in itertools.zip_longest(first, second))
    return _judged("data order", changed / len(first), 0.0, f"{len(first)} batches, read twice")


def _digest(batch: Batch) -> bytes:
    digest = hashlib.blake2b()
    for leaf in flatten(batch)[0]:
        digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
        digest.update(leaf.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _differences(H: LinearOperator, v: Tensor, allowed: float, seed: int) -> Finding:
    """Does the product agree with differences of first derivatives?"""
    origin = H.origin
    if origin is None:
        return _skipped("differences", NO_ORIGIN)
    if origin.kind not in DIFFERENCES:
        return _skipped("differences", NO_SECOND_WAY)
    try:
        if H.sample is not None and origin.data.num_examples > NUM_EXAMPLES:
            H = H.sample(NUM_EXAMPLES, seed)
            origin = H.origin or origin
        image = H.product(v)
        # A row of zeros is that of a constant, as of padding. Differences would move it.
        v = torch.where((image == 0) & image.any(), 0, v)
        image = H.product(v)[:, 0].double()
        expected, unsettled = product_by_differences(origin, v[:, 0])
    except ERRORS as error:
        return _skipped("differences", f"the loss does not take {NUM_EXAMPLES} examples in float64: {error}")
    length = _length(H, expected)
    allowed = max(allowed, torch.finfo(torch.float64).eps ** (1 / 3), 4 * _ratio(unsettled, length))
    detail = f"{origin.data.num_examples} examples, against float64"
    finding = _judged("differences", _ratio(_length(H, image - expected), length), allowed, detail)
    shares = [float(torch.linalg.vector_norm(leaf)) for leaf in origin.layout.split(image - expected)]
    furthest = origin.layout.names[shares.index(max(shares))]
    return replace(finding, suspects=(furthest,)) if finding.verdict == FAILED else finding


def _batching(H: LinearOperator, v: Tensor, image: Tensor, allowed: float) -> Finding:
    """Do batches of another size, with a ragged last one, give the same product?"""
    origin = H.origin
    if origin is None:
        return _skipped("batching", NO_ORIGIN)
    if origin.kind not in CONSTRUCTORS:
        return _skipped("batching", NO_SECOND_WAY)
    if any(objective.batchnorm == "batch" for objective in held(origin.loss_fn, Objective)):
        return _skipped("batching", 'batchnorm="batch" goes by the batch that an example is in')
    total, size = origin.data.num_examples, _first_size(origin.data)
    other = _other_size(size, total)
    data = as_data(origin.data, batch_size=other)
    if _first_size(data) == size:
        return _skipped("batching", f"{total} examples, {size} in a batch, cannot be cut otherwise")
    params = origin.layout.unflatten(join(origin.leaves))
    try:
        again = CONSTRUCTORS[origin.kind](origin.loss_fn, params, data, mode=origin.mode).product(v)
    except ERRORS as error:
        return _skipped("batching", f"the loss does not take batches of {other}: {error}")
    figure = _ratio(_length(H, again - image), _length(H, image))
    return _judged("batching", figure, allowed, f"{total} examples in batches of {size} and of {other}")


def _constants(origin: Origin | None) -> Finding:
    """Check that the loss depends on no parameters other than those that it is differentiated by."""
    if origin is None:
        return _skipped("constants", NO_ORIGIN)
    points = [leaf.detach().requires_grad_() for leaf in origin.leaves]
    with exact_derivatives(points[0].device), torch.enable_grad():
        value = origin.loss_fn(origin.layout.unflatten(join(points)), next(iter(origin.data)))
    names = captured_parameters(origin.loss_fn, value, points)
    finding = _judged(
        "constants", float(len(names)), 0.0, "parameters beside params, in the first batch's loss"
    )
    return replace(finding, suspects=tuple(names))


CONSTRUCTORS: dict[str, Callable[..., LinearOperator]] = {
    "hessian": hessian,
    "ggn": ggn,
    "empirical-fisher": empirical_fisher,
}


def _first_size(data: Data) -> int:
    return batch_size(next(iter(data)))


def _other_size(size: int, total: int) -> int:
    """Another batch size, ragged if possible and without a batch of one, which has no statistics; else the same."""
    others = [*range(size - 1, 1, -1), *range(size + 1, min(size + 3, total))]
    whole = [other for other in others if total % other != 1 and (other > size or size % other != 1)]
    return min(whole, key=lambda other: total % other == 0, default=size)


def _explained(finding: Finding, H: LinearOperator) -> Finding:
    """The finding that failed, with suspects and mend."""
    suspects, mend = find_suspects(finding.check, H.origin and H.origin.loss_fn)
    others = {"data order": "data", "linear": "precision"}
    where = others.get(finding.check, "loss_fn" if H.origin else H.name)
    return replace(finding, suspects=suspects or finding.suspects or (where,), mend=mend)
