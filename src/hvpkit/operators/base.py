"""Matrix-free symmetric linear operators: all that solvers and estimators know of a problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hvpkit._utils.memory import free_memory, in_words
from hvpkit._utils.ranks import is_shards, whole
from hvpkit._utils.typing import Tree
from hvpkit._utils.validation import check_count, check_finite, check_function, check_type
from hvpkit.autodiff.pytree import Layout
from hvpkit.errors import NonFiniteError
from hvpkit.operators.space import LOCAL, Space
from hvpkit.operators.torch_dtype import TorchDtype
from hvpkit.operators.vectors import as_columns

if TYPE_CHECKING:
    import scipy.sparse.linalg

Product = Callable[[Tensor], Tensor]
"""A matvec on columns, ``[n, k]`` to ``[n, k]``, that does not write to its argument."""


@dataclass(frozen=True, eq=False, repr=False)
class LinearOperator:
    """A symmetric operator of shape ``(n, n)``, given by its matvec.

    ``H @ v`` takes a tensor ``[n]`` or ``[n, k]``, or a tree shaped like the parameters, and returns the same. It
    validates ``v`` and the result. ``H.product`` is the matvec on ``[n, k]``: no validation and no host
    synchronisation.

    Attributes:
        product: the matvec, ``[n, k]`` to ``[n, k]``.
        n: dimension.
        dtype, device: of vectors and matvecs.
        name: for ``repr`` and results.
        layout: correspondence between trees of parameters and vectors; None: there are no trees.
        cost: full-data products that one matvec costs.
        space: inner products of its vectors.

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
    cost: float = 1.0
    space: Space = LOCAL

    def __post_init__(self) -> None:
        check_function("product", self.product, "product(vectors) of [n, k]", 1)
        check_count("n", self.n, 1)
        check_type("dtype", self.dtype, torch.dtype)
        check_type("device", self.device, torch.device, "torch.device('cpu')")
        if not self.dtype.is_floating_point:
            raise TypeError(f"dtype must be real floating point, got {self.dtype}")

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""
        return (self.n, self.n)

    @property
    def precision(self) -> float:
        """Relative error of matvecs: rounding in the dtype, or more where it was measured."""
        return torch.finfo(self.dtype).eps

    @property
    def exact(self) -> LinearOperator | None:
        """The operator in native arithmetic, where this one uses less; else None.

        Solvers take their last matvecs, and the figures that they report, from it.
        """
        return None

    def split_product(self, space: Space) -> Product:
        """Return the matvec on columns of which each rank holds its part by ``space``."""

        def product(vectors: Tensor) -> Tensor:
            return space.local(self.product(space.whole(vectors, self.n)))

        return product

    def identity(self) -> dict[str, Any]:
        """Return what is known of the operator without a matvec, part by part; large parts as digests.

        Checkpoints hold it, and a matvec verifies the rest.
        """
        return {"n": self.n, "dtype": str(self.dtype)}

    def blame(self, vectors: Tensor) -> str:  # noqa: ARG002
        """Return a message that locates NaN or infinity in the matvec with ``vectors [n, k]``."""
        return f"a product of {self!r} gave NaN or infinity"

    def __repr__(self) -> str:
        return f"<{self.name}: {', '.join(self._details())}>"

    def _details(self) -> list[str]:
        return [f"{self.n} x {self.n}", str(self.dtype).removeprefix("torch."), str(self.device)]

    __array_ufunc__ = None  # NumPy leaves v @ H to __rmatmul__

    def __matmul__(self, v: Tree) -> Tree:
        """Multiply by ``v``: a tensor or NumPy array ``[n]`` or ``[n, k]``, or a tree shaped like the parameters.

        ``H @ H`` is the operator :math:`H^2`. NumPy arrays are converted to the dtype of H, and so is the result. A
        DTensor on the mesh of the data gives a DTensor, by as many bytes between ranks as a tensor.

        Raises:
            TypeError: ``v`` is another operator: the product of two is not symmetric; a DTensor, without a mesh.
            ValueError: ``v`` has another shape, dtype, device or placement, or holds NaN or infinity.
            NonFiniteError: the result does; names the first batch at fault where there are batches.
        """
        from hvpkit.operators.algebra import product_of  # these build on this module
        from hvpkit.operators.sharded import sharded as split

        if isinstance(v, LinearOperator):
            return product_of(self, v)
        op = split(self) if is_shards(v) else self
        vectors, back = as_columns(op, v)
        return back(op._columns(vectors))

    def _columns(self, vectors: Tensor) -> Tensor:
        """Return the matvec with columns ``[n, k]``; raise NonFiniteError if it is not finite."""
        with torch.autocast(self.device.type, enabled=False):
            result = self.product(vectors)
        if not bool(self.space.finite(result.mT).all()):
            raise NonFiniteError(self.blame(vectors))
        return result

    def __rmatmul__(self, v: Any) -> Any:
        """Multiply from the left by ``v``, ``[n]`` or ``[k, n]``: H is symmetric."""
        if isinstance(v, LinearOperator) or getattr(v, "ndim", 0) not in (1, 2):
            return NotImplemented
        return self @ v if v.ndim == 1 else (self @ v.T).T

    def __call__(self, v: Tree) -> Tree:
        """Return ``H @ v``."""
        return self @ v

    def matvec(self, v: Tree) -> Tree:
        """Return ``H @ v``."""
        return self @ v

    @property
    def T(self) -> LinearOperator:
        """The transpose: the operator itself."""
        return self

    def to(self, dtype: torch.dtype) -> LinearOperator:
        """Return the operator on vectors of another dtype.

        Its matvecs are those of H, in the arithmetic of H, with vectors converted before and after: for more digits
        make H of parameters of that dtype.

        Raises:
            TypeError: ``dtype`` is no real floating dtype of torch.
        """
        from hvpkit.operators.algebra import Converted

        return Converted.of(self, dtype)

    def to_dense(self, block_size: int = 64) -> Tensor:
        """Return the matrix ``[n, n]``, by n matvecs in blocks.

        Args:
            block_size: columns of a block.

        Raises:
            MemoryError: the matrix does not fit into the memory that is free.
            NonFiniteError: a matvec is not finite.
        """
        num_bytes, free = self.n**2 * self.dtype.itemsize, free_memory(self.device)
        if num_bytes > free:
            raise MemoryError(
                f"the dense matrix of {self!r} takes {in_words(num_bytes)}, and {in_words(free)} are free; use "
                "its matvecs, as hk.lanczos, hk.solve and hk.spectral_density do"
            )
        block_size = check_count("block_size", block_size, 1)
        matrix = torch.empty(self.n, self.n, dtype=self.dtype, device=self.device)
        for first in range(0, self.n, block_size):
            size = min(block_size, self.n - first)
            unit = torch.zeros(self.n, size, dtype=self.dtype, device=self.device)
            unit[torch.arange(first, first + size, device="cpu"), torch.arange(size, device="cpu")] = 1
            matrix[:, first : first + size] = self._columns(unit)
        return matrix

    def __array__(self, *_: Any, **__: Any) -> Any:
        """Raise TypeError: a conversion that takes n matvecs has to be asked for by name."""
        raise TypeError(
            f"NumPy cannot hold {self!r}, without entries: pass H.to_scipy() to SciPy, or take H.to_dense().numpy()"
        )

    def _layout(self) -> Layout:
        if self.layout is None:
            raise TypeError(f"v must be a tensor: {self!r} knows no tree of parameters")
        return self.layout

    def flatten(self, tree: Tree) -> Tensor:
        """Return the vector ``[n]`` of a tree shaped like the parameters, in ``parameters_to_vector`` order."""
        return self._layout().flatten(tree, name="tree")

    def unflatten(self, v: Tensor) -> Tree:
        """Return the tree whose vector is ``v [n]``; its leaves are views of ``v``.

        A DTensor, as of an eigenvector over a mesh, is gathered first: all ranks call this together.
        """
        return self._layout().unflatten(whole(v))

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return self._add(other, 1.0)

    def __radd__(self, other: int) -> LinearOperator:
        if isinstance(other, int) and other == 0:  # where sum() starts
            return self
        return NotImplemented

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return self._add(other, -1.0)

    def _add(self, other: LinearOperator, sign: float) -> LinearOperator:
        from hvpkit.operators.algebra import check_compatible  # algebra builds on this module

        if isinstance(other, Real):
            raise TypeError(
                f"an operator and the number {other} have no sum; for H + sigma I take H.shift({other})"
            )
        if isinstance(other, Tensor | np.ndarray):
            raise TypeError(
                "an operator and a matrix have no sum; take hvpkit.aslinearoperator(matrix) first"
            )
        if not isinstance(other, LinearOperator):
            return NotImplemented
        check_compatible(self, other)
        name = f"({self.name} {'+' if sign > 0 else '-'} {other.name})"
        return self._combine([(1.0, self), (sign, other)], 0.0, name)

    def __mul__(self, factor: float) -> LinearOperator:
        if isinstance(factor, Tensor | np.ndarray | LinearOperator):
            raise TypeError(
                f"an operator is multiplied by a number, got {type(factor).__name__}: take float(factor) for a "
                "multiple, and H @ v for a matvec"
            )
        if isinstance(factor, bool) or not isinstance(factor, Real):
            return NotImplemented
        scale = check_finite("the factor of an operator", factor)
        return self._combine([(scale, self)], 0.0, f"{scale:g} * {self.name}")

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> LinearOperator:
        if isinstance(divisor, bool) or not isinstance(divisor, Real):
            return NotImplemented
        return self * (1.0 / float(divisor))

    def __neg__(self) -> LinearOperator:
        return self * -1.0

    def shift(self, sigma: float) -> LinearOperator:
        r"""Return :math:`H + \sigma I`: eigenvalues move by ``sigma``, eigenvectors stay."""
        check_finite("sigma", sigma)
        name = f"({self.name} {'+' if sigma >= 0 else '-'} {abs(sigma):g} I)"
        return self._combine([(1.0, self)], sigma, name)

    def _combine(
        self, operands: Sequence[tuple[float, LinearOperator]], sigma: float, name: str
    ) -> LinearOperator:
        r"""Return :math:`\sum_j c_j A_j + \sigma I`; the algebra above comes to this, and subclasses override it."""
        from hvpkit.operators.algebra import LinearCombination

        return LinearCombination.of(operands, sigma, name)

    def coarsen(self, *_: Any, **__: Any) -> LinearOperator:
        """Raise TypeError: only a :class:`hvpkit.CurvatureOperator` is over examples that may be left out."""
        raise TypeError(
            f"{self!r} is not over examples that may be left out: coarsen an operator of hk.hessian or its kin, "
            'with batchnorm="eval" and without variables for each example, and combine it with others after that'
        )

    def to_scipy(self, dtype: Any = None) -> scipy.sparse.linalg.LinearOperator:
        """Return the operator for SciPy, with ``matvec`` and ``matmat`` on NumPy arrays.

        Args:
            dtype: NumPy dtype that SciPy sees, by default the operator's own. A wider one only hides that
                matvecs have the precision of the operator's dtype.

        Raises:
            TypeError: NumPy has no such dtype (bfloat16): name one, such as ``numpy.float32``.

        Example:
            >>> import torch, hvpkit as hk
            >>> A = hk.aslinearoperator(torch.diag(torch.tensor([1.0, 2.0])))
            >>> A.to_scipy().matvec([1.0, 1.0])
            array([1., 2.], dtype=float32)
        """
        from hvpkit.operators.interop import to_scipy  # interop builds on this module

        return to_scipy(self, dtype)


LinearOperator.dtype = TorchDtype()  # type: ignore[assignment]  # after the dataclass, whose field has no default
