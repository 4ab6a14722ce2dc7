"""How many examples to put through at once: ``batch_size="auto"``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from hvpkit._utils.memory import Allocations
from hvpkit.curvature.products import Leaves, Term

SMALLEST = 16
CLEARLY_SLOWER, NEARLY_BEST = 1.3, 1.03
LEAST_SECONDS, LEAST_REPEATS, MOST_REPEATS = 0.3, 2, 6
"""A trial is repeated until it took so long, or so many times; the fastest counts."""


@dataclass(frozen=True)
class Trial:
    """What a product of one batch took: ``seconds`` an example, and the most bytes at once."""

    size: int
    seconds: float
    num_bytes: int


def best_size(term_of: Callable[[int], Term], vector: Leaves, mode: str, largest: int, limit: float) -> int:
    """The smallest of the sizes, each twice the one before, whose product is nearly the fastest.

    Args:
        term_of: from a size to a batch of so many examples.
        vector: to multiply with.
        mode: of products.
        largest: examples there are.
        limit: bytes that a product may take; the smallest size is tried in any case.
    """
    trials: list[Trial] = []
    size = min(SMALLEST, largest)
    while True:
        trials.append(_try(term_of(size), vector, mode, size))
        best = min(trial.seconds for trial in trials)
        last = trials[-1]
        slower = [trial.seconds > CLEARLY_SLOWER * best for trial in trials[-2:]]  # once may be noise
        if size == largest or slower == [True, True] or 2 * last.num_bytes > limit:
            break
        size = min(2 * size, largest)
    allowed = [trial for trial in trials if trial.num_bytes <= limit] or trials[:1]
    best = min(trial.seconds for trial in allowed)
    return next(trial.size for trial in allowed if trial.seconds <= NEARLY_BEST * best)


def _try(term: Term, vector: Leaves, mode: str, size: int) -> Trial:
    with Allocations() as made:
        term(mode)([vector])
    fastest, total = math.inf, 0.0
    for repeat in range(MOST_REPEATS):
        begin = time.perf_counter()
        linear = term(mode)
        linear([vector], again=True)  # kept graphs are used more often than they are made
        float(linear([vector])[0][0].sum())  # waits for the device
        seconds = time.perf_counter() - begin
        fastest, total = min(fastest, seconds), total + seconds
        if total > LEAST_SECONDS and repeat + 1 >= LEAST_REPEATS:
            break
    return Trial(size, fastest / size, made.peak)
