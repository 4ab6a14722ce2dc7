"""What one rank meets, all ranks are told of: errors, interruptions, deadlines, disagreement; nobody waits in vain."""

from __future__ import annotations

import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import hvpkit as hk
from distributed.ranks import run, told
from hvpkit._utils import ranks
from hvpkit.operators.sharded import sharded

X = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
P = torch.linspace(-1, 1, 12, dtype=torch.float64)


def loss_fn(p: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(x @ p).square() + 0.1 * (x * p).cos().sum(-1)


def hessian(mesh: DeviceMesh | None, function: Any = loss_fn, x: Tensor = X, p: Tensor = P) -> Any:
    data = hk.as_data(x, mesh=mesh, batch_size=8)
    return hk.hessian(function, p, data, mode="reverse-over-reverse", memory_limit=0)


def on_rank(mesh: DeviceMesh, rank: int, action: Any) -> Any:
    """Return a loss that does something on one rank, from its third call on after construction."""
    calls, active = [], [False]

    def function(p: Tensor, x: Tensor) -> Tensor:
        calls.append(1)
        if active[0] and mesh.get_local_rank() == rank and len(calls) > 2:
            action()
        return loss_fn(p, x)

    H = hessian(mesh, function)
    calls.clear()
    active[0] = True
    return H


def again(mesh: DeviceMesh) -> Any:
    return (hessian(mesh) @ P).tolist()


def not_finite(mesh: DeviceMesh) -> Any:
    x = X.clone()
    x[9] = torch.nan  # in batch 1, of rank 1
    H = hessian(mesh, x=x)
    found = hk.lanczos(H)
    return [told(lambda: H @ P), str(found.status), found.message]


def a_raise(mesh: DeviceMesh) -> Any:
    def fail() -> None:
        raise ZeroDivisionError("no such number")

    H = on_rank(mesh, 1, fail)
    return [told(lambda: hk.trace(H, num_matvecs=9, block_size=1)), again(mesh)]


def an_interruption(mesh: DeviceMesh) -> Any:
    H = on_rank(mesh, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    return [told(lambda: hk.lanczos(H)), again(mesh)]


def a_failing_monitor(mesh: DeviceMesh) -> Any:
    def monitor(_: object) -> None:
        raise OSError("no screen")

    return [told(lambda: hk.lanczos(hessian(mesh), monitor=monitor)), again(mesh)]


def monitors(mesh: DeviceMesh) -> Any:
    seen: list[Any] = []
    found = hk.lanczos(hessian(mesh), monitor=seen.append)
    return [len(seen), found.num_matvecs]


def other_parameters(mesh: DeviceMesh) -> Any:
    p = P + mesh.get_local_rank()
    return [told(lambda: hessian(mesh, p=p)), again(mesh)]


def other_data(mesh: DeviceMesh) -> Any:
    x = X + mesh.get_local_rank()
    sizes = X[: 40 - mesh.get_local_rank()]
    late = X + mesh.get_local_rank() * (torch.arange(40) == 39)[:, None]
    return [*(told(partial(hessian, mesh, x=other)) for other in (x, late, sizes)), again(mesh)]


class Read(torch.utils.data.Dataset):
    """Examples of which one, or another order, is a rank's own."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return self.x[index]


class Batches:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __iter__(self) -> Any:
        return iter(self.x.split(8))


def other_data_that_is_read(mesh: DeviceMesh) -> Any:
    """Return what is said of data that are the same in the first batch."""
    late = X + mesh.get_local_rank() * (torch.arange(40) >= 30)[:, None]
    forms = (Read(late), DataLoader(Read(late), 8), Batches(late), [(part,) for part in late.split(8)])
    found = [told(lambda form=form: hk.as_data(form, mesh=mesh, batch_size=8)) for form in forms]
    lists = [{"x": part, "n": [0]} for part in late.split(8)]
    found.append(told(lambda: hk.as_data(lists, num_examples=lambda batch: len(batch["x"]), mesh=mesh)))
    own = X.float() if mesh.get_local_rank() else X
    return [*found, told(lambda: hk.as_data(own, mesh=mesh, split=False)), again(mesh)]


def other_questions(mesh: DeviceMesh) -> Any:
    H = hessian(mesh)
    ask = hk.trace if mesh.get_local_rank() else hk.lanczos
    return [told(lambda: ask(H)), again(mesh)]


def other_vectors(mesh: DeviceMesh) -> Any:
    H = hessian(mesh)
    return [told(lambda: H @ (P + mesh.get_local_rank())), again(mesh)]


def skewed_clocks(mesh: DeviceMesh) -> Any:
    clock, rank, begin = time.perf_counter, mesh.get_local_rank(), time.perf_counter()
    H = on_rank(mesh, 0, lambda: time.sleep(0.005))
    time.perf_counter = lambda: begin + (1 + 3 * rank) * (clock() - begin)
    try:
        found = [hk.lanczos(H, tol=1e-12, atol=0.0, time_limit=limit) for limit in (0.03, 0.1, 0.3)]
        trace = hk.trace(H, num_matvecs=10**6, time_limit=0.3)
    finally:
        time.perf_counter = clock
    solves = [[str(one.status), one.num_matvecs, one.values.tolist()] for one in found]
    return [solves, repr(trace.value), trace.num_matvecs, again(mesh)]  # NaN where no sample was in time


def refusals(mesh: DeviceMesh) -> Any:
    dataset = TensorDataset(X)
    loader = DataLoader(dataset, 8, sampler=DistributedSampler(dataset))

    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(X)

    return [
        told(lambda: hk.as_data(loader)),
        told(lambda: hk.as_data(loader, mesh=mesh, split=False)),
        told(lambda: hk.as_data(DataLoader(Stream(), 8))),
        hk.as_data(DataLoader(Stream(), 8), mesh=mesh).num_examples,
        told(lambda: hk.as_data(X, mesh="cpu")),
        told(lambda: hk.as_data(hk.as_data(X), mesh=mesh)),
    ]


CALLS = [
    not_finite,
    a_raise,
    an_interruption,
    a_failing_monitor,
    monitors,
    other_parameters,
    other_data,
    other_data_that_is_read,
    other_questions,
    other_vectors,
    skewed_clocks,
    refusals,
]


@pytest.fixture(scope="module")
def answers() -> dict[str, list[Any]]:
    return {call.__name__: found for call, found in zip(CALLS, run(2, *CALLS), strict=True)}


EXPECTED = (hessian(None) @ P).tolist()


def test_a_batch_that_is_not_finite_is_named_with_its_rank(answers: dict[str, list[Any]]) -> None:
    for product, status, message in answers["not_finite"]:
        assert product.startswith("NonFiniteError")
        assert "batch 0 of rank 1" in product
        assert status == "non-finite"
        assert "batch 0 of rank 1" in message


@pytest.mark.parametrize(
    ("call", "own", "others"),
    [
        (
            "a_raise",
            "ZeroDivisionError: no such",
            "RemoteError: rank 1 failed: ZeroDivisionError: no such",
        ),
        ("an_interruption", "KeyboardInterrupt", "RemoteError: rank 1 failed: KeyboardInterrupt"),
        ("a_failing_monitor", "RemoteError: rank 0 failed: OSError: no screen", "OSError: no screen"),
        ("other_parameters", "ValueError: params must be the same", "ValueError: params must be the same"),
        (
            "other_questions",
            "RemoteError: ranks ask different questions",
            "RemoteError: ranks ask different questions",
        ),
        (
            "other_vectors",
            "RemoteError: ranks ask different questions",
            "RemoteError: ranks ask different questions",
        ),
    ],
)
def test_all_ranks_are_told_and_can_go_on(
    answers: dict[str, list[Any]], call: str, own: str, others: str
) -> None:
    (first, first_after), (second, second_after) = answers[call]
    assert first.startswith(others)
    assert second.startswith(own)
    torch.testing.assert_close([first_after, second_after], [EXPECTED, EXPECTED])


def test_other_data_on_a_rank_is_refused(answers: dict[str, list[Any]]) -> None:
    for values, late, sizes, after in answers["other_data"]:
        assert late.startswith("ValueError: the digest of all of data must be the same on all ranks")
        assert "the digest of all of data must be the same on all ranks" in values
        assert (
            "the number of examples in data must be the same on all ranks: rank 0 has 40, rank 1 has 39"
            in sizes
        )
        torch.testing.assert_close(after, EXPECTED)


def test_other_data_is_refused_as_far_as_it_is_read(answers: dict[str, list[Any]]) -> None:
    for dataset, loader, stream, batches, whole, own, after in answers["other_data_that_is_read"]:
        for text in (dataset, loader):
            assert text.startswith(
                "ValueError: the digest of examples all over the data must be the same on all"
            )
        assert stream.startswith("ValueError: the sums over all of data must be the same on all ranks")
        for text in (batches, whole):
            assert text.startswith("ValueError: the digest of all of data must be the same on all ranks")
        assert own.startswith("ValueError: the tensors in a batch of data must be the same on all ranks")
        assert "float64" in own
        torch.testing.assert_close(after, EXPECTED)


def test_the_first_rank_alone_monitors(answers: dict[str, list[Any]]) -> None:
    (seen, num_matvecs), (unseen, same) = answers["monitors"]
    assert seen > 0
    assert unseen == 0
    assert num_matvecs == same


def test_clocks_that_differ_decide_nothing_twice(answers: dict[str, list[Any]]) -> None:
    first, second = answers["skewed_clocks"]
    assert first == second
    assert "time-limit" in first[0][0][0]
    torch.testing.assert_close(first[-1], EXPECTED)


def test_a_share_is_not_taken_for_all_data(answers: dict[str, list[Any]]) -> None:
    for sampler, own, stream, num_examples, mesh, twice in answers["refusals"]:
        assert "DistributedSampler" in sampler
        assert "mesh=mesh" in sampler
        assert "DistributedSampler" in own
        assert "a stream (DataLoader) in one of 2 processes" in stream
        assert "split=False" in stream
        assert num_examples == 40
        assert mesh.startswith("TypeError: mesh must be a DeviceMesh")
        assert twice.startswith("ValueError: mesh goes with the data as you have them")


def test_an_epoch_of_a_sampler_does_not_change_an_operator() -> None:
    class Shuffled(torch.utils.data.Sampler):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Any:
            return iter(torch.randperm(40, generator=torch.Generator().manual_seed(self.epoch))[:20].tolist())

        def __len__(self) -> int:
            return 20

    sampler = Shuffled()
    loader = DataLoader(TensorDataset(X), 8, sampler=sampler)
    H = hk.hessian(lambda p, batch: loss_fn(p, batch[0]), P, loader, mode="reverse-over-reverse")
    before = H @ P
    sampler.set_epoch(1)
    assert torch.equal(H @ P, before)
    after = hk.hessian(lambda p, batch: loss_fn(p, batch[0]), P, loader, mode="reverse-over-reverse") @ P
    assert not torch.allclose(after, before)


@pytest.mark.parametrize(
    ("number", "timeout", "least"), [(signal.SIGKILL, 120.0, 0.0), (signal.SIGSTOP, 6.0, 4.0)]
)
def test_a_rank_that_is_gone_is_an_error_within_the_timeout(
    number: int, timeout: float, least: float
) -> None:
    """A rank that was killed is missed at once, one that stopped at the timeout."""

    def call(mesh: DeviceMesh) -> Any:
        pids: list[Any] = [None, None]
        torch.distributed.all_gather_object(pids, os.getpid())
        H = on_rank(mesh, 1, lambda: os.kill(os.getpid(), number))
        begin = time.perf_counter()
        found = [told(lambda: hk.lanczos(H)), time.perf_counter() - begin]
        os.kill(pids[1], signal.SIGKILL)  # no other process waits for it
        return found

    ((found, _),) = run(2, call, timeout=timeout)
    text, seconds = found
    assert text.startswith("RemoteError: another rank does not answer")
    assert least < seconds < 100


def counted(mesh: DeviceMesh) -> Any:
    """Return the bytes that a rank sends and receives for a matvec, of whole vectors and of split ones."""
    H, numbers = hessian(mesh), {}
    for name, op in (("whole", H), ("split", sharded(H))):
        sent: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            for owner, function, passes, place in (
                (torch.distributed, "all_reduce", 2, 0),
                (ranks, "_all_gather", 1, 0),
                (ranks, "_all_to_all", 1, 1),
            ):
                call = partial(count, getattr(owner, function), H.space.ranks, sent, passes, place)
                patch.setattr(owner, function, call)
            op.product(op.space.local(P)[:, None])
        numbers[name] = sum(sent)
    return numbers


def count(call: Any, of: Any, sent: list[int], passes: int, place: int, *args: Any, **options: Any) -> Any:
    if options.get("group") is of.group:
        sent.append(passes * (of.size - 1) * args[place].nbytes // of.size)
    return call(*args, **options)


def test_split_vectors_cost_no_more_bytes_than_whole_ones() -> None:
    for size in (2, 4):
        for numbers in run(size, counted)[0]:
            assert numbers["whole"] == 2 * (size - 1) * len(P) * 8 // size
            assert numbers["split"] == numbers["whole"]


def saved(mesh: DeviceMesh | None, path: Path, max_matvecs: int = 1000) -> Any:
    found = hk.lanczos(
        hessian(mesh), 2, which="BE", tol=1e-13, atol=0.0, max_matvecs=max_matvecs, checkpoint=path
    )
    return [found.values, str(found.status), found.num_matvecs]


def test_a_solve_of_three_ranks_goes_on_with_two_and_with_one(tmp_path: Path) -> None:
    path, copy = tmp_path / "solve.ckpt", tmp_path / "copy.ckpt"
    parts = run(3, lambda mesh: saved(mesh, path, 5))
    assert {found[1] for found in parts[0]} == {"max-matvecs"}
    copy.write_bytes(path.read_bytes())
    shutil.copytree(f"{path}.parts", f"{copy}.parts")
    whole = saved(None, tmp_path / "whole.ckpt")
    for found in [*run(2, lambda mesh: saved(mesh, path))[0], saved(None, copy)]:
        torch.testing.assert_close(found[0], whole[0])
        assert found[1] == whole[1]
    assert [*tmp_path.iterdir()] == []


def interrupted(mesh: DeviceMesh, path: Path, number: int) -> str:
    """Solve until one rank is interrupted in the midst of its share of a matvec."""
    calls, begun = [], [False]

    def function(p: Tensor, x: Tensor) -> Tensor:
        calls.append(begun[0])
        if sum(calls) == 8 and mesh.get_local_rank() == 1:
            os.kill(os.getpid(), number)
        return loss_fn(p, x)

    H = hessian(mesh, function)
    begun[0] = True
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else it ends the process, after the save
    return told(lambda: hk.lanczos(H, 2, which="BE", tol=1e-13, atol=0.0, checkpoint=path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_of_one_rank_saves_the_split_basis_of_all(number: int, tmp_path: Path) -> None:
    path = tmp_path / "solve.ckpt"
    ((first, second),) = run(2, lambda mesh: interrupted(mesh, path, number))
    assert first.startswith("RemoteError: rank 1 failed: KeyboardInterrupt")
    assert second.startswith("KeyboardInterrupt")
    assert path.exists()
    whole, (again, _) = saved(None, tmp_path / "whole.ckpt"), run(2, lambda mesh: saved(mesh, path))[0]
    torch.testing.assert_close(again[0], whole[0])
    assert again[1] == whole[1]
    assert again[2] == whole[2] + 1  # the matvec that verifies the operator
