"""Complex parameters, against the same network written with pairs of real ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hvpkit as hk
from oracles import (
    ggn_by_jacobian,
    gradient_at,
    hessian_by_differences,
    hessian_by_double_backward,
    relative_error,
    scalar_loss,
    second_moment,
)

MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")
TOLERANCE = {mode: 1e-11 for mode in MODES[:2]} | {"finite-difference": 1e-7}


def reals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


DATA = (reals(9, 4), reals(9, seed=1))
PARAMS = {
    "shift": reals(3, seed=2),
    "weight": torch.complex(reals(4, 3, seed=3), reals(4, 3, seed=4)),
    "scale": torch.complex(reals(3, seed=5), reals(3, seed=6)),
}
PAIRS = {name: torch.view_as_real(p) if p.is_complex() else p for name, p in PARAMS.items()}


def forward(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    hidden = torch.tanh(batch[0].to(params["weight"].dtype) @ params["weight"])
    return ((hidden * params["scale"].conj()).real + hidden.abs() * params["shift"]).sum(1)


def forward_by_pairs(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """The same in real arithmetic: tanh(a + ib) = (sinh 2a + i sin 2b) / (cosh 2a + cos 2b)."""
    a, b = (batch[0] @ params["weight"][..., part] for part in (0, 1))
    denominator = torch.cosh(2 * a) + torch.cos(2 * b)
    re, im = torch.sinh(2 * a) / denominator, torch.sin(2 * b) / denominator
    product = re * params["scale"][:, 0] + im * params["scale"][:, 1]
    return (product + (re**2 + im**2).sqrt() * params["shift"]).sum(1)


def output_loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return torch.log(torch.cosh(outputs - batch[1]))


COMPLEX, REAL = hk.Objective(forward, output_loss), hk.Objective(forward_by_pairs, output_loss)
HESSIAN = hessian_by_double_backward(REAL, PAIRS, DATA)
GGN = ggn_by_jacobian(forward_by_pairs, output_loss, PAIRS, DATA)
V = reals(len(HESSIAN), 3, seed=7)


def test_the_oracles_are_of_the_same_loss() -> None:
    assert torch.allclose(COMPLEX(PARAMS, DATA), REAL(PAIRS, DATA), rtol=1e-13)
    assert relative_error(HESSIAN, hessian_by_differences(REAL, PAIRS, DATA)) < 1e-7


@pytest.mark.parametrize("mode", MODES)
def test_matvecs_are_those_of_pairs_of_real_parameters(mode: str) -> None:
    H = hk.hessian(COMPLEX, PARAMS, DATA, mode=mode, batch_size=4)
    assert (H.n, H.dtype) == (len(HESSIAN), torch.float64)
    assert relative_error(H @ V, HESSIAN @ V) < TOLERANCE[mode]
    assert relative_error(hk.ggn(COMPLEX, PARAMS, DATA, mode=mode) @ V, GGN @ V) < TOLERANCE[mode]
    v = H.unflatten(V[:, 0])
    assert {name: leaf.dtype for name, leaf in v.items()} == {name: p.dtype for name, p in PARAMS.items()}
    assert torch.equal(H.flatten(v), V[:, 0])
    for tree in (H @ v, hk.hvp(COMPLEX, PARAMS, DATA, v, mode=mode)):
        assert tree["weight"].dtype == torch.complex128
        assert relative_error(H.flatten(tree), HESSIAN @ V[:, 0]) < TOLERANCE[mode]
    product = hk.ggnvp(COMPLEX, PARAMS, DATA, v, mode=mode)
    assert relative_error(H.flatten(product), GGN @ V[:, 0]) < TOLERANCE[mode]


def test_gradients_forms_and_fisher_matrices() -> None:
    F_ = hk.empirical_fisher(COMPLEX, PARAMS, DATA)
    moment = second_moment(REAL, PAIRS, DATA)
    assert relative_error(F_ @ V, moment @ V) < 1e-12
    v = F_.unflatten(V[:, 0])
    product = hk.fisher_vp(COMPLEX, PARAMS, DATA, v)
    assert relative_error(F_.flatten(product), moment @ V[:, 0]) < 1e-12
    gradient = hk.grad(COMPLEX, PARAMS, DATA)
    slope = gradient_at(scalar_loss(REAL, PAIRS, DATA), F_.flatten(PARAMS))
    assert relative_error(F_.flatten(gradient), slope) < 1e-12
    leaf = PARAMS["weight"].clone().requires_grad_()
    COMPLEX({**PARAMS, "weight": leaf}, DATA).mean().backward()
    assert relative_error(torch.view_as_real(gradient["weight"]), torch.view_as_real(leaf.grad)) < 1e-12
    along = hk.quadratic_form(COMPLEX, PARAMS, DATA, v)
    assert relative_error(along.mean(), V[:, 0] @ HESSIAN @ V[:, 0]) < 1e-11


def test_what_is_made_of_operators_takes_complex_parameters() -> None:
    H = hk.hessian(COMPLEX, PARAMS, DATA)
    assert hk.check(H).ok
    ends = torch.linalg.eigvalsh(HESSIAN)
    found = hk.extreme_eigenvalues(H, tol=1e-6)
    assert found.largest.value == pytest.approx(float(ends[-1]), rel=1e-5)
    assert found.smallest.value == pytest.approx(float(ends[0]), rel=1e-5)
    part = hk.hessian(COMPLEX, PARAMS, DATA, wrt="weight")
    assert relative_error(part @ V[3:27], HESSIAN[3:27, 3:27] @ V[3:27]) < 1e-11
    single = {name: p.to(torch.complex64 if p.is_complex() else torch.float32) for name, p in PARAMS.items()}
    few = hk.hessian(COMPLEX, single, tuple(t.float() for t in DATA))
    assert few.dtype == torch.float32
    assert relative_error(few @ V.float(), HESSIAN @ V) < 1e-4
    assert hk.check(few).ok


@pytest.mark.parametrize("shape", [(), (3,), (4, 3)])
def test_parameters_may_be_one_complex_tensor(shape: tuple[int, ...]) -> None:
    p, x = torch.complex(reals(*shape, seed=3), reals(*shape, seed=4)), reals(5, seed=1)

    def losses(p: Tensor, x: Tensor) -> Tensor:
        return (x.view(-1, *[1] * p.ndim) * p).abs().square().reshape(len(x), -1).sin().sum(1)

    def by_pairs(params: dict[str, Tensor], x: Tensor) -> Tensor:
        squares = params["p"].square().sum(-1)
        return (x.square().view(-1, *[1] * p.ndim) * squares).reshape(len(x), -1).sin().sum(1)

    oracle = hessian_by_double_backward(by_pairs, {"p": torch.view_as_real(p)}, x)
    H = hk.hessian(losses, p, x)
    product = H @ p
    assert product.shape == p.shape
    assert relative_error(torch.view_as_real(product).flatten(), oracle @ H.flatten(p)) < 1e-11
    assert relative_error(H @ H.flatten(p), oracle @ H.flatten(p)) < 1e-11
    with pytest.raises(ValueError, match=r"is real, expected complex|v must have shape"):
        H @ p.real


def test_modules_with_complex_parameters() -> None:
    class Filter(nn.Module):
        """Convolution as a product of Fourier transforms."""

        def __init__(self) -> None:
            super().__init__()
            self.transfer = nn.Parameter(torch.complex(reals(3), reals(3, seed=1)))
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(torch.fft.irfft(torch.fft.rfft(x) * self.transfer, n=4)))

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Filter().double()
    objective, params = hk.from_module(model, nn.CrossEntropyLoss())
    data = (DATA[0], torch.arange(9) % 2)

    def by_pairs(pairs: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return objective({**pairs, "transfer": torch.view_as_complex(pairs["transfer"].contiguous())}, batch)

    pairs = {name: torch.view_as_real(p) if p.is_complex() else p for name, p in params.items()}
    oracle = hessian_by_differences(by_pairs, pairs, data)
    for mode in MODES:
        H = hk.hessian(objective, params, data, mode=mode, batch_size=4)
        v = reals(H.n)
        assert relative_error(H @ v, oracle @ v) < 1e-7
