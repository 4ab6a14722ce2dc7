"""Trace estimates from small matrices: probes against a basis that they have, or have not, a part in.

Source: Epperly, Tropp, Webber, SIAM J. Matrix Anal. Appl. 45 (2024) 1-23, doi:10.1137/23M1548323.

Departures from the paper:
1. It takes the products of probes for independent; here those that are not are safe (:func:`left_out`): operators
   of low rank, and signs that happen to agree.
2. Its standard error takes the samples for independent, and is then too small by a quarter or more; here what they
   share is estimated and added (:func:`shared_variance`).
3. Its small matrices are formed anew when all probes are known; here they grow with them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hvpkit.estimators.estimate import Mean, mean_of
from hvpkit.estimators.sketch import Small


def left_out(factor: Tensor, eps: float) -> Tensor:
    r"""For each column of R ``[r, k]``, the unit direction that it alone has a part in, or zero: ``[r, k]``.

    It is orthogonal to all other columns: :math:`s_i \propto (R^+)'e_i`, unless column i is a combination of them.
    Singular values at rounding, ``eps`` of the largest, count as zero.
    """
    u, singular, v = torch.linalg.svd(factor, full_matrices=False)
    real = singular > eps * len(factor) * singular.amax() if len(singular) else singular > 0
    share = v * real[:, None]
    directions = u @ (share / torch.where(real, singular, 1.0)[:, None])
    lengths = torch.linalg.vector_norm(directions, dim=0)
    alone = ((share * share).sum(dim=0) > 0.999) & (lengths > 0)
    return torch.where(alone, directions / lengths, 0.0)


def samples(found: Small, lost: Tensor, *, normalise: bool) -> Tensor:
    r"""Estimates ``[k]`` of the trace, one for each probe, each unbiased.

    With Q the basis that probe :math:`\omega` meets, :math:`\operatorname{tr} Q'AQ + \omega'(I - QQ')A(I - QQ')\omega`.

    Args:
        found: small matrices.
        lost: what the basis that probe i meets lacks of the whole one: a unit column, or zero ``[r, k]``.
        normalise: give what the basis leaves of the probe the length that its dimension asks for, which a probe that
            is uniform on a sphere allows.
    """
    inside, forms = _left(found, lost)
    kept = found.projected.trace() - (lost * (found.projected @ lost)).sum(dim=0)
    return kept + forms * _factor(found, inside.square().sum(dim=0), lost.square().sum(dim=0), normalise)


def _left(found: Small, lost: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients ``[r, k]`` of each probe on its basis, and the form ``[k]`` of what that leaves."""
    inside = found.dots - lost * (lost * found.dots).sum(dim=0)
    return inside, found.forms - (inside * (2 * found.crossed - found.projected @ inside)).sum(dim=0)


def _factor(found: Small, squares: Tensor, num_lost: Tensor, normalise: bool) -> Tensor | float:
    """What forms are multiplied by, from squared lengths inside of bases and the directions that these lack."""
    if not normalise:
        return 1.0
    dimension = found.n - found.rank + num_lost
    return torch.where(dimension > 0.5, dimension / (found.n - squares), 0.0)


def angles(lost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines and sines between columns, and which pairs are two, and not parallel; each ``[k, k]``."""
    cosines = lost.mT @ lost
    pairs = (1 - cosines**2 > 1e-8) & ~torch.eye(len(cosines), dtype=torch.bool)
    return cosines, torch.where(pairs, 1 - cosines**2, 1.0).sqrt(), pairs


def shared_variance(found: Small, lost: Tensor, *, normalise: bool) -> Tensor:
    r"""An unbiased estimate of the mean covariance of two samples, which share most of their bases.

    Let :math:`t_{i|j}` be the estimate from probe i with the basis that neither i nor j has a part in, and
    :math:`\Delta_{ij} = t_i - t_{i|j}`. Whatever the other probes are, each of these is unbiased over its own, so that
    :math:`t_{i|j}` has no covariance with :math:`t_{j|i}`, nor with :math:`\Delta_{ji}`, and

    .. math:: \operatorname{Cov}(t_i, t_j) = E\, \Delta_{ij} \Delta_{ji}.

    Without j the basis lacks :math:`u_{ij} = (s_j - c\, s_i) / \sqrt{1 - c^2}` too, where :math:`c = s_i's_j`.
    """
    k = lost.shape[1]
    inside, forms = _left(found, lost)
    cosines, sines, pairs = angles(lost)
    images = found.projected @ lost

    def along_u(columns: Tensor) -> Tensor:
        """Inner products ``[i, j]`` of u_ij with column i."""
        dots = columns.mT @ lost
        return (dots - cosines * dots.diagonal()[:, None]) / sines

    own, mixed = (lost * images).sum(dim=0), lost.mT @ images
    form_of_u = (own - 2 * cosines * mixed + cosines**2 * own[:, None]) / sines**2
    beta, gamma = along_u(found.dots), along_u(found.crossed - found.projected @ inside)
    without = forms[:, None] + beta * (2 * gamma + beta * form_of_u)
    squares, num_lost = inside.square().sum(dim=0)[:, None], lost.square().sum(dim=0)[:, None]
    change = form_of_u + forms[:, None] * _factor(found, squares, num_lost, normalise)
    change = change - without * _factor(found, squares - beta**2, num_lost + num_lost.mT, normalise)
    change = torch.where(pairs, change, 0.0)
    return (change * change.mT).sum() / (k * (k - 1))


def leave_one_out(found: Small, lost: Tensor, *, normalise: bool) -> Mean:
    """XTrace: the mean of estimates with the bases that their probes have no part in.

    What the samples share counts for at least nothing and at most as much again as what they do not: where the
    spectrum decays fast, the estimate of it is noise.
    """
    mean = mean_of(samples(found, lost, normalise=normalise))
    if len(mean.samples) < 2:
        return mean
    own, shared = mean.stderr**2, shared_variance(found, lost, normalise=normalise)
    return replace(mean, stderr=(own + torch.minimum(shared.clamp(min=0), own)).sqrt())
