r"""Bounds of the distance between Ritz values and the ends of the spectrum.

Four statements, from certain to likely. Let :math:`A` be symmetric with eigenvalues
:math:`\lambda_1 \le \dots \le \lambda_n`, and u a unit vector with :math:`\theta = u'Au` and
:math:`r = \|Au - \theta u\|`.

1. **Inner.** :math:`\lambda_1 \le \theta \le \lambda_n`, as a mean of eigenvalues with weights
   :math:`(x_i'u)^2`. More generally the j-th Ritz value from an end lies inside of the j-th eigenvalue
   (Cauchy).
2. **Residual.** Some eigenvalue lies within r of :math:`\theta`: :math:`r^2 = \sum_i (\lambda_i - \theta)^2
   (x_i'u)^2 \ge \min_i (\lambda_i - \theta)^2`. Which one is not said.
3. **Residual squared over gap** (:func:`kato_temple`), where the neighbours' distance is bounded.
4. **Outer** (:class:`StartPolynomial`, :func:`uniform_distance`): no eigenvalue lies further out, with a probability
   over random start vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

TINY = 1e-300
"""Positive stand-in for zero in divisions and logarithms of float64."""


def kato_temple(values: Tensor, residual_norms: Tensor) -> Tensor:
    r"""Return error bounds ``[m]`` of ascending Ritz values, by residual or by its square over the gap.

    If no eigenvalue but :math:`\lambda_1` lies below :math:`\nu > \theta`, then
    :math:`\sum_i (\lambda_i - \lambda_1)(\lambda_i - \nu)(x_i'u)^2 \ge 0`, which is
    :math:`r^2 + (\theta - \lambda_1)(\theta - \nu) \ge 0`, so that

    .. math:: 0 \le \theta - \lambda_1 \le \frac{r^2}{\nu - \theta}.

    Here :math:`\nu` is the next Ritz value less its own residual's norm, on both sides for values between others.
    That no eigenvalue is hidden nearer than the neighbour's interval is an assumption, to which
    :class:`StartPolynomial` gives a probability. Where intervals overlap no gap is known, and the residual stays the
    bound.

    Source:
        Kato, J. Phys. Soc. Japan 4 (1949) 334-339, doi:10.1143/JPSJ.4.334; Parlett, The Symmetric Eigenvalue
        Problem, SIAM (1998), section 11.7, doi:10.1137/1.9781611971163.

    Example:
        >>> import torch
        >>> kato_temple(torch.tensor([0.0, 1.0]), torch.tensor([0.1, 0.5]))
        tensor([0.0200, 0.2778])
    """
    low, high = values - residual_norms, values + residual_norms
    far = values.new_full((1,), math.inf)
    gap = torch.minimum(torch.cat([low[1:], far]) - values, values - torch.cat([-far, high[:-1]]))
    squared = torch.where(gap > 0, residual_norms**2 / gap.clamp(min=TINY), math.inf)
    return torch.minimum(residual_norms, squared)


@dataclass(frozen=True)
class StartPolynomial:
    r"""The polynomial that a Krylov process applied to its start vector.

    The next basis vector is :math:`f = p(A) v`, with v the start and

    .. math:: p(\lambda) = \frac{\prod_i (\lambda - \rho_i) \prod_j (\lambda - \theta_j)}{\prod \beta},

    :math:`\theta_j` the Ritz values now, :math:`\rho_i` those that restarts discarded, and :math:`\beta` the
    norms that new vectors had before they were normalised. An eigenvector x of :math:`\lambda` has the component
    :math:`x'f = p(\lambda)\, x'v` on f, and, since :math:`AV = VT + fb'`, the components
    :math:`(\lambda - T)^{-1} b\, x'f` on the basis. All of them together are at most 1:

    .. math:: |x'v| \le G(\lambda) = \Big(|p(\lambda)|
              \sqrt{1 + \textstyle\sum_j r_j^2 / (\lambda - \theta_j)^2}\Big)^{-1},

    with :math:`r_j` the residuals' norms. Outside of the Ritz values G falls with every step. If v is random,
    :math:`|x'v|` is very rarely as small as that: an eigenvalue so far out is unlikely.

    Attributes:
        n: dimension.
        share: the part of v that is uniform on the sphere, the rest being arbitrary: 1 for a random start. The
            probability that :math:`|x'v|` is small is largest where the rest adds nothing.
        roots: :math:`\rho_i`, ``[q]``.
        log_norms: sum of :math:`\log \beta` before the last restart.

    Source:
        Van Dorsselaer, Hochstenbach, van der Vorst, SIAM J. Matrix Anal. Appl. 22 (2000) 837-852,
        doi:10.1137/S0895479899366859; here through restarts, and with the components on the basis.
    """

    n: int
    share: float
    roots: Tensor
    log_norms: float = 0.0

    @classmethod
    def of_start(cls, n: int, share: float) -> StartPolynomial:
        """Return the polynomial 1."""
        return cls(n, share, torch.empty(0, dtype=torch.float64, device="cpu"))

    def restarted(self, discarded: Tensor, norms: Tensor) -> StartPolynomial:
        """Return the polynomial after a restart that discards Ritz values; ``norms`` are those since the last one."""
        total = self.log_norms + float(norms.log().sum())
        return replace(self, roots=torch.cat([self.roots, discarded]), log_norms=total)

    def log_component(self, at: float, values: Tensor, residual_norms: Tensor, norms: Tensor) -> float:
        r"""Return :math:`\log G(\lambda)` at ``at``, for Ritz values, residuals ``[m]`` and norms ``[l]``."""
        # a call of NumPy costs a third of one of torch; ignored, whatever the caller's np.seterr says
        with np.errstate(divide="ignore", over="ignore", under="ignore"):
            distances = np.abs(at - values.numpy()).clip(TINY)
            outside = np.abs(at - self.roots.numpy()).clip(TINY)
            log_norms = self.log_norms + float(np.log(norms.numpy()).sum())
            log_p = float(np.log(distances).sum() + np.log(outside).sum()) - log_norms
            ratios = residual_norms.numpy() / distances
            peak = max(float(ratios.max()), 1.0)
            return -log_p - math.log(peak) - 0.5 * math.log(peak**-2 + float(np.square(ratios / peak).sum()))

    def probability(self, log_component: float) -> float:
        r"""Return the probability that :math:`|x'v|` is at most that.

        For v uniform on the sphere, :math:`(x'v)^2` has the distribution Beta(1/2, (n - 1)/2).
        """
        from scipy.special import betainc

        size = math.exp(min(log_component, 0.0)) / self.share if self.share else math.inf
        if self.n == 1 or size >= 1:
            return 1.0 if size >= 1 else 0.0
        return float(betainc(0.5, (self.n - 1) / 2, size * size))

    def distance(
        self, end: int, confidence: float, values: Tensor, residual_norms: Tensor, norms: Tensor
    ) -> float:
        """Return how far beyond the lowest (``end=0``) or highest (``end=-1``) Ritz value the spectrum may reach.

        With probability ``confidence`` or more over random starts, for either end.
        """
        edge, outward = float(values[end]), -1.0 if end == 0 else 1.0

        def likely(distance: float) -> bool:
            at = edge + outward * distance
            return self.probability(self.log_component(at, values, residual_norms, norms)) > 1 - confidence

        if not self.share or not len(norms):
            return math.inf
        far = max(float(residual_norms[end]), TINY)
        while likely(far):
            far *= 2
            if far > 1e12 * max(float(values.abs().max()), TINY):
                return math.inf
        near = 0.0
        for _ in range(50):
            middle = (near + far) / 2
            near, far = (middle, far) if likely(middle) else (near, middle)
        return far


def uniform_distance(spread: float, n: int, num_steps: int, confidence: float) -> float:
    r"""Return the same distance from the number of steps alone, for any spectrum.

    After k steps from a random start,

    .. math:: P\big(\lambda_n - \theta_{\max} > \epsilon (\lambda_n - \lambda_1)\big)
              \le 1.648 \sqrt{n}\, e^{-\sqrt\epsilon (2k - 1)},

    and the same at the low end. Where both hold, the true spread is at most ``spread / (1 - 2 epsilon)``. This is
    the fallback where the polynomial is not known, as in a block method, whose space holds that of its first
    vector.

    Args:
        spread: largest less smallest Ritz value.
        n: dimension.
        num_steps: degree of the Krylov space, k.
        confidence: of each end.

    Source:
        Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl. 13 (1992) 1094-1122, doi:10.1137/0613066.

    Example:
        >>> uniform_distance(1.0, n=1000, num_steps=50, confidence=0.99) < 0.01
        True
    """
    failure = (1 - confidence) / 2  # both ends have to hold
    root = math.log(1.648 * math.sqrt(n) / failure) / (2 * num_steps - 1)
    epsilon = root * root
    return math.inf if epsilon >= 0.5 else epsilon * spread / (1 - 2 * epsilon)
