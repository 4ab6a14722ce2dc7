"""Curvature over batches that are no rectangles: read whole, by ``as_data(num_examples=...)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import hvpkit as hk
from oracles import hessian_by_double_backward, relative_error

f64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Given:
    """A loss, its parameters, batches, and the number of examples in each."""

    loss_fn: Callable[[Any, Any], Tensor]
    params: dict[str, Tensor]
    batches: list[Any]
    num_examples: Callable[[Any], int]

    def data(self) -> hk.Data:
        return hk.as_data(self.batches, num_examples=self.num_examples)

    def dense(self, chosen: list[int] | None = None, weights: list[float] | None = None) -> Tensor:
        """The Hessian of the mean, or of the weighted sum of the mean losses of some batches."""
        sizes = [float(self.num_examples(batch)) for batch in self.batches]
        chosen = [*range(len(self.batches))] if chosen is None else chosen
        shares = [sizes[i] / sum(sizes) for i in chosen] if weights is None else weights

        def mean(params: dict[str, Tensor], _: object) -> Tensor:
            means = [self.loss_fn(params, self.batches[i]).mean() for i in chosen]
            return torch.stack([w * value for w, value in zip(shares, means, strict=True)]).sum()

        return hessian_by_double_backward(mean, self.params, None)


def pictures() -> Given:
    """Pictures of different sizes as a list, a score for each: the shape of detection models."""
    sizes = [[(3, 4), (5, 2)], [(2, 2), (6, 3), (4, 4)], [(3, 3)]]
    batches = [
        ([draw(*size, seed=10 * i + j) for j, size in enumerate(batch)], draw(len(batch), seed=90 + i))
        for i, batch in enumerate(sizes)
    ]

    def loss_fn(p: dict[str, Tensor], batch: tuple[list[Tensor], Tensor]) -> Tensor:
        features = torch.stack([torch.stack([x.mean(), x.square().mean(), x.amax()]) for x in batch[0]])
        return (torch.tanh(features @ p["w"]) @ p["v"] - batch[1]) ** 2

    return Given(loss_fn, {"w": draw(3, 2, seed=1), "v": draw(2, seed=2)}, batches, lambda b: len(b[0]))


def graphs() -> Given:
    """All nodes of some graphs in one tensor, and which graph each is in."""
    members = [torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 0, 0, 0]), torch.tensor([0, 1, 1])]
    batches = [
        {"x": draw(len(m), 3, seed=20 + i), "batch": m, "y": draw(int(m.max()) + 1, seed=30 + i)}
        for i, m in enumerate(members)
    ]

    def loss_fn(p: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        nodes = torch.tanh(batch["x"] @ p["w"]) @ p["v"]
        pooled = torch.zeros(len(batch["y"]), dtype=nodes.dtype).index_add(0, batch["batch"], nodes)
        return (pooled - batch["y"]) ** 2

    return Given(loss_fn, {"w": draw(3, 2, seed=1), "v": draw(2, seed=2)}, batches, lambda b: len(b["y"]))


def time_first() -> Given:
    batches = [(draw(t, b, 2, seed=40 + t), draw(b, seed=50 + t)) for t, b in ((3, 4), (5, 2), (2, 3))]

    def loss_fn(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return (torch.tanh(batch[0] @ p["w"]).mean(0) @ p["v"] - batch[1]) ** 2

    return Given(loss_fn, {"w": draw(2, 2, seed=1), "v": draw(2, seed=2)}, batches, lambda b: b[0].shape[1])


def packed() -> Given:
    """Sequences of different lengths, packed, through a recurrent cell."""
    batches = [
        (
            pack_sequence([draw(k, 2, seed=60 + k) for k in lengths], enforce_sorted=False),
            draw(len(lengths), seed=len(lengths)),
        )
        for lengths in ([2, 4, 1], [3, 3])
    ]

    def loss_fn(p: dict[str, Tensor], batch: tuple[PackedSequence, Tensor]) -> Tensor:
        padded, lengths = pad_packed_sequence(batch[0], batch_first=True)
        h = padded.new_zeros(len(padded), 2)
        for t in range(padded.shape[1]):
            h = torch.where((t < lengths)[:, None], torch.tanh(padded[:, t] @ p["w"] + h @ p["u"]), h)
        return (h.sum(1) - batch[1]) ** 2

    return Given(loss_fn, {"w": draw(2, 2, seed=1), "u": draw(2, 2, seed=2)}, batches, lambda b: len(b[1]))


def equation() -> Given:
    """A physics-informed loss: u'' = f at many points inside, u = 0 at the two ends; a 0-d loss."""
    batches = [(draw(n, seed=70 + n), torch.tensor([-1.0, 1.0], dtype=f64)) for n in (5, 9)]

    def loss_fn(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        inside, ends = batch
        z = inside[:, None] * p["w"] + p["b"]
        second = (-2 * torch.tanh(z) * (1 - torch.tanh(z) ** 2) * p["w"] ** 2) @ p["v"]
        at_ends = torch.tanh(ends[:, None] * p["w"] + p["b"]) @ p["v"]
        return (second - torch.sin(inside)).square().mean() + 10 * at_ends.square().mean()

    params = {"w": draw(3, seed=1), "b": draw(3, seed=2), "v": draw(3, seed=3)}
    return Given(loss_fn, params, batches, lambda b: len(b[0]))


def names() -> Given:
    """Examples whose features are looked up by name."""
    table = {name: draw(3, seed=ord(name)) for name in "abcdefg"}
    batches = [["a", "b", "c"], ["d", "e"], ["f", "g", "a"]]

    def loss_fn(p: dict[str, Tensor], batch: list[str]) -> Tensor:
        return torch.stack([torch.exp(0.3 * table[name] @ p["w"]) for name in batch])

    return Given(loss_fn, {"w": draw(3, seed=1)}, batches, len)


def nothing() -> Given:
    """A loss that has all its data already."""
    x = draw(5, 3)
    return Given(lambda p, _: ((x @ p["w"]) ** 4).mean(), {"w": draw(3, seed=1)}, [None], lambda _: 5)


GIVEN = {make.__name__: make for make in (pictures, graphs, time_first, packed, equation, names, nothing)}
of_each = pytest.mark.parametrize("given", GIVEN)


def matrix(H: hk.LinearOperator) -> Tensor:
    return H @ torch.eye(H.n, dtype=f64)


@of_each
@pytest.mark.parametrize("mode", ["auto", "forward-over-reverse", "reverse-over-reverse"])
def test_products_are_those_of_the_mean_over_examples(given: str, mode: str) -> None:
    this = GIVEN[given]()
    H = hk.hessian(this.loss_fn, this.params, this.data(), mode=mode)
    expected = this.dense()
    if (given, mode) == ("packed", "forward-over-reverse"):  # torch cannot unpack under its transforms
        with pytest.raises(RuntimeError, match="data pointer"):
            H @ torch.ones(H.n, dtype=f64)
        return
    assert relative_error(matrix(H), expected) < 1e-13
    assert relative_error(matrix(H), expected) < 1e-13  # from graphs that are kept
    total = sum(this.num_examples(batch) for batch in this.batches)
    assert H.num_examples == total
    assert float(hk.loss(this.loss_fn, this.params, this.data())) == pytest.approx(
        sum(float(this.loss_fn(this.params, b).mean()) * this.num_examples(b) / total for b in this.batches),
        rel=1e-13,
    )


@of_each
def test_ends_and_checks_and_means_take_whole_batches(given: str) -> None:
    this = GIVEN[given]()
    H = hk.hessian(this.loss_fn, this.params, this.data())
    values = torch.linalg.eigvalsh(this.dense())
    found = hk.extreme_eigenvalues(H, tol=1e-6)
    assert found.largest.value == pytest.approx(float(values[-1]), rel=1e-5)
    assert found.smallest.value == pytest.approx(float(values[0]), rel=1e-5, abs=1e-10)
    report = hk.check(H)
    assert report.ok, report
    skipped = {f.check: f.detail for f in report.findings if f.verdict == "not applicable"}
    assert "read whole" in skipped.pop("batching")
    assert not skipped


@of_each
@pytest.mark.parametrize("zero_d", [False, True])
def test_a_sample_draws_batches_and_weighs_them_without_bias(given: str, zero_d: bool) -> None:
    this = GIVEN[given]()

    def loss_fn(params: Any, batch: Any) -> Tensor:
        losses = this.loss_fn(params, batch)
        return losses.mean() if zero_d else losses

    H = hk.hessian(loss_fn, this.params, this.data())
    count, total = len(this.batches), H.num_examples
    for seed in range(4):
        sample = H.sample(1, seed)
        sizes = [this.num_examples(batch) for batch in this.batches]
        singles = [this.dense([i], [count * sizes[i] / total]) for i in range(count)]
        errors = [float(relative_error(matrix(sample), single)) for single in singles]
        assert min(errors) < 1e-13
        assert sample.num_examples == sizes[errors.index(min(errors))]
        assert sample.cost == pytest.approx(sample.num_examples / total)
    whole = H.coarsen(total, importance="loss")
    assert relative_error(matrix(whole), this.dense()) < 1e-13


@pytest.mark.parametrize("importance", ["loss", "gradient", None, "own"])
def test_coarse_operators_of_whole_batches_have_the_mean_of_all(importance: str | None) -> None:
    this = graphs()
    H = hk.hessian(this.loss_fn, this.params, this.data())
    score = importance
    if importance == "own":
        score = lambda params, batch: this.loss_fn(params, batch).mean()  # noqa: E731
    drawn = torch.stack([matrix(H.coarsen(4, importance=score, seed=seed)) for seed in range(80)])
    expected = this.dense()
    spread = drawn.std(0) / len(drawn) ** 0.5
    assert bool(((drawn.mean(0) - expected).abs() <= 5 * spread + 1e-12).all())
    if importance is not None:
        twice = H.coarsen(5, importance=score).coarsen(3, importance=score)
        assert twice.num_examples < H.num_examples


def test_all_kinds_of_curvature_take_graphs() -> None:
    this = graphs()

    def forward(p: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        nodes = torch.tanh(batch["x"] @ p["w"]) @ p["v"]
        return torch.zeros(len(batch["y"]), dtype=nodes.dtype).index_add(0, batch["batch"], nodes)

    objective = hk.Objective(forward, lambda z, batch: 0.5 * (z - batch["y"]) ** 2)
    flat, layout = (
        torch.cat([p.reshape(-1) for p in this.params.values()]),
        [p.shape for p in this.params.values()],
    )

    def outputs(p: Tensor, batch: dict[str, Tensor]) -> Tensor:
        w, v = p.split([shape.numel() for shape in layout])
        return forward({"w": w.view(layout[0]), "v": v}, batch)

    jacobians = [torch.autograd.functional.jacobian(partial(outputs, batch=b), flat) for b in this.batches]
    residuals = [outputs(flat, b) - b["y"] for b in this.batches]
    total = sum(len(r) for r in residuals)
    gauss_newton = sum(J.mT @ J for J in jacobians) / total
    moments = (
        sum((J * r[:, None]).mT @ (J * r[:, None]) for J, r in zip(jacobians, residuals, strict=True)) / total
    )
    data = this.data()
    assert relative_error(matrix(hk.ggn(objective, this.params, data)), gauss_newton) < 1e-13
    assert relative_error(matrix(hk.empirical_fisher(objective, this.params, data)), moments) < 1e-13
    assert (
        relative_error(matrix(hk.fisher(objective, this.params, data, likelihood="gaussian")), gauss_newton)
        < 1e-13
    )
    coarse = hk.ggn(objective, this.params, data).coarsen(total)
    assert relative_error(matrix(coarse), gauss_newton) < 1e-13


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: PackedSequence) -> Tensor:
        return self.head(self.gru(x)[1][-1])


def test_a_recurrent_module_takes_packed_sequences() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Recurrent().double()
    batches = [(sequences, torch.arange(len(y)) % 2) for sequences, y in packed().batches]
    objective, params = hk.from_module(model, F.cross_entropy)
    H = hk.hessian(objective, params, hk.as_data(batches, num_examples=lambda b: len(b[1])))
    this = Given(objective, params, batches, lambda b: len(b[1]))
    assert relative_error(matrix(H), this.dense()) < 1e-12
    assert H.coarsen(2).num_examples in (2, 3)


def test_what_whole_batches_do_not_have_is_refused_by_name() -> None:
    this = graphs()
    for batch_size in (2, "auto"):
        with pytest.raises(ValueError, match=r"batch_size=.* are read whole, and never split"):
            hk.hessian(this.loss_fn, this.params, this.data(), batch_size=batch_size)
    with pytest.warns(hk.CompileWarning, match=r"compile=True: .* read whole"):
        H = hk.hessian(this.loss_fn, this.params, this.data(), compile=True)
    assert relative_error(matrix(H), this.dense()) < 1e-13
    with pytest.raises(ValueError, match=r"loss_fn returned shape \[6\] for a batch of 3 examples"):
        hk.hessian(lambda p, b: (b["x"] @ p["w"]).sum(1) ** 2, this.params, this.data())
    with pytest.raises(ValueError, match=r"indices must be in \[0, 3\), the batches"):
        H.subset(torch.tensor([3]), torch.ones(1))
