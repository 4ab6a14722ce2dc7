r"""Certificates: with a stated probability over random starts, nothing of a spectrum lies beyond a value.

Lanczos from a random vector, on the congruence :math:`B = s\, P^{1/2} (H - \sigma I)\, P^{1/2}` of
:mod:`hvpkit.solvers.congruence`. How likely an eigenvalue of B hides below its Ritz values is known from the polynomial
of the start: :class:`hvpkit.solvers.common.bounds.StartPolynomial`. That is an event of the start alone, for any P that
does not depend on it; a poor likeness costs steps. Two kinds:

1. *Of a known value* :math:`\theta`. :math:`\sigma` lies beyond it by the distance that may be missed, and its vector
   is lifted. If it is unlikely that B has a negative eigenvalue, it is as unlikely, by Sylvester's law, that H has one
   beyond :math:`\sigma`. A negative Ritz value refutes :math:`\theta`. In between, where eigenvalues are near each
   other, :math:`\theta` may be the next one; the vector z of B's lowest Ritz pair, as below, tells.
2. *Search*, where the value is not known well, because the likeness lacks the vector. B's lowest Ritz pair
   :math:`(\mu, y)` gives the vector :math:`z = P^{1/2} y` of H with the quotient
   :math:`\theta = \sigma + s \mu / \|z\|^2`, a true Ritz value. An eigenvalue :math:`\lambda` of H with the vector x,
   further out than :math:`\theta` by a distance d, makes an eigenvalue of B of at most

   .. math:: \frac{s (\lambda - \sigma)}{x^\top P^{-1} x} \le \max\Big(0,\; \frac{s(\theta - \sigma) - d}{c}\Big),
             \qquad c = \|P\|^{-1},

   which is excluded like a hidden one if it lies below :math:`\mu`. Where it does not, as :math:`\sigma` lies inside or
   too far out, z is handed back, and a certificate of its value follows.

The first is exact for any likeness, the second if the likeness's spectrum is within the bounds that its own Lanczos
steps show, so that the norm of P is known. For an eigenvalue that is not the outermost one, vectors of m further out
are deflated (:func:`hvpkit.solvers.congruence.deflated`); then nothing but m eigenvalues of H lies beyond.

Cost: steps with the cost of the congruence. Memory: two vectors for each step that may be taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvpkit.solvers import krylov, pairs
from hvpkit.solvers.common.bounds import StartPolynomial, kato_temple
from hvpkit.solvers.congruence import CongruentOperator
from hvpkit.solvers.krylov import KrylovState

MAX_STEPS = 60
"""Steps of a certificate, at most: one that takes more comes from a poor likeness. Chosen by feel: good ones take 4 to
32."""

SPREAD_STEPS, MAX_SPREAD = 2, 7.0
"""Steps after which the largest Ritz value of B may be at most the second: B is near 1 for a good likeness; a twentieth
of 40,000 examples gives 2 to 4, a tenth of 1,500 up to 4."""

MAX_MAGNIFIED = 4.0
"""Sum of the lengths of what a vector is combined of, at most, in units of its own, for its matvec to be taken from
theirs. Chosen by feel."""

SETTLED = 0.3
"""Probability that B has a lower vector than the one found, at which a search may end. Its value is certified after it.
Chosen by feel."""


NOTHING = torch.empty(0, dtype=torch.float64, device="cpu")
"""No amounts."""


@dataclass(frozen=True)
class Certificate:
    """The Lanczos process on a congruence.

    Attributes:
        end: the place of the eigenvalue in the spectrum, from 0 or down from -1.
        known: of the first kind.
        sigma: the shift, over scale.
        op: B.
        seed: of its start.
        krylov: the state of the process; None before its start, which takes matvecs of the likeness.
        max_steps: steps, at most.
        amounts: by which eigenvalues further out are deflated, ``[m]``; their vectors are the first rows of P.
    """

    end: int
    known: bool
    sigma: float
    op: CongruentOperator
    seed: int
    krylov: KrylovState | None = None
    max_steps: int = MAX_STEPS
    amounts: Tensor = NOTHING

    @property
    def sign(self) -> float:
        """The sign s of B: 1 at the low end, -1 at the high one."""
        return 1.0 if self.end >= 0 else -1.0

    @property
    def step_cost(self) -> float:
        """Full-data matvecs of the next step."""
        return self.op.metric.start_cost if self.krylov is None else self.op.cost

    @property
    def num_steps(self) -> int:
        """Vectors that are multiplied."""
        return 0 if self.krylov is None else self.krylov.num_multiplied

    def step(self) -> Certificate:
        """Draw the start, or multiply once."""
        op, state = self.op, self.krylov
        if state is not None:
            return replace(self, krylov=pairs.step(op.space, state, op.image, op.metric))
        pair, share = op.metric.random_pair(self.seed)
        polynomial = StartPolynomial.of_start(op.n // 2, share)
        return replace(self, krylov=pairs.start(op.space, self.max_steps + 1, pair, polynomial))


@dataclass(frozen=True)
class Verdict:
    """The findings of a certificate so far; numbers are over scale.

    Attributes:
        certificate: to continue from.
        bound: nothing lies beyond it, with the probability asked for; None: not known yet.
        vector: of H ``[n]``: from a search, of the end; from a certificate of a known value, one whose quotient lies
            further out, or further in by no more than the error allowed.
        image: its product with H over scale, less what is deflated ``[n]``; None: not known.
        error: error bound of the vector's quotient, up to how uneven the metric is near the end, of a search with a
            bound; else infinite.
        poor: the likeness is poor.
        suspect: a vector ``[n, 1]`` whose matvec was not finite.
    """

    certificate: Certificate
    bound: float | None = None
    vector: Tensor | None = None
    image: Tensor | None = None
    error: float = math.inf
    poor: bool = False
    suspect: Tensor | None = None


def begin(
    op: CongruentOperator,
    end: int,
    sigma: float,
    *,
    known: bool,
    seed: int,
    max_steps: int = MAX_STEPS,
    amounts: Tensor = NOTHING,
) -> Certificate:
    """Return a certificate before its start; ``op`` is B."""
    return Certificate(end, known, sigma, op, seed, None, min(MAX_STEPS, max_steps), amounts)


def judge(certificate: Certificate, error: float, distance: float, failure: float) -> Verdict:
    """Return what the certificate says.

    Args:
        certificate: after one step or more.
        error: allowed of the value of the end.
        distance: beyond the value that may be missed.
        failure: probability of missing an eigenvalue further out, at most.
    """
    assert certificate.krylov is not None
    state, non_finite = krylov.compact(certificate.krylov)
    certificate, m = replace(certificate, krylov=state), state.num_multiplied
    if non_finite:
        return Verdict(certificate, suspect=pairs.halves(state.basis[m])[0].unsqueeze(1))
    ritz, norms = krylov.project(certificate.op, state)
    lowest, exhausted = float(ritz.values[0]), state.num_frontier == 0

    def unlikely(at: float, probability: float = failure) -> bool:
        component = state.polynomial.log_component(at, ritz.values, ritz.residual_norms, norms)
        return exhausted or state.polynomial.probability(component) <= probability

    poor = m >= certificate.max_steps or (m >= SPREAD_STEPS and float(ritz.values[-1]) > MAX_SPREAD)
    if certificate.known and lowest > 0:
        if not unlikely(0.0):
            return Verdict(certificate, poor=poor)
        found = Verdict(certificate, certificate.sigma)
        vector, image = _unfold(certificate, ritz.vectors[:, 0].to(state.basis))
        is_near = lowest < (distance + error) * float(certificate.op.space.norm(vector)) ** 2
        return replace(found, vector=vector, image=image) if is_near else found
    error_in_b = float(kato_temple(ritz.values, ritz.residual_norms)[0])

    def settled(size: float) -> bool:
        """Return True if y is the lowest vector of B, as far as z, of this squared norm, needs it."""
        # where it is negative another certificate follows, and the sooner the better
        inside = lowest < 0 and m > SPREAD_STEPS
        return error_in_b <= error * size and (inside or unlikely(lowest - distance * size, SETTLED))

    largest = certificate.op.metric.norm
    if not certificate.known and not settled(largest):  # no vector is longer than that
        return Verdict(certificate, poor=poor)
    vector, image = _unfold(certificate, ritz.vectors[:, 0].to(state.basis))
    if certificate.known:
        return Verdict(certificate, vector=vector, image=image)
    size = float(certificate.op.space.norm(vector)) ** 2
    at = max(0.0, (lowest / size - distance) * largest)
    if not settled(size) or (at < lowest and not unlikely(at)):
        return Verdict(certificate, poor=poor)
    found = Verdict(certificate, vector=vector, image=image)
    if (
        at >= lowest
    ):  # nor does B's accuracy say how accurate z is: B's lowest vector may be another one than H's
        return found
    bound = certificate.sigma + certificate.sign * (lowest / size - distance)
    return replace(found, bound=bound, error=error_in_b / size)


def _unfold(certificate: Certificate, combination: Tensor) -> tuple[Tensor, Tensor | None]:
    r"""Return :math:`z = P^{1/2} y` and its product with the deflated H, for y of a combination ``[m]`` of the basis.

    Of known matvecs: by B y, the second of a pair is :math:`s (H - \sigma I) z`. None if that magnifies their rounding,
    as z is much smaller than what it is combined of.
    """
    state, space = certificate.krylov, certificate.op.space
    assert state is not None
    m, (us, ws) = len(combination), pairs.halves(state.basis[: state.num_rows])
    vector = combination @ us[:m]
    if not combination.abs() @ space.row_norms(us[:m]) <= MAX_MAGNIFIED * space.norm(vector):
        return vector, None
    moved = (state.projected[: state.num_rows, :m] @ combination) @ ws
    return vector, certificate.sigma * vector + certificate.sign * moved
