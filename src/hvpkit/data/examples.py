"""Data as a re-iterable sequence of batches whose examples can be counted, weighted and selected.

Every pass gives the same examples, however the caller's loader orders them, and leaves the global random
state unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree

from hvpkit._utils.ranks import Ranks
from hvpkit._utils.typing import Batch
from hvpkit._utils.validation import check_count
from hvpkit.autodiff.pytree import flatten, plain, unflatten, usable
from hvpkit.data.sources import (
    DatasetBatches,
    IterableBatches,
    Source,
    TensorBatches,
    WholeBatches,
    count_examples,
    evenly,
    every,
    name_batch,
    unstable,
)


class Part(NamedTuple):
    """A batch, and its place among the examples.

    Attributes:
        batch: tree of tensors, or anything that is read whole.
        size: how many examples it holds.
        weights: of the examples' losses, ``[size]``; of a batch that is read whole, the one of its mean loss, 0-d;
            None: uniform, ``1 / num_examples`` for each example.
        number: batches before it.
        start: examples before it.
    """

    batch: Batch
    size: int
    weights: Tensor | None
    number: int
    start: int


@dataclass(frozen=True, repr=False)
class Data:
    """Examples in batches, the same ones in every pass. Made by :func:`as_data`.

    What can be left out of a sample is a *unit*: an example, or a batch where batches are read whole.

    Attributes:
        source: the batches.
        num_examples: number of examples in a pass.
        weights: one weight for each unit ``[num_units]``; None: each example weighs ``1 / num_examples``.
        device: the device that batches are moved to; None: they stay where they are.
        ranks: that share the batches; None: this process has all of them.
        units_of_ranks: how many units each rank brought; None: every rank could read all of them.
        has_own_variables: each example has variables of its own, as a perturbation, so that none can be left out.
        can_cut: the loss of an example does not depend on its batch, so that ranks may cut batches.
    """

    source: Source
    num_examples: int
    weights: Tensor | None = None
    device: torch.device | None = None
    ranks: Ranks | None = None
    units_of_ranks: tuple[int, ...] | None = None
    has_own_variables: bool = False
    can_cut: bool = False

    def __repr__(self) -> str:
        size, batches = self.batch_size, ""
        if size is not None:
            batches = f" in batches of {size}"
        elif self.whole:
            batches = f" in {self.num_units} whole batches"
        device = "" if self.device is None else f" on {self.device}"
        weighted = "" if self.weights is None else ", weighted"
        shared = "" if self.ranks is None else f", shared by {self.ranks.size} ranks"
        return (
            f"<Data: {self.num_examples} examples of {self.source.name}{batches}{device}{weighted}{shared}>"
        )

    @property
    def whole(self) -> bool:
        """Return True if batches are read whole, and never split: ``num_examples=`` of :func:`as_data`."""
        return isinstance(self.source, WholeBatches)

    @property
    def num_units(self) -> int:
        """Return the number of examples; of batches, where they are read whole."""
        return len(self.source) if self.units_of_ranks is None else sum(self.units_of_ranks)

    @property
    def own_units(self) -> slice:
        """Return the units, among all, that this process can read."""
        if self.ranks is None or self.units_of_ranks is None:
            return slice(0, self.num_units)
        start = sum(self.units_of_ranks[: self.ranks.rank])
        return slice(start, start + len(self.source))

    @property
    def shares(self) -> Tensor:
        """Return the weight of each unit's mean loss in the mean over the data, ``[num_units]``, float64, CPU."""
        if self.weights is not None:
            return self.weights.to("cpu", torch.float64)
        return self.unit_sizes / self.num_examples

    @property
    def unit_sizes(self) -> Tensor:
        """Return how many examples each unit holds, ``[num_units]``, float64."""
        if isinstance(self.source, WholeBatches):
            return torch.tensor(self.source.sizes, dtype=torch.float64, device="cpu")
        return torch.ones(self.num_units, dtype=torch.float64, device="cpu")

    @property
    def smallest_batch(self) -> int | None:
        """Return the number of examples in the smallest batch; None if only a pass could tell."""
        return self.source.smallest_batch

    @property
    def batch_size(self) -> int | None:
        """Return the maximum number of examples in a batch; None if the source decides."""
        return self.source.batch_size

    @property
    def num_batches(self) -> int | None:
        """Return the number of batches of this rank in a pass, about; None if only a pass could tell."""
        if isinstance(self.source, IterableBatches):
            return None
        num_sharing = 1 if self.ranks is None or self.units_of_ranks is not None else self.ranks.size
        return math.ceil(len(self.source) / (self.batch_size or 1) / num_sharing)

    @property
    def longest_batch(self) -> int:
        """Return the largest possible batch size: ``num_examples``; for iterables, the size of the first batch."""
        if isinstance(self.source, IterableBatches):
            return count_examples(next(iter(replace(self.source, batch_size=None))))
        return max(self.source.sizes) if isinstance(self.source, WholeBatches) else self.num_examples

    def __iter__(self) -> Iterator[Batch]:
        return (part.batch for part in self.parts())

    def parts(self) -> Iterator[Part]:
        """Yield all batches that this process can read.

        Raises:
            UnstableDataError: this pass has another number of examples than the first one.
        """
        return self._parts(1, 0)

    def share(self) -> Iterator[Part]:
        """Yield the batches that are this rank's; together the ranks have each batch once.

        Raises:
            UnstableDataError: as :meth:`parts`.
        """
        if self.ranks is None or self.units_of_ranks is not None:
            return self._parts(1, 0)
        return self._parts(self.ranks.size, self.ranks.rank)

    def even_share(self) -> Iterator[Part]:
        """Yield this rank's batches, the last ones cut, if they can be, so that ranks have as many examples.

        Raises:
            UnstableDataError: as :meth:`parts`.
        """
        ranks, source = self.ranks, self.source
        is_cut = self.can_cut and self.units_of_ranks is None
        if ranks is None or not is_cut or not isinstance(source, TensorBatches | DatasetBatches):
            yield from self.share()
        else:
            for number, start, batch in name_batch(evenly(source, ranks)):
                yield self._part(number, start, batch, count_examples(batch))

    def _parts(self, step: int, first: int) -> Iterator[Part]:
        end = 0
        for number, start, batch in name_batch(every(self.source, step, first)):
            size = self._size_of(number, start, batch)
            if size == 0:
                continue
            end = start + size
            yield self._part(number, start, batch, size)
        expected = self.num_examples if self.units_of_ranks is None else len(self.source)
        if step == 1 and end != expected:
            raise unstable(end, expected)

    def _size_of(self, number: int, start: int, batch: Batch) -> int:
        if isinstance(self.source, WholeBatches):
            return self.source.sizes[number]
        if isinstance(self.source, TensorBatches):
            return min(self.source.batch_size, len(self.source) - start)
        return count_examples(batch)

    def _part(self, number: int, start: int, batch: Batch, size: int) -> Part:
        whole, weights = isinstance(self.source, WholeBatches), self.weights
        if weights is not None:
            first = self.own_units.start + start
            weights = prepare(weights[number if whole else slice(first, first + size)], self.device)
        return Part(prepare(batch, self.device, whole=whole), size, weights, number, start)

    def first(self, num_examples: int | None = None) -> Data:
        """Return the first batch as data, cut to ``num_examples`` and a copy unless batches are read whole."""
        batch, size, weights, _, _ = next(self.parts())
        if self.whole:
            source = WholeBatches([batch], (size,), lambda _: size)
            return Data(source, size, None if weights is None else weights.reshape(1), self.device)
        # a loss that writes to it shall not have written to the data
        batch = _pytree.tree_map(torch.clone, batch)
        data = whole_batch(batch, weights)
        if num_examples is None or num_examples >= size:
            return data
        return data.subset(
            torch.arange(num_examples, device="cpu"), None if weights is None else weights[:num_examples]
        )

    def subset(self, indices: Tensor | Sequence[int], weights: Tensor | None = None) -> Data:
        """Select the examples at ``indices`` ``[m]`` (a repeated index counts again), each with its weight.

        Weights multiply losses as they are: an unbiased sample of the mean over N examples, drawn with
        inclusion probabilities ``p``, has ``weights = 1 / (N p)``. By default each weighs ``1 / m``.
        The examples keep the order of the data. Where batches are read whole, indices count batches, and weights
        multiply the mean losses of batches; by default each example weighs the same.

        Raises:
            TypeError: indices that are not integers, such as a mask.
            ValueError: an index out of range, no indices, or another number of weights than indices.

        Example:
            >>> import torch, hvpkit as hk
            >>> data = hk.as_data((torch.arange(6.0), torch.arange(6)))
            >>> [batch[1].tolist() for batch in data.subset(torch.tensor([4, 1]))]
            [[1, 4]]
        """
        if isinstance(indices, str):
            raise TypeError(f"indices must be a vector of whole numbers, got {indices!r}")
        indices = torch.as_tensor(indices, device="cpu")
        if indices.dtype == torch.bool or indices.is_floating_point():
            raise TypeError(
                f"indices must be whole numbers, got {indices.dtype}; of a mask pass mask.nonzero().flatten()"
            )
        indices = indices.to(torch.int64)
        if indices.ndim != 1 or len(indices) == 0:
            raise ValueError(f"indices must be a non-empty vector, got shape {tuple(indices.shape)}")
        if int(indices.min()) < 0 or int(indices.max()) >= self.num_units:
            units = "batches, which are read whole" if self.whole else "examples"
            raise ValueError(f"indices must be in [0, {self.num_units}), the {units} of the data")
        order = torch.argsort(indices, stable=True)
        if weights is not None:
            weights = (
                weights.detach() if isinstance(weights, Tensor) else torch.as_tensor(weights, device="cpu")
            )
            if weights.shape != indices.shape:
                raise ValueError(
                    f"weights must have one entry for each index: got shape {tuple(weights.shape)} "
                    f"for {len(indices)} indices"
                )
            if not bool(torch.isfinite(weights).all()):
                raise ValueError("weights contains NaN or infinity")
            weights = weights[order.to(weights.device)]
        chosen, of_ranks = indices[order], None
        if self.ranks is not None and self.units_of_ranks is not None:
            ends = torch.tensor(self.units_of_ranks, device="cpu").cumsum(0)
            of_ranks = torch.bucketize(chosen, ends, right=True).bincount(minlength=self.ranks.size).tolist()
            start = sum(of_ranks[: self.ranks.rank])
            chosen = chosen[start : start + of_ranks[self.ranks.rank]] - self.own_units.start
        source = self.source.select(chosen)
        num_examples = sum(source.sizes) if isinstance(source, WholeBatches) else len(indices)
        return replace(
            self,
            source=source,
            num_examples=num_examples,
            weights=weights,
            units_of_ranks=None if of_ranks is None else tuple(of_ranks),
        )

    @property
    def alone(self) -> Data:
        """Return what this process can read, without the other ranks: for trials."""
        if self.ranks is None or self.units_of_ranks is None:
            return replace(self, ranks=None)
        weights, own = self.weights, len(self.source)
        weights = None if weights is None else weights[self.own_units]
        return replace(self, ranks=None, units_of_ranks=None, num_examples=own, weights=weights)

    def spread(self) -> Data:
        """Return the same examples in batches that are small enough for each rank to have one, where they are cut."""
        if self.ranks is None or self.units_of_ranks is not None or self.batch_size is None:
            return self
        size = -(-self.num_units // self.ranks.size)
        return self if size >= self.batch_size else replace(self, source=self.source.resized(size))

    def sample(self, num_examples: int, random: torch.Generator) -> Data:
        """Draw units uniformly without replacement: about ``num_examples`` examples, weighted without bias.

        Where batches are read whole, it is as many batches as hold ``num_examples`` on average, at least one.
        """
        num_examples = check_count("num_examples", num_examples, 1, self.num_examples)
        order = torch.randperm(self.num_units, generator=random, device="cpu")
        return self.restrict(order[: self.count_units(num_examples)])

    def restrict(self, units: Tensor) -> Data:
        """Select units that were drawn uniformly, weighted so that their sum is an unbiased estimate of the mean."""
        if self.weights is None and not self.whole:
            return self.subset(units)
        shares = self.shares if self.weights is None else self.weights
        return self.subset(units, shares[units.to(shares.device)] * (self.num_units / len(units)))

    def count_units(self, num_examples: int) -> int:
        """Return how many units hold ``num_examples`` examples on average, at least one."""
        return max(1, round(num_examples * self.num_units / self.num_examples))


def prepare(batch: Batch, device: torch.device | None = None, *, whole: bool = False) -> Batch:
    """Return the batch in containers that torch knows, with tensors that autograd can use, on ``device`` if given.

    Raises:
        TypeError: a leaf is not a tensor, unless the batch is read ``whole``: then what can be moved is.
    """
    if whole:
        return _pytree.tree_map(
            lambda leaf: _moved(leaf, device), plain(batch), is_leaf=lambda x: isinstance(x, PackedSequence)
        )
    leaves, spec = flatten(batch, name="data")
    return unflatten([_moved(leaf, device) for leaf in leaves], spec)


def _moved(leaf: Any, device: torch.device | None) -> Any:
    if isinstance(leaf, Tensor):
        return usable(leaf if device is None else leaf.to(device, non_blocking=True))
    return leaf.to(device) if device is not None and callable(getattr(leaf, "to", None)) else leaf


def whole_batch(batch: Batch, weights: Tensor | None = None) -> Data:
    """Return one batch as data.

    Raises:
        ValueError: the batch is empty.
    """
    size = check_count("data: the number of examples", count_examples(batch), 1)
    return Data(TensorBatches(batch, size), size, weights)
