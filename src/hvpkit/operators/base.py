"""Matrix-free symmetric linear operators: all that solvers and estimators know of a problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hvpkit._utils.typing import Tree
from hvpkit._utils.validation import check_like
from hvpkit.autodiff.pytree import Layout, as_real
from hvpkit.errors import NonFiniteError
from hvpkit.operators.space import LOCAL, Space

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

    def __matmul__(self, v: Tree) -> Tree:
        """Multiply by ``v``: a tensor ``[n]`` or ``[n, k]``, or a tree shaped like the parameters.

        Raises:
            ValueError: ``v`` has another shape, dtype or device, or holds NaN or infinity.
            NonFiniteError: the result does; names the first batch at fault where there are batches.
        """
        if not isinstance(v, Tensor) or self._is_tree(v):
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

    def _is_tree(self, v: Tensor) -> bool:
        """Return True if the tensor ``v`` is a tree of one leaf: parameters that are one matrix, or complex."""
        is_vector = v.ndim == 1 and not v.is_complex()
        return self.layout is not None and not is_vector and self.layout.shapes == (as_real(v).shape,)

    def flatten(self, tree: Tree) -> Tensor:
        """Return the vector ``[n]`` of a tree shaped like the parameters, in ``parameters_to_vector`` order."""
        return self._layout().flatten(tree, name="tree")

    def unflatten(self, v: Tensor) -> Tree:
        """Return the tree whose vector is ``v [n]``; its leaves are views of ``v``."""
        return self._layout().unflatten(v)

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

        if not isinstance(other, LinearOperator):
            return NotImplemented
        check_compatible(self, other)
        name = f"({self.name} {'+' if sign > 0 else '-'} {other.name})"
        return self._combine([(1.0, self), (sign, other)], 0.0, name)

    def __mul__(self, factor: float) -> LinearOperator:
        if isinstance(factor, bool) or not isinstance(factor, Real):
            return NotImplemented
        scale = float(factor)
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
            'with batchnorm="eval", and combine it with other operators after that'
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
