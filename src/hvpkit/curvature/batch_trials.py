"""Time and memory of a pass over the data, from trials with its first batches."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass

from hvpkit._utils.memory import Allocations
from hvpkit._utils.random import normal_vector
from hvpkit.curvature.batches import Leaves, LinearMap, weighted_batches
from hvpkit.curvature.operator import Curvature

MAX_BATCHES = 5
"""Batches that are timed, at most. By feel."""


@dataclass(frozen=True)
class BatchTrials:
    """Times of the first batches' matvecs with one vector, in seconds an example, and their memory.

    Attributes:
        fresh: to read a batch, to linearize its loss, and to multiply.
        kept: to multiply alone, by a graph that is kept.
        product_bytes: of the first batch's matvec at its peak, beside vectors.
        graph_bytes: of the first batch's graph, for an example.
        keeps: True if graphs are kept between passes in this mode.
    """

    fresh: tuple[float, ...]
    kept: tuple[float, ...]
    product_bytes: float
    graph_bytes: float
    keeps: bool


def time_batches(term: Curvature, max_seconds: float, seed: int) -> BatchTrials:
    """Time the matvecs of at least one batch, and of up to five within ``max_seconds``, with a random vector.

    They are the first of all batches, whatever other ranks share them.

    The first batch is multiplied once before, as its first matvec may take longer, unless that takes too long.
    """
    problem, mode = term.problem, term.recipe.mode
    vector = normal_vector(problem.layout.n, dtype=problem.leaves[0].dtype, device=problem.device, seed=seed)
    column, begin = [problem.layout.split(vector)], time.perf_counter()
    fresh: list[float] = []
    kept: list[float] = []
    product_bytes = graph_bytes = 0.0
    with term.settings(), closing(weighted_batches(problem.data.alone)) as batches:
        while len(fresh) < MAX_BATCHES and (not fresh or time.perf_counter() - begin < max_seconds):
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            read = time.perf_counter() - start
            matrix = term.of_batch(problem.loss_fn, problem.layout, problem.leaves, batch)
            if not fresh:
                start = time.perf_counter()
                with Allocations() as held:
                    linear = matrix.linearize(mode)
                    graph = float(held.now)
                    multiplied = _time(linear, column)
                product_bytes, graph_bytes = float(held.peak), graph / batch.size
                linearized = time.perf_counter() - start - multiplied
            if fresh or time.perf_counter() - begin < max_seconds:
                start = time.perf_counter()
                linear = matrix.linearize(mode)
                _time(linear, column)
                linearized, multiplied = time.perf_counter() - start, _time(linear, column, last=True)
            fresh.append((read + linearized) / batch.size)
            kept.append(multiplied / batch.size)
    return BatchTrials(
        tuple(fresh), tuple(kept), product_bytes, graph_bytes, keeps=mode == "reverse-over-reverse"
    )


def _time(linear: LinearMap, column: list[Leaves], *, last: bool = False) -> float:
    """Multiply, wait for the device, and return the seconds."""
    start = time.perf_counter()
    leaves = linear(column, retain_graph=not last)[0]
    float(leaves[0].reshape(-1)[:1].sum())
    return time.perf_counter() - start
