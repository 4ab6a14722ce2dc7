"""Matrix-free symmetric linear operators: what every solver and estimator sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hvpkit._typing import LossFn, Seed, Tree
from hvpkit.data import Data
from hvpkit.errors import NonFiniteError, check_count
from hvpkit.importance import Importance, inclusion, scores, systematic
from hvpkit.probes import resolve_seed
from hvpkit.products import Leaves, check_like
from hvpkit.space import LOCAL, Space
from hvpkit.trees import Layout

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
        cost: full-data products that one product costs.
        mode: how products are made, or None.
        mode_reason: the mode and why it was taken, where ``mode="auto"`` took it, or None.
        precision: relative error of products, as it was measured where it is more than rounding.
        space: inner products of its vectors.
        explain: given a vector ``[n]`` whose product is not finite, says where that comes from.
        sample: given a number of examples and a seed, the same operator over a uniform random subset of that
            many, without replacement: unbiased, at their share of the cost. None where there are no examples.
        subset: given indices of examples and their weights, the same operator over those, at their share of the
            cost; None as ``sample``, and for what the algebra makes.
        origin: what an operator of curvature was made of; None for others, and for what the algebra makes.

    Example:
        >>> import torch
        >>> A = aslinearoperator(torch.diag(torch.tensor([1.0, 2.0])))
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
    cost: float = 1.0
    mode: str | None = None
    mode_reason: str | None = None
    precision: float = 0.0
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
        return self.layout is not None and v.ndim != 1 and self.layout.shapes == (v.shape,)

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
            cost=self.cost + other.cost,
            precision=max(self.precision, other.precision),
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
            >>> import torch
            >>> A = aslinearoperator(torch.diag(torch.tensor([1.0, 2.0])))
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


def aslinearoperator(A: Any, *, device: torch.device | str | None = None) -> LinearOperator:
    """A symmetric matrix or foreign operator as a :class:`LinearOperator`.

    Args:
        A: a dense tensor or NumPy array ``[n, n]``; a SciPy sparse matrix or operator; an object of
            another library with ``shape``, ``dtype`` and ``@``; or a tuple ``(matvec, n, dtype)`` with
            ``matvec`` on tensors ``[n]``. Symmetry is the caller's word; solvers test it as they go.
        device: where vectors live; by default the tensor's own, else the CPU.

    Raises:
        TypeError: ``A`` is none of these, or its dtype is not real floating point.
        ValueError: ``A`` is not square, or holds NaN or infinity.

    Example:
        >>> import torch
        >>> A = aslinearoperator((lambda v: 3.0 * v, 4, torch.float64))
        >>> A @ torch.ones(4, dtype=torch.float64)
        tensor([3., 3., 3., 3.], dtype=torch.float64)
    """
    import numpy as np

    if isinstance(A, LinearOperator):
        return A
    if isinstance(A, tuple):
        return _from_matvec(A, torch.device(device or "cpu"))
    if isinstance(A, np.ndarray):
        A = torch.tensor(np.ascontiguousarray(A))
    if isinstance(A, Tensor):
        return _from_dense(A.detach() if device is None else A.detach().to(device))
    if hasattr(A, "dtype") and hasattr(A, "__matmul__"):
        size = getattr(A, "size", None)  # hessian-eigenthings has this instead of a shape
        shape = getattr(A, "shape", (size, size) if isinstance(size, int) else None)
        if shape is not None:
            return _from_foreign(A, _check_square(shape), device)
    raise TypeError(
        "A must be a tensor, a SciPy matrix or operator, an object with shape, dtype and @, or a tuple "
        f"(matvec, n, dtype); got {type(A).__name__}"
    )


def _check_square(shape: Sequence[int]) -> int:
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 1:
        raise ValueError(f"A must be square, [n, n] with n >= 1; got shape {list(shape)}")
    return int(shape[0])


def _check_real(dtype: object) -> torch.dtype:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"A must have a real floating dtype, got {dtype}; convert it first")
    return dtype


def _from_dense(matrix: Tensor) -> LinearOperator:
    if matrix.layout != torch.strided:
        raise TypeError(
            f"A is a sparse tensor ({matrix.layout}); pass (matvec, n, dtype): (lambda v: A @ v, n, A.dtype)"
        )
    n, dtype = _check_square(matrix.shape), _check_real(matrix.dtype)
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("A contains NaN or infinity")
    return LinearOperator(lambda v: matrix @ v, n, dtype, matrix.device, name="dense matrix")


def _from_matvec(parts: tuple[Any, ...], device: torch.device) -> LinearOperator:
    if len(parts) != 3 or not callable(parts[0]):
        raise TypeError("A: a tuple must be (matvec, n, dtype) with a function, an int and a torch.dtype")
    matvec, n, dtype = parts[0], check_count("n of A", parts[1], 1), parts[2]

    def product(vectors: Tensor) -> Tensor:
        with torch.enable_grad():  # it may differentiate
            return torch.stack([_checked(matvec(column), n) for column in vectors.unbind(1)], dim=1)

    return LinearOperator(product, n, _check_real(dtype), device, name="matvec")


def _checked(result: object, n: int) -> Tensor:
    if not isinstance(result, Tensor) or result.shape != (n,):
        found = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"A: matvec must return a tensor of shape [{n}], got {found}")
    return result.detach()


def _from_foreign(A: Any, n: int, device: torch.device | str | None) -> LinearOperator:
    """An operator of SciPy, or of a library whose operators multiply tensors."""
    import numpy as np

    if isinstance(A.dtype, torch.dtype):
        own: torch.device | str = getattr(A, "device", "cpu")
        target = torch.device(own if device is None else device)

        def product(vectors: Tensor) -> Tensor:
            with torch.enable_grad():  # it may differentiate
                return torch.stack([_checked(A @ v.contiguous(), n) for v in vectors.unbind(1)], dim=1)

        return LinearOperator(product, n, _check_real(A.dtype), target, name=type(A).__name__)

    dtype = _check_real(getattr(torch, np.dtype(A.dtype).name, A.dtype))
    target = torch.device(device or "cpu")

    def numpy_product(vectors: Tensor) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(A @ vectors.cpu().numpy())).to(target, dtype)

    return LinearOperator(numpy_product, n, dtype, target, name=type(A).__name__)
