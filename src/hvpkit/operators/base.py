"""Matrix-free symmetric linear operators: what every solver and estimator sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hvpkit._utils.random import resolve_seed
from hvpkit._utils.typing import LossFn, Seed, Tree
from hvpkit._utils.validation import check_count, check_like
from hvpkit.autodiff.pytree import Layout, as_real
from hvpkit.curvature.importance_sampling import Importance, inclusion, scores, systematic
from hvpkit.curvature.products import Leaves
from hvpkit.data import Data
from hvpkit.errors import NonFiniteError
from hvpkit.operators.space import LOCAL, Space

if TYPE_CHECKING:
    import scipy.sparse.linalg

Product = Callable[[Tensor], Tensor]
"""``[n, k]`` to ``[n, k]``: a function that does not write to its argument."""


@dataclass(frozen=True, eq=False)
class Origin:
    """What an operator of curvature was made of: what a check needs to make its products in another way.

    Attributes:
        kind: ``"hessian"``, ``"ggn"``, ``"empirical-fisher"`` or ``"fisher"``.
        loss_fn: the loss as a function of the operator's parameters and a batch; of what ``wrt`` left out,
            constants are in it.
        layout: of those parameters.
        leaves: their values, a copy.
        data: the examples.
        mode: how products are made.
    """

    kind: str
    loss_fn: LossFn
    layout: Layout
    leaves: Leaves
    data: Data
    mode: str


@dataclass(frozen=True, eq=False, repr=False)
class LinearOperator:
    """A symmetric operator of shape ``(n, n)``, known by its products.

    ``H @ v`` takes a tensor ``[n]`` or ``[n, k]``, or a tree shaped like the parameters, and returns the
    like. It looks at what it is given and at what comes out; ``H.product`` is the same on ``[n, k]`` without
    a look, which never waits for the device.

    Attributes:
        product: ``[n, k]`` to ``[n, k]``, unchecked.
        n: dimension.
        dtype, device: of vectors and products.
        name: what it is, for ``repr`` and results.
        layout: how trees of parameters lie in vectors, or None.
        num_examples: examples that one product passes over, or None.
        batch_size: the most of them that are put through at once, or None: as they come, or there are none.
        cost: full-data products that one product costs.
        mode: how products are made, or None.
        mode_reason: the mode and why it was taken, where ``mode="auto"`` took it, or None.
        precision: relative error of products, as it was measured where it is more than rounding.
        exact: where products are in less than native arithmetic, the same operator in that; solvers take the last
            products, and what they report, from it.
        space: inner products of its vectors.
        explain: given a vector ``[n]`` whose product is not finite, says where that comes from.
        sample: given a number of examples and a seed, the same operator over a uniform random subset of that
            many, without replacement: unbiased, at their share of the cost. None where there are no examples.
        subset: given indices of examples and their weights, the same operator over those, at their share of the
            cost; None as ``sample``, and for what the algebra makes.
        origin: what an operator of curvature was made of; None for others, and for what the algebra makes.

    Example:
        >>> import torch, hvpkit as hk
        >>> A = hk.aslinearoperator(torch.diag(torch.tensor([1.0, 2.0])))
        >>> (2.0 * A.shift(1.0)) @ torch.tensor([1.0, 1.0])
        tensor([4., 6.])
    """

    product: Product
    n: int
    dtype: torch.dtype
    device: torch.device
    name: str = "operator"
    layout: Layout | None = None
    num_examples: int | None = None
    batch_size: int | None = None
    cost: float = 1.0
    mode: str | None = None
    mode_reason: str | None = None
    precision: float = 0.0
    exact: LinearOperator | None = None
    space: Space = LOCAL
    explain: Callable[[Tensor], str] | None = None
    sample: Callable[[int, int], LinearOperator] | None = None
    subset: Callable[[Tensor, Tensor], LinearOperator] | None = None
    origin: Origin | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", max(self.precision, torch.finfo(self.dtype).eps))

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""
        return (self.n, self.n)

    def __repr__(self) -> str:
        details = [f"{self.n} x {self.n}", str(self.dtype).removeprefix("torch."), str(self.device)]
        if self.num_examples is not None:
            details.append(f"{self.num_examples} examples")
        if self.mode is not None:
            details.append(self.mode)
        return f"<{self.name}: {', '.join(details)}>"

    def __matmul__(self, v: Tree) -> Tree:
        """The product with ``v``: a tensor ``[n]`` or ``[n, k]``, or a tree shaped like the parameters.

        Raises:
            ValueError: ``v`` has another length, shape, dtype or device, or holds NaN or infinity.
            NonFiniteError: the product does; names the first batch at fault where there are batches.
        """
        if not isinstance(v, Tensor) or self._is_leaf(v):
            layout = self._layout()
            leaves = [check_like(leaf, self._like()) for leaf in layout.leaves(v)]
            return layout.unflatten(self @ torch.cat([leaf.reshape(-1) for leaf in leaves]))
        if v.ndim not in (1, 2) or v.shape[0] != self.n or v.numel() == 0:
            raise ValueError(f"v must have shape [{self.n}] or [{self.n}, k], got {list(v.shape)}")
        vectors = check_like(v, self._like()).reshape(self.n, -1)
        if not bool(torch.isfinite(vectors).all()):
            raise ValueError("v contains NaN or infinity")
        with torch.autocast(self.device.type, enabled=False):
            result = self.product(vectors)
        if not bool(torch.isfinite(result).all()):
            raise NonFiniteError(self.blame(vectors))
        return result.reshape(v.shape)

    def _like(self) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device=self.device)

    def _layout(self) -> Layout:
        if self.layout is None:
            raise TypeError(f"v must be a tensor: {self!r} knows no tree of parameters")
        return self.layout

    def _is_leaf(self, v: Tensor) -> bool:
        """Whether ``v`` is itself a tree, as parameters that are one matrix are."""
        is_vector = v.ndim == 1 and not v.is_complex()
        return self.layout is not None and not is_vector and self.layout.shapes == (as_real(v).shape,)

    def blame(self, vectors: Tensor) -> str:
        """Where a product with ``vectors`` ``[n, k]`` that is not finite comes from."""
        if self.explain is None:
            return f"a product of {self!r} gave NaN or infinity"
        finite = torch.isfinite(self.product(vectors)).all(dim=0).tolist()
        return self.explain(vectors[:, finite.index(False) if False in finite else 0])

    def flatten(self, tree: Tree) -> Tensor:
        """The vector ``[n]`` of a tree shaped like the parameters, in ``parameters_to_vector`` order."""
        return self._layout().flatten(tree, name="tree")

    def unflatten(self, v: Tensor) -> Tree:
        """The tree whose vector is ``v`` ``[n]``; its leaves are views of ``v``."""
        return self._layout().unflatten(v)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return self._combine(other, 1.0)

    def __radd__(self, other: int) -> LinearOperator:
        if isinstance(other, int) and other == 0:  # where sum() starts
            return self
        return NotImplemented

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return self._combine(other, -1.0)

    def _combine(self, other: LinearOperator, sign: float) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        for what in ("shape", "dtype", "device"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                raise ValueError(f"operators of different {what} cannot be combined: {mine} and {theirs}")
        return LinearOperator(
            lambda v: torch.add(self.product(v), other.product(v), alpha=sign),
            self.n,
            self.dtype,
            self.device,
            name=f"({self.name} {'+' if sign > 0 else '-'} {other.name})",
            layout=self.layout or other.layout,
            num_examples=self.num_examples or other.num_examples,
            batch_size=self.batch_size or other.batch_size,
            cost=self.cost + other.cost,
            precision=max(self.precision, other.precision),
            exact=(self.exact or self)._combine(other.exact or other, sign)
            if self.exact or other.exact
            else None,
            space=self.space,
        )

    def __mul__(self, factor: float) -> LinearOperator:
        if isinstance(factor, bool) or not isinstance(factor, Real):
            return NotImplemented
        scale = float(factor)
        return replace(
            self,
            product=lambda v: scale * self.product(v),
            name=f"{scale:g} * {self.name}",
            exact=None if self.exact is None else self.exact * scale,
            sample=self._samples(lambda part: part * scale),
            subset=None,
            origin=None,
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> LinearOperator:
        if isinstance(divisor, bool) or not isinstance(divisor, Real):
            return NotImplemented
        return self * (1.0 / float(divisor))

    def __neg__(self) -> LinearOperator:
        return self * -1.0

    def shift(self, sigma: float) -> LinearOperator:
        r"""The operator :math:`H + \sigma I`: eigenvalues move by ``sigma``, eigenvectors stay."""
        return replace(
            self,
            product=lambda v: torch.add(self.product(v), v, alpha=sigma),
            name=f"({self.name} {'+' if sigma >= 0 else '-'} {abs(sigma):g} I)",
            exact=None if self.exact is None else self.exact.shift(sigma),
            sample=self._samples(lambda part: part.shift(sigma)),
            subset=None,
            origin=None,
        )

    def _samples(
        self, change: Callable[[LinearOperator], LinearOperator]
    ) -> Callable[[int, int], LinearOperator] | None:
        """Samples of the operator that ``change`` makes of this one."""
        sample = self.sample
        return None if sample is None else lambda num_examples, seed: change(sample(num_examples, seed))

    def coarsen(
        self, num_examples: int, *, importance: Importance = "residual", seed: Seed = 0
    ) -> LinearOperator:
        r"""A cheaper operator of the same mean: over a weighted sample of the examples.

        .. math:: H_S = \sum_{i \in S} \frac{1}{N \pi_i} H_i, \qquad \mathbb{E}\, H_S = H

        with inclusion probabilities :math:`\pi_i = \min(1, c\, s_i)` for scores s: systematic sampling, those with high
        scores for certain, and a twentieth of the chance spread evenly. Samples of a sample are nested:
        ``coarse = H.coarsen(4000); coarser = coarse.coarsen(1000)``.

        Args:
            num_examples: how many (one more or less, as the probabilities round).
            importance: ``"residual"``: the norm of each loss's gradient with respect to the outputs, ``|p - y|`` for
                cross entropy; ``"loss"``; ``"gradient"``: the norm of each example's gradient; a function
                ``(params, batch) -> [B]``; or None: all alike.
            seed: of the sample.

        Raises:
            TypeError: this operator is not of curvature over examples that may be left out.
            ValueError: ``num_examples`` out of range; scores that are none.

        Cost:
            A forward pass over the data for the scores, a ninth of a product; a third with ``"gradient"``.

        Example:
            >>> import torch, hvpkit as hk
            >>> loss_fn = lambda p, batch: 0.5 * (batch @ p) ** 2
            >>> H = hk.hessian(loss_fn, torch.ones(2), torch.randn(100, 2, generator=torch.Generator().manual_seed(0)))
            >>> H.coarsen(10, importance="loss").cost
            0.1
        """
        if self.subset is None or self.origin is None or self.num_examples is None:
            raise TypeError(
                f"{self!r} is not over examples that may be left out: coarsen an operator of hk.hessian or its kin, "
                'with batchnorm="eval", before the algebra'
            )
        check_count("num_examples", num_examples, 1, self.num_examples)
        origin = self.origin
        weights = origin.data.weights
        size = scores(origin.loss_fn, origin.layout, origin.leaves, origin.data, importance)
        shares = torch.full_like(size, 1 / len(size)) if weights is None else weights.to(size)
        chances = inclusion(size * shares, num_examples)
        chosen = systematic(chances, resolve_seed(seed))
        return self.subset(chosen, shares[chosen] / chances[chosen])

    def to_scipy(self, dtype: Any = None) -> scipy.sparse.linalg.LinearOperator:
        """The operator for SciPy, with ``matvec`` and ``matmat`` on NumPy arrays.

        Args:
            dtype: NumPy dtype of what SciPy sees, by default the operator's own. A wider one only hides that
                products have the precision of the operator's dtype.

        Raises:
            TypeError: NumPy has no such dtype (bfloat16): name one, such as ``numpy.float32``.

        Example:
            >>> import torch, hvpkit as hk
            >>> A = hk.aslinearoperator(torch.diag(torch.tensor([1.0, 2.0])))
            >>> A.to_scipy().matvec([1.0, 1.0])
            array([1., 2.], dtype=float32)
        """
        import numpy as np
        from scipy.sparse.linalg import LinearOperator as ScipyOperator

        if dtype is None:
            if self.dtype not in (torch.float16, torch.float32, torch.float64):
                raise TypeError(f"NumPy has no {self.dtype}; pass dtype=numpy.float32")
            dtype = str(self.dtype).removeprefix("torch.")
        numpy_dtype = np.dtype(dtype)
        seen_dtype = torch.from_numpy(np.empty(0, numpy_dtype)).dtype

        def apply(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            vectors = torch.tensor(np.ascontiguousarray(array)).to(self.device, self.dtype)
            result: np.ndarray[Any, Any] = (self @ vectors).to("cpu", seen_dtype).numpy()
            return result

        return ScipyOperator(self.shape, matvec=apply, rmatvec=apply, matmat=apply, dtype=numpy_dtype)
