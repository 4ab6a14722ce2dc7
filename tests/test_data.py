from __future__ import annotations

import random
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import hvpkit as hk
from hvpkit._utils.ranks import Ranks
from hvpkit.data import random_state
from hvpkit.data.sources import DatasetBatches, TensorBatches, evenly

N = 11
X = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N, dtype=torch.float64)
P = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
Pair = namedtuple("Pair", "x y")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process without other threads: other tests may leave some. For those see test_threads."""
    monkeypatch.setattr(random_state, "_is_quiet", lambda _: True)


class Plain:
    """A map-style dataset of no class of torch's."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": X[index], "y": Y[index]}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(X, Y, strict=True))


class Batches:
    """Ragged batches, an empty one among them, as often as wanted."""

    def __iter__(self) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        for start, stop in ((0, 4), (4, 4), (4, 5), (5, N)):
            yield {"pair": (X[start:stop], Y[start:stop])}


class Doubled(DataLoader):
    """A loader that does something of its own to batches."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((x * 2 / 2, y) for x, y in super().__iter__())


class TwoByTwo(torch.utils.data.Sampler):
    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(range(start, min(start + 2, N))) for start in range(0, N, 2)])

    def __len__(self) -> int:
        return (N + 1) // 2


def as_userdict(examples: list[tuple[Tensor, Tensor]]) -> UserDict:
    return UserDict(x=torch.stack([x for x, _ in examples]), y=torch.stack([y for _, y in examples]))


def loader(**options: object) -> DataLoader:
    return DataLoader(TensorDataset(X, Y), **options)


SOURCES: dict[str, Callable[[], object]] = {
    "tuple": lambda: (X, Y),
    "dict": lambda: {"x": X, "y": Y},
    "userdict": lambda: UserDict(x=X, y=Y),
    "nested": lambda: ({"x": X}, [Y]),
    "namedtuple": lambda: Pair(X, Y),
    "dataset": lambda: TensorDataset(X, Y),
    "plain_dataset": Plain,
    "loader": lambda: loader(batch_size=4),
    "loader_of_ones": loader,
    "loader_shuffled": lambda: loader(batch_size=4, shuffle=True),
    "loader_dropping": lambda: loader(batch_size=4, drop_last=True, shuffle=True),
    "loader_batch_sampler": lambda: loader(batch_sampler=BatchSampler(RandomSampler(range(N)), 4, True)),
    "loader_collating": lambda: loader(batch_size=4, collate_fn=as_userdict),
    "loader_of_plain": lambda: DataLoader(Plain(), batch_size=3),
    "loader_of_own_class": lambda: Doubled(TensorDataset(X, Y), batch_size=4),
    "loader_of_stream": lambda: DataLoader(Stream(), batch_size=4),
    "loader_of_own_sampler": lambda: loader(batch_sampler=TwoByTwo()),
    "loader_of_batches": lambda: DataLoader([(X[:4], Y[:4]), (X[4:], Y[4:])], batch_size=None),
    "list": lambda: [(X[:4], Y[:4]), (X[4:9], Y[4:9]), (X[9:], Y[9:])],
    "reiterable": Batches,
}
in_each = pytest.mark.parametrize("source", SOURCES)


def losses(params: Tensor, batch: object) -> Tensor:
    x, y = tree_leaves(batch)
    return (x @ params - y) ** 2


def direct(indices: list[int], weights: Tensor | None = None) -> Tensor:
    values = (X[indices] @ P - Y[indices]) ** 2
    return values.mean() if weights is None else weights.double() @ values


def ids(data: hk.Data) -> list[list[int]]:
    return [tree_leaves(batch)[-1].long().tolist() for batch in data]


def flat(batches: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


def same(found: Tensor, expected: Tensor) -> bool:
    return bool(torch.isclose(found, expected, rtol=1e-13, atol=0.0))


@in_each
def test_every_source_holds_each_example_once_and_in_order(source: str) -> None:
    data = hk.as_data(SOURCES[source]())
    assert data.num_examples == N
    for _ in range(2):
        batches = list(data)
        assert torch.equal(torch.cat([tree_leaves(batch)[0] for batch in batches]), X)
        assert torch.equal(torch.cat([tree_leaves(batch)[1] for batch in batches]), Y)


@in_each
@pytest.mark.parametrize("batch_size", [None, 1, 3, 100])
def test_the_mean_is_over_examples_however_they_are_batched(source: str, batch_size: int | None) -> None:
    data = hk.as_data(SOURCES[source](), batch_size=batch_size)
    assert batch_size is None or max(len(batch) for batch in ids(data)) <= batch_size
    assert same(hk.loss(losses, P, data), direct(list(range(N))))


@pytest.mark.parametrize(
    ("source", "batch_size", "sizes"),
    [
        ("tuple", None, [11]),
        ("tuple", 4, [4, 4, 3]),
        ("dataset", 4, [4, 4, 3]),
        ("plain_dataset", None, [11]),
        ("loader", None, [4, 4, 3]),
        ("loader", 6, [6, 5]),
        ("loader_dropping", None, [4, 4, 3]),
        ("loader_batch_sampler", None, [4, 4, 3]),
        ("loader_of_ones", None, [1] * 11),
        ("loader_of_own_class", None, [4, 4, 3]),
        ("list", None, [4, 5, 2]),
        ("list", 3, [3, 1, 3, 2, 2]),
        ("reiterable", None, [4, 1, 6]),
    ],
)
def test_batches_are_as_large_as_asked_for(source: str, batch_size: int | None, sizes: list[int]) -> None:
    assert [len(batch) for batch in ids(hk.as_data(SOURCES[source](), batch_size=batch_size))] == sizes
    again = hk.as_data(hk.as_data(SOURCES[source]()), batch_size=batch_size)
    assert [len(batch) for batch in ids(again)] == sizes


@in_each
def test_a_subset_is_a_weighted_sum_over_its_examples(source: str) -> None:
    data = hk.as_data(SOURCES[source]())
    indices = [9, 2, 2, 0, 10]
    weights = torch.tensor([0.5, 0.25, 1.0, 3.0, 0.125])
    plain, weighted = data.subset(indices), data.subset(torch.tensor(indices), weights)
    assert plain.num_examples == weighted.num_examples == 5
    assert sorted(flat(ids(plain))) == sorted(indices)
    assert same(hk.loss(losses, P, plain), direct(indices))
    assert same(hk.loss(losses, P, weighted), direct(indices, weights))
    for batch_size in (1, 2):
        resized = hk.as_data(weighted, batch_size=batch_size)
        assert max(len(batch) for batch in ids(resized)) <= batch_size
        assert same(hk.loss(losses, P, resized), direct(indices, weights))


@in_each
def test_a_subset_of_a_subset_is_counted_in_the_first_ones_order(source: str) -> None:
    first = hk.as_data(SOURCES[source]()).subset([8, 1, 5, 10])
    assert flat(ids(first)) == [1, 5, 8, 10]
    weights = torch.tensor([2.0, -1.0, 4.0])
    second = first.subset([3, 0, 3], weights)
    assert flat(ids(second)) == [1, 10, 10]
    assert same(hk.loss(losses, P, second), direct([10, 1, 10], weights))


@in_each
def test_weights_reach_gradients_and_products(source: str) -> None:
    indices, weights = [7, 3, 3], torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    data = hk.as_data(SOURCES[source]()).subset(indices, weights)
    x, y = X[indices], Y[indices]
    slope = hk.grad(losses, P, data)
    assert torch.allclose(slope, 2 * (weights * (x @ P - y)) @ x, rtol=1e-13, atol=0.0)
    dense = 2 * (x.mT * weights) @ x
    for mode in ("forward-over-reverse", "reverse-over-reverse"):
        H = hk.hessian(losses, P, data, mode=mode)
        assert torch.allclose(H @ torch.eye(3, dtype=torch.float64), dense, rtol=1e-13, atol=1e-15)
        assert H.num_examples == 3


def test_weights_need_one_loss_for_each_example() -> None:
    data = hk.as_data((X, Y)).subset([1, 2], torch.tensor([1.0, 2.0]))

    def mean_loss(params: Tensor, batch: object) -> Tensor:
        return losses(params, batch).mean()

    for front_door in (hk.loss, hk.grad, hk.hessian):
        with pytest.raises(ValueError, match="loss_fn returned a 0-d mean, which cannot be weighted"):
            front_door(mean_loss, P, data)


Seeded = torch.Generator | None
SAMPLED: dict[str, tuple[Callable[[Seeded], DataLoader], list[int] | int]] = {
    "subset": (lambda g: loader(batch_size=2, sampler=SubsetRandomSampler([1, 4, 6], g)), [1, 4, 6]),
    "subset in batch sampler": (
        lambda g: loader(batch_sampler=BatchSampler(SubsetRandomSampler([1, 4, 6], g), 2, False)),
        [1, 4, 6],
    ),
    "weighted": (lambda g: loader(sampler=WeightedRandomSampler(Y + 1, 20, generator=g)), 20),
    "weighted in batch sampler": (
        lambda g: loader(batch_sampler=BatchSampler(WeightedRandomSampler(Y + 1, 20, generator=g), 4, False)),
        20,
    ),
    "replacement": (lambda g: loader(sampler=RandomSampler(range(N), replacement=True, generator=g)), N),
    "fewer": (lambda g: loader(sampler=RandomSampler(range(N), num_samples=5, generator=g)), 5),
    "range": (lambda g: loader(batch_size=4, sampler=range(3, 9), generator=g), [3, 4, 5, 6, 7, 8]),
    "own class": (
        lambda g: Doubled(TensorDataset(X, Y), batch_size=4, shuffle=True, generator=g),
        list(range(N)),
    ),
}


def disturb() -> None:
    torch.rand(3)
    np.random.rand(3)
    random.random()


@pytest.mark.parametrize("sampling", SAMPLED)
@pytest.mark.parametrize("seeded", [False, True])
def test_a_sampler_of_its_own_gives_the_same_examples_in_every_pass(sampling: str, seeded: bool) -> None:
    make, expected = SAMPLED[sampling]
    generator = torch.Generator().manual_seed(7) if seeded else None
    before = global_states(), generator and generator.get_state().tolist()
    data = hk.as_data(make(generator))
    first = ids(data)
    assert (global_states(), generator and generator.get_state().tolist()) == before
    disturb()
    assert ids(data) == first
    chosen = flat(first)
    assert data.num_examples == len(chosen)
    if isinstance(expected, list):
        assert sorted(chosen) == expected
    else:
        assert len(chosen) == expected
        assert (len(set(chosen)) < expected) == (sampling != "fewer")
    assert same(hk.loss(losses, P, data), direct(chosen))
    assert same(hk.loss(losses, P, data.subset([2, 0])), direct([chosen[0], chosen[2]]))


class Noisy(Dataset):
    """Examples that draw from all three global generators whenever they are read."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()]), index


def global_states() -> tuple[object, ...]:
    _, words, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), words.tolist(), rest, random.getstate()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_random_examples_are_the_same_in_every_pass_and_leave_no_trace(
    num_workers: int, shuffle: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    source = DataLoader(
        Noisy(),
        batch_size=2,
        shuffle=shuffle,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        generator=generator,
    )
    before = global_states(), generator.get_state().tolist()
    data = hk.as_data(source)
    first = torch.cat([noise for noise, _ in data])
    assert (global_states(), generator.get_state().tolist()) == before
    disturb()
    assert torch.equal(torch.cat([noise for noise, _ in data]), first)
    assert len(first.unique()) > 7
    assert flat(ids(data)) == list(range(7))
    assert flat(ids(data.subset([5, 1]))) == [1, 5]
    assert torch.equal(torch.cat([noise for noise, _ in data.subset([5, 1])]), first[[1, 5]])


class Augmented(Dataset):
    """Points that are flipped, scaled and shifted at random, each by another library's numbers."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = X[index] * (1 if random.random() < 0.5 else -1) * np.random.uniform(0.5, 1.5)
        return x + 0.3 * torch.randn(3, dtype=torch.float64), Y[index]


class FromBatches(Augmented):
    """As datasets that fetch a batch at once."""

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        return [self[index] for index in indices]


def drawn(loss_of: Callable[[Tensor, Tensor], Tensor], batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return torch.autograd.functional.hessian(lambda p: loss_of(x @ p, y).mean(), P)


AUGMENTED: dict[str, Callable[[], object]] = {
    "dataset": Augmented,
    "fetching batches": lambda: DataLoader(FromBatches(), batch_size=4),
    "batches of 4": lambda: DataLoader(Augmented(), batch_size=4, shuffle=True),
    "batches of 5": lambda: DataLoader(Augmented(), batch_size=5),
    "two workers": lambda: DataLoader(Augmented(), batch_size=3, num_workers=2, persistent_workers=True),
    "own sampler": lambda: DataLoader(Augmented(), batch_sampler=TwoByTwo()),
    "subset": lambda: DataLoader(torch.utils.data.Subset(Augmented(), range(N)), batch_size=2),
}


@pytest.mark.parametrize("source", AUGMENTED)
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_augmentation_is_one_draw_of_each_example_whatever_reads_it(source: str) -> None:
    def quartic(z: Tensor, y: Tensor) -> Tensor:
        return (z - y) ** 4

    def loss_fn(params: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return quartic(batch[0] @ params, batch[1])

    def dense(H: hk.LinearOperator) -> Tensor:
        return H @ torch.eye(3, dtype=torch.float64)

    stated = list(hk.as_data(Augmented()))
    assert not torch.allclose(stated[0][0], X, atol=0.1)
    before = global_states()
    data = hk.as_data(AUGMENTED[source]())
    H = hk.hessian(loss_fn, P, data)
    assert torch.allclose(dense(H), drawn(quartic, stated), rtol=1e-12, atol=0.0)
    assert hk.check(H).ok
    disturb()
    few = data.subset([7, 2, 3])
    chosen = [(x[[2, 3, 7]], y[[2, 3, 7]]) for x, y in stated]
    assert torch.allclose(dense(hk.hessian(loss_fn, P, few)), drawn(quartic, chosen), rtol=1e-12, atol=0.0)
    sample = H.coarsen(5, importance="loss")
    x, y = (torch.cat(parts) for parts in zip(*sample.origin.data, strict=True))
    assert all(torch.equal(a, stated[0][0][int(i)]) for a, i in zip(x, y, strict=True))
    random.setstate(before[3])


class Keyed(Dataset):
    """Examples by name, which only a sampler knows, and which are drawn at random."""

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        return X[{"first": 0, "last": N - 1}[name]] + torch.rand(3), Y[0]


def test_examples_may_have_keys_of_any_type() -> None:
    names = ["last", "first", "last"]
    data = hk.as_data(DataLoader(Keyed(), sampler=names, batch_size=2))
    first, second = (torch.cat([x for x, _ in data]) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0] - X[N - 1], first[1] - X[0])


class DrawsLate(Augmented):
    """As a dataset that augments one class only."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return (X[index] * torch.rand(()) if index == 8 else X[index]), Y[index]


def test_a_subset_of_a_dataset_has_its_examples() -> None:
    whole = torch.cat([x for x, _ in hk.as_data(Augmented())])
    part = hk.as_data(torch.utils.data.Subset(torch.utils.data.Subset(Augmented(), [8, 3, 5]), [2, 0]))
    assert torch.equal(torch.cat([x for x, _ in part]), whole[[5, 8]])
    assert torch.equal(torch.cat([x for x, _ in part.subset([1])]), whole[[8]])


def test_one_example_that_draws_is_fixed_too() -> None:
    passes = [torch.cat([x for x, _ in hk.as_data(DrawsLate(), batch_size=size)]) for size in (1, 3, 11)]
    assert torch.equal(passes[0], passes[1])
    assert torch.equal(passes[0], passes[2])
    assert torch.equal(passes[0] == X, (Y != 8)[:, None].expand(N, 3))


def test_nothing_is_seeded_around_data_that_draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [source() for name, source in SOURCES.items() if name not in ("loader_of_own_class",)]
    held = [hk.as_data(source) for source in sources if not isinstance(source, DataLoader)]
    held += [hk.as_data(loader(batch_size=4, shuffle=True)), hk.as_data(DataLoader(Plain()))]

    def refuse(seed: int) -> None:
        raise AssertionError(f"seeded with {seed}")

    augmented = hk.as_data(Augmented())
    monkeypatch.setitem(type(augmented.source.examples)._read_seeded.__globals__, "seed_global", refuse)
    with pytest.raises(AssertionError, match="seeded with 0"):
        list(augmented)
    for data in held:
        assert sum(len(batch) for batch in ids(data)) == N
        assert len(ids(data.subset([3, 1]))) >= 1


class OwnGenerator(Augmented):
    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] * self.random.uniform(), Y[index]


def mixup(examples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = torch.utils.data.default_collate(examples)
    share = torch.distributions.Beta(0.2, 0.2).sample()
    return share * x + (1 - share) * x.roll(1, 0), y


class AugmentedStream(Stream):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((x + torch.randn(3), y) for x, y in super().__iter__())


class OwnGeneratorStream:
    def __init__(self) -> None:
        self.generator_of_numpy = np.random.default_rng(0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield X * self.generator_of_numpy.uniform(), Y


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            lambda **o: DataLoader(OwnGenerator(), batch_size=4, **o),
            "dataset gives another example .* seeded for",
        ),
        (lambda **o: loader(batch_size=4, collate_fn=mixup, **o), "collate_fn draws random numbers .mixup"),
        (
            lambda **o: loader(
                batch_sampler=BatchSampler(WeightedRandomSampler(Y + 1, 9), 4, False), collate_fn=mixup, **o
            ),
            "collate_fn draws random numbers",
        ),
        (
            lambda **o: DataLoader(AugmentedStream(), batch_size=4, **o),
            r"the examples are others when .* list\(...\)",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_random_data_that_no_seed_fixes_are_refused_with_the_remedy(
    source: Callable[..., object], reason: str, num_workers: int
) -> None:
    before = global_states()
    with pytest.raises(hk.UnstableDataError, match=f"data: .*{reason}"):
        hk.as_data(source(num_workers=num_workers))
    assert global_states() == before


def test_a_stream_with_numbers_of_its_own_is_refused_and_its_list_is_not() -> None:
    with pytest.raises(hk.UnstableDataError, match="data: the examples are others"):
        hk.as_data(OwnGeneratorStream())
    assert hk.as_data(list(OwnGeneratorStream())).num_examples == N


class ShuffledStream:
    """The same examples in an order that global or own random numbers give."""

    def __init__(self, permutation: Callable[[int], np.ndarray]) -> None:
        self.permutation = permutation

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.from_numpy(self.permutation(N))
        return ((X[chosen], Y[chosen]) for chosen in order.split(3))


def test_a_stream_in_random_order_is_no_other_data() -> None:
    for permutation in (np.random.permutation, np.random.default_rng(0).permutation):
        data = hk.as_data(ShuffledStream(permutation))
        assert sorted(flat(ids(data))) == list(range(N))
        assert same(hk.loss(losses, P, data), direct(list(range(N))))
    repeated = hk.as_data(ShuffledStream(np.random.permutation))
    assert ids(repeated) == ids(repeated)


def test_a_pass_that_is_left_early_leaves_no_trace() -> None:
    generator = torch.Generator().manual_seed(3)
    before = global_states(), generator.get_state().tolist()
    source = loader(batch_size=2, sampler=RandomSampler(range(N), replacement=True, generator=generator))
    for _ in hk.as_data(source):
        break
    assert (global_states(), generator.get_state().tolist()) == before


def test_batches_are_moved_to_the_device_asked_for() -> None:
    for source in SOURCES.values():
        data = hk.as_data(source(), device="meta")
        assert {leaf.device.type for batch in data for leaf in tree_leaves(batch)} == {"meta"}
        assert {weights.device.type for _, _, weights, *_ in data.subset([1], [1.0]).parts()} == {"meta"}
        back = hk.as_data(data, device="cpu")
        assert {leaf.device.type for batch in back for leaf in tree_leaves(batch)} == {"cpu"}


@in_each
def test_the_smallest_batch_is_known_where_the_sizes_are(source: str) -> None:
    for batch_size in (1, 3, 4, 5, 100):
        data = hk.as_data(SOURCES[source](), batch_size=batch_size)
        for part in (data, data.subset([0, 1, 2])):
            if part.smallest_batch is not None:
                assert part.smallest_batch == min(len(batch) for batch in ids(part))
    known = hk.as_data(SOURCES[source]()).smallest_batch is not None
    counted = ("list", "reiterable", "loader_of_own", "loader_of_stream", "loader_of_batches")
    assert known == (not source.startswith(counted))


def test_the_data_may_be_indices_alone() -> None:
    def loss_fn(params: Tensor, index: Tensor) -> Tensor:
        return (X[index] @ params - Y[index]) ** 2

    for indices in (torch.arange(N), range(N), DataLoader(range(N), batch_size=3)):
        assert same(hk.loss(loss_fn, P, indices), direct(list(range(N))))


def test_the_data_may_be_one_tensor_or_integers() -> None:
    data = hk.as_data(torch.arange(5), batch_size=2)
    assert [batch.tolist() for batch in data] == [[0, 1], [2, 3], [4]]


class Changing:
    """One example fewer (or more) in each pass."""

    def __init__(self, step: int) -> None:
        self.size, self.step = 4, step

    def __iter__(self) -> Iterator[Tensor]:
        self.size += self.step
        yield torch.ones(2, 1)
        yield torch.ones(self.size, 1)


class Dropping(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return torch.ones(1) * index


def drop_odd(examples: list[Tensor]) -> Tensor:
    return torch.stack([example for example in examples if example % 2 == 0])


@pytest.mark.parametrize(
    "source",
    [
        lambda: Changing(-1),
        lambda: Changing(1),
        lambda: DataLoader(Dropping(), batch_size=2, collate_fn=drop_odd),
    ],
)
def test_another_number_of_examples_in_a_later_pass_is_an_error(source: Callable[[], object]) -> None:
    data = hk.as_data(source())
    with pytest.raises(hk.UnstableDataError, match=r"data gave \d examples in this pass, not the \d counted"):
        list(data)
    with pytest.raises(hk.UnstableDataError):
        hk.loss(lambda p, x: (x * p).sum(1), torch.tensor(1.0), source())


def keep_below_two(examples: list[Tensor]) -> Tensor:
    stacked = torch.stack(examples)
    return stacked[stacked[:, 0] < 2]


def test_no_pass_gives_a_batch_of_none() -> None:
    batches = iter(hk.as_data(DataLoader(Dropping(), batch_size=2, collate_fn=keep_below_two)))
    assert len(next(batches)) == 2
    with pytest.raises(hk.UnstableDataError, match="data gave 2 examples"):
        next(batches)


def test_a_subset_of_changing_data_is_an_error_too() -> None:
    data = hk.as_data(Changing(-1)).subset([0, 1])
    with pytest.raises(hk.UnstableDataError):
        list(data)


@pytest.mark.parametrize(
    ("source", "error", "reason"),
    [
        (lambda: (torch.ones(0, 3), torch.ones(0)), ValueError, "data is empty"),
        (lambda: [], ValueError, "data is empty"),
        (lambda: [(torch.ones(0, 3), torch.ones(0))], ValueError, "data is empty"),
        (lambda: TensorDataset(torch.ones(0, 3)), ValueError, "data is empty"),
        (lambda: DataLoader(TensorDataset(torch.ones(0, 3))), ValueError, "data is empty"),
        (lambda: (), ValueError, "data holds a batch without any tensor"),
        (lambda: (X, Y[:4]), ValueError, "data: .* share their first dimension"),
        (lambda: [(X, Y), (X, Y[:4])], ValueError, "data: .* share their first dimension"),
        (lambda: (X, torch.tensor(1.0)), ValueError, "data: .* share their first dimension"),
        (lambda: torch.tensor(1.0), ValueError, "data: .* share their first dimension"),
        (lambda: ((X, Y) for _ in range(2)), ValueError, "data is a one-shot iterator .generator"),
        (lambda: iter([(X, Y)]), ValueError, "data is a one-shot iterator"),
        (lambda: iter(loader()), ValueError, "data is a one-shot iterator"),
        (lambda: zip([X], [Y], strict=True), ValueError, "data is a one-shot iterator .zip"),
        (lambda: [X, Y], ValueError, "data is a list of tensors"),
        (lambda: Stream(), TypeError, "data is an IterableDataset"),
        (lambda: X.numpy(), TypeError, "data is a NumPy array"),
        (lambda: (X, Y.numpy()), TypeError, "data must be a tree of tensors, .* ndarray"),
        (lambda: (X, "label"), TypeError, "data must be a tree of tensors, .* str"),
        (lambda: [(X, None)], TypeError, "data must be a tree of tensors, .* NoneType"),
        (lambda: None, TypeError, "data must be tensors, .* got NoneType"),
        (lambda: "digits", TypeError, "data must be tensors, .* got str"),
        (lambda: 3, TypeError, "data must be tensors, .* got int"),
    ],
)
def test_what_is_no_data_is_refused(source: Callable, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        hk.as_data(source())


def test_a_refused_iterator_is_not_used_up() -> None:
    iterator = iter([(X, Y)])
    with pytest.raises(ValueError, match="one-shot"):
        hk.as_data(iterator)
    assert len(list(iterator)) == 1


@pytest.mark.parametrize(
    ("batch_size", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_a_batch_size_that_is_no_count_is_refused(batch_size: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="batch_size must be"):
        hk.as_data((X, Y), batch_size=batch_size)


def test_a_batch_size_may_be_of_numpy() -> None:
    assert [len(batch) for batch in ids(hk.as_data((X, Y), batch_size=np.int64(6)))] == [6, 5]


@pytest.mark.parametrize(
    ("indices", "weights", "error", "reason"),
    [
        ([], None, (ValueError, TypeError), "indices must be"),
        ([[0, 1]], None, ValueError, "indices must be a non-empty vector"),
        ([0, N], None, ValueError, rf"indices must be in \[0, {N}\)"),
        ([-1], None, ValueError, rf"indices must be in \[0, {N}\)"),
        ([0.0, 1.0], None, TypeError, "indices must be whole numbers"),
        (Y > 3, None, TypeError, "indices must be whole numbers, got torch.bool; of a mask"),
        ([0, 1], [1.0], ValueError, "weights must have one entry for each index"),
        ([0, 1], 1.0, ValueError, "weights must have one entry for each index"),
    ],
)
def test_a_choice_that_is_none_is_refused(
    indices: object, weights: object, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        hk.as_data((X, Y)).subset(indices, weights)


def test_sequential_batch_samplers_cover_the_dataset_in_order() -> None:
    source = loader(batch_sampler=BatchSampler(SequentialSampler(range(N)), 5, True))
    assert ids(hk.as_data(source)) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10]]


# Batches that are read whole.

BOXES = [
    torch.randn(k, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(1, 8)
]


class Pictures(Dataset):
    """Pictures of different sizes, each with a name."""

    def __len__(self) -> int:
        return len(BOXES)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        return BOXES[index], f"{index}.png"


def as_lists(examples: list[tuple[Tensor, str]]) -> tuple[list[Tensor], list[str]]:
    pictures, names = zip(*examples, strict=True)
    return list(pictures), list(names)


def in_pairs(**options: object) -> DataLoader:
    return DataLoader(Pictures(), collate_fn=as_lists, **({"batch_size": 2} | options))


def pairs() -> list[tuple[list[Tensor], list[str]]]:
    return [as_lists([Pictures()[i] for i in range(k, min(k + 2, 7))]) for k in range(0, 7, 2)]


class PairsAgain:
    def __iter__(self) -> Iterator[tuple[list[Tensor], list[str]]]:
        return iter(pairs())


def num_pictures(batch: tuple[list[Tensor], list[str]]) -> int:
    return len(batch[1])


WHOLE: dict[str, Callable[[], object]] = {
    "loader": in_pairs,
    "loader with workers": lambda: in_pairs(num_workers=2),
    "loader shuffled": lambda: in_pairs(shuffle=True),
    "loader of own sampler": lambda: in_pairs(
        batch_size=1, batch_sampler=[[0, 1], [2, 3], [4, 5], [6]], shuffle=None
    ),
    "list": pairs,
    "reiterable": PairsAgain,
}
of_each = pytest.mark.parametrize("source", WHOLE)


@of_each
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_batches_of_any_form_are_read_whole(source: str) -> None:
    data = hk.as_data(WHOLE[source](), num_examples=num_pictures)
    assert (data.num_examples, data.num_units, data.smallest_batch, data.longest_batch) == (7, 4, 1, 2)
    assert data.shares.tolist() == [2 / 7, 2 / 7, 2 / 7, 1 / 7]
    for _ in range(2):
        assert [names for _, names in data] == [
            ["0.png", "1.png"],
            ["2.png", "3.png"],
            ["4.png", "5.png"],
            ["6.png"],
        ]
        assert all(torch.equal(a, b) for a, b in zip(flat([x for x, _ in data]), BOXES, strict=True))
    assert isinstance(next(iter(data))[0], list)


@of_each
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_subset_of_whole_batches_counts_batches(source: str) -> None:
    data = hk.as_data(WHOLE[source](), num_examples=num_pictures)
    part = data.subset([3, 1, 1])
    assert [names for _, names in part] == [["2.png", "3.png"]] * 2 + [["6.png"]]
    assert part.num_examples == 5
    assert part.shares.tolist() == [0.4, 0.4, 0.2]
    again = part.subset([2, 0], [0.25, 4.0])
    assert [(names, float(w)) for (_, names), _, w, *_ in again.parts()] == [
        (["2.png", "3.png"], 4.0),
        (["6.png"], 0.25),
    ]
    with pytest.raises(ValueError, match=r"indices must be in \[0, 4\), the batches, which are read whole"):
        data.subset([4])


@pytest.mark.parametrize("weighted", [False, True])
def test_restricted_data_estimate_the_mean_without_bias(weighted: bool) -> None:
    data = hk.as_data(pairs(), num_examples=num_pictures)
    if weighted:
        data = data.subset([0, 1, 2, 3], [1.0, 0.5, 2.0, 4.0])
    every = [data.restrict(torch.tensor(units)) for units in ([0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3])]
    totals = dict.fromkeys(range(4), 0.0)
    for part in every:
        for (_, names), _, weight, *_ in part.parts():
            totals[int(names[0][0]) // 2] += float(weight) / len(every)
    assert list(totals.values()) == pytest.approx(data.shares.tolist())


def test_what_whole_batches_cannot_be_is_refused() -> None:
    with pytest.raises(TypeError, match=r"num_examples must be a function of a batch, .* got 3"):
        hk.as_data(pairs(), num_examples=3)
    with pytest.raises(ValueError, match="batch_size and num_examples exclude each other"):
        hk.as_data(pairs(), batch_size=2, num_examples=num_pictures)
    data = hk.as_data(pairs(), num_examples=num_pictures)
    with pytest.raises(ValueError, match=r"batch_size=2: batches .* are read whole, and never split"):
        hk.as_data(data, batch_size=2)
    with pytest.raises(ValueError, match="num_examples goes with the data as you have them"):
        hk.as_data(data, num_examples=num_pictures)
    with pytest.raises(TypeError, match=r"num_examples of a batch must be an int, got 1\.5"):
        hk.as_data(pairs(), num_examples=lambda _: 1.5)
    with pytest.raises(ValueError, match="data is empty"):
        hk.as_data(pairs(), num_examples=lambda _: 0)


@pytest.mark.parametrize(
    "source",
    [
        lambda: in_pairs(),
        lambda: [(torch.ones(4, 2), torch.ones(3))],
        lambda: (torch.ones(4, 2), torch.ones(3)),
        lambda: [{"x": torch.ones(4), "energy": torch.tensor(1.0)}],
    ],
)
def test_batches_without_a_common_first_dimension_are_told_of_num_examples(
    source: Callable[[], object],
) -> None:
    with pytest.raises(
        (TypeError, ValueError), match=r"hvpkit.as_data\(data, num_examples=lambda batch: ...\)"
    ):
        list(hk.as_data(source()))


def test_a_batch_whose_number_of_examples_changes_is_an_error() -> None:
    sizes = iter([2, 2, 2, 1, 2, 3, 2, 1])
    data = hk.as_data(pairs(), num_examples=lambda _: next(sizes))
    with pytest.raises(hk.UnstableDataError, match="data gave 3 examples in batch 1, not the 2 counted"):
        list(data)


def test_whole_batches_are_moved_as_far_as_they_can_be() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    batch = {"boxes": BOXES[:2], "packed": packed, "names": ["a", "b"], "none": None, "user": UserDict(x=X)}
    (read,) = hk.as_data([batch], num_examples=lambda b: len(b["names"]), device="meta")
    assert {leaf.device.type for leaf in (*read["boxes"], read["packed"].data, read["user"]["x"])} == {"meta"}
    assert read["packed"].batch_sizes.device.type == "cpu"
    assert (read["names"], read["none"]) == (["a", "b"], None)
    (one,) = hk.as_data((X, X[:3]), num_examples=lambda b: len(b[0]))
    assert [len(x) for x in one] == [N, 3]


# Errors and names.


class Broken(Plain):
    """Example 7 cannot be read."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == 7:
            raise OSError("truncated file")
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_an_example_that_cannot_be_read_is_named(num_workers: int) -> None:
    data = hk.as_data(DataLoader(Broken(), batch_size=3, num_workers=num_workers))
    with pytest.raises(OSError, match="truncated file") as caught:
        list(data)
    text = str(caught.value) + "".join(caught.value.__notes__)
    assert "while reading example 7 of the dataset" in text
    assert "while reading batch 2 of data (counted from 0)" in text
    with pytest.raises(OSError, match="truncated file") as caught:
        list(data.subset([9, 7]))
    assert "while reading example 7 of the dataset" in str(caught.value) + "".join(caught.value.__notes__)


def test_examples_of_different_shapes_are_told_of_a_collate_function() -> None:
    with pytest.raises(RuntimeError, match="equal size") as caught:
        list(hk.as_data(Pictures()))
    assert "pass a DataLoader with one that can, and num_examples=" in "".join(caught.value.__notes__)


def test_data_have_a_short_name() -> None:
    assert repr(hk.as_data((X, Y), batch_size=4)) == "<Data: 11 examples of tensors in batches of 4>"
    named = hk.as_data(loader(batch_size=4), device="meta").subset([1, 2], [1.0, 2.0])
    assert repr(named) == "<Data: 2 examples of TensorDataset in batches of 4 on meta, weighted>"
    assert repr(hk.as_data([(X, Y)])) == "<Data: 11 examples of list>"
    assert (
        repr(hk.as_data(in_pairs(), num_examples=num_pictures))
        == "<Data: 7 examples of Pictures in 4 whole batches>"
    )


# Errors of the loss name the batch that they are about.


def classifier() -> tuple[hk.Objective, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 4).double()
    return hk.from_module(model, torch.nn.functional.cross_entropy)


def notes_of(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


KINDS = {"hessian": hk.hessian, "ggn": hk.ggn, "fisher": hk.empirical_fisher}


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_out_of_range_is_found_in_its_batch(kind: str) -> None:
    objective, params = classifier()
    y = torch.arange(N) % 4
    y[9] = 4
    H = KINDS[kind](objective, params, hk.as_data((X, y), batch_size=4))
    with pytest.raises((IndexError, RuntimeError)) as caught:
        H @ torch.ones(H.n, dtype=torch.float64)
    assert "loss_fn failed on batch 2 of data (counted from 0), examples 8 to 10" in notes_of(caught.value)
    assert "1: int64 [3], from 0 (example 8) to 4 (example 9)" in notes_of(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_data_of_another_dtype_than_the_parameters_say_how_to_convert(kind: str) -> None:
    objective, params = classifier()
    with pytest.raises(RuntimeError, match="dtype") as caught:
        KINDS[kind](objective, params, (X.float(), torch.arange(N) % 4))
    assert "0: float32 [11, 3]" in notes_of(caught.value)
    assert "The parameters are float64: convert one, as by model.to(torch.float32)" in notes_of(caught.value)


def test_labels_of_a_wrong_type_are_described() -> None:
    objective, params = classifier()
    for labels in (torch.ones(N), (torch.arange(N) % 4).to(torch.int16)):
        with pytest.raises((RuntimeError, NotImplementedError)) as caught:
            hk.hessian(objective, params, (X, labels))
        assert f"1: {str(labels.dtype)[6:]} [11]" in notes_of(caught.value)


def test_a_missing_key_is_shown_beside_those_that_are_there() -> None:
    def loss_fn(params: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (batch["x"] @ params - batch["target"]) ** 2

    with pytest.raises(KeyError) as caught:
        hk.hessian(loss_fn, P, {"x": X, "y": Y})
    assert (
        "batch 0 of data (counted from 0), examples 0 to 10: x: float64 [11, 3]; y: float64 [11]"
        in notes_of(caught.value)
    )
    for one_pass in (hk.loss, hk.grad):
        with pytest.raises(KeyError) as caught:
            one_pass(loss_fn, P, {"x": X, "y": Y})
        assert "batch 0 of data" in notes_of(caught.value)


def test_an_example_that_breaks_a_solve_is_named() -> None:
    H = hk.hessian(lambda p, b: (b["x"] @ p - b["y"]) ** 4, P, DataLoader(Broken(), batch_size=3))
    with pytest.raises(OSError, match="truncated file") as caught:
        hk.extreme_eigenvalues(H)
    assert "while reading example 7 of the dataset" in notes_of(caught.value)
    assert "while reading batch 2 of data" in notes_of(caught.value)


def test_a_mean_can_be_weighted_where_all_examples_of_a_batch_weigh_the_same() -> None:
    def quartic(params: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (batch[0] @ params - batch[1]) ** 4

    indices, weights = [0, 1, 2, 3, 4, 5], torch.tensor([0.5, 0.5, 0.5, 2.0, 2.0, 2.0], dtype=torch.float64)
    data = hk.as_data(hk.as_data((X, Y)).subset(indices, weights), batch_size=3)
    expected = torch.autograd.functional.hessian(
        lambda p: (weights * (X[indices] @ p - Y[indices]) ** 4).sum(), P
    )
    for loss_fn in (quartic, lambda p, batch: quartic(p, batch).mean()):
        found = hk.hessian(loss_fn, P, data) @ torch.eye(3, dtype=torch.float64)
        assert torch.allclose(found, expected, rtol=1e-13, atol=0.0)
    with pytest.raises(ValueError, match="loss_fn returned a 0-d mean, which cannot be weighted"):
        hk.hessian(lambda p, batch: quartic(p, batch).mean(), P, hk.as_data(data, batch_size=4))
    H = hk.hessian(lambda p, batch: quartic(p, batch).mean(), P, (X, Y))
    sample = H.coarsen(4, importance=None)
    chosen = torch.cat([y for _, y in sample.data]).long()
    mean = torch.autograd.functional.hessian(lambda p: ((X[chosen] @ p - Y[chosen]) ** 4).mean(), P)
    assert torch.allclose(sample @ torch.eye(3, dtype=torch.float64), mean, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 40])
@pytest.mark.parametrize("num_examples", [1, 4, 8, 21, 30])
def test_even_shares_have_each_example_once_and_are_of_one_size(
    num_examples: int, batch_size: int, num_ranks: int
) -> None:
    x = torch.arange(num_examples)
    for source in (TensorBatches(x, batch_size), DatasetBatches.of(x, batch_size)):
        given = list(x.split(batch_size))
        found: list[int] = []
        for rank in range(num_ranks):
            ranks = SimpleNamespace(size=num_ranks, rank=rank)
            ranks.part = partial(Ranks.part, ranks)
            parts = list(evenly(source, ranks))
            assert sum(len(batch) for *_, batch in parts) <= -(-num_examples // num_ranks)
            for number, start, batch in parts:
                assert batch.tolist() == x[start : start + len(batch)].tolist()
                assert set(batch.tolist()) <= set(given[number].tolist())
            found += torch.cat([batch for *_, batch in parts]).tolist() if parts else []
        assert sorted(found) == x.tolist()


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (
            [(torch.ones(3), torch.tensor(0)), (torch.ones(3), torch.tensor(1))],
            "of single examples pass .*DataLoader",
        ),
        ([(np.ones(3), 1)], "A list is one of batches"),
        (((torch.ones(4, 3), torch.ones(4)), (torch.ones(2, 3), torch.ones(2))), "several go in a list"),
        (DataLoader(TensorDataset(torch.ones(4, 3), torch.ones(4)), batch_size=None), "has batch_size=None"),
        ((torch.ones(4, 3), torch.ones(5)), r"got shapes \(4, 3\), \(5,\)\. Batches of any other form"),
        (tuple(torch.ones(n) for n in range(1, 10)), r"\(6,\) and 3 more\. Batches"),
    ],
)
def test_what_is_no_batch_is_refused_with_what_may_have_been_meant(data: object, hint: str) -> None:
    with pytest.raises((TypeError, ValueError), match=hint):
        hk.as_data(data)


def test_a_dataset_without_a_length_says_so() -> None:
    class Endless(Dataset):
        def __getitem__(self, index: int) -> Tensor:
            return torch.ones(3) * index

    with pytest.raises(TypeError, match="got Endless, which has no __len__"):
        hk.as_data(Endless())


def test_tensors_that_are_written_to_later_are_refused_by_name() -> None:
    x, y = torch.randn(12, 3), torch.randn(12)
    loss_fn = lambda p, batch: (batch[0] @ p - batch[1]) ** 2  # noqa: E731
    p, v = torch.ones(3), torch.ones(3)
    operators = [
        hk.hessian(loss_fn, p, data, memory_limit=limit)
        for data in ((x, y), hk.as_data((x, y), batch_size=5))
        for limit in (0, None)
    ]
    sample = hk.as_data((x, y)).subset([1, 2])  # a copy
    for H in operators:
        assert torch.equal(H @ v, H @ v)
    x.mul_(2)
    for H in operators[::2]:
        with pytest.raises(
            hk.UnstableDataError, match=r"data has been written to, in place, .* another operator"
        ):
            H @ v
    for H in operators[1::2]:  # of kept graphs torch tells
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
            H @ v
        assert "has been written to since a graph of it was kept" in caught.value.__notes__[-1]
    assert len(list(sample)) == 1
    assert torch.allclose(hk.hessian(loss_fn, p, (x, y)).to_dense(), 2 * x.mT @ x / 12)
