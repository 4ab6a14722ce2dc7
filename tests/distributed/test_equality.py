"""Several ranks give what one process gives: products, samples, solvers, estimators, on data of every form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import hvpkit as hk
from distributed.ranks import run
from hvpkit.curvature.batches import weighted_batches
from hvpkit.solvers.likeness import may_save_passes

NUM_RANKS = 3
N = 61  # examples: of no size that ranks or batches divide

G = torch.Generator().manual_seed(0)
X = torch.randn(N, 5, dtype=torch.float64, generator=G)
Y = torch.randint(0, 3, (N,), generator=G)


class Points(Dataset):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], Y[index]


class Stream:
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(X.split(9), Y.split(9), strict=True))


def network() -> tuple[hk.Objective, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return hk.from_module(model, nn.CrossEntropyLoss())


OBJECTIVE, PARAMS = network()

SOURCES: dict[str, Callable[[], Any]] = {
    "tensors": lambda: (X, Y),
    "dataset": Points,
    "loader": lambda: DataLoader(Points(), batch_size=8, shuffle=True),
    "worker": lambda: DataLoader(Points(), batch_size=8, num_workers=1),
    "list": lambda: [(X[:20], Y[:20]), (X[20:23], Y[20:23]), (X[23:], Y[23:])],
    "stream": Stream,
}


def data(mesh: DeviceMesh | None, source: str = "tensors", **options: Any) -> hk.Data:
    return hk.as_data(SOURCES[source](), mesh=mesh, **options)


@cache
def hessian(mesh: DeviceMesh | None, source: str = "tensors", **options: Any) -> hk.CurvatureOperator:
    options = {"batch_size": 7, "mode": "reverse-over-reverse", **options}
    return hk.hessian(OBJECTIVE, PARAMS, data(mesh, source), **options)


SIZE = sum(p.numel() for p in PARAMS.values())
V = torch.linspace(-1, 1, 2 * SIZE, dtype=torch.float64).reshape(SIZE, 2)

QUESTIONS: dict[str, Callable[[DeviceMesh | None], Any]] = {}


def question(function: Callable[[DeviceMesh | None], Any]) -> Callable[[DeviceMesh | None], Any]:
    QUESTIONS[function.__name__] = function
    return function


for name in SOURCES:
    for size in (7, None):
        QUESTIONS[f"product over {name} in batches of {size}"] = lambda mesh, name=name, size=size: (
            hessian(mesh, name, batch_size=size) @ V
        )
for mode in ("forward-over-reverse", "finite-difference", "auto"):
    QUESTIONS[f"product {mode}"] = lambda mesh, mode=mode: hessian(mesh, mode=mode) @ V


@question
def kinds(mesh: DeviceMesh | None) -> list[Tensor]:
    makers = (hk.ggn, hk.fisher, hk.empirical_fisher)
    made = [make(OBJECTIVE, PARAMS, data(mesh), batch_size=7) for make in makers]
    sampled = hk.fisher(OBJECTIVE, PARAMS, data(mesh), batch_size=7, num_samples=2)
    return [H @ V for H in [*made, sampled, 2 * made[0] - 0.5 * hessian(mesh), hessian(mesh).shift(0.3)]]


@question
def whole_batches(mesh: DeviceMesh | None) -> list[Any]:
    batches = [(X[:20], Y[:20]), (X[20:23], Y[20:23]), (X[23:], Y[23:]), (X[:9], Y[:9])]
    H = hk.hessian(
        OBJECTIVE, PARAMS, hk.as_data(batches, num_examples=lambda batch: len(batch[0]), mesh=mesh)
    )
    sample = H.coarsen(40)
    return [H @ V, sample @ V, sample.num_examples]


@question
def two_batches_for_three_ranks(mesh: DeviceMesh | None) -> Tensor:
    return hessian(mesh, batch_size=40) @ V


def centred(params: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    outputs = batch[0] @ params
    return (outputs - outputs.mean()) ** 4  # of examples, and of the batch that they are in


@question
def losses_that_depend_on_their_batch(mesh: DeviceMesh | None) -> list[Tensor]:
    examples, v = data(mesh, batch_size=25), torch.ones(5, dtype=torch.float64)
    mean = hk.hessian(lambda params, batch: ((batch[0] @ params) ** 4).mean(), v, examples)
    return [hk.hessian(centred, v, examples) @ v, mean @ v]


@question
def kept_graphs(mesh: DeviceMesh | None) -> list[Tensor]:
    H = hessian(mesh)
    return [H @ V for _ in range(4)]


@question
def gradient_and_loss(mesh: DeviceMesh | None) -> list[Any]:
    examples = data(mesh, batch_size=7)
    return [hk.grad(OBJECTIVE, PARAMS, examples), hk.loss(OBJECTIVE, PARAMS, examples)]


@question
def samples(mesh: DeviceMesh | None) -> list[Any]:
    found: list[Any] = []
    for source in ("tensors", "dataset", "list"):
        for importance in ("residual", "gradient", None):
            coarse = hessian(mesh, source, batch_size=None).coarsen(30, importance=importance)
            coarser = coarse.coarsen(4)
            found += [coarse.data.weights, coarser.data.weights, coarse @ V, coarser @ V]
    return found


@question
def compared_samples(mesh: DeviceMesh | None) -> list[Any]:
    first, other = hessian(mesh).two_samples(30, importance="residual", seed=1)
    return [first @ V, other @ V, *may_save_passes(first, other, 1)]


def values(found: hk.EigenResult) -> list[Any]:
    found = found.full_tensor()
    return [found.values, found.error_bounds, found.num_matvecs, str(found.status), found.vectors.abs()]


SOLVERS: dict[str, Callable[[hk.CurvatureOperator], hk.EigenResult]] = {
    "lanczos": lambda H: hk.lanczos(H, 4, which="BE", tol=1e-8),
    "lanczos that restarts": lambda H: hk.lanczos(H, 2, which="BE", tol=1e-8, ncv=16),
    "lobpcg": lambda H: hk.lobpcg(H, 2, which="LA", tol=1e-6),
    "chebyshev": lambda H: hk.chebyshev(H, 2, which="LA", tol=1e-6),
    "power": lambda H: hk.power(H, 1, which="LA", tol=1e-3),
    "accelerated power": lambda H: hk.accelerated_power(H, 1, which="LA", tol=1e-3),
    "SciPy's LOBPCG": lambda H: hk.scipy_lobpcg(H, 2, which="LA", tol=1e-6),
    "Oja": lambda H: hk.oja(H, which="LA", max_matvecs=5),
    "stochastic power": lambda H: hk.stochastic_power(H, which="LM", max_matvecs=20),
    "preconditioned and shifted": lambda H: hk.lanczos(
        hk.precondition(2 * H.shift(0.3), torch.linspace(1, 2, H.n, dtype=H.dtype)), 2, which="BE", tol=1e-8
    ),
    "ARPACK": lambda H: hk.eigsh(H, 2, which="BE", tol=1e-6),
    "top": lambda H: hk.top_eigenvalues(H, 3, which="LA"),
    "multifidelity": lambda H: hk.multifidelity([H.coarsen(20), H]),
    "follow_top": lambda H: hk.follow_top(H, 2, hk.follow_top(1.1 * H)[1])[0],
}
for name, solve in SOLVERS.items():
    QUESTIONS[name] = lambda mesh, solve=solve: values(solve(hessian(mesh)))

ESTIMATES: dict[str, Callable[[hk.CurvatureOperator], Any]] = {
    "trace": lambda H: hk.trace(H, num_matvecs=30, seed=3),
    "diagonal": lambda H: hk.diagonal(H, num_matvecs=20, seed=3),
    "XDiag": lambda H: hk.diagonal(H, method="xdiag", num_matvecs=20, seed=3),
    "diagonal of all columns": lambda H: hk.diagonal(H, num_matvecs=H.n),
    "norm": lambda H: hk.frobenius_norm(H, num_matvecs=20, seed=3),
    "logdet": lambda H: hk.logdet(H, damping=1.0, seed=3),
    "effective dimension": lambda H: hk.effective_dimension(H, damping=1.0, seed=3),
    "count": lambda H: hk.count_eigenvalues(H, 0.1, 1.0, seed=3),
}
for name, estimate in ESTIMATES.items():
    QUESTIONS[name] = lambda mesh, estimate=estimate: [
        getattr(estimate(hessian(mesh)).full_tensor(), part) for part in ("value", "stderr")
    ]


@question
def extremes(mesh: DeviceMesh | None) -> list[Any]:
    ex = hk.extreme_eigenvalues(hessian(mesh), certify=True)
    ends = [[end.value, end.interval.lower, end.interval.upper] for end in (ex.largest, ex.smallest)]
    return [ends, ex.num_matvecs, str(ex.status)]


@question
def density(mesh: DeviceMesh | None) -> list[Any]:
    found = [
        hk.spectral_density(hessian(mesh), num_steps=8, num_probes=2, method=m)
        for m in ("lanczos", "chebyshev")
    ]
    return [[one.grid, one.values] for one in found]


@question
def functions(mesh: DeviceMesh | None) -> list[Any]:
    H, b = hessian(mesh).shift(1.0), V[:, 0]
    return [
        hk.matrix_function(H, torch.log, b).x,
        hk.solve(H, V, tol=1e-10).x,
        hk.inverse(H, damping=0.1) @ b,
    ]


@question
def conjugate_gradients(mesh: DeviceMesh | None) -> list[Any]:
    H = hessian(mesh)
    definite, indefinite = (
        hk.solve(op, V, method="cg", tol=1e-10)
        for op in (hk.ggn(OBJECTIVE, PARAMS, data(mesh)).shift(1.0), H)
    )
    negative = indefinite.negative_curvature
    assert negative is not None
    sampled = hk.solve(H, V[:, 0], damping=3.0, preconditioner="sample", tol=1e-8)
    return [definite.x, negative.direction.abs(), negative.curvature, sampled.x, sampled.num_matvecs]


@question
def blocks(mesh: DeviceMesh | None) -> list[Any]:
    found = hk.blocks(OBJECTIVE, PARAMS, data(mesh, batch_size=7))
    vectors = [one.extremes.full_tensor().largest.vector.abs() for one in found.blocks]
    return [vectors, [[one.name, one.extremes.largest.value, one.trace.value] for one in found.blocks]]


@question
def preconditioned(mesh: DeviceMesh | None) -> Tensor:
    return hk.precondition(hessian(mesh), torch.linspace(1, 2, SIZE, dtype=torch.float64)) @ V


@question
def weighted(mesh: DeviceMesh | None) -> Tensor:
    objective = hk.Objective(OBJECTIVE.forward, OBJECTIVE.output_loss, lambda batch: 1.0 + batch[1])
    return hk.hessian(objective, PARAMS, data(mesh), batch_size=7) @ V


@question
def checked(mesh: DeviceMesh | None) -> list[Any]:
    report = hk.check(hessian(mesh))
    return [[finding.check, finding.verdict] for finding in report.findings]


@question
def planned(mesh: DeviceMesh | None) -> list[Any]:
    H = hessian(mesh)
    plans = [hk.plan(op, max_seconds=0.1) for op in (H, H @ H)]
    return [[one.fits, [[task.call, task.method, task.num_vectors] for task in one.tasks]] for one in plans]


@question
def distributed_sampler(mesh: DeviceMesh | None) -> Tensor:
    loader = DataLoader(Points(), batch_size=7)
    if mesh is not None:
        loader = DataLoader(Points(), batch_size=7, sampler=DistributedSampler(Points(), seed=1))
    return hk.hessian(OBJECTIVE, PARAMS, hk.as_data(loader, mesh=mesh)) @ V


PARTS = [(0, 40), (40, 41), (41, 61)]


@question
def own_parts(mesh: DeviceMesh | None) -> list[Any]:
    if mesh is None:
        examples = data(None)
    else:
        part = slice(*PARTS[mesh.get_local_rank()])
        examples = hk.as_data((X[part], Y[part]), mesh=mesh, split=False)
    H = hk.hessian(OBJECTIVE, PARAMS, examples, batch_size=7)
    coarse = H.coarsen(9)
    found = hk.extreme_eigenvalues(H)
    return [
        H @ V,
        coarse.data.weights,
        coarse @ V,
        coarse.coarsen(2) @ V,
        found.largest.value,
        H.num_examples,
    ]


def shares(mesh: DeviceMesh) -> list[list[int]]:
    """Return the sizes of this rank's batches: of losses of examples, of those that depend on a batch, and of means."""
    point = torch.ones(5, dtype=torch.float64)
    operators = [
        hessian(mesh, batch_size=25),
        hessian(mesh, "dataset", batch_size=25),
        hk.hessian(centred, point, data(mesh, batch_size=25)),
        hk.hessian(lambda params, batch: ((batch[0] @ params) ** 4).mean(), point, data(mesh, batch_size=25)),
    ]
    return [[batch.size for batch in weighted_batches(H.data)] for H in operators]


def test_ranks_have_as_many_examples_where_batches_can_be_cut() -> None:
    (found,) = run(2, shares)
    assert found[0] == [[25, 6], [25, 6], [25, 11], [25, 11]]
    assert found[1] == [[25, 5], [25, 5], [25], [25]]


def close(found: Any, expected: Any, rtol: float, atol: float) -> bool:
    """Return True if numbers and tensors are close, and all else is equal."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            close(found[k], expected[k], rtol, atol) for k in expected
        )
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(
            close(*pair, rtol, atol) for pair in zip(found, expected, strict=True)
        )
    if isinstance(expected, Tensor | float):
        pair = [torch.as_tensor(x, dtype=torch.float64) for x in (found, expected)]
        return pair[0].shape == pair[1].shape and torch.allclose(*pair, rtol=rtol, atol=atol, equal_nan=True)
    return bool(found == expected)


@pytest.fixture(scope="module")
def answers() -> dict[str, list[Any]]:
    return dict(zip(QUESTIONS, run(NUM_RANKS, *QUESTIONS.values()), strict=True))


@pytest.mark.parametrize("name", QUESTIONS)
def test_ranks_answer_as_one_process_does(name: str, answers: dict[str, list[Any]]) -> None:
    expected = QUESTIONS[name](None)
    for found in answers[name]:
        assert close(found, expected, 1e-7, 1e-9), (found, expected)


@pytest.mark.parametrize("name", QUESTIONS)
def test_all_ranks_have_the_same_bits(name: str, answers: dict[str, list[Any]]) -> None:
    first, *others = answers[name]
    for other in others:
        assert close(other, first, 0.0, 0.0), (other, first)
