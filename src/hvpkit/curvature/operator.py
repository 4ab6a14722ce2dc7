"""Operators of curvature over data: linear combinations of curvature matrices, multiplied batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from hvpkit._utils.checkpoints import digest
from hvpkit._utils.deadline import check_deadline
from hvpkit._utils.monitoring import advance
from hvpkit._utils.random import generator, resolve_seed
from hvpkit._utils.ranks import fingerprint
from hvpkit._utils.signals import handle_waiting_signals
from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_count
from hvpkit.autodiff.exact import exact_derivatives
from hvpkit.curvature.batch_sums import all_finite, blame_batch
from hvpkit.curvature.batches import (
    BatchCurvature,
    Kind,
    Leaves,
    Problem,
    batch_curvatures,
)
from hvpkit.curvature.data_identity import same_examples
from hvpkit.curvature.graph_cache import GraphCache
from hvpkit.curvature.importance_sampling import Importance, importance_sample, scores
from hvpkit.curvature.mode_selection import Recipe, lower_precision
from hvpkit.curvature.sharded_problem import parameters_of
from hvpkit.data import Data, as_data, digest_of
from hvpkit.objective import Objective, goes_by_batches
from hvpkit.operators.algebra import combination, combined_product
from hvpkit.operators.base import LinearOperator, Product
from hvpkit.operators.space import Space

T = TypeVar("T")

NAMES = {"hessian": "Hessian", "ggn": "GGN", "empirical-fisher": "empirical Fisher", "fisher": "Fisher"}


@dataclass(frozen=True, eq=False)
class Curvature:
    """A curvature matrix of a loss over data at fixed parameters.

    Attributes:
        kind: ``"hessian"``, ``"ggn"``, ``"empirical-fisher"`` or ``"fisher"``.
        of_batch: the matrix of one batch.
        problem: loss, parameters and data.
        recipe: mode and arithmetic of matvecs.
        cache: graphs that are kept between matvecs.
        data_share: examples of ``problem.data`` over those of the full data: the cost of one matvec.
        progress: show a bar over the batches of each matvec.
        scale: the diagonal S of S C S, ``[n]``; None: the identity.
    """

    kind: str
    of_batch: Kind
    problem: Problem
    recipe: Recipe
    cache: GraphCache
    data_share: float = 1.0
    progress: bool = False
    scale: Tensor | None = None

    @property
    def name(self) -> str:
        """The name for ``repr`` and messages."""
        name = NAMES[self.kind] + (" of fixed batches" if goes_by_batches(self.problem.loss_fn) else "")
        return name if self.recipe.arithmetic == "native" else f"{name} in {self.recipe.arithmetic}"

    @property
    def stage(self) -> str:
        """Return what a matvec passes over, in words."""
        return "sample" if self.data_share < 1 else "full data"

    def product(self, vectors: Tensor) -> Tensor:
        """Multiply columns ``[n, k]`` in one pass over the data.

        Raises:
            DeadlineReached: the context's deadline passes before the last batch.
        """
        if self.scale is not None:
            return self.scale[:, None] * replace(self, scale=None).product(self.scale[:, None] * vectors)
        if self.problem.shards is not None:
            space = self.problem.shards.space
            return space.whole(self.of_parts(space.local(vectors)), self.problem.n)
        ranks = self.problem.data.ranks
        if ranks is None:
            return self._share(vectors).mT
        with ranks.together(("matvec", self.name, vectors.shape, fingerprint(vectors))):
            rows = self._share(vectors)
        return ranks.sum(rows).mT

    def share(self, vectors: Tensor) -> Tensor:
        """Return the images ``[k, n]`` of columns ``[n, k]`` by this rank's batches."""
        if self.scale is None:
            return self._share(vectors)
        return self.scale * self._share(self.scale[:, None] * vectors)

    def of_parts(self, vectors: Tensor) -> Tensor:
        """Multiply columns of which each rank holds its part, by parameters of which it does too."""
        assert self.problem.shards is not None
        with self.problem.shards.ranks.together(("matvec in parts", self.name, vectors.shape[1])):
            return self._share(vectors).mT

    def _share(self, vectors: Tensor) -> Tensor:
        split = self.problem.layout.split
        columns = [split(vector.contiguous()) for vector in vectors.mT]
        with self.settings():
            images = vectors.new_zeros(len(columns), self.problem.layout.n)
            sums = [split(row) for row in images]
            share = len(columns) * self.data_share / self.cache.count_batches(self.problem.data)
            # closed at once if a batch is interrupted, so that what reading data sets is reset before anything else
            with closing(self.cache.linearized(self._batches, self.recipe.mode)) as linear_maps:
                for linear, kept in _with_bar(linear_maps) if self._shows_bar else linear_maps:
                    check_deadline()
                    handle_waiting_signals()
                    _add_(sums, linear(columns, retain_graph=kept))
                    advance(share, self.stage)
        return images

    @property
    def _shows_bar(self) -> bool:
        ranks = self.problem.data.ranks
        return self.progress and (ranks is None or ranks.is_first)

    def blame(self, vector: Tensor) -> str:
        """Return a message that names the first batch whose matvec with ``vector [n]`` is not finite."""
        if self.problem.shards is not None:
            return (
                f"the {self.name} product is not finite (NaN or infinity); which batch it is from is known without "
                "shard_params, or from the losses of examples"
            )
        column = self.problem.layout.split(vector if self.scale is None else self.scale * vector)

        def matvec(batch: BatchCurvature) -> Leaves:
            return batch.linearize(self.recipe.mode)([column])[0]

        with self.settings():
            return blame_batch(f"{self.name} product", self._batches(), matvec, self.problem.data.ranks)

    def over(self, data: Data) -> Curvature:
        """Return the same matrix over a subset of the examples, with a cache of the same budget."""
        share = self.data_share * data.num_examples / self.problem.data.num_examples
        return replace(
            self,
            problem=self.problem.over(data.spread()),
            cache=self.cache.budget.new_cache(),
            data_share=share,
        )

    @cached_property
    def native(self) -> Curvature:
        """The same matrix in native arithmetic."""
        if self.recipe.arithmetic == "native":
            return self
        recipe = replace(self.recipe, arithmetic="native", precision=0.0)
        return replace(self, recipe=recipe, cache=self.cache.budget.new_cache())

    def _batches(self) -> Iterator[BatchCurvature]:
        return batch_curvatures(self.of_batch, self.problem)

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Set what matvecs need: exact second derivatives, and the arithmetic."""
        device = self.problem.device
        with exact_derivatives(device), lower_precision(self.recipe.arithmetic, device):
            yield


@dataclass(frozen=True, eq=False, repr=False)
class CurvatureOperator(LinearOperator):
    r"""A linear combination of curvature matrices over the same examples, :math:`\sum_j c_j C_j + \sigma I`.

    Made by :func:`hvpkit.hessian` and its siblings, and by ``+``, ``-``, multiples and :meth:`shift` of operators over
    the same examples. All of these can be sampled: a sample of ``2 * H.shift(s)`` is ``2 * S.shift(s)`` of the sample S
    of H. The same examples are the same tensors, dataset or iterable, in the same order and with the same weights.

    Attributes:
        terms: pairs :math:`(c_j, C_j)`.
        sigma: the multiple of the identity; after :func:`hvpkit.precondition` it may be a diagonal ``[n]``.
    """

    terms: tuple[tuple[float, Curvature], ...] = ()
    sigma: float | Tensor = 0.0

    @classmethod
    def of(
        cls, terms: Sequence[tuple[float, Curvature]], sigma: float | Tensor = 0.0, name: str | None = None
    ) -> CurvatureOperator:
        """Return the operator of these terms."""
        problem = terms[0][1].problem
        return cls(
            combined_product(terms, sigma),
            problem.n,
            problem.leaves[0].dtype,
            problem.device,
            name=name or terms[0][1].name,
            layout=problem.layout if problem.shards is None else problem.shards.layout,
            cost=sum(term.data_share for _, term in terms),
            space=Space(ranks=problem.data.ranks),
            terms=tuple(terms),
            sigma=sigma,
        )

    @property
    def data(self) -> Data:
        """The examples, in the batches of the first term."""
        return self.terms[0][1].problem.data

    @property
    def num_examples(self) -> int:
        """Examples that one matvec passes over."""
        return self.data.num_examples

    @property
    def batch_size(self) -> int | None:
        """The most examples in a batch; None: as they come."""
        sizes = [term.problem.data.batch_size for _, term in self.terms]
        return max((size for size in sizes if size is not None), default=None)

    @property
    def mode(self) -> str:
        """The mode of matvecs: one of :func:`hvpkit.hvp`; joined where terms differ."""
        return ", ".join(dict.fromkeys(term.recipe.mode for _, term in self.terms))

    @property
    def mode_reason(self) -> str | None:
        """The mode and why ``mode="auto"`` chose it; None: it was asked for."""
        reasons = [term.recipe.reason for _, term in self.terms if term.recipe.reason is not None]
        return "; ".join(dict.fromkeys(reasons)) or None

    @property
    def data_share(self) -> float:
        """Share of the full data's examples that the operator is over."""
        return self.terms[0][1].data_share

    @property
    def origin(self) -> Problem | None:
        """The loss, parameters and data whose curvature this is; None for a combination, or parameters in parts."""
        (coefficient, term), *rest = self.terms
        changed = bool(rest) or coefficient != 1 or self.is_shifted or term.scale is not None
        changed = changed or self.has_sharded_parameters
        return None if changed else term.problem

    @property
    def is_shifted(self) -> bool:
        """True if a multiple of the identity, or a diagonal, is added to the curvature."""
        return isinstance(self.sigma, Tensor) or self.sigma != 0

    @property
    def has_sharded_parameters(self) -> bool:
        """True if ranks hold parts of the parameters."""
        return any(term.problem.shards is not None for _, term in self.terms)

    @property
    def has_outputs(self) -> bool:
        """True if each loss is an :class:`hvpkit.Objective`: then ``importance="residual"`` has its outputs."""
        return all(isinstance(term.problem.loss_fn, Objective) for _, term in self.terms)

    @property
    def samples_pay(self) -> bool:
        """True for Hessians of objectives, whose samples save passes over many examples."""
        hessians = all(term.kind == "hessian" for _, term in self.terms)
        return hessians and self.has_outputs and self.subset is not None

    @property
    def precision(self) -> float:
        """Relative error of matvecs: rounding in the dtype, or more where it was measured."""
        return max(super().precision, *(term.recipe.precision for _, term in self.terms))

    @property
    def exact(self) -> CurvatureOperator | None:
        """The operator in native arithmetic, where this one uses less; else None."""
        lowered = {term.recipe.arithmetic for _, term in self.terms} - {"native"}
        if not lowered:
            return None
        name = self.name
        for arithmetic in lowered:
            name = name.replace(f" in {arithmetic}", "")
        return replace(self._map(lambda term: term.native), name=name)

    def identity(self) -> dict[str, Any]:
        """Return what is known of the operator without a matvec, in a pass over the data that computes nothing."""
        terms = [(coefficient, term.kind, term.recipe.arithmetic) for coefficient, term in self.terms]
        problems = list(dict.fromkeys(term.problem for _, term in self.terms))
        known = {
            **super().identity(),
            "matrix": " + ".join(f"{c!r} {kind} in {arithmetic}" for c, kind, arithmetic in terms),
            "sigma": digest(self.sigma) if isinstance(self.sigma, Tensor) else self.sigma,
            "parameters": digest([parameters_of(problem) for problem in problems]),
            "data": digest_of(self.data),
        }
        scales = [term.scale for _, term in self.terms]
        return known if all(scale is None for scale in scales) else {**known, "scale": digest(scales)}

    def split_product(self, space: Space) -> Product:
        """Return the matvec on columns of which each rank holds its part: a rank's share is summed part by part."""
        sigma = space.local(self.sigma)[:, None] if isinstance(self.sigma, Tensor) else self.sigma
        ranks = space.ranks
        assert ranks is not None

        def shifted(images: Tensor, vectors: Tensor) -> Tensor:
            return images + sigma * vectors if self.is_shifted else images

        if all(term.problem.shards is not None and term.scale is None for _, term in self.terms):
            parts = combination([(coefficient, term.of_parts) for coefficient, term in self.terms])
            return lambda vectors: shifted(parts(vectors), vectors)
        share = combination([(coefficient, term.share) for coefficient, term in self.terms])

        def product(vectors: Tensor) -> Tensor:
            whole = space.whole(vectors, self.n)
            with ranks.together(("matvec", self.name, whole.shape)):  # gathered: the same on all
                rows = share(whole)
            return shifted(space.local_sum(rows), vectors)

        return product

    def blame(self, vectors: Tensor) -> str:
        """Return a message that names the first batch whose matvec with ``vectors [n, k]`` is not finite."""
        finite = torch.isfinite(self.product(vectors)).all(dim=0).tolist()
        column = finite.index(False) if False in finite else 0
        vector = vectors[:, column : column + 1]
        terms = [term for _, term in self.terms]
        bad = next((term for term in terms if not all_finite([term.product(vector)])), terms[0])
        return bad.blame(vector[:, 0])

    def _details(self) -> list[str]:
        return [*super()._details(), f"{self.num_examples} examples", self.mode]

    def _combine(
        self, operands: Sequence[tuple[float, LinearOperator]], sigma: float, name: str
    ) -> LinearOperator:
        terms: list[tuple[float, Curvature]] = []
        total_sigma: float | Tensor = sigma
        for coefficient, op in operands:
            if not isinstance(op, CurvatureOperator) or not same_examples(self.data, op.data):
                return super()._combine(operands, sigma, name)
            terms += [(coefficient * c, term) for c, term in op.terms]
            total_sigma += coefficient * op.sigma
        return replace(
            self,
            product=combined_product(operands, sigma),
            name=name,
            cost=sum(op.cost for _, op in operands),
            terms=tuple(terms),
            sigma=total_sigma,
        )

    def scaled(self, scale: Tensor, name: str) -> CurvatureOperator:
        """Return S H S for a diagonal S ``[n]``, with all that H knows: samples, precision, the loss and the data."""

        def change(term: Curvature) -> Curvature:
            return replace(term, scale=scale if term.scale is None else scale * term.scale)

        made = self._map(change)
        return self.of(made.terms, self.sigma * scale.square() if self.is_shifted else 0.0, name)

    def _map(self, change: Callable[[Curvature], Curvature]) -> CurvatureOperator:
        changed = {term: change(term) for _, term in self.terms}  # a term that comes twice stays one
        return self.of([(c, changed[term]) for c, term in self.terms], self.sigma, self.name)

    @property
    def sample(self) -> Callable[[int, int], CurvatureOperator] | None:
        """``sample(num_examples, seed)``: the operator over a uniform random subset without replacement, unbiased.

        None where examples cannot be left out: losses depend on the batch that an example is in, or examples have
        variables of their own.
        """
        return self._sample if self._is_separable else None

    @property
    def subset(self) -> Callable[[Tensor, Tensor], CurvatureOperator] | None:
        """``subset(indices, weights)``: the operator over these examples, each with its weight; None as ``sample``."""
        return self._subset if self._is_separable else None

    def check_whole(self, function: str) -> None:
        """Raise TypeError for parameters in parts, which a function cannot work with."""
        if self.has_sharded_parameters:
            raise TypeError(
                f"{function} needs whole parameters, and {self!r} has shard_params=True; make it without"
            )

    @property
    def _is_separable(self) -> bool:
        mixed = any(goes_by_batches(term.problem.loss_fn) for _, term in self.terms)
        return not (mixed or self.data.has_own_variables or self.has_sharded_parameters)

    def _sample(self, num_examples: int, seed: int) -> CurvatureOperator:
        return self._map(
            lambda term: term.over(term.problem.data.sample(num_examples, generator(resolve_seed(seed))))
        )

    def _subset(self, indices: Tensor, weights: Tensor) -> CurvatureOperator:
        weights = weights.to(self.device, self.dtype)
        return self._map(lambda term: term.over(term.problem.data.subset(indices, weights)))

    def rebatched(self, batch_size: int) -> CurvatureOperator:
        """Return the same operator over batches of another size."""
        return self._map(lambda term: term.over(as_data(term.problem.data, batch_size=batch_size)))

    def coarsen(
        self, num_examples: int, *, importance: Importance = "residual", seed: Seed = 0
    ) -> CurvatureOperator:
        r"""Return a cheaper operator with the same mean, over a weighted sample of the examples.

        .. math:: H_S = \sum_{i \in S} \frac{1}{N \pi_i} H_i, \qquad \mathbb{E}\, H_S = H

        with inclusion probabilities :math:`\pi_i = \min(1, c\, s_i)` for scores s: systematic sampling, those with high
        scores for certain, and a twentieth of the probability spread evenly. Samples of a sample are nested:
        ``coarse = H.coarsen(4000); coarser = coarse.coarsen(1000)``. The score of an example in a combination is
        :math:`\sum_j |c_j| s_{ij}`; the shift is not sampled.

        Args:
            num_examples: how many (one more or less, as the probabilities round).
            importance: ``"residual"``: the norm of each loss's gradient with respect to the outputs, ``|p - y|`` for
                cross entropy; ``"loss"``; ``"gradient"``: the norm of each example's gradient; a function
                ``(params, batch) -> [B]``; or None: all the same.
            seed: of the sample.

        Raises:
            TypeError: examples may not be left out: ``batchnorm="batch"``, or a perturbation for each of them.
            ValueError: ``num_examples`` out of range; scores that are negative or not finite.

        Cost:
            A forward pass over the data for the scores of each term, a ninth of a product; a third with ``"gradient"``.

        Example:
            >>> import torch, hvpkit as hk
            >>> loss_fn = lambda p, batch: 0.5 * (batch @ p) ** 2
            >>> H = hk.hessian(loss_fn, torch.ones(2), torch.randn(100, 2, generator=torch.Generator().manual_seed(0)))
            >>> H.coarsen(10, importance="loss").cost
            0.1
        """
        return self._samples(1, num_examples, importance, resolve_seed(seed))[0]

    def two_samples(
        self, num_examples: int, *, importance: Importance, seed: int
    ) -> tuple[CurvatureOperator, CurvatureOperator]:
        """Return what :meth:`coarsen` does, and an independent one by the same scores."""
        first, second = self._samples(2, num_examples, importance, seed)
        return first, second

    def _samples(
        self, num_samples: int, num_examples: int, importance: Importance, seed: int
    ) -> list[CurvatureOperator]:
        self.check_whole("coarsen")
        if self.subset is None:
            super().coarsen()  # raises
        num_examples = check_count("num_examples", num_examples, 1, self.num_examples)
        combined = torch.zeros(self.data.num_units, dtype=torch.float64, device="cpu")
        for coefficient, term in self.terms:
            combined += abs(coefficient) * scores(term.problem, importance)
        drawn = (
            importance_sample(combined, self.data, num_examples, seed, stream)
            for stream in range(num_samples)
        )
        return [self._subset(indices, weights) for indices, weights in drawn]


def _add_(sums: list[Leaves], shares: list[Leaves]) -> None:
    for total, share in zip(sums, shares, strict=True):
        torch._foreach_add_(total, share)


def _with_bar(batches: Iterator[T]) -> Iterator[T]:
    from tqdm.auto import tqdm

    yield from tqdm(batches, desc="product", unit="batch", leave=False)
