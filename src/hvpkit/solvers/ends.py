r"""The wanted eigenvalues at the ends of a spectrum: what is known of each, and how far it may lie beyond its value.

A *place* is an index of the ascending spectrum: 0, 1, ... from the low end, -1, -2, ... from the high one.

A bound says that at most m eigenvalues lie further out than b. With none (m = 0) it is one of the outermost
eigenvalue. With more it says how far those m may lie beyond m Ritz values that lie further out than b: :func:`reach`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvpkit.results.plain_data import LONG
from hvpkit.solvers.common.rayleigh_ritz import num_at_low_end
from hvpkit.solvers.common.request import Request
from hvpkit.solvers.davidson import Direction

BISECTIONS = 60
"""Halvings of an interval that contains a root: as many as float64 has digits."""


@dataclass(frozen=True)
class Bound:
    """At most ``count`` eigenvalues lie further out than ``at``, which is over scale."""

    at: float
    count: int


@dataclass(frozen=True)
class End:
    """An eigenvalue at an end of the spectrum, as far as it is known; numbers are over scale.

    Attributes:
        value: the Ritz value.
        vector, residual: of its Ritz pair ``[n]``.
        error: its error bound, or predicted error times a factor.
        direction: for this pair, if it is known.
        num_directions: that were followed.
        bound: by a certificate of this place.
        num_refuted: certificates that ended with a vector and without a bound.
        promised: error bound of the next value, by a certificate.
        num_certificates: that began.
    """

    value: float
    vector: Tensor = field(metadata=LONG)
    residual: Tensor = field(metadata=LONG)
    error: float
    direction: Direction | None = None
    num_directions: int = 0
    bound: Bound | None = None
    num_refuted: int = 0
    promised: float = math.inf
    num_certificates: int = 0


def outwards(place: int) -> float:
    """Return the sign of the direction out of the spectrum."""
    return -1.0 if place >= 0 else 1.0


def rank(place: int) -> int:
    """Return how many eigenvalues lie further out."""
    return place if place >= 0 else -place - 1


def wanted_sides(request: Request) -> list[list[int]]:
    """Return the places asked for at each end, from the outermost inwards; the high end first: it is the easier one."""
    num_low = num_at_low_end(request.k, request.which)
    sides = [list(range(-1, num_low - request.k - 1, -1)), list(range(num_low))]
    return [side for side in sides if side]


def ascending(places: list[int]) -> list[int]:
    """Return places in the order of the spectrum."""
    return sorted(places, key=lambda place: (place < 0, place))


def distinct(places: Iterable[int], num_values: int) -> list[int]:
    """Return places that exist among so many Ritz values, one for each of these."""
    return [*{place % num_values: place for place in places if rank(place) < num_values}.values()]


def reach(values: Tensor, gram: Tensor, at: float) -> Tensor:
    r"""Return how far above Ritz values ``[m]`` the m largest eigenvalues lie at most, if no others lie above ``at``.

    The values ascend and lie above ``at``. With the Ritz vectors X, their residuals R, G = R'R ``[m, m]``, and
    :math:`\Theta` the values less ``at``, the operator less ``at`` is :math:`\begin{pmatrix} \Theta & R' \\ R & K
    \end{pmatrix}`. It has m positive eigenvalues, as many as :math:`\Theta`, so that by Haynsworth's additivity of
    inertia :math:`K \le R\, \Theta^{-1} R' \le \kappa`. By the same for :math:`t > \kappa`, at most i eigenvalues lie
    above t if the i + 1st largest one of :math:`\Theta + G / (t - \kappa)` does not.

    Source:
        Haynsworth, Linear Algebra and its Applications 1 (1968) 73-81, doi:10.1016/0024-3795(68)90050-5.

    Example:
        >>> import torch
        >>> reach(torch.tensor([3.0, 4.0]), torch.diag(torch.tensor([0.01, 0.01])), 1.0)
        tensor([0.0050, 0.0033])
    """
    theta = values - at
    root = theta.rsqrt()
    kappa = float(torch.linalg.eigvalsh(root[:, None] * gram * root)[-1])
    largest = float(torch.linalg.eigvalsh(gram)[-1])
    distances = []
    for place, value in enumerate(theta.tolist()):
        gap = value - kappa
        low, high = max(0.0, -gap), (math.sqrt(gap * gap + 4 * largest) - gap) / 2  # one residual for all
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            above = gap + middle
            shifted = torch.diag(theta) + gram / above if above > 0 else None
            inside = shifted is not None and float(torch.linalg.eigvalsh(shifted)[place]) <= value + middle
            low, high = (low, middle) if inside else (middle, high)
        distances.append(high)
    return values.new_tensor(distances)


def reach_of(ends: Mapping[int, End], gram: Tensor, place: int, bound: Bound) -> float:
    """Return how far beyond its value the eigenvalue of a place may lie, by a bound of its end of the spectrum.

    ``ends`` are in the order of the spectrum, ``gram`` are the inner products of their residuals.
    """
    sign = outwards(place)
    if bound.count <= rank(place):
        return max(0.0, sign * (bound.at - ends[place].value))
    places = list(ends)
    beyond = [
        index
        for index, other in enumerate(places)
        if outwards(other) == sign and sign * (ends[other].value - bound.at) > 0
    ]
    if len(beyond) != bound.count or places.index(place) not in beyond:
        return math.inf
    order = beyond[:: int(sign)]
    values = torch.tensor(
        [sign * ends[places[index]].value for index in order], dtype=torch.float64, device="cpu"
    )
    distances = reach(values, gram[order][:, order], sign * bound.at)
    return float(distances[order.index(places.index(place))])
