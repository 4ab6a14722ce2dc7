"""Sums, differences, multiples and shifts of operators: one linear combination."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hvpkit._utils.checkpoints import digest
from hvpkit.operators.base import LinearOperator, Product
from hvpkit.operators.wrapped import Wrapped


class HasProduct(Protocol):
    """Anything with a matvec on ``[n, k]``."""

    @property
    def product(self) -> Product: ...


def combination(functions: Sequence[tuple[float, Callable[[Tensor], Tensor]]]) -> Callable[[Tensor], Tensor]:
    """Return the linear combination of functions of a tensor; one alone, with the factor 1, is itself."""
    (first, function), *rest = functions
    if first == 1 and not rest:
        return function

    def combined(argument: Tensor) -> Tensor:
        total = function(argument) if first == 1 else first * function(argument)
        for coefficient, other in rest:
            total = torch.add(total, other(argument), alpha=coefficient)
        return total

    return combined


def combined_product(operands: Sequence[tuple[float, HasProduct]], sigma: float | Tensor = 0.0) -> Product:
    r"""Return the matvec of :math:`\sum_j c_j A_j + \sigma I` for ``operands`` :math:`(c_j, A_j)`.

    ``sigma`` may be a diagonal ``[n]``.
    """
    images = combination([(coefficient, A.product) for coefficient, A in operands])
    if not isinstance(sigma, Tensor) and not sigma:
        return images

    def product(vectors: Tensor) -> Tensor:
        if isinstance(sigma, Tensor):
            return torch.addcmul(images(vectors), sigma[:, None], vectors)
        return torch.add(images(vectors), vectors, alpha=sigma)

    return product


def check_compatible(A: LinearOperator, B: LinearOperator) -> None:
    """Raise ValueError if the operators act on vectors of different shape, dtype or device."""
    for attribute in ("shape", "dtype", "device"):
        mine, theirs = getattr(A, attribute), getattr(B, attribute)
        if mine != theirs:
            raise ValueError(f"operators of different {attribute} cannot be combined: {mine} and {theirs}")


@dataclass(frozen=True, eq=False, repr=False)
class LinearCombination(LinearOperator):
    r"""The operator :math:`\sum_j c_j A_j + \sigma I`.

    Attributes:
        operands: pairs :math:`(c_j, A_j)`.
        sigma: the multiple of the identity.
    """

    operands: tuple[tuple[float, LinearOperator], ...] = ()
    sigma: float = 0.0

    @classmethod
    def of(
        cls, operands: Sequence[tuple[float, LinearOperator]], sigma: float, name: str
    ) -> LinearCombination:
        """Return the combination; its cost is the sum of the costs of its operands."""
        A = operands[0][1]
        fields: dict[str, Any] = {
            "layout": next((op.layout for _, op in operands if op.layout is not None), None),
            "cost": sum(op.cost for _, op in operands),
            "space": A.space,
        }
        product = combined_product(operands, sigma)
        return cls(product, A.n, A.dtype, A.device, name, operands=tuple(operands), sigma=sigma, **fields)

    @property
    def precision(self) -> float:
        """Return the largest relative error of the operands' matvecs."""
        return max(op.precision for _, op in self.operands)

    @property
    def exact(self) -> LinearOperator | None:
        """Return the combination of the operands in native arithmetic; None if they are."""
        if all(op.exact is None for _, op in self.operands):
            return None
        return self.of([(c, op.exact or op) for c, op in self.operands], self.sigma, self.name)

    def identity(self) -> dict[str, Any]:
        """Return what is known of the operands without a matvec."""
        operands = [[coefficient, op.identity()] for coefficient, op in self.operands]
        return {**super().identity(), "operands": digest([operands, self.sigma])}

    def blame(self, vectors: Tensor) -> str:
        """Ask the first operand whose matvec is not finite."""
        for _, op in self.operands:
            if not bool(torch.isfinite(op.product(vectors)).all()):
                return op.blame(vectors)
        return super().blame(vectors)


@dataclass(frozen=True, eq=False, repr=False)
class Power(Wrapped):
    r"""The operator :math:`A^p`.

    Attributes:
        exponent: p, at least 2.
    """

    exponent: int = 2

    @classmethod
    def of(cls, A: LinearOperator, exponent: int) -> Power:
        """Return the power, by ``exponent`` matvecs with ``A``."""

        def product(vectors: Tensor) -> Tensor:
            for _ in range(exponent):
                vectors = A.product(vectors)
            return vectors

        fields: dict[str, Any] = {"layout": A.layout, "cost": exponent * A.cost, "space": A.space}
        fields |= {"inner": A, "exponent": exponent}
        return cls(product, A.n, A.dtype, A.device, f"{A.name}^{exponent}", **fields)

    @property
    def precision(self) -> float:
        """Relative error of all matvecs."""
        return self.exponent * self.operand.precision

    @property
    def exact(self) -> LinearOperator | None:
        """The power of the operator in native arithmetic; None if it is."""
        exact = self.operand.exact
        return None if exact is None else Power.of(exact, self.exponent)

    def identity(self) -> dict[str, Any]:
        """Return what is known of the operator without a matvec, and the exponent."""
        return {**super().identity(), "exponent": self.exponent}

    def blame(self, vectors: Tensor) -> str:
        """Ask the operator, for the first of its matvecs that is not finite."""
        for _ in range(self.exponent):
            images = self.operand.product(vectors)
            if not bool(torch.isfinite(images).all()):
                break
            vectors = images
        return super().blame(vectors)


def product_of(A: LinearOperator, B: LinearOperator) -> Power:
    """Return the product of two powers of one operator.

    Raises:
        TypeError: they are of different operators.
    """
    (base, p), (other, q) = _base_of(A), _base_of(B)
    if base is not other:
        raise TypeError(
            f"{A!r} @ {B!r} is not symmetric in general, and no LinearOperator; multiply vectors one after the other, "
            "A @ (B @ v)"
        )
    return Power.of(base, p + q)


def _base_of(A: LinearOperator) -> tuple[LinearOperator, int]:
    """Return the base and the exponent of a power; of another operator, itself and 1."""
    return (A.operand, A.exponent) if isinstance(A, Power) else (A, 1)


@dataclass(frozen=True, eq=False, repr=False)
class Scaled(Wrapped):
    r"""The operator :math:`S A S` with a diagonal S.

    Attributes:
        scale: the diagonal ``[n]``.
    """

    scale: Tensor | None = None

    @classmethod
    def of(cls, A: LinearOperator, scale: Tensor, name: str) -> Scaled:
        """Return the operator."""
        columns = scale[:, None]

        def product(vectors: Tensor) -> Tensor:
            return columns * A.product(columns * vectors)

        fields: dict[str, Any] = {"layout": A.layout, "cost": A.cost, "space": A.space}
        return cls(product, A.n, A.dtype, A.device, name, inner=A, scale=scale, **fields)

    @property
    def _diagonal(self) -> Tensor:
        assert self.scale is not None
        return self.scale

    @property
    def exact(self) -> LinearOperator | None:
        """The same of the operator in native arithmetic; None if it is."""
        exact = self.operand.exact
        return None if exact is None else Scaled.of(exact, self._diagonal, self.name)

    def identity(self) -> dict[str, Any]:
        """Return what is known of the operator without a matvec, and a digest of the diagonal."""
        return {**super().identity(), "scale": digest(self.scale)}

    def blame(self, vectors: Tensor) -> str:
        """Ask the operator."""
        return super().blame(self._diagonal[:, None] * vectors)


@dataclass(frozen=True, eq=False, repr=False)
class Converted(Wrapped):
    """An operator on vectors of another dtype."""

    @classmethod
    def of(cls, A: LinearOperator, dtype: torch.dtype) -> LinearOperator:
        """Return ``A`` itself if it has this dtype, else the operator that converts.

        Raises:
            TypeError: ``dtype`` is no real floating dtype of torch.
        """
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a real floating dtype of torch, got {dtype!r}")
        if dtype == A.dtype:
            return A

        def product(vectors: Tensor) -> Tensor:
            return A.product(vectors.to(A.dtype)).to(dtype)

        fields: dict[str, Any] = {"layout": A.layout, "cost": A.cost, "space": A.space, "inner": A}
        return cls(product, A.n, dtype, A.device, A.name, **fields)

    @property
    def precision(self) -> float:
        """Relative error of matvecs: that of the operator, or rounding in the new dtype."""
        return max(torch.finfo(self.dtype).eps, self.operand.precision)

    @property
    def exact(self) -> LinearOperator | None:
        """The operator in native arithmetic, converted; None if it is."""
        exact = self.operand.exact
        return None if exact is None else Converted.of(exact, self.dtype)

    def identity(self) -> dict[str, Any]:
        """Return what is known of the operator without a matvec, with the new dtype."""
        return {**super().identity(), "dtype": str(self.dtype)}

    def blame(self, vectors: Tensor) -> str:
        """Ask the operator."""
        return super().blame(vectors.to(self.operand.dtype))
