from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from hvpkit.autodiff.pytree import (
    Layout,
    batch_size,
    check_params,
    flatten,
    join,
    leaf_names,
    snapshot,
    usable,
)

Pair = namedtuple("Pair", "left right")

leaves = st.lists(st.integers(0, 3), max_size=3).map(lambda shape: torch.randn(shape, dtype=torch.float64))
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("ab.", max_size=3), inner, max_size=3)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=8,
)
properties = settings(max_examples=60, deadline=None, database=None, derandomize=True)


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if type(a) is not type(b) or len(a) != len(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return all(same(x, y) for x, y in zip(a, b, strict=True))


@properties
@given(trees)
def test_a_tree_survives_its_vector_and_back(tree: object) -> None:
    layout = Layout.of(tree)
    if not layout.names:
        return
    vector = layout.flatten(tree)
    assert vector.shape == (layout.n,)
    assert same(layout.unflatten(vector), tree)


@properties
@given(trees, st.integers(0, 2**31))
def test_a_vector_survives_its_tree_and_back(tree: object, seed: int) -> None:
    layout = Layout.of(tree)
    if not layout.names:
        return
    vector = torch.randn(layout.n, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(layout.flatten(layout.unflatten(vector)), vector)


@properties
@given(trees)
def test_every_leaf_has_a_name(tree: object) -> None:
    assert len(leaf_names(tree)) == len(flatten(tree)[0])


def test_the_vector_is_that_of_parameters_to_vector() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Conv1d(1, 2, 3))
    params = dict(reversed(list(model.named_parameters())))
    layout = Layout.of(params)
    assert torch.equal(layout.flatten(params), parameters_to_vector(params.values()))
    vector = torch.randn(layout.n)
    vector_to_parameters(vector, params.values())
    assert same(layout.unflatten(vector), {name: p.data for name, p in params.items()})


def test_flattening_copies_and_unflattening_views() -> None:
    params = {"w": torch.zeros(2, 2)}
    layout = Layout.of(params)
    layout.flatten(params).fill_(1.0)
    assert params["w"].eq(0).all()
    vector = torch.zeros(4)
    layout.unflatten(vector)["w"].fill_(2.0)
    assert vector.eq(2).all()


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        (torch.ones(1), [""]),
        ([torch.ones(1), (torch.ones(1), torch.ones(1))], ["0", "1.0", "1.1"]),
        ({"b": torch.ones(1), "a": {3: torch.ones(1)}}, ["b", "a.3"]),
        (Pair(torch.ones(1), torch.ones(1)), ["left", "right"]),
        (UserDict(b=torch.ones(1), a=UserDict(c=torch.ones(1))), ["b", "a.c"]),
    ],
)
def test_names_are_the_path_from_the_root(tree: object, names: list[str]) -> None:
    assert leaf_names(tree) == names


def test_mappings_that_torch_does_not_know_are_read_as_dicts_at_any_depth() -> None:
    x, y = torch.ones(2), torch.zeros(3)
    assert same(flatten([UserDict(a=UserDict(b=x)), y])[0], [x, y])


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
def test_keys_may_come_in_another_order_and_in_another_mapping(kind: type) -> None:
    layout = Layout.of({"a": torch.zeros(2), "b": torch.zeros(3)})
    given = kind([("b", torch.arange(3.0)), ("a", torch.arange(2.0) + 10)])
    assert layout.flatten(given).tolist() == [10, 11, 0, 1, 2]


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({"a": torch.zeros(2)}, "v must be a tree shaped like the parameters"),
        ({"a": torch.zeros(2), "c": torch.zeros(3)}, "got another structure with 2 leaves"),
        ({"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}, "3 leaves"),
        (torch.zeros(5), "got another structure with 1 leaves"),
        ({"a": torch.zeros(2), "b": torch.zeros(3, 1)}, r"v .*leaf 'b' has shape \(3, 1\), expected \(3,\)"),
    ],
)
def test_a_tree_of_another_shape_is_refused(tree: object, reason: str) -> None:
    layout = Layout.of({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match=reason):
        layout.flatten(tree)


def test_two_leaves_of_one_dotted_name_are_told_apart_by_structure() -> None:
    params = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}}
    layout = Layout.of(params)
    assert layout.flatten(params).tolist() == [0, 1]
    with pytest.raises(ValueError, match="another structure"):
        layout.flatten(OrderedDict(params))


def test_a_complex_leaf_is_pairs_of_coordinates() -> None:
    params = {"c": torch.tensor([[1 + 2j, 3 + 4j]]), "r": torch.tensor([5.0])}
    layout = Layout.of(params)
    assert layout.n == 5
    assert layout.flatten(params).tolist() == [1, 2, 3, 4, 5]
    assert layout.flatten({"c": params["c"].conj(), "r": params["r"]}).tolist() == [1, -2, 3, -4, 5]
    assert same(layout.unflatten(torch.arange(1.0, 6.0)), params)
    assert same(layout.unflatten(torch.arange(7.0)[1:6]), params), "pairs may begin anywhere"
    with pytest.raises(ValueError, match="v must be like the parameters: leaf 'c' is real, expected complex"):
        layout.flatten({"c": torch.ones(1, 2), "r": params["r"]})
    with pytest.raises(ValueError, match="leaf 'r' is complex, expected real"):
        layout.flatten({"c": params["c"], "r": params["c"][0, :1]})
    with pytest.raises(ValueError, match=r"leaf 'c' has shape \(2,\), expected \(1, 2\)"):
        layout.flatten({"c": params["c"][0], "r": params["r"]})


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vector must have shape \[2\], got \[3\]"):
        Layout.of(torch.zeros(2)).unflatten(torch.zeros(3))


@pytest.mark.parametrize("leaf", [1.0, "text", None, [1, 2]])
def test_leaves_that_are_no_tensors_are_refused_by_type(leaf: object) -> None:
    with pytest.raises(TypeError, match="data must be a tree of tensors, but has a leaf of type"):
        batch_size((torch.ones(2), leaf))


@pytest.mark.parametrize("batch", [(torch.ones(2), torch.ones(3)), (torch.ones(2), torch.tensor(1.0))])
def test_examples_must_agree_in_number(batch: object) -> None:
    with pytest.raises(ValueError, match=r"data: .* share their first dimension.* got shapes \(2,\), \("):
        batch_size(batch)


def test_a_batch_without_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match="data holds a batch without any tensor"):
        batch_size(())


@pytest.mark.parametrize(
    ("params", "error", "reason"),
    [
        ({"w": torch.ones(2, dtype=torch.int64)}, TypeError, r"params\['w'\] has dtype torch.int64"),
        (torch.ones(2, dtype=torch.bool), TypeError, "params has dtype torch.bool"),
        ([torch.ones(1, dtype=torch.complex128), torch.ones(1)], ValueError, "share one dtype"),
        ([torch.ones(1) * torch.tensor(complex(0, float("inf")))], ValueError, "contains NaN or infinity"),
        ({"w": torch.ones(1), "b": torch.ones(1).double()}, ValueError, "params must share one dtype: .*'b'"),
        ([torch.ones(1), torch.ones(1, device="meta")], TypeError, "params.*is a meta tensor.*load them"),
        ({"w": torch.tensor([1.0, float("nan")])}, ValueError, r"params\['w'\] contains NaN or infinity"),
        ([torch.ones(1), torch.tensor(float("inf"))], ValueError, r"params\['1'\] contains NaN or infinity"),
        ({}, ValueError, "params holds no parameters"),
        ([torch.ones(0, 3)], ValueError, "params holds no parameters"),
        (nn.Linear(2, 2), TypeError, "params must be a tree of tensors, .* Linear"),
        (nn.Linear(2, 2).parameters(), TypeError, "params must be a tree of tensors, .* generator"),
    ],
)
def test_parameters_that_have_no_hessian_are_refused(
    params: object, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        check_params(params)


def test_parameters_come_back_detached_and_uncopied() -> None:
    weight = nn.Parameter(torch.ones(2))
    _, (leaf,) = check_params({"w": weight})
    assert not leaf.requires_grad
    assert leaf.data_ptr() == weight.data_ptr()


def test_a_snapshot_is_a_copy_that_autograd_takes_whatever_the_mode() -> None:
    with torch.inference_mode():
        made_inside = torch.ones(2)
        copy = snapshot(made_inside)
    assert not copy.is_inference()
    assert not usable(made_inside).is_inference()
    ordinary = torch.ones(2)
    assert usable(ordinary) is ordinary
    assert snapshot(ordinary).data_ptr() != ordinary.data_ptr()


def test_joining_leaves_keeps_their_order_and_entries() -> None:
    strided = torch.arange(6.0).view(2, 3).mT
    assert join([torch.tensor(7.0), strided]).tolist() == [7, 0, 3, 1, 4, 2, 5]
