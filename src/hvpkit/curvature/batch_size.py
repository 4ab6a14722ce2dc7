"""The number of examples in a batch by trial: ``batch_size="auto"``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from hvpkit._utils.memory import Allocations
from hvpkit.curvature.batches import BatchCurvature, Leaves

SMALLEST = 16
"""Examples in the first trial; each further trial has twice as many. Chosen by feel."""

CLEARLY_SLOWER = 1.3
"""Ratio of times an example: two sizes in turn that are so much slower than the best end the trials. By feel."""

NEARLY_BEST = 1.03
"""Ratio of times an example within which the smaller size, which takes less memory, is preferred. By feel."""

LEAST_SECONDS = 0.3
"""Seconds that the repeats of a trial must take together. By feel."""

LEAST_REPEATS, MOST_REPEATS = 2, 6
"""Repeats of a trial; the fastest counts. By feel."""


@dataclass(frozen=True)
class Trial:
    """The time of one batch's matvec in ``seconds`` an example, and its peak memory."""

    size: int
    seconds: float
    num_bytes: int


def best_size(
    batch_of: Callable[[int], BatchCurvature], vector: Leaves, mode: str, largest: int, limit: float
) -> int:
    """Return the smallest of the sizes 16, 32, 64 ... whose matvec is nearly the fastest for an example.

    Args:
        batch_of: from a size to a batch of so many examples.
        vector: to multiply with.
        mode: of linearization.
        largest: the most examples that a batch can have.
        limit: bytes that a matvec may take; the smallest size is tried in any case.
    """
    trials: list[Trial] = []
    size = min(SMALLEST, largest)
    while True:
        trials.append(_try(batch_of(size), vector, mode, size))
        best = min(trial.seconds for trial in trials)
        last = trials[-1]
        slower = [trial.seconds > CLEARLY_SLOWER * best for trial in trials[-2:]]  # once may be noise
        if size == largest or slower == [True, True] or 2 * last.num_bytes > limit:
            break
        size = min(2 * size, largest)
    allowed = [trial for trial in trials if trial.num_bytes <= limit] or trials[:1]
    best = min(trial.seconds for trial in allowed)
    return next(trial.size for trial in allowed if trial.seconds <= NEARLY_BEST * best)


def _try(batch: BatchCurvature, vector: Leaves, mode: str, size: int) -> Trial:
    with Allocations() as made:
        batch.linearize(mode)([vector])
    fastest, total = math.inf, 0.0
    for repeat in range(MOST_REPEATS):
        begin = time.perf_counter()
        linear = batch.linearize(mode)
        linear([vector], retain_graph=True)  # kept graphs are used more often than they are made
        float(linear([vector])[0][0].sum())  # waits for the device
        seconds = time.perf_counter() - begin
        fastest, total = min(fastest, seconds), total + seconds
        if total > LEAST_SECONDS and repeat + 1 >= LEAST_REPEATS:
            break
    return Trial(size, fastest / size, made.peak)
