"""Solves beside other threads: no number is drawn twice, all bits are those of a solve alone, forks go through."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from torch.utils import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, TensorDataset

import hvpkit as hk
from hvpkit.data import random_state
from problems import Problem, network
from test_purity import settings

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")

N = 24
X = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = X.sum(dim=1)
P = torch.ones(3, dtype=torch.float64)


@pytest.fixture(autouse=True)
def only_own_threads_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only threads that a test starts count: other tests may leave some."""
    before, is_quiet = set(threading.enumerate()), random_state._is_quiet
    monkeypatch.setattr(random_state, "_is_quiet", lambda thread: thread in before or is_quiet(thread))


def loss_fn(p: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (torch.tanh(x @ p) - y) ** 2


class Augmented(Dataset):
    """Points that are flipped, scaled and shifted at random, each by another library's numbers."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(1e-4)  # a read long enough for other threads to draw
        x = X[index] * (1 if random.random() < 0.5 else -1) * np.random.uniform(0.5, 1.5)
        return x + 0.1 * torch.randn(3, dtype=torch.float64), Y[index]


class LateAugmented(Augmented):
    """Points that are augmented from the fifth on, which a trial with the first ones does not show."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return super().__getitem__(index) if index > 4 else (X[index], Y[index])


class Plain(Dataset):
    """Points that are slow to read."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(1e-4)
        return X[index], Y[index]


class Batches:
    """Batches in an order that the global generators give."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(N).tolist()
        np.random.shuffle(order)
        for start in range(0, N, 5):
            time.sleep(1e-3)
            index = order[start : start + 5]
            yield X[index], Y[index]


class Points(IterableDataset):
    """Points one by one."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        time.sleep(1e-3)
        return iter(zip(X, Y, strict=True))


class OwnOrder(Sampler):
    """An order that NumPy's global generator gives."""

    def __iter__(self) -> Iterator[int]:
        time.sleep(1e-3)
        return iter(np.random.permutation(N).tolist())

    def __len__(self) -> int:
        return N


def drawn(dataset: Dataset, **options: object) -> DataLoader:
    return DataLoader(dataset, 5, sampler=RandomSampler(dataset, replacement=True, num_samples=30), **options)


DATA: dict[str, Callable[[], object]] = {
    "tensors": lambda: (X, Y),
    "dataset": Plain,
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True),
    "loader with a worker": lambda: DataLoader(Plain(), batch_size=5, num_workers=1),
    "augmented": lambda: DataLoader(Augmented(), batch_size=5),
    "augmented with a worker": lambda: DataLoader(Augmented(), batch_size=5, num_workers=1),
    "augmented later": lambda: DataLoader(LateAugmented(), batch_size=5),
    "sampled": lambda: drawn(Plain()),
    "sampled with a worker": lambda: drawn(Plain(), num_workers=1),
    "sampled and augmented": lambda: drawn(Augmented()),
    "own order": lambda: DataLoader(Plain(), 5, sampler=OwnOrder()),
    "stream": lambda: DataLoader(Points(), batch_size=5),
    "stream with a worker": lambda: DataLoader(Points(), batch_size=5, num_workers=1),
    "list": lambda: [(X[:11], Y[:11]), (X[11:], Y[11:])],
    "re-iterable": Batches,
}


def solve(data: object) -> list[Tensor]:
    """Products and a solve over the data; their results."""
    H = hk.hessian(loss_fn, P, data, mode="reverse-over-reverse", batch_size=None)
    found = hk.lanczos(H, which="BE", k=2, max_matvecs=6)
    return [H @ P, found.values, found.vectors, hk.loss(loss_fn, P, data)]


@contextmanager
def drawing() -> Iterator[list[tuple[str, object]]]:
    """Draw numbers from the global generators in another thread; give all of them."""
    numbers: list[tuple[str, object]] = []
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            numbers.append(("torch", torch.rand((), dtype=torch.float64).item()))
            numbers.append(("numpy", np.random.rand()))
            numbers.append(("python", random.random()))
            time.sleep(1e-4)  # others wait for the interpreter else

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        yield numbers
    finally:
        stop.set()
        thread.join()


@contextmanager
def company() -> Iterator[None]:
    """Have another thread, which does nothing."""
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("kind", DATA)
def test_a_drawing_thread_draws_no_number_twice_and_the_solve_has_the_same_bits(kind: str) -> None:
    expected = solve(DATA[kind]())
    with drawing() as numbers, warnings.catch_warnings():
        warnings.simplefilter("error", hk.SharedGeneratorWarning)
        found = solve(DATA[kind]())
    assert len(numbers) > 100
    assert max(Counter(numbers).values()) == 1
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_networks_of_the_zoo_draw_from_generators_of_their_own() -> None:
    expected = hk.zoo.digits_cnn(seed=3)
    with drawing() as numbers:
        found = [hk.zoo.digits_cnn(seed=3) for _ in range(20)]
    assert len(numbers) > 10
    assert max(Counter(numbers).values()) == 1
    parameters = [dict(thing.named_parameters()) for thing in (expected, *found)]
    assert all(torch.equal(p[name], parameters[0][name]) for p in parameters for name in p)


@pytest.mark.parametrize("kind", sorted(DATA.keys() - {"augmented later"}))  # found out too late to be undone
def test_generators_are_as_they_were_whether_threads_are_alive_or_not(kind: str) -> None:
    before = settings()
    solve(DATA[kind]())
    with company():
        solve(DATA[kind]())
    assert settings() == before


class Lock(Tensor):
    """A tensor that does not pickle."""

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("not to be sent")


@pytest.mark.parametrize("kind", ["examples", "batches"])
def test_what_another_process_cannot_give_is_read_here_with_a_warning(kind: str) -> None:
    class Held(Batches):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for x, y in super().__iter__():
                yield {"x": x, "y": y.as_subclass(Lock)}

    class HeldExamples(Augmented):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            x, y = super().__getitem__(index)
            return {"x": x, "y": y}

    def hold(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = torch.utils.data.default_collate(examples)
        return {"x": batch["x"], "y": batch["y"].as_subclass(Lock)}

    def of_dict(p: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return loss_fn(p, (batch["x"], batch["y"].as_subclass(Tensor)))

    def product() -> Tensor:
        data = DataLoader(HeldExamples(), 5, collate_fn=hold) if kind == "examples" else Held()
        return hk.hessian(of_dict, P, data, mode="reverse-over-reverse") @ P

    expected = product()
    with company(), pytest.warns(hk.SharedGeneratorWarning, match="num_workers=1"):
        found = product()
    assert torch.equal(found, expected)


def test_a_fault_in_the_data_is_told_as_without_threads() -> None:
    class Broken(Augmented):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            if index == 7:
                raise OSError("no such image")
            return super().__getitem__(index)

    with company():
        H = hk.hessian(loss_fn, P, DataLoader(Broken(), batch_size=5), mode="reverse-over-reverse")
        with pytest.raises(OSError, match="no such image") as told:
            H @ P
    assert "batch 1" in "".join(told.value.__notes__)


def attention_solve(seed: int, problem: Problem | None = None) -> list[Tensor]:
    problem = problem or network("attention")
    H = hk.hessian(problem.objective, problem.params, problem.data, mode="forward-over-reverse", batch_size=4)
    found = hk.lanczos(H, which="BE", k=2, max_matvecs=8, seed=seed)
    return [found.values, found.vectors, torch.tensor(hk.trace(H, num_matvecs=6, seed=seed).value)]


def test_concurrent_solves_have_the_bits_of_solves_one_after_another() -> None:
    problems = [
        network("attention") for _ in range(4)
    ]  # made here: each seeds the global generator for its weights
    before = settings()
    expected = [attention_solve(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(attention_solve, range(4), problems))
    assert settings() == before
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_another_thread_keeps_its_settings() -> None:
    """While a product waits inside its loss, another thread sees fused attention, autocast and checkpoints."""
    inside, seen = threading.Event(), threading.Event()
    outside = settings()

    def waiting(p: Tensor, x: Tensor) -> Tensor:
        if not seen.is_set():
            inside.set()
            assert seen.wait(10)
        return (x @ p) ** 2

    def look() -> tuple:
        assert inside.wait(10)
        try:
            x = torch.ones(2, 3, requires_grad=True)
            calls = []
            checkpoint.checkpoint(
                lambda x: calls.append(1) or x.sin(), x, use_reentrant=False
            ).sum().backward()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                dtype = (x @ x.mT).dtype
            q = torch.ones(1, 1, 2, 2, requires_grad=True)
            fused = nn.functional.scaled_dot_product_attention(q, q, q).grad_fn.name()
            return settings(), dtype, len(calls), fused
        finally:
            seen.set()

    with ThreadPoolExecutor(1) as pool:
        looked = pool.submit(look)
        hk.hvp(waiting, P, X, P, mode="reverse-over-reverse")
        found, dtype, calls, fused = looked.result()
    assert found == outside
    assert dtype == torch.bfloat16
    assert calls == 2  # forward, and again in backward
    assert "Flash" in fused


def test_a_loss_that_names_a_fused_kernel_has_derivatives_all_the_same() -> None:
    def of_attention(p: Tensor, x: Tensor) -> Tensor:
        with sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            out = nn.functional.scaled_dot_product_attention(x * p, x, x)
        return out.square().mean(dim=(1, 2, 3))

    x = X.view(2, 2, 6, 3)
    found = hk.hessian(of_attention, P, x) @ P
    step = 1e-5 * P
    ahead, behind = (hk.grad(of_attention, P + sign * step, x) for sign in (1, -1))
    torch.testing.assert_close(found, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-9)


@contextmanager
def computing() -> Iterator[None]:
    """Multiply in another thread, without a pause."""
    stop = threading.Event()
    problem = network("attention")
    H = hk.hessian(problem.objective, problem.params, problem.data, mode="reverse-over-reverse")
    v = torch.ones(H.n, dtype=H.dtype)

    def work() -> None:
        while not stop.is_set():
            H @ v

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def child(results: object) -> None:
    torch.set_num_threads(1)
    results.put([part.tolist() for part in attention_solve(3)])


def test_a_process_forked_while_a_thread_computes_can_compute_too() -> None:
    expected = [part.tolist() for part in attention_solve(3)]
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with computing():
        for _ in range(5):
            process = context.Process(target=child, args=(results,))
            process.start()
            process.join(60)
            alive = process.is_alive()
            process.kill()
            assert not alive
            assert results.get() == expected


def test_os_fork_while_a_thread_computes_ends() -> None:
    with computing(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of later Pythons: forks with threads
        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                torch.set_num_threads(1)
                os._exit(0 if hk.hvp(loss_fn, P, (X, Y), P).isfinite().all() else 1)
            deadline = time.monotonic() + 600
            while not (status := os.waitpid(pid, os.WNOHANG))[0]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert status[1] == 0


def test_threads_of_progress_bars_and_queues_are_no_company() -> None:
    from tqdm import tqdm
    from tqdm._monitor import TMonitor

    queue = multiprocessing.Queue()
    queue.put(1)
    feeders = [one for one in threading.enumerate() if one.name == "QueueFeederThread"]
    assert feeders
    assert all(map(random_state._is_quiet, feeders))
    assert queue.get() == 1
    stop = threading.Event()
    idle, monitor = threading.Thread(target=stop.wait), TMonitor(tqdm, 10)
    idle.start()
    try:
        assert {monitor, idle} <= set(threading.enumerate())
        assert random_state._is_quiet(monitor)
        assert not random_state._is_quiet(idle)
        assert not random_state.is_alone()
    finally:
        stop.set()
        monitor.exit()
