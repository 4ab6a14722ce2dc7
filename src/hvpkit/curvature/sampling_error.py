r"""By how much what a sample says of the data scatters, from two halves of the sample."""

from __future__ import annotations

import torch
from torch import Tensor

from hvpkit._utils.random import generator, resolve_seed
from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_like
from hvpkit.operators.base import LinearOperator


def sampling_error(sample: LinearOperator, vectors: Tensor, *, seed: Seed = 0) -> Tensor:
    r"""Standard errors of a sample's quadratic forms, as estimates of those over all the data.

    .. math:: \mathrm{se}(v' H_S v) = \Big| \sum_{i \in S} \pm w_i \sqrt{1 - \pi_i}\; v' H_i v \Big|

    with the weights :math:`w_i` of the sample, the chances :math:`\pi_i` with which its examples came to be in it, and
    one sign for a random half of them, the other for the rest: what is in it for certain does not scatter. One number
    tells a standard error to a factor of two or three only; average squares over seeds for more. A Ritz value of the
    sample, :math:`v' H_S v` at a vector that was fitted to it, lies outside of that besides: its vector's quotient on
    the data, one product, says by how much.

    Args:
        sample: of :meth:`hvpkit.LinearOperator.coarsen`.
        vectors: v, ``[n]`` or columns ``[n, k]``.
        seed: of how the sample is halved.

    Returns:
        ``[k]`` (0-d for one vector), float64, on the CPU.

    Raises:
        TypeError: an operator that no sample was made of.
        ValueError: vectors of another shape, dtype or device; fewer than two examples by chance.

    Cost:
        ``k`` products of the sample.

    Source:
        Balanced half-samples: Wolter, Introduction to Variance Estimation (2007), doi:10.1007/978-0-387-35099-8, ch. 3.

    Example:
        >>> import torch, hvpkit as hk
        >>> g = torch.Generator().manual_seed(0)
        >>> loss_fn = lambda p, batch: 0.5 * (batch @ p) ** 2
        >>> H = hk.hessian(loss_fn, torch.ones(3), torch.randn(1000, 3, generator=g))
        >>> sample, v = H.coarsen(100, importance=None), torch.tensor([1.0, 0.0, 0.0])
        >>> error = abs(float(v @ (sample @ v) - v @ (H @ v)))
        >>> bool(error < 4 * sampling_error(sample, v))
        True
    """
    weights, chances = _weights(sample)
    if not isinstance(vectors, Tensor) or vectors.ndim not in (1, 2) or len(vectors) != sample.n:
        raise ValueError(f"vectors must be a tensor of shape [{sample.n}] or [{sample.n}, k]")
    check_like(vectors, torch.empty(0, dtype=sample.dtype, device=sample.device), name="vectors")
    by_chance = (chances < 1).nonzero().flatten()
    if len(by_chance) < 2:
        raise ValueError(f"sample must have two examples that are in it by chance, and {sample!r} has fewer")
    dealt = by_chance[torch.randperm(len(by_chance), generator=generator(resolve_seed(seed)))]
    shares = weights * (1 - chances).sqrt()
    columns = vectors.reshape(sample.n, -1)
    forms = []
    for half in dealt.tensor_split(2):
        assert sample.subset is not None
        images = sample.subset(half, shares[half]) @ columns
        forms.append(sample.space.dots(columns.mT, images).diagonal())
    errors: Tensor = (forms[0] - forms[1]).to("cpu", torch.float64).abs()
    return errors if vectors.ndim == 2 else errors[0]


def _weights(sample: LinearOperator) -> tuple[Tensor, Tensor]:
    """Weights of the sample's examples, and the chances with which they came to be in it, float64, on the CPU."""
    if not isinstance(sample, LinearOperator) or sample.origin is None or sample.subset is None:
        raise TypeError(f"sample must be what H.coarsen(...) returns, got {sample!r}")
    data = sample.origin.data
    if data.weights is None or sample.cost >= 1:
        raise TypeError(f"sample must be what H.coarsen(...) returns, and {sample!r} is over all of its data")
    weights = data.weights.to("cpu", torch.float64)
    over = weights * (data.num_examples / sample.cost)
    return weights, torch.where(over > 1 + 1e-5, 1 / over, 1.0)
