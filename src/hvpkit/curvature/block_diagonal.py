"""The block-diagonal part of a Hessian: each block multiplied by vectors of its own, in one pass over the data.

In reverse over reverse all blocks share the graph of the gradient, and the matvec of a block follows only the paths
from the block's part of the gradient back to its parameters: a block near the output takes a small part of a whole
matvec. In the other modes a block's matvec is that of the whole Hessian with zeros elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hvpkit._utils.deadline import check_deadline
from hvpkit._utils.monitoring import advance
from hvpkit._utils.ranks import fingerprint, together
from hvpkit.autodiff.pytree import Layout, flatten
from hvpkit.curvature.batches import (
    BatchHessian,
    Leaves,
    LinearMap,
    LossShare,
    annotated,
    gradient_graph,
    weighted_batches,
)
from hvpkit.curvature.graph_cache import GraphCache
from hvpkit.curvature.operator import Curvature, CurvatureOperator
from hvpkit.operators.base import LinearOperator

Block = tuple[int, ...]
"""The places of a block's leaves among all."""


@dataclass(frozen=True, eq=False)
class BatchBlocks:
    """The diagonal blocks of the Hessian of a function of leaves.

    As a linear map it takes for each block the block's leaves, with a first dimension for the columns
    ``[k, *shape]``, which differs between blocks and may be 0, and returns the same.

    Attributes:
        function: the function.
        leaves: the point.
        blocks: the leaves of each block.
    """

    function: LossShare
    leaves: Leaves
    blocks: tuple[Block, ...]

    def linearize(self, mode: str) -> LinearMap:
        """Return the blocks as a linear map, by one of :data:`hvpkit.curvature.batches.MODES`."""
        if mode == "reverse-over-reverse":
            return annotated("Hessian", mode, self._reverse_over_reverse)
        return self._padded(BatchHessian(self.function, self.leaves).linearize(mode))

    def _reverse_over_reverse(self) -> LinearMap:
        points, edges = gradient_graph(self.function, self.leaves)

        def matvecs(vectors: Sequence[Leaves], *, retain_graph: bool = False) -> list[Leaves]:
            images = [[torch.zeros_like(stack) for stack in stacks] for stacks in vectors]
            todo = [
                (number, column)
                for number, stacks in enumerate(vectors)
                if any(place in edges for place in self.blocks[number])
                for column in range(len(stacks[0]))
            ]
            for turn, (number, column) in enumerate(todo, 1):
                block = self.blocks[number]
                used = [
                    (edges[place], stack)
                    for place, stack in zip(block, vectors[number], strict=True)
                    if place in edges
                ]
                products = torch.autograd.grad(
                    [edge for edge, _ in used],
                    [points[place] for place in block],
                    [stack[column] for _, stack in used],
                    retain_graph=retain_graph or turn < len(todo),
                    allow_unused=True,
                )
                for image, product in zip(images[number], products, strict=True):
                    if product is not None:
                        image[column] = product
            return images

        return matvecs

    def _padded(self, whole: LinearMap) -> LinearMap:
        """Return the blocks of a linear map of all leaves."""
        zeros = [leaf.new_zeros(()).expand_as(leaf) for leaf in self.leaves]

        def matvecs(vectors: Sequence[Leaves], *, retain_graph: bool = False) -> list[Leaves]:
            images = [[torch.zeros_like(stack) for stack in stacks] for stacks in vectors]
            for block, stacks, into in zip(self.blocks, vectors, images, strict=True):
                for column in range(len(stacks[0])):
                    vector = list(zeros)
                    for place, stack in zip(block, stacks, strict=True):
                        vector[place] = stack[column]
                    product = whole([vector], retain_graph=retain_graph)[0]
                    for place, image in zip(block, into, strict=True):
                        image[column] = product[place]
            return images

        return matvecs


@dataclass(frozen=True, eq=False, repr=False)
class BlockOperator(LinearOperator):
    """A diagonal block of a Hessian.

    Attributes:
        whole: the blocks that it is one of.
        number: its number among them.
    """

    whole: BlockDiagonal | None = None
    number: int = 0

    @property
    def _whole(self) -> BlockDiagonal:
        assert self.whole is not None
        return self.whole

    @property
    def block_name(self) -> str:
        """The name of the block."""
        return self._whole.names[self.number]

    @property
    def precision(self) -> float:
        """Relative error of matvecs: that of the Hessian's."""
        return self._whole.H.precision

    def blame(self, vectors: Tensor) -> str:
        """Ask the whole Hessian, with zeros elsewhere."""
        whole = self._whole
        padded = vectors.new_zeros(whole.H.n, vectors.shape[1])
        padded[whole.coordinates(self.number)] = vectors
        return whole.H.blame(padded)


@dataclass(frozen=True, eq=False)
class BlockDiagonal:
    """Diagonal blocks of a Hessian over data.

    Attributes:
        H: the whole Hessian, as :func:`hvpkit.hessian` makes it.
        names: of the blocks.
        blocks: the leaves of each.
    """

    H: CurvatureOperator
    names: tuple[str, ...]
    blocks: tuple[Block, ...]

    @property
    def curvature(self) -> Curvature:
        """The Hessian over the data."""
        return self.H.terms[0][1]

    @cached_property
    def cache(self) -> GraphCache:
        """The linear maps of the blocks that are held between passes, which are not those of the Hessian."""
        return self.curvature.cache.budget.new_cache()

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """How the parameters of each block lie in its vectors."""
        problem = self.curvature.problem
        names, leaves = problem.layout.names, flatten(problem.params)[0]
        return tuple(Layout.of({names[place]: leaves[place] for place in block}) for block in self.blocks)

    def coordinates(self, number: int) -> Tensor:
        """Return the coordinates of a block in vectors of the whole ``[n_b]``."""
        split = self.curvature.problem.layout.split(torch.arange(self.H.n, device="cpu"))
        return torch.cat([split[place].flatten() for place in self.blocks[number]])

    def operators(self) -> list[BlockOperator]:
        """Return an operator for each block; alone, each takes a pass for its matvec."""

        def operator(number: int) -> BlockOperator:
            def product(vectors: Tensor) -> Tensor:
                columns = [vectors.new_zeros(layout.n, 0) for layout in self.layouts]
                columns[number] = vectors
                return self.products(columns)[number]

            layout, name = self.layouts[number], f"{self.names[number]} of {self.H.name}"
            return BlockOperator(
                product,
                layout.n,
                self.H.dtype,
                self.H.device,
                name,
                layout,
                whole=self,
                number=number,
                space=self.H.space,
            )

        return [operator(number) for number in range(len(self.blocks))]

    def products(self, columns: Sequence[Tensor]) -> list[Tensor]:
        """Multiply each block by columns of its own ``[n_b, k_b]``, where ``k_b`` may be 0, in one pass over the data.

        Raises:
            DeadlineReached: the context's deadline passes before the last batch.
        """
        stacks = [self._stacked(number, vectors) for number, vectors in enumerate(columns)]
        sums = [[torch.zeros_like(stack) for stack in leaves] for leaves in stacks]
        curvature, ranks = self.curvature, self.curvature.problem.data.ranks
        question = ("matvec of blocks", [(len(v), v.shape[1], fingerprint(v)) for v in columns if v.shape[1]])
        with (
            together(ranks, question),
            curvature.settings(),
            closing(self.cache.linearized(self._batches, curvature.recipe.mode)) as linear_maps,
        ):
            for linear, kept in linear_maps:
                check_deadline()
                for total, share in zip(sums, linear(stacks, retain_graph=kept), strict=True):
                    torch._foreach_add_(total, share)
                advance(1 / self.cache.count_batches(curvature.problem.data), curvature.stage)
        if ranks is not None:
            sums = [[ranks.sum(stack) if len(stack) else stack for stack in leaves] for leaves in sums]
        return [
            torch.cat(
                [stack.reshape(len(stack), m) for stack, m in zip(leaves, layout.numels, strict=True)], 1
            ).mT
            for leaves, layout in zip(sums, self.layouts, strict=True)
        ]

    def _stacked(self, number: int, vectors: Tensor) -> Leaves:
        """Return columns ``[n_b, k]`` as the block's leaves ``[k, *shape]``."""
        layout, k = self.layouts[number], vectors.shape[1]
        parts = vectors.mT.split(layout.numels, dim=1)
        return [part.reshape(k, *shape) for part, shape in zip(parts, layout.shapes, strict=True)]

    def _batches(self) -> Iterator[BatchBlocks]:
        problem = self.curvature.problem
        for batch in weighted_batches(problem.data):
            yield BatchBlocks(batch.loss_share(problem.loss_fn, problem.layout), problem.leaves, self.blocks)
