"""Parameters split over ranks (shard_params=True): the numbers of dense oracles, memory, bytes, failures, refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import hvpkit as hk
import oracles
from distributed.ranks import launch, run
from hvpkit.operators.sharded import sharded

SIZES = (2, 3, 4)
N = 11  # examples: of no size that ranks or batches divide

G = torch.Generator().manual_seed(0)
X = torch.randn(N, 5, dtype=torch.float64, generator=G)
IMAGES = torch.randn(N, 2, 5, 5, dtype=torch.float64, generator=G)
TOKENS = torch.randint(0, 7, (N, 6), generator=G)
Y = torch.randint(0, 3, (N,), generator=G)


class Tied(nn.Module):
    """A network in which one layer is used twice, and its weight a third time, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out, self.scale = nn.Linear(5, 5), nn.Linear(5, 3), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        return self.out(self.scale * torch.tanh(self.inner(h)) + h @ self.inner.weight.T)


class InPlace(nn.Module):
    """Slices, views and sums of parameters, and functions that write to activations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.unused = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.weight[:5].view(5, 5).t()
        h += self.weight[5]
        h[:, :2] *= self.weight[6, 0]
        rows = torch.stack([self.weight[5], self.weight[7]]).sum(0)
        return torch.relu_(h - rows.mean())[:, :3] * self.weight.square().sum().sqrt()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn, self.out = (
            nn.Embedding(7, 3),
            nn.GRU(3, 4, batch_first=True),
            nn.Linear(4, 3),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.rnn(self.embedding(tokens))[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 3)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.encoder(self.embedding(tokens)).mean(1))


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 3), nn.Tanh())


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.SiLU(), nn.Linear(4, 3))


def normalised() -> nn.Module:
    norm = nn.BatchNorm1d(4)
    norm.running_mean, norm.running_var = torch.linspace(-1, 1, 4), torch.linspace(0.5, 2, 4)
    return nn.Sequential(nn.Linear(5, 4), norm, nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.GroupNorm(1, 3),
        nn.GELU(),
        nn.Conv2d(3, 2, 2, bias=False),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def gpt() -> nn.Module:
    return hk.zoo.tiny_gpt(vocab_size=7, context=6, width=4, num_layers=1, num_heads=2)


def next_token(scores: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores[:, :-1].mT, tokens[:, 1:], reduction="none").mean(1)


class Product(torch.autograd.Function):
    """A product x w' of a network's first layer, with its own derivative by w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.x = x
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, gradient.T @ ctx.x


class Squares(torch.autograd.Function):
    """Squares of a product x w', with the parameter among the tensors that it saves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return (x @ w.T).square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return None, 2 * (gradient * (x @ w.T)).T @ x


class OwnFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(5, 3, bias=False), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(Product.apply(x, self.inner.weight))
        return self.out(h + self.inner(x).square() + Squares.apply(x, self.inner.weight))


Problem = tuple[Any, dict[str, Tensor], Any]
MAIN = ("perceptron", "normalised", "convolutional", "GPT", "tied")
"""Problems for all numbers of ranks; the others are for three."""

MODULES: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
    "layer": (layer, nn.CrossEntropyLoss(), (X, Y)),
    "small": (small, nn.CrossEntropyLoss(), (X, Y)),
    "perceptron": (perceptron, nn.CrossEntropyLoss(), (X, Y)),
    "normalised": (normalised, nn.CrossEntropyLoss(), (X, Y)),
    "convolutional": (convolutional, nn.CrossEntropyLoss(), (IMAGES, Y)),
    "GPT": (gpt, next_token, (TOKENS, TOKENS)),
    "attention": (Attention, nn.CrossEntropyLoss(), (TOKENS, Y)),
    "recurrent": (Recurrent, nn.CrossEntropyLoss(), (TOKENS, Y)),
    "tied": (Tied, nn.CrossEntropyLoss(), (X, Y)),
    "in place": (InPlace, nn.CrossEntropyLoss(), (X, Y)),
    "own function": (OwnFunction, nn.CrossEntropyLoss(), (X, Y)),
    "weighted": (perceptron, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double()), (X, Y)),
}


def tree_loss(params: Any, batch: Any) -> Tensor:
    """A loss of a tree, with a parameter of one entry, and one that is a constant of the forward pass."""
    x, y = batch
    z = torch.nn.functional.linear(x, params["w"], params["b"]).exp() / params["t"]
    assert isinstance(params["t"].item(), float)
    return (z - y[:, None]).square().mean(1)


def of_tree() -> Problem:
    params = {"w": 0.3 * torch.ones(2, 5), "b": torch.tensor([0.1, -0.2]), "t": torch.tensor(1.5)}
    return tree_loss, {name: p.double() for name, p in params.items()}, (X, Y)


@cache
def problem(name: str) -> Problem:
    if name == "tree":
        return of_tree()
    make, criterion, data = MODULES[name]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = make().double()
    return *hk.from_module(model, criterion), data


def vectors(n: int) -> Tensor:
    return torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@cache
def sharded_hessian(mesh: DeviceMesh, name: str, **options: Any) -> hk.CurvatureOperator:
    loss_fn, params, data = problem(name)
    options = {"batch_size": 4, "shard_params": True, **options}
    return hk.hessian(loss_fn, params, hk.as_data(data, mesh=mesh), **options)


NAMES = (*MODULES, "tree")


def product(mesh: DeviceMesh, name: str) -> Tensor:
    H = sharded_hessian(mesh, name)
    return H @ vectors(H.n)


def products_in_parts(mesh: DeviceMesh) -> list[Any]:
    H = sharded_hessian(mesh, "perceptron")
    S, V = sharded(H), vectors(H.n)
    part = S.space.local(V)
    tree = H @ H.unflatten(V[:, 0])
    combined = (2 * H - 0.5 * sharded_hessian(mesh, "perceptron", batch_size=20)).shift(0.3)
    parts = [sharded(combined).product(part), S.product(part)]
    return [part.shape[0], *(S.space.whole(one, H.n) for one in parts), combined @ V, H.flatten(tree)]


def kinds(mesh: DeviceMesh) -> list[Tensor]:
    loss_fn, params, data = problem("small")
    examples = hk.as_data(data, mesh=mesh)
    makers = (hk.ggn, hk.fisher, partial(hk.fisher, num_samples=3), hk.empirical_fisher)
    made = [make(loss_fn, params, examples, batch_size=4, shard_params=True) for make in makers]
    return [H @ vectors(H.n) for H in made]


def one_process(mesh: DeviceMesh | None) -> hk.CurvatureOperator:
    loss_fn, params, data = problem("layer")
    if mesh is None:
        return hk.hessian(loss_fn, params, data, batch_size=6)
    return sharded_hessian(mesh, "layer", batch_size=6)


def questions(mesh: DeviceMesh | None) -> list[Any]:
    H = one_process(mesh)
    ex = hk.extreme_eigenvalues(H, tol=1e-8, method="lanczos")
    parts = hk.top_eigenvalues(H, 3, tol=1e-8, method="lanczos")
    top, images = parts.full_tensor(), H @ parts.vectors
    images = images if mesh is None else images.full_tensor()
    density = hk.spectral_density(H, num_steps=6, seed=3)
    return [
        [ex.largest.value, ex.smallest.value, ex.num_matvecs, str(ex.status)],
        [top.values, top.vectors.abs(), images.abs()],
        [hk.trace(H, num_matvecs=9, seed=3).value, density.grid, density.values],
        [hk.solve(H.shift(1.0), vectors(H.n), tol=1e-10).x, repr(H).replace("reverse-over-reverse", "")],
    ]


def parts_of_examples(mesh: DeviceMesh) -> Tensor:
    """Multiply by examples of which each rank brings its own, by number."""
    loss_fn, params, (x, y) = problem("perceptron")
    bounds = {2: (0, 8, N), 3: (0, 8, 9, N), 4: (0, 7, 8, 10, N)}[mesh.size()]
    part = slice(*bounds[mesh.get_local_rank() :][:2])
    data = hk.as_data((x[part], y[part]), mesh=mesh, split=False)
    H = hk.hessian(loss_fn, params, data, batch_size=4, shard_params=True)
    return H @ vectors(H.n)


def one_batch(mesh: DeviceMesh) -> Tensor:
    H = sharded_hessian(mesh, "perceptron", batch_size=20)
    return H @ vectors(H.n)


def blocks_of_parameters(mesh: DeviceMesh) -> list[Any]:
    H = sharded_hessian(mesh, "perceptron", wrt=("4.*", "0.bias"))
    return [H.n, H @ vectors(H.n)]


def of_fsdp(mesh: DeviceMesh) -> list[Any]:
    """Multiply by the shards of a model of fully_shard, which is never whole."""
    from torch.distributed.fsdp import fully_shard

    _, _, data = problem("perceptron")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = perceptron().double()
    fully_shard(model, mesh=mesh)
    objective, params = hk.from_module(model, nn.CrossEntropyLoss(), shard_params=True)
    H = hk.hessian(objective, params, hk.as_data(data, mesh=mesh), batch_size=4, shard_params=True)
    return [{type(p).__name__ for p in params.values()}, H @ vectors(H.n)]


QUESTIONS: dict[str, Callable[[DeviceMesh], Any]] = {
    **{f"product {name}": partial(product, name=name) for name in NAMES},
    **{
        function.__name__: function
        for function in (
            products_in_parts,
            kinds,
            questions,
            parts_of_examples,
            one_batch,
            blocks_of_parameters,
        )
    },
    "of_fsdp": of_fsdp,
}


ALWAYS = {*(f"product {name}" for name in MAIN), "products_in_parts", "kinds", "parts_of_examples", "of_fsdp"}


@cache
def answers_of(size: int) -> dict[str, list[Any]]:
    asked = {name: f for name, f in QUESTIONS.items() if size == 3 or name in {*ALWAYS, "questions"}}
    return dict(zip(asked, run(size, *asked.values(), timeout=100, seconds=600), strict=True))


@cache
def dense(name: str) -> Tensor:
    loss_fn, params, batch = problem(name)
    if name == "weighted":  # the mean over the weights of the data
        total = loss_fn.example_weight(batch).mean()
        return oracles.hessian_by_double_backward(lambda p, b: loss_fn(p, b) / total, params, batch)
    return oracles.hessian_by_double_backward(loss_fn, params, batch)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


CASES = [(size, name) for size in SIZES for name in NAMES if size == 3 or name in MAIN]


@pytest.mark.parametrize(("size", "name"), CASES)
def test_products_are_those_of_the_dense_matrix(size: int, name: str) -> None:
    expected = dense(name)
    for found in answers_of(size)[f"product {name}"]:
        assert isinstance(found, Tensor), found
        close(found, expected @ vectors(len(expected)))


@pytest.mark.parametrize("size", SIZES)
def test_parts_of_vectors_go_in_and_come_out(size: int) -> None:
    H = dense("perceptron")
    V, n = vectors(len(H)), len(H)
    found = answers_of(size)["products_in_parts"]
    assert sum(one[0] for one in found) == n
    assert max(one[0] for one in found) == -(-n // size)
    for _, combined, parts, whole, tree in found:
        close(combined, 1.5 * H @ V + 0.3 * V)
        close(whole, 1.5 * H @ V + 0.3 * V)
        close(parts, H @ V)
        close(tree, H @ V[:, 0])


@pytest.mark.parametrize("size", SIZES)
def test_all_kinds_of_curvature_are_those_of_dense_matrices(size: int) -> None:
    objective, params, batch = problem("small")
    G = oracles.ggn_by_jacobian(objective.forward, objective.output_loss, params, batch)
    F = oracles.second_moment(objective, params, batch)
    sampled, V = hk.fisher(objective, params, batch, num_samples=3), vectors(len(G))
    for ggn, fisher, sampled_fisher, empirical in answers_of(size)["kinds"]:
        close(ggn, G @ V)
        close(fisher, G @ V)
        close(sampled_fisher, sampled @ V)
        close(empirical, F @ V)


@pytest.mark.parametrize("size", SIZES)
def test_questions_have_the_answers_of_one_process(size: int) -> None:
    values = torch.linalg.eigvalsh(dense("layer"))
    expected = questions(None)
    for extremes, top, estimates, others in answers_of(size)["questions"]:
        torch.testing.assert_close(torch.tensor(extremes[:2]), values[[-1, 0]].float(), rtol=1e-6, atol=1e-6)
        assert extremes[2:] == expected[0][2:]
        torch.testing.assert_close(top, expected[1], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(estimates, expected[2], rtol=1e-7, atol=1e-9)
        close(others[0], expected[3][0])


@pytest.mark.parametrize("size", SIZES)
def test_data_come_in_any_parts_and_parameters_from_fsdp(size: int) -> None:
    H = dense("perceptron")
    expected, found = H @ vectors(len(H)), answers_of(size)
    for one in found["parts_of_examples"]:
        close(one, expected)
    for kinds, one in found["of_fsdp"]:
        assert kinds == {"DTensor"}
        close(one, expected)


def test_ranks_without_a_batch_and_blocks_of_parameters() -> None:
    H, found = dense("perceptron"), answers_of(3)
    for one in found["one_batch"]:
        close(one, H @ vectors(len(H)))
    names = [name for name, p in problem("perceptron")[1].items() for _ in range(p.numel())]
    chosen = torch.tensor([name.startswith("4.") or name == "0.bias" for name in names])
    block = H[chosen][:, chosen]
    for n, one in found["blocks_of_parameters"]:
        assert n == len(block)
        close(one, block @ vectors(n))


def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/distributed.md").read_text()
    (script := tmp_path / "in_parts.py").write_text(page.split("```python\n")[2].split("```")[0])
    done = launch(2, str(script))
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    objective, params = hk.from_module(hk.zoo.digits_cnn(seed=0), nn.CrossEntropyLoss())
    largest = hk.lanczos(hk.hessian(objective, params, hk.zoo.digits()), 1).values[0]
    assert float(line.split()[0]) == pytest.approx(float(largest), rel=1e-2)
