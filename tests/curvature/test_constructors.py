from __future__ import annotations

import fnmatch
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hvpkit as hk
from hvpkit.curvature.constructors import empirical_fisher, fisher, ggn
from oracles import hessian_by_double_backward, relative_error
from problems import cross_entropy, network

MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def rows_of(params: dict[str, Tensor], chosen: Callable[[str], bool]) -> Tensor:
    flags = [torch.full((p.numel(),), chosen(name)) for name, p in params.items()]
    return torch.cat(flags).nonzero().flatten()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("wrt", "chosen"),
    [
        ("0.*", lambda name: name.startswith("0.")),
        ("*.weight", lambda name: name.endswith("weight")),
        ("*", lambda _: True),
        (["0.bias", "*[1-9].bias"], lambda name: name.endswith("bias")),
        (("6.weight", "0.weight"), lambda name: name in ("0.weight", "6.weight")),
        (lambda name: "1" in name, lambda name: "1" in name),
    ],
)
def test_wrt_gives_the_block_of_the_chosen_parameters(wrt: object, chosen: Callable, mode: str) -> None:
    problem = network("conv_batchnorm")
    dense = hessian_by_double_backward(problem.objective, problem.params, problem.data)
    rows = rows_of(problem.params, chosen)
    H = hk.hessian(problem.objective, problem.params, problem.data, wrt=wrt, batch_size=5, mode=mode)
    assert H.n == len(rows) > 0
    expected = dense[rows][:, rows]
    V = torch.randn(H.n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert relative_error(H @ V, expected @ V) < (1e-7 if mode == "finite-difference" else 1e-13)
    tree = H @ {name: p for name, p in problem.params.items() if chosen(name)}
    assert list(tree) == [name for name in problem.params if chosen(name)]


def test_wrt_goes_by_dotted_names_of_any_tree() -> None:
    params = [torch.ones(2).double(), {"a": {"b": torch.ones(1).double()}, "c": torch.ones(3).double()}]
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss_fn(p: list, batch: Tensor) -> Tensor:
        return (batch @ torch.cat([p[0], p[1]["a"]["b"], p[1]["c"]])) ** 3

    whole = hk.hessian(loss_fn, params, x) @ eye(6)
    for wrt, rows in (("0", [0, 1]), ("1.a.*", [2]), ("1.*", [2, 3, 4, 5]), (["1.c", "0"], [0, 1, 3, 4, 5])):
        H = hk.hessian(loss_fn, params, x, wrt=wrt)
        assert relative_error(H @ eye(H.n), whole[rows][:, rows]) < 1e-14


@pytest.mark.parametrize("wrt", ["nothing", [], ["conv*", "fc*"], lambda _: False, "0.WEIGHT"])
def test_wrt_that_matches_nothing_is_refused_with_the_names(wrt: object) -> None:
    problem = network("mlp")
    with pytest.raises(ValueError, match=r"wrt=.* matches no parameter; their names: 0.weight, 0.bias, 2.w"):
        hk.hessian(problem.objective, problem.params, problem.data, wrt=wrt)


def test_wrt_of_an_unused_parameter_is_refused_as_no_function_of_it() -> None:
    problem = network("unused_parameter")
    with pytest.raises(ValueError, match="loss_fn does not depend on params"):
        hk.hessian(problem.objective, problem.params, problem.data, wrt="idle.*")


def test_auto_takes_the_mode_that_is_fast_on_a_cpu_and_says_so() -> None:
    problem = network("mlp")
    H = hk.hessian(problem.objective, problem.params, problem.data)
    assert H.mode == "reverse-over-reverse"
    for mode in MODES:
        assert hk.hessian(problem.objective, problem.params, problem.data, mode=mode).mode == mode
    with pytest.raises(ValueError, match=r"mode must be one of 'auto', .* got 'exact'"):
        hk.hessian(problem.objective, problem.params, problem.data, mode="exact")


def test_data_of_every_kind_give_one_operator() -> None:
    problem = network("mlp")
    x, y = problem.data
    whole = hk.hessian(problem.objective, problem.params, problem.data) @ eye(43)
    for data in (
        TensorDataset(x, y),
        DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True, drop_last=True),
        [(x[:5], y[:5]), (x[5:], y[5:])],
        hk.as_data(problem.data, batch_size=2),
    ):
        H = hk.hessian(problem.objective, problem.params, data)
        assert H.num_examples == 13
        assert relative_error(H @ eye(43), whole) < 1e-13


def test_one_example_is_data_too() -> None:
    problem = network("mlp", num_examples=1)
    oracle = hessian_by_double_backward(problem.objective, problem.params, problem.data)
    H = hk.hessian(problem.objective, problem.params, problem.data, batch_size=1000)
    assert relative_error(H @ eye(H.n), oracle) < 1e-13


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrt", [None, "2.*"])
def test_later_training_does_not_reach_an_operator(mode: str, wrt: str | None) -> None:
    model = network("conv_batchnorm").model
    data = network("conv_batchnorm").data
    objective, _ = hk.from_module(model, cross_entropy)
    live = dict(model.named_parameters())
    H = hk.hessian(objective, live, data, mode=mode, wrt=None if wrt is None else "0.*")
    v = torch.ones(H.n, dtype=torch.float64)
    before = H @ v
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for _ in range(2):
        cross_entropy(model(data[0]), data[1]).mean().backward()
        optimizer.step()
    assert torch.equal(H @ v, before)
    after = hk.hessian(objective, live, data, mode=mode, wrt=None if wrt is None else "0.*")
    assert not torch.allclose(after @ v, before, rtol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_a_product_that_is_not_finite_names_its_first_batch(mode: str) -> None:
    x = torch.ones(9, 2, dtype=torch.float64)
    x[7] = float("nan")
    H = hk.hessian(lambda p, batch: (batch @ p) ** 2, torch.ones(2).double(), x, batch_size=2, mode=mode)
    with pytest.raises(hk.NonFiniteError, match=r"the Hessian product is not finite .* batch 3 of the data"):
        H @ torch.ones(2).double()
    for derived in (2.0 * H, H.shift(1.0)):
        with pytest.raises(hk.NonFiniteError, match="from batch 3 of the data"):
            derived @ torch.ones(2, 3).double()


def test_only_the_direction_that_overflows_is_blamed() -> None:
    x = torch.tensor([[1.0, 1.0], [1.0, 1e30]])
    H = hk.hessian(lambda p, batch: (batch @ p) ** 2, torch.zeros(2), x, batch_size=1)
    V = torch.eye(2)
    assert torch.isfinite(H @ V[:, :1]).all()
    with pytest.raises(hk.NonFiniteError, match="from batch 1 of the data"):
        H @ V


def test_a_loss_that_is_not_finite_is_refused_at_once() -> None:
    x = torch.full((3, 2), float("nan"))
    with pytest.raises(hk.NonFiniteError, match="loss_fn gave NaN or infinity on batch 0"):
        hk.hessian(lambda p, batch: batch @ p, torch.ones(2), x)


def batch_normalised() -> tuple[hk.Objective, dict[str, Tensor]]:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    return hk.from_module(model, nn.CrossEntropyLoss(), batchnorm="batch")


X = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])


@pytest.mark.parametrize(
    ("data", "batch_size"),
    [
        ((X, Y), 4),
        ((X, Y), 1),
        ((X[:1], Y[:1]), None),
        (TensorDataset(X, Y), 4),
        (DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True, drop_last=True), None),
        (hk.as_data((X, Y)).subset([0, 1, 2]), 2),
    ],
)
@pytest.mark.parametrize("wrt", [None, "0.*"])
def test_a_last_batch_of_one_is_refused_before_any_pass(
    data: object, batch_size: int | None, wrt: str | None
) -> None:
    objective, params = batch_normalised()
    calls = []
    counted = hk.Objective(
        lambda p, batch: calls.append(batch) or objective.forward(p, batch),
        objective.output_loss,
        batchnorm="batch",
    )
    with pytest.raises(ValueError, match='batchnorm="batch" needs at least two examples in each batch'):
        hk.hessian(counted, params, data, batch_size=batch_size, wrt=wrt)
    assert not calls


def test_a_batch_of_one_among_others_is_refused_when_it_comes() -> None:
    objective, params = batch_normalised()
    H = hk.hessian(objective, params, [(X[:4], Y[:4]), (X[4:5], Y[4:5]), (X[5:], Y[5:])])
    with pytest.raises(ValueError, match='batchnorm="batch" needs at least two examples in each batch'):
        H @ torch.ones(H.n, dtype=torch.float64)
    H = hk.hessian(objective, params, (X, Y), batch_size=7)
    assert torch.isfinite(H @ torch.ones(H.n, dtype=torch.float64)).all()


@pytest.mark.parametrize(("progress", "bars"), [(True, 3), (False, 0)])
def test_progress_shows_a_bar_for_each_product(
    progress: bool, bars: int, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = network("mlp")
    H = hk.hessian(problem.objective, problem.params, problem.data, batch_size=5, progress=progress)
    for _ in range(3):
        H @ torch.ones(H.n, dtype=torch.float64)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("product: 0batch") == bars


def test_names_are_matched_with_case_as_the_shell_does() -> None:
    problem = network("mlp")
    for glob in ("?.bias", "[!0]*", "2.[wb]*"):
        H = hk.hessian(problem.objective, problem.params, problem.data, wrt=glob)
        names = [name for name in problem.params if fnmatch.fnmatchcase(name, glob)]
        assert list(H.unflatten(torch.zeros(H.n))) == names


def test_samples_are_the_hessian_of_so_many_examples_at_their_share_of_the_cost() -> None:
    problem = network("mlp")
    x, y = problem.data
    H = hk.hessian(problem.objective, problem.params, problem.data, batch_size=5)
    whole = H.sample(len(x), 0)
    assert whole.cost == 1.0
    assert relative_error(whole @ eye(H.n), H @ eye(H.n)) < 1e-14
    singles = [
        hessian_by_double_backward(problem.objective, problem.params, (x[i : i + 1], y[i : i + 1]))
        for i in range(len(x))
    ]
    seen = set()
    for seed in range(60):
        part = (2.0 * H).shift(0.5).sample(1, seed)
        assert part.cost == pytest.approx(1 / len(x))
        dense = (part @ eye(H.n) - 0.5 * eye(H.n)) / 2
        errors = [relative_error(dense, single) for single in singles]
        assert min(errors) < 1e-12
        seen.add(errors.index(min(errors)))
    assert len(seen) > len(x) // 2
    with pytest.raises(ValueError, match="num_examples"):
        H.sample(len(x) + 1, 0)


# What all kinds of curvature have in common.

KINDS: dict[str, Callable[..., hk.LinearOperator]] = {
    "hessian": hk.hessian,
    "ggn": ggn,
    "empirical-fisher": empirical_fisher,
    "fisher": fisher,
    "sampled fisher": partial(fisher, num_samples=3),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_an_operator_knows_what_it_was_made_of(kind: str) -> None:
    problem = network("conv_batchnorm")
    weights = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = hk.as_data(problem.data, batch_size=4).subset([0, 2, 3, 5, 8, 9], weights)
    H = KINDS[kind](problem.objective, problem.params, data, wrt="0.*", mode="reverse-over-reverse")
    origin = H.origin
    assert [(c, term.kind) for c, term in H.terms] == [(1.0, kind.removeprefix("sampled "))]
    assert H.mode == "reverse-over-reverse"
    assert origin.layout == H.layout
    assert all(
        torch.equal(leaf, problem.params[name])
        for leaf, name in zip(origin.leaves, ("0.weight", "0.bias"), strict=True)
    )
    assert (origin.data.num_examples, origin.data.smallest_batch) == (6, 2)
    assert torch.equal(origin.data.weights, weights)
    variables = H.unflatten(H.flatten({name: problem.params[name] for name in ("0.weight", "0.bias")}))
    assert torch.equal(
        origin.loss_fn(variables, problem.data), problem.objective(problem.params, problem.data)
    )
    part = H.sample(3, 0)
    assert part.terms[0][1].kind == H.terms[0][1].kind
    assert (part.origin.data.num_examples, part.num_examples) == (3, 3)
    for derived in (2.0 * H, H / 2, -H, H.shift(1.0), H + H, H - H, (2.0 * H).sample(3, 0)):
        assert derived.origin is None


@each_kind
def test_later_training_and_batch_size_have_no_say_in_any_kind(kind: str) -> None:
    problem = network("mlp")
    live = {name: p.clone().requires_grad_() for name, p in problem.params.items()}
    H = KINDS[kind](problem.objective, live, problem.data, wrt="0.*", batch_size=5)
    V = torch.randn(H.n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = H @ V
    with torch.no_grad():
        for p in live.values():
            p.mul_(2.0)
    assert torch.equal(H @ V, before)
    assert all(p.grad is None for p in live.values())
    columns = torch.stack([H @ v for v in V.unbind(1)], dim=1)
    assert relative_error(before, columns) < 1e-13
    other = KINDS[kind](problem.objective, problem.params, problem.data, wrt=["0.*"], batch_size=2)
    assert relative_error(other @ V, before) < 1e-13


@each_kind
def test_what_no_kind_takes_is_refused(kind: str) -> None:
    problem = network("mlp")
    make = partial(KINDS[kind], problem.objective)
    with pytest.raises(TypeError, match=r"params\['0.weight'\] has dtype torch.int64; .* floating point"):
        make({name: p.long() for name, p in problem.params.items()}, problem.data)
    with pytest.raises(ValueError, match="mode must be one of 'auto', "):
        make(problem.params, problem.data, mode="exact")
    with pytest.raises(ValueError, match=r"wrt='conv\*' matches no parameter"):
        make(problem.params, problem.data, wrt="conv*")
    with pytest.raises(hk.NonFiniteError, match="loss_fn gave NaN or infinity on batch 0"):
        make(problem.params, (problem.data[0] * float("nan"), problem.data[1]))


@each_kind
def test_tied_weights_count_once_and_frozen_parameters_not_at_all(kind: str) -> None:
    tied, frozen = network("tied_weights"), network("frozen_parameter")
    H = KINDS[kind](tied.objective, tied.params, tied.data)
    assert H.n == 7 * 4 + 4 * 4 + 4
    assert list(H.unflatten(torch.zeros(H.n))) == ["embedding.weight", "hidden.weight", "hidden.bias"]
    assert KINDS[kind](frozen.objective, frozen.params, frozen.data).n == 16 + 12 + 3


@each_kind
@pytest.mark.parametrize("mode", MODES)
def test_unused_parameters_have_zeros_in_every_kind(kind: str, mode: str) -> None:
    problem = network("unused_parameter")
    H = KINDS[kind](problem.objective, problem.params, problem.data, mode=mode)
    rows = rows_of(problem.params, lambda name: name.startswith("idle"))
    M = H @ eye(H.n)
    assert not M[rows].any()
    assert not M[:, rows].any()
    assert M.any()


@pytest.mark.parametrize("kind", ["ggn", "empirical-fisher", "fisher"])
def test_progress_shows_a_bar_in_every_kind(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    problem = network("mlp")
    H = KINDS[kind](problem.objective, problem.params, problem.data, batch_size=5, progress=True)
    capsys.readouterr()
    H @ torch.ones(H.n, dtype=torch.float64)
    assert "product: " in capsys.readouterr().err


def test_extremes_of_each_layer_take_one_line() -> None:
    problem = network("mlp")
    loss_fn, params, data = problem.objective, problem.params, problem.data
    ends = {name: hk.extreme_eigenvalues(hk.hessian(loss_fn, params, data, wrt=name)) for name in params}
    dense = hessian_by_double_backward(loss_fn, params, data)
    for name, found in ends.items():
        rows = rows_of(params, lambda other, name=name: other == name)
        values = torch.linalg.eigvalsh(dense[rows][:, rows])
        assert found.smallest.value == pytest.approx(float(values[0]), rel=1e-2, abs=1e-12)
        assert found.largest.value == pytest.approx(float(values[-1]), rel=1e-2)


def test_a_loss_that_closes_over_the_model_is_refused() -> None:
    problem = network("mlp")
    live = dict(problem.model.named_parameters())
    with pytest.raises(ValueError, match=r"loss_fn does not depend on params: .* close over the model's own"):
        hk.hessian(lambda _, batch: cross_entropy(problem.model(batch[0]), batch[1]), live, problem.data)
