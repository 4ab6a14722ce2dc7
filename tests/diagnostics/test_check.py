"""Wrong operators fail, each by the check that is there for it; right ones pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import hvpkit as hk
from hvpkit.curvature.constructors import empirical_fisher, ggn
from hvpkit.diagnostics.check import CHECKS, Finding, Report, check
from hvpkit.errors import AsymmetryWarning
from hvpkit.solvers.common.convergence import warn_asymmetric
from problems import NETWORKS, cross_entropy, matrix, network
from variants import variant

MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")
OWN_CHECKS = {"data order", "differences", "batching", "constants"}


def failed(report: Report) -> set[str]:
    return {finding.check for finding in report.findings if finding.verdict == "failed"}


def passes(H: hk.LinearOperator) -> bool:
    """Whether all checks apply and hold."""
    report = check(H)
    assert report.ok == all(found.verdict != "failed" for found in report.findings)
    return all(found.verdict == "ok" for found in report.findings)


def finding(report: Report, name: str) -> Finding:
    return next(found for found in report.findings if found.check == name)


def problem(*layers: nn.Module, num_examples: int = 13, dtype: torch.dtype = torch.float64) -> tuple:
    """A model on vectors of four, its raw loss function, parameters and data."""
    g = torch.Generator().manual_seed(3)
    model = nn.Sequential(*layers).to(dtype)
    for parameter in model.parameters():
        parameter.data.normal_(generator=g).mul_(0.5)

    def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(functional_call(model, params, (batch[0],)), batch[1])

    x = torch.randn(num_examples, 4, generator=g, dtype=dtype)
    y = torch.randint(0, 3, (num_examples,), generator=g)
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return model, loss_fn, params, (x, y)


def mlp(**options: object) -> tuple:
    return problem(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), **options)


def replaced(H: hk.LinearOperator, product: Callable[[Tensor], Tensor]) -> hk.LinearOperator:
    """An operator that claims to be H, with products of its own."""
    claimed = dataclasses.replace(H, product=lambda V: torch.stack([product(v) for v in V.unbind(1)], dim=1))
    return variant(claimed, sample=None)


def mean_loss(H: hk.LinearOperator, loss_fn: Callable, batch: tuple) -> Callable[[Tensor], Tensor]:
    return lambda flat: loss_fn(H.unflatten(flat), batch).mean()


def jvp_of(
    derivative: Callable, H: hk.LinearOperator, loss_fn: Callable, params: dict, batch: tuple
) -> Callable:
    slope = derivative(mean_loss(H, loss_fn, batch))
    return lambda v: torch.func.jvp(slope, (H.flatten(params),), (v,))[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_right_operators_pass(name, mode, dtype):
    given = network(name)
    objective, params = hk.from_module(given.model.to(dtype), cross_entropy)
    x, y = given.data
    x = x.to(dtype) if x.is_floating_point() else x
    assert passes(hk.hessian(objective, params, (x, y), mode=mode, batch_size=5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", [ggn, empirical_fisher])
def test_other_kinds_pass(kind, dtype):
    given = network("tied_weights")
    objective, params = hk.from_module(given.model.to(dtype), cross_entropy)
    for mode in MODES:
        assert passes(kind(objective, params, given.data, mode=mode, batch_size=5))


def test_products_in_bfloat16_pass_to_their_own_precision():
    _, loss_fn, params, data = mlp(dtype=torch.float32)
    H = hk.hessian(loss_fn, params, data, arithmetic="bf16", batch_size=5)
    assert passes(H)
    assert finding(check(H), "linear").figure > 1e-4


# Mutants.


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(6), nn.BatchNorm1d(6, track_running_stats=False), nn.InstanceNorm1d(2, affine=True)],
    ids=repr,
)
def test_jvp_of_jacrev_through_a_normalisation_is_asymmetric(norm):
    shape = [nn.Unflatten(1, (2, 3)), norm, nn.Flatten()] if isinstance(norm, nn.InstanceNorm1d) else [norm]
    _, loss_fn, params, data = problem(nn.Linear(4, 6), *shape, nn.Tanh(), nn.Linear(6, 3))
    H = hk.hessian(loss_fn, params, data)
    right = check(replaced(H, jvp_of(torch.func.grad, H, loss_fn, params, data)))
    wrong = check(replaced(H, jvp_of(torch.func.jacrev, H, loss_fn, params, data)))
    assert "symmetric" not in failed(right)
    assert {"symmetric", "differences"} <= failed(wrong)
    suspects = finding(wrong, "symmetric").suspects
    assert len(suspects) == 1
    assert type(norm).__name__ in suspects[0]
    assert "jacrev" in finding(wrong, "symmetric").mend


def test_a_mean_of_means_of_ragged_batches_depends_on_the_batching():
    _, loss_fn, params, (x, y) = mlp()
    H = hk.hessian(loss_fn, params, (x, y), batch_size=5)
    batches = list(zip(x.split(5), y.split(5), strict=True))
    products = [jvp_of(torch.func.grad, H, loss_fn, params, batch) for batch in batches]
    mutant = replaced(H, lambda v: sum(product(v) for product in products) / len(products))
    assert failed(check(mutant)) == {"differences", "batching"}
    weighed = replaced(
        H, lambda v: sum(len(b[1]) / 13 * product(v) for b, product in zip(batches, products, strict=True))
    )
    assert check(weighed).ok


def test_a_loss_divided_by_what_its_batch_holds_depends_on_the_batching():
    _, loss_fn, params, (x, y) = mlp()

    def mean_of_kept(params, batch):
        kept = batch[1] > 0
        return (loss_fn(params, batch) * kept).sum() / kept.sum()

    report = check(hk.hessian(mean_of_kept, params, (x, y), batch_size=13))
    assert failed(report) == {"batching"}
    assert finding(report, "batching").suspects == ("loss_fn",)


def test_batch_statistics_behind_a_raw_loss_are_found_and_named():
    norm = nn.BatchNorm1d(5, track_running_stats=False)
    _, loss_fn, params, data = problem(nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, 3))
    report = check(hk.hessian(loss_fn, params, data, batch_size=5))
    assert failed(report) == {"batching"}
    assert finding(report, "batching").suspects == ("1 (BatchNorm1d)",)


def test_dropout_in_training_is_not_repeatable():
    model, loss_fn, params, data = problem(nn.Linear(4, 5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, 3))
    H = hk.hessian(lambda p, b: (model.eval(), loss_fn(p, b))[1], params, data)
    mutant = replaced(H, jvp_of(torch.func.grad, H, loss_fn, params, data))
    assert check(mutant).ok
    model.train()
    with torch.random.fork_rng(devices=[]):
        report = check(mutant)
    assert failed(report) == {"repeatable"}
    assert finding(report, "repeatable").suspects == ("1 (Dropout)",)
    assert [found.verdict for found in report.findings[3:]] == ["not applicable"] * 5
    assert finding(report, "symmetric").detail == "repeatable failed"


def test_a_dropped_tangent_is_asymmetric():
    _, loss_fn, params, data = mlp()
    H = hk.hessian(loss_fn, params, data)
    kept = torch.ones(H.n, dtype=H.dtype)
    kept[20:25] = 0
    assert "symmetric" in failed(check(replaced(H, lambda v: H @ (kept * v))))


def test_a_tangent_dropped_on_both_sides_disagrees_with_differences():
    _, loss_fn, params, data = mlp()
    H = hk.hessian(loss_fn, params, data)
    kept = torch.ones(H.n, dtype=H.dtype)
    kept[20:25] = 0
    report = check(replaced(H, lambda v: kept * (H @ (kept * v))))
    assert failed(report) == {"differences", "batching"}
    assert finding(report, "differences").suspects == ("0.bias",)


def test_a_padding_row_with_a_tangent_is_found():
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(7, 3, padding_idx=0), nn.Flatten(), nn.Tanh(), nn.Linear(15, 3)
    ).double()
    tokens, y = torch.randint(0, 7, (13, 5), generator=g), torch.randint(0, 3, (13,), generator=g)
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    params["0.weight"] = torch.randn(7, 3, generator=g, dtype=torch.float64)

    def loss_fn(params, batch):
        return cross_entropy(functional_call(model, params, (batch[0],)), batch[1])

    H = hk.hessian(loss_fn, params, (tokens, y))
    report = check(replaced(H, jvp_of(torch.func.grad, H, loss_fn, params, (tokens, y))))
    assert failed(report) == {"symmetric", "batching"}
    assert finding(report, "symmetric").suspects == ("0 (Embedding)",)
    assert check(H).ok


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_norm_by_torchs_double_backward_is_found():
    _, loss_fn, params, data = problem(nn.utils.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))
    H = hk.hessian(loss_fn, params, data)

    def product(v):
        point = H.flatten(params).requires_grad_()
        with torch.enable_grad():
            slope = torch.autograd.grad(mean_loss(H, loss_fn, data)(point), point, create_graph=True)[0]
            return torch.autograd.grad(slope, point, v)[0]

    report = check(replaced(H, product))
    assert "differences" in failed(report)
    assert finding(report, "differences").suspects == ("0 (Linear)",)
    assert "weight_norm" in finding(report, "differences").mend


@pytest.mark.parametrize("kind", [hk.hessian, ggn, empirical_fisher])
@pytest.mark.parametrize("scale", [-1.0, 1.001, 13.0])
def test_a_wrong_scale_disagrees_with_differences(scale, kind):
    given = network("mlp")
    H = kind(given.objective, given.params, given.data)
    assert failed(check(replaced(H, lambda v: scale * (H @ v)))) == {"differences", "batching"}


def test_a_loss_that_detaches_disagrees_with_differences():
    _, loss_fn, params, data = mlp()

    def detached(params, batch):
        losses = loss_fn(params, batch)
        return losses * losses.detach()

    assert failed(check(hk.hessian(detached, params, data))) == {"differences"}


def test_a_wrong_derivative_of_a_custom_function_disagrees_with_differences():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, slope):
            (x,) = ctx.saved_tensors
            return slope * 3 * (x * x.detach())

    params = {"w": torch.linspace(0.5, 1.0, 4, dtype=torch.float64)}
    data = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4)
    report = check(
        hk.hessian(lambda p, x: Cube.apply(x * p["w"]).sum(1), params, data, mode="reverse-over-reverse")
    )
    assert failed(report) == {"differences"}
    assert finding(report, "differences").figure == pytest.approx(0.5, rel=1e-5)
    assert finding(report, "differences").suspects == ("w",)


# Data.


class Shuffled:
    """Batches in another order in each pass, by random numbers that nobody seeds."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors, self.order = tensors, np.random.default_rng(0)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = torch.from_numpy(self.order.permutation(len(self.tensors[0])))
        for chosen in order.split(5):
            yield tuple(tensor[chosen] for tensor in self.tensors)


def test_a_loader_that_shuffles_is_found():
    _, loss_fn, params, data = mlp()
    report = check(hk.hessian(loss_fn, params, Shuffled(*data)))
    assert failed(report) == {"data order"}
    assert finding(report, "data order").suspects == ("data",)
    assert 0 < finding(report, "data order").figure <= 1


def standardized(examples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A collate function that makes each example another one in another batch."""
    x, y = torch.utils.data.default_collate(examples)
    return x - x.mean(0), y


def test_examples_that_depend_on_their_batch_are_found_to_be_the_data_s_fault():
    _, loss_fn, params, data = mlp()
    loader = DataLoader(TensorDataset(*data), batch_size=5, collate_fn=standardized)
    report = check(hk.hessian(loss_fn, params, loader))
    assert failed(report) == {"batching"}
    assert finding(report, "batching").suspects == ("data",)
    assert "collate_fn" in finding(report, "batching").mend


def test_parameters_that_the_loss_does_not_use_are_named_and_no_fault():
    _, loss_fn, params, data = mlp()
    extra = {"idle": torch.ones(3, dtype=torch.float64)}

    def used_only(p: dict[str, Tensor], batch: tuple) -> Tensor:
        return loss_fn({name: p[name] for name in params}, batch)

    report = check(hk.hessian(used_only, params | extra, data))
    assert report.ok
    assert finding(report, "finite").detail == "4 products; zero in all rows of idle"
    assert finding(check(hk.hessian(loss_fn, params, data)), "finite").detail == "4 products"


def test_data_that_shrinks_is_found():
    _, loss_fn, params, (x, y) = mlp()

    class Shrinking:
        size = 13

        def __iter__(self):
            yield x[: self.size], y[: self.size]

    data = Shrinking()
    H = hk.hessian(loss_fn, params, data)
    assert check(H).ok
    data.size = 12
    report = check(H)
    assert failed(report) == {"data order"}
    assert "12 examples" in finding(report, "data order").detail


def test_a_shuffling_loader_of_a_dataset_passes():
    _, loss_fn, params, data = mlp()
    loader = DataLoader(TensorDataset(*data), batch_size=4, shuffle=True)
    assert check(hk.hessian(loss_fn, params, loader)).ok


def test_batches_that_cannot_be_cut_otherwise_are_said_to_be_so():
    _, loss_fn, params, (x, y) = mlp()
    for data in (list(zip(x.split(1), y.split(1), strict=True)), (x[:3], y[:3]), (x[:1], y[:1])):
        report = check(hk.hessian(loss_fn, params, data))
        assert report.ok
        assert finding(report, "batching").verdict == "not applicable"
        assert "cannot be cut" in finding(report, "batching").detail


@pytest.mark.parametrize(
    ("num_examples", "size", "other"),
    [(13, 13, 11), (13, 5, 7), (12, 4, 5), (4, 4, 2), (40, 256, 38), (14, 1, 3)],
)
def test_the_other_batch_size_is_ragged_and_leaves_no_batch_of_one(num_examples, size, other):
    _, loss_fn, params, data = mlp(num_examples=num_examples)
    found = finding(check(hk.hessian(loss_fn, params, data, batch_size=size)), "batching")
    size = min(size, num_examples)
    assert found.verdict == "ok"
    assert found.detail == f"{num_examples} examples in batches of {size} and of {other}"


# Products.


def test_a_product_with_nan_names_the_batch():
    _, loss_fn, params, (x, y) = mlp()

    def root(params, batch):
        return (loss_fn(params, batch) * 0 + params["2.bias"].sum() * batch[0][:, 0]).abs().sqrt()

    x = x.clone()
    x[9, 0] = 0
    report = check(hk.hessian(root, params, (x, y), batch_size=5))
    assert failed(report) == {"finite"}
    assert "batch 1 of the data" in finding(report, "finite").detail
    assert finding(report, "linear").detail == "finite failed"


def test_an_asymmetric_matrix_fails_and_its_symmetric_part_passes():
    A = torch.randn(30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    report = check(hk.aslinearoperator(A))
    assert failed(report) == {"symmetric"}
    assert finding(report, "symmetric").suspects == ("dense matrix",)
    report = check(hk.aslinearoperator(A + A.mT))
    assert report.ok
    assert {found.check for found in report.findings if found.verdict == "not applicable"} == OWN_CHECKS


@pytest.mark.parametrize("size", [1e-6, 1e-3])
def test_the_figure_of_symmetry_estimates_the_relative_asymmetry(size):
    symmetric = matrix(torch.linspace(-1, 1, 200).tolist())
    skew = torch.randn(200, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64).triu(1)
    skew = skew - skew.mT
    mutant = hk.aslinearoperator(symmetric + size * skew * symmetric.norm() / (2 * skew.norm()))
    figures = torch.tensor([finding(check(mutant, seed=seed), "symmetric").figure for seed in range(50)])
    error = (figures**2).std() / 50**0.5
    assert abs((figures**2).mean() - size**2) < 4 * error
    assert error < 0.2 * size**2


def test_an_operator_that_answers_at_random_is_not_repeatable():
    g = torch.Generator().manual_seed(0)
    noisy = hk.aslinearoperator((lambda v: v + 1e-3 * torch.randn(9, generator=g), 9, torch.float32))
    assert failed(check(noisy)) == {"repeatable"}


def test_an_operator_that_is_not_linear_fails():
    report = check(hk.aslinearoperator((lambda v: v.tanh(), 9, torch.float64)))
    assert "linear" in failed(report)
    assert finding(report, "linear").suspects == ("precision",)


def test_finite_differences_across_kinks_lack_digits():
    _, loss_fn, params, data = problem(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 3), dtype=torch.float32)
    assert check(hk.hessian(loss_fn, params, data)).ok
    report = check(hk.hessian(loss_fn, params, data, mode="finite-difference"))
    assert failed(report) == {"linear"}
    assert "finite differences" in finding(report, "linear").mend


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_size_does_not_matter(scale, dtype):
    A = matrix(torch.linspace(-1, 1, 30).tolist(), dtype=dtype)
    assert check(hk.aslinearoperator(scale * A)).ok
    A[3, 5] += 0.1
    assert failed(check(hk.aslinearoperator(scale * A))) == {"symmetric"}


@pytest.mark.parametrize("values", [[0.0] * 5, [2.0], [1.0] * 4])
def test_zero_and_identity_and_single_entries_pass(values):
    assert check(hk.aslinearoperator(torch.diag(torch.tensor(values)))).ok


# What a loss may be.


def test_a_batch_policy_has_no_batching_to_check():
    given = network("conv_batchnorm")
    objective, params = hk.from_module(given.model, cross_entropy, batchnorm="batch")
    report = check(hk.hessian(objective, params, given.data, batch_size=7))
    assert report.ok
    assert "batchnorm" in finding(report, "batching").detail
    assert finding(report, "differences").verdict == "ok"


def test_a_block_is_checked_as_the_whole_is():
    given = network("mlp")
    H = hk.hessian(given.objective, given.params, given.data, wrt="2.*", batch_size=5)
    assert passes(H)
    mutant = replaced(H, lambda v: 1.01 * (H @ v))
    assert failed(check(mutant)) == {"differences", "batching"}


def test_a_loss_without_curvature_passes_and_a_zero_operator_for_another_does_not():
    data = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4)
    assert passes(hk.hessian(lambda p, x: x @ p, torch.ones(4, dtype=torch.float64), data))
    _, loss_fn, params, data = mlp()
    H = hk.hessian(loss_fn, params, data)
    assert failed(check(replaced(H, torch.zeros_like))) == {"differences", "batching"}


def test_a_mean_loss_passes():
    _, loss_fn, params, data = mlp()
    assert check(hk.hessian(lambda p, b: loss_fn(p, b).mean(), params, data, batch_size=5)).ok


def test_constants_of_another_precision_do_not_hinder_differences():
    _, loss_fn, params, data = mlp(dtype=torch.float32)
    weights = torch.linspace(0.5, 1.5, 3)

    def weighted(params, batch):
        return loss_fn(params, batch).float() * weights[batch[1]].to(torch.float32)

    report = check(hk.hessian(weighted, params, data))
    assert finding(report, "differences").verdict == "ok"
    assert finding(report, "differences").figure < 1e-6


def test_a_loss_that_cannot_run_in_float64_is_said_to_be_so():
    def only_float32(params, batch):
        if params.dtype != torch.float32:
            raise RuntimeError("only float32")
        return (batch @ params) ** 2

    H = hk.hessian(only_float32, torch.ones(3), torch.ones(4, 3))
    found = finding(check(H), "differences")
    assert found.verdict == "not applicable"
    assert "only float32" in found.detail


def test_a_loss_for_batches_of_one_size_is_said_to_be_so():
    _, loss_fn, params, data = mlp(num_examples=40)

    def eights(params, batch):
        return loss_fn(params, batch).reshape(8).clone()

    report = check(hk.hessian(eights, params, data, batch_size=8))
    assert report.ok
    assert "8" in finding(report, "batching").detail
    assert {found.check for found in report.findings if found.verdict == "not applicable"} == {"batching"}


def test_masks_of_dropout_are_the_same_in_differences():
    model, _, _, data = problem(
        nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3), num_examples=40, dtype=torch.float32
    )
    assert passes(hk.hessian(*hk.from_module(model, cross_entropy, dropout=1), data, batch_size=7))


def test_differences_look_at_few_of_many_examples():
    _, loss_fn, params, data = mlp(num_examples=40)
    report = check(hk.hessian(loss_fn, params, data))
    assert finding(report, "differences").detail.startswith("16 examples")
    assert finding(report, "batching").detail.startswith("40 examples")


def test_combinations_of_curvature_are_checked_as_their_terms_are():
    given = network("tied_weights", num_examples=40)
    options = {"batch_size": 7}
    H, G = (kind(given.objective, given.params, given.data, **options) for kind in (hk.hessian, ggn))
    for op in (2.0 * H, H.shift(1.0), -H / 3, H - G, 2 * (H.shift(0.1) - G), H - H.shift(1.0)):
        assert passes(op), check(op)


def test_combinations_with_a_wrong_derivative_fail():
    class Wrong(torch.autograd.Function):
        """A square whose gradient is right and whose second derivative is off by a tenth."""

        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z.square()

        @staticmethod
        def backward(ctx, g):
            (z,) = ctx.saved_tensors
            return g * (2.2 * z - 0.2 * z.detach())

    model, loss_fn, params, data = mlp()
    wrong = hk.hessian(
        lambda p, b: Wrong.apply(functional_call(model, p, (b[0],))).mean(1),
        params,
        data,
        mode="reverse-over-reverse",
    )
    H = hk.hessian(loss_fn, params, data)
    assert failed(check(wrong)) == {"differences"}
    for op in (-2.0 * wrong, wrong.shift(0.1), H + wrong, wrong - H, 2 * (H - wrong.shift(0.5))):
        assert failed(check(op)) == {"differences"}, check(op)


def test_combinations_with_other_operators_have_no_loss_to_check_against():
    _, loss_fn, params, data = mlp()
    H = hk.hessian(loss_fn, params, data)
    report = check(H + hk.aslinearoperator(torch.eye(H.n, dtype=H.dtype)))
    assert report.ok
    assert {found.check for found in report.findings if found.verdict == "not applicable"} == OWN_CHECKS


# The report.


def test_a_report_prints_as_a_table_and_is_short_otherwise():
    A = hk.aslinearoperator(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    report = check(A)
    lines = str(report).splitlines()
    assert lines[0] == "dense matrix: 2 x 2, float32, cpu: FAILED"
    assert [line[2:14].strip() for line in lines[1:] if line[2] != " "] == list(CHECKS)
    assert [line.strip() for line in lines if "suspected" in line] == ["suspected: dense matrix"]
    assert sum("mend:" in line for line in lines) == 1
    assert repr(report) == "<Report: symmetric failed>"
    assert repr(check(hk.aslinearoperator(torch.eye(3)))) == "<Report: ok>"


def test_many_suspects_are_cut_short_in_print_only():
    suspects = tuple(f"{i} (LayerNorm)" for i in range(9))
    found = Finding("symmetric", 1.0, 0.1, "failed", "", suspects, "mend it")
    assert "3 (LayerNorm) and 5 more" in str(Report("operator", (found,)))


def test_the_seed_decides_everything():
    A = hk.aslinearoperator(matrix([1.0, 2.0, 3.0, 4.0]))
    assert str(check(A, seed=1)) == str(check(A, seed=1))
    assert finding(check(A, seed=1), "symmetric") != finding(check(A, seed=2), "symmetric")


def test_the_callers_random_state_and_module_stay():
    given = network("encoder_layer")
    given.model.train()
    before = torch.get_rng_state()
    check(hk.hessian(*hk.from_module(given.model, cross_entropy), given.data))
    assert torch.equal(before, torch.get_rng_state())
    assert all(module.training for module in given.model.modules())
    assert all(parameter.grad is None for parameter in given.model.parameters())


def test_a_matrix_is_checked_and_what_is_no_operator_refused_with_the_remedy():
    assert check(torch.eye(3)).ok
    with pytest.raises(TypeError, match=r"A must be a tensor.*\(matvec, n, dtype\); got function"):
        check(lambda v: v)


# The warning of solvers.


def test_solvers_warn_above_rounding_only():
    A = hk.aslinearoperator(torch.eye(3))
    warn_asymmetric(A, 1e-5, 1.0)
    with pytest.warns(AsymmetryWarning, match=r"differ by 1\.0e-04"):
        warn_asymmetric(A, 1e-3, 10.0)
    warn_asymmetric(variant(A, precision=1e-4), 1e-3, 10.0)
