"""Problems whose parameters are split over ranks: how they are made, what is refused, and how they are verified."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hvpkit._utils.checkpoints import Hasher
from hvpkit._utils.ranks import Ranks
from hvpkit._utils.typing import LossFn, Tree
from hvpkit.autodiff.overrides import FunctionOverrides, embedding, padded
from hvpkit.autodiff.pytree import Layout, check_alike, check_params, flatten, snapshot
from hvpkit.curvature.batches import (
    Kind,
    Leaves,
    Problem,
    batch_curvatures,
    gradient_of,
    hessian_of_batch,
    loss_shares,
)
from hvpkit.curvature.derivative_check import LARGEST_GAP, SURE
from hvpkit.curvature.sharded_parameters import ShardedParameter, Shards
from hvpkit.data import Data
from hvpkit.objective import composed
from hvpkit.objective.fully_sharded import gathered
from hvpkit.operators.space import Space

MODE = "reverse-over-reverse"
"""The only mode: forward mode does not go through functions that wait for other ranks."""


def check_ranks(data: Data) -> Ranks:
    """Return the ranks that share the data; raise ValueError if there are none."""
    if data.ranks is None:
        raise ValueError(
            "shard_params=True splits parameters over the ranks of a mesh, and data has none: pass "
            "hvpkit.as_data(data, mesh=mesh) on every rank"
        )
    return data.ranks


def check_options(**options: object) -> None:
    """Raise ValueError for options of constructors that do not go with ``shard_params=True``."""
    possible = {
        "mode": ("auto", MODE),
        "arithmetic": ("native",),
        "compile": (False,),
        "memory_limit": (None, 0),
    }
    for name, values in possible.items():
        if options[name] not in values:
            raise ValueError(f"shard_params=True needs {name}={values[-1]!r}, got {options[name]!r}")
    if options["batch_size"] == "auto":
        raise ValueError("shard_params=True needs a batch_size that is a number, got 'auto'")


def device_of(params: Tree) -> torch.device:
    """Return the device of the parameters; raise ValueError if there are none."""
    leaves = flatten(params, name="params")[0]
    if not any(leaf.numel() for leaf in leaves):
        check_params(params)  # raises
    return leaves[0].device


def sharded_problem(loss_fn: LossFn, params: Tree, data: Data) -> Problem:
    """Return the problem with this rank's parts of parameters, which come whole, or as DTensors.

    Raises:
        TypeError, ValueError: as :func:`hvpkit.autodiff.pytree.check_params`; other parameters on another rank.
    """
    ranks, layout = check_ranks(data), Layout.of(params)
    shards, digest = Shards(ranks, layout), Hasher()
    parts, labels = [], []
    for index, (name, leaf) in enumerate(zip(layout.names, flatten(params)[0], strict=True)):
        whole = gathered(leaf) if leaf.numel() == 0 else check_params({name: gathered(leaf)})[1][0]
        digest.add(whole)
        labels.append(f"params[{name!r}]")
        parts.append(snapshot(whole.reshape(-1)[shards.own(index)]))
    check_alike(labels, parts)
    ranks.check_same(params=digest.result())
    return Problem(composed(loss_fn, shards.tree), shards.parts, parts, data, shards)


def parameters_of(problem: Problem) -> Leaves | str:
    """Return the parameters for a digest; of parameters in parts, one of the whole, gathered one after the other."""
    if problem.shards is None:
        return problem.leaves
    digest = Hasher()
    for index, part in enumerate(problem.leaves):
        digest.add(problem.shards.gather([part], [index])[0])
    return digest.result()


def verify(of_batch: Kind, problem: Problem, first: Data) -> None:
    """Compare products with each other and with differences of the gradient; all ranks take the first examples.

    By inner products with two random vectors, which are drawn again each time: little is held beside a product.

    Raises:
        ArithmeticError: the matrix is not symmetric, or its Hessian not the derivative of the gradient: a function in
            the loss does other things when it is run again, or its derivative is wrong.
    """
    probes = Probes(problem)
    for kind in dict.fromkeys((of_batch, hessian_of_batch)):
        linear = next(batch_curvatures(kind, problem, first)).linearize(MODE)
        images = [
            probes.measure(linear([probes.draw(stream)], retain_graph=stream == 0)[0]) for stream in (0, 1)
        ]
        (of_v, norm), (of_w, norm_of_w) = images
        apart, scale = abs(of_v[1] - of_w[0]), math.sqrt(problem.n) * (norm + norm_of_w)
        if apart > torch.finfo(problem.leaves[0].dtype).eps ** 0.5 * scale:
            raise ArithmeticError(_WRONG.format(f"not symmetric, by {apart / scale:.0e}"))
    del linear
    near, far = probes.differences(first, 1.0), probes.differences(first, 2.0)
    apart, error = math.dist(of_v, near), math.dist(near, far)
    if apart > SURE * error + LARGEST_GAP * norm:
        raise ArithmeticError(
            _WRONG.format(f"off by {apart / (norm or 1.0):.0e}, by differences of the gradient")
        )


_WRONG = (
    "shard_params=True: products are {}. The functions in a loss are run again in its derivatives here: one that draws "
    "random numbers, keeps state, or is not of torch cannot be; leave shard_params out, or correct that function"
)


@dataclass(frozen=True, eq=False)
class Probes:
    """Random vectors of a problem's parameters in parts, and inner products with them.

    Attributes:
        problem: whose parameters are in parts.
    """

    problem: Problem

    @property
    def space(self) -> Space:
        """Of the vectors."""
        assert self.problem.shards is not None
        return self.problem.shards.space

    def draw(self, stream: int) -> Leaves:
        """Return this rank's parts of a random vector."""
        vector = self.space.random(self.problem.n, like=self.problem.leaves[0], seed=0, stream=stream)
        return self.problem.layout.split(vector)

    def measure(self, leaves: Leaves) -> tuple[list[float], float]:
        """Return the inner products of a vector with three random ones, and its norm."""
        products = torch.stack(
            [_dot(self.draw(stream), leaves) for stream in range(3)] + [_dot(leaves, leaves)]
        )
        *found, square = self.space.reduce(products).tolist()
        return found, math.sqrt(square)

    def differences(self, first: Data, factor: float) -> list[float]:
        """Return the inner products of the derivative of the gradient along the first vector, by differences."""
        problem, direction = self.problem, self.draw(0)
        share = next(loss_shares(problem.loss_fn, problem.layout, first))

        def measured(step: float) -> list[float]:
            moved = [p + step * d for p, d in zip(problem.leaves, direction, strict=True)]
            with self.fixed_padding():
                return self.measure(gradient_of(share, moved))[0]

        sizes = [
            self.space.reduce(_dot(leaves, leaves)).sqrt().item() for leaves in (problem.leaves, direction)
        ]
        step = factor * torch.finfo(direction[0].dtype).eps ** (1 / 3) * max(1.0, sizes[0]) / sizes[1]
        ahead, behind = measured(step), measured(-step)
        return [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]

    def fixed_padding(self) -> FunctionOverrides:
        """Give embeddings the padding rows of the problem's parameters: constants, which no derivative moves."""
        shards, leaves = self.problem.shards, self.problem.leaves
        assert shards is not None

        def held(input: Tensor, weight: Tensor, *, padding_idx: int | None, **options: Any) -> Tensor:
            rows = embedding(input, weight, padding_idx=padding_idx, **options)
            if padding_idx is None or not isinstance(weight, ShardedParameter):
                return rows
            before = ShardedParameter(shards, weight.place, leaves[weight.place])
            return padded(rows, before[padding_idx], input, padding_idx % len(weight))

        return FunctionOverrides({F.embedding: held})


def _dot(a: Leaves, b: Leaves) -> Tensor:
    """Return the inner product of this rank's parts, in float64."""
    pairs = zip(a, b, strict=True)
    return torch.stack([torch.linalg.vecdot(x.flatten(), y.flatten()).double() for x, y in pairs]).sum()
