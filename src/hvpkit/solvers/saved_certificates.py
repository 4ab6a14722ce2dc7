"""Checkpoints of :class:`hvpkit.solvers.certified_davidson.CertifiedDavidson`: its state as plain data, and back.

Operators are left out, and made again from what they are of: samples by their seed, metrics by their rows.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from hvpkit.solvers import krylov, pairs
from hvpkit.solvers.certificate import Certificate
from hvpkit.solvers.certified_davidson import CertifiedDavidson, CertifiedDavidsonState
from hvpkit.solvers.checkpoint import Witness
from hvpkit.solvers.common.block_subspace import BlockSubspace
from hvpkit.solvers.common.bounds import StartPolynomial
from hvpkit.solvers.congruence import CongruentOperator, Metric, Start
from hvpkit.solvers.davidson import Direction
from hvpkit.solvers.ends import Bound, End
from hvpkit.solvers.krylov import KrylovState
from hvpkit.solvers.plain_state import Vectors, plain, plain_fields, restored
from hvpkit.solvers.sample_space import SampleSpace

ON_CPU = ("values", "amounts")
"""Fields that are on the CPU wherever the operator is."""

T = TypeVar("T")


def pack(state: CertifiedDavidsonState) -> dict[str, Any]:
    """Return the state as plain data, as :func:`hvpkit.solvers.plain_state.plain` makes them."""
    m, certificate, suspect = state.num_rows, state.certificate, state.suspect
    saved = plain_fields(state, without=("rows", "images", "best", "suspect", "ends", "certificate"))
    if certificate is not None:
        process = certificate.krylov
        saved["certificate"] = {
            **plain_fields(certificate, without=("op", "krylov")),
            "metric": plain_fields(certificate.op.metric, without=("likeness",)),
            "krylov": None if process is None else plain(_as_vectors(krylov.trim(process))),
        }
    return {
        **saved,
        "rows": Vectors(state.rows[: m + state.num_new]),
        "images": Vectors(state.images[:m]),
        "best": {**plain_fields(state.best, without=("vectors",)), "vectors": Vectors(state.best.vectors.mT)},
        "suspect": None if suspect is None else Vectors(suspect.mT),
        "ends": [[place, plain(end)] for place, end in state.ends.items()],
    }


def _as_vectors(state: KrylovState) -> KrylovState:
    """Return a state of pairs whose basis has a row for each half: vectors of the operator's size."""
    return replace(state, basis=state.basis.reshape(2 * len(state.basis), -1))


def unpack(solver: CertifiedDavidson, saved: dict[str, Any]) -> CertifiedDavidsonState:
    """Return the state that was packed, with the operators of the solver."""
    fresh, device, suspect = solver.init(), solver.op.device, saved["suspect"]
    best = {**saved["best"], "vectors": saved["best"]["vectors"].mT}
    saved = {**saved, "best": best, "suspect": None if suspect is None else suspect.mT.to(device)}
    names = [field.name for field in fields(BlockSubspace)]
    subspace: BlockSubspace = restored(BlockSubspace(**{name: getattr(fresh, name) for name in names}), saved)
    sample = saved["sample"]
    state = replace(
        fresh,
        **{name: getattr(subspace, name) for name in names},
        **{name: saved[name] for name in ("gram", "target", "expected", "level", "verified")},
        gains=tuple(saved["gains"]),
        sample=None if sample is None else _rebuilt(SampleSpace, sample, device),
        ends={place: _end(end, device) for place, end in saved["ends"]},
    )
    found = saved.get("certificate")
    if found is None:
        return state
    parts = {
        **found["metric"],
        "coefficients": tuple(found["metric"]["coefficients"]),
        "start": Start(**found["metric"]["start"]),
    }
    metric = _rebuilt(Metric, {**parts, "likeness": solver.likeness(state)}, device)
    op = solver.certificate_operator(state, metric, found["end"], found["sigma"], found["amounts"])
    kept = {name: value for name, value in found.items() if name != "metric"}
    certificate = Certificate(**{**kept, "op": op, "krylov": _process(op, found)})
    return replace(state, certificate=certificate)


def _process(op: CongruentOperator, found: dict[str, Any]) -> KrylovState | None:
    """Return the process of a saved certificate, with room for the rest of it."""
    if found["krylov"] is None:
        return None
    rows = found["krylov"]["basis"]
    process = {**found["krylov"], "basis": rows.reshape(len(rows) // 2, -1)}
    first, polynomial = process["basis"][0].to(op.device), StartPolynomial.of_start(op.n // 2, 1.0)
    state: KrylovState = restored(pairs.start(op.space, found["max_steps"] + 1, first, polynomial), process)
    return state


def verify(solver: CertifiedDavidson, state: CertifiedDavidsonState) -> CertifiedDavidsonState:
    """Verify by one matvec, and one of a certificate in progress, that a loaded state belongs to the operators.

    Raises:
        ValueError: it belongs to others.
    """
    m = state.num_rows
    known = Witness.empty(solver.op).including(solver.op.space, state.rows[:m], state.images[:m])
    cost = known.check(solver.op, state.scale, state.norm)
    if state.certificate is not None:
        cost += _verify_certificate(state.certificate)
    return replace(state, num_matvecs=state.num_matvecs + cost, verified=state.verified + cost)


def _verify_certificate(certificate: Certificate) -> float:
    """Verify a certificate in progress by a matvec, or before the first one by one of its metric; return the cost."""
    op, process = certificate.op, certificate.krylov
    if process is None:
        return 0.0
    if process.num_multiplied:
        return krylov.witness(process).check(op, process.scale, float(process.norm))
    u, w = pairs.halves(process.basis[0])
    metric = replace(op, product=op.metric, n=op.n // 2, cost=op.metric.cost)
    return Witness(w, u, 1).check(metric)


def _rebuilt(kind: type[T], saved: dict[str, Any], device: torch.device) -> T:
    """Return a dataclass of these fields, tensors on the device."""

    def placed(name: str, value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) and name not in ON_CPU else value

    return kind(**{name: placed(name, value) for name, value in saved.items()})


def _end(saved: dict[str, Any], device: torch.device) -> End:
    direction, bound = saved["direction"], saved["bound"]
    end = _rebuilt(End, saved, device)
    return replace(
        end,
        direction=None if direction is None else _rebuilt(Direction, direction, device),
        bound=None if bound is None else Bound(**bound),
    )
