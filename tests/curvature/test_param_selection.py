"""Selection by name: each pattern selects something, names are names first, and no two leaves are mixed up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hvpkit as hk

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.float64)


def dense(H: hk.LinearOperator) -> Tensor:
    return H @ torch.eye(H.n, dtype=torch.float64)


def cubic(leaves: list[Tensor]) -> Tensor:
    return (X @ torch.cat(leaves)) ** 3


def by_double_backward(leaves: list[Tensor]) -> Tensor:
    flat = torch.cat(leaves)
    return torch.autograd.functional.hessian(lambda p: ((X @ p) ** 3).mean(), flat)


@pytest.mark.parametrize(
    ("wrt", "typo"),
    [
        (["weight", "typo"], "'typo'"),
        (["*eight", "bais", "Weight"], "'bais', 'Weight'"),
        (("bias", "weight.*"), r"'weight\.\*'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_named_though_others_match(wrt: object, typo: str) -> None:
    params = {"weight": ones(2), "bias": ones(2)}
    with pytest.raises(ValueError, match=rf"wrt=.*: {typo} matches no parameter; their names: weight, bias"):
        hk.hessian(lambda p, _: cubic([p["weight"], p["bias"]]), params, X, wrt=wrt)


@pytest.mark.parametrize("one_name", ["w[0]", ["w[0]"], "w?", "a*"])
def test_a_name_with_wildcards_in_it_is_a_name(one_name: str | list[str]) -> None:
    names = ["w[0]", "w0", "w?", "a*", "ab"]
    params = {name: ones(1) * (k + 1) for k, name in enumerate(names)}
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss_fn(p: dict[str, Tensor], batch: Tensor) -> Tensor:
        return (batch @ torch.cat(list(p.values()))) ** 3

    whole = torch.autograd.functional.hessian(
        lambda p: ((x @ p) ** 3).mean(), torch.cat(list(params.values()))
    )
    place = names.index(one_name if isinstance(one_name, str) else one_name[0])
    H = hk.hessian(loss_fn, params, x, wrt=one_name)
    assert list(H.unflatten(torch.zeros(1))) == [names[place]]
    torch.testing.assert_close(dense(H), whole[place : place + 1, place : place + 1], rtol=1e-13, atol=0.0)


def test_each_parameter_of_a_list_in_a_dict_has_its_own_block() -> None:
    """The loop over layers of docs/tour.md, of a dict whose keys look like patterns."""
    params = {f"w[{k}]": ones(1) * (k + 1) for k in range(4)}
    whole = by_double_backward(list(params.values()))
    for k, name in enumerate(params):
        H = hk.hessian(lambda p, _: cubic(list(p.values())), params, X, wrt=name)
        assert float(dense(H)) == pytest.approx(float(whole[k, k]), rel=1e-13)


def test_a_character_class_still_matches_where_it_is_no_name() -> None:
    params = {f"w{k}": ones(1) for k in range(4)}
    H = hk.hessian(lambda p, _: cubic(list(p.values())), params, X, wrt="w[02]")
    assert list(H.unflatten(torch.zeros(2))) == ["w0", "w2"]


@pytest.mark.parametrize("params", [{"a.b": ones(2), "a": {"b": ones(2)}}, {1: ones(2), "1": ones(2)}])
def test_two_leaves_of_one_name_are_refused_where_names_select(params: dict) -> None:
    def loss_fn(p: dict, _: Tensor) -> Tensor:
        first, second = p.values()
        return cubic([first, second["b"] if isinstance(second, dict) else second])

    for wrt in ("*", "a.b", lambda _: True):
        with pytest.raises(ValueError, match=r"params: several leaves have the dotted name '(a\.b|1)'"):
            hk.hessian(loss_fn, params, X, wrt=wrt)
    whole = by_double_backward([ones(2), ones(2)])
    torch.testing.assert_close(dense(hk.hessian(loss_fn, params, X)), whole, rtol=1e-13, atol=0.0)
