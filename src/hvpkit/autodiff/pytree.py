"""Trees of tensors and their flat vectors.

Leaves keep the order of their containers (dict keys are not sorted), so that the flat vector of
``dict(model.named_parameters())`` is that of ``torch.nn.utils.parameters_to_vector(model.parameters())``.

A complex parameter is a real one with a last dimension of two, as ``torch.view_as_real`` gives it: each complex entry
is two coordinates of the flat vector. All derivatives are taken by real leaves; trees have complex ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from hvpkit._utils.typing import Tree
from hvpkit._utils.validation import check_dense

MAX_SHAPES = 6
"""Shapes that a message lists."""


def flatten(tree: Tree, *, name: str = "tree") -> tuple[list[Tensor], _pytree.TreeSpec]:
    """Return the leaves of ``tree`` and its structure.

    Raises:
        TypeError: a leaf is not a tensor.
    """
    leaves, spec = _pytree.tree_flatten(plain(tree))
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            remedy = "turn it into a tensor (torch.as_tensor) or leave it out"
            if isinstance(leaf, nn.Module | Iterator):
                remedy = (
                    "for a module pass dict(model.named_parameters()), or what hvpkit.from_module returns"
                )
            raise TypeError(
                f"{name} must be a tree of tensors, but has a leaf of type {type(leaf).__name__}: "
                f"{' '.join(repr(leaf).split()):.80}; {remedy}"
            )
    return leaves, spec


def plain(tree: Tree) -> Tree:
    """Convert mappings that torch takes for leaves (such as a tokenizer's UserDict) to dicts."""
    return _pytree.tree_map(lambda leaf: plain(dict(leaf)) if isinstance(leaf, Mapping) else leaf, tree)


@dataclass(frozen=True)
class ParamSpec:
    """Structure of a tree of parameters, and which of its leaves are complex."""

    tree: _pytree.TreeSpec
    is_complex: tuple[bool, ...]


def unflatten(leaves: Sequence[Tensor], spec: _pytree.TreeSpec | ParamSpec) -> Tree:
    """Return the tree of structure ``spec`` with these leaves; by a ``ParamSpec`` real leaves become complex."""
    if isinstance(spec, ParamSpec):
        pairs = zip(leaves, spec.is_complex, strict=True)
        leaves = [torch.complex(*leaf.unbind(-1)) if is_complex else leaf for leaf, is_complex in pairs]
        spec = spec.tree
    return _pytree.tree_unflatten(leaves, spec)


def as_real(leaf: Tensor) -> Tensor:
    """Return a complex tensor as a real one with a last dimension of two, and a real one as it is."""
    return torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf


def leaf_names(tree: Tree) -> list[str]:
    """Return the dotted names of the leaves: keys and indices from the root, joined by dots.

    Example:
        >>> import torch
        >>> leaf_names({"conv.weight": torch.ones(2), "head": [torch.ones(1), torch.ones(1)]})
        ['conv.weight', 'head.0', 'head.1']
    """
    paths, _ = _pytree.tree_flatten_with_path(plain(tree))
    return [".".join(_key_name(key) for key in path) for path, _ in paths]


def _key_name(key: object) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def batch_size(batch: Tree) -> int:
    """Return the common leading dimension of the leaves of ``batch``.

    Raises:
        ValueError: the tree has no leaves, a leaf is 0-d, or leading dimensions disagree.
    """
    leaves, _ = flatten(batch, name="data")
    if not leaves:
        raise ValueError(
            "data holds a batch without any tensor: pass tensors whose first dimension are the examples"
        )
    for leaf in leaves:
        check_dense("data", leaf)
    sizes = [leaf.shape[0] if leaf.ndim else None for leaf in leaves]
    if None in sizes or len(set(sizes)) > 1:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves[:MAX_SHAPES])
        if len(leaves) > MAX_SHAPES:
            shapes += f" and {len(leaves) - MAX_SHAPES} more"
        raise ValueError(
            "data: the tensors of a batch must share their first dimension, the examples; "
            f"got shapes {shapes}"
        )
    return leaves[0].shape[0]


@dataclass(frozen=True)
class Layout:
    """Correspondence between a tree of parameters and a flat vector ``[n]``."""

    spec: ParamSpec
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    numels: tuple[int, ...] = field(init=False)
    n: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "numels", tuple(prod(shape) for shape in self.shapes))
        object.__setattr__(self, "n", sum(self.numels))

    @classmethod
    def of(cls, tree: Tree) -> Layout:
        """Return the layout of ``tree``."""
        leaves, spec = flatten(tree, name="params")
        is_complex = tuple(leaf.is_complex() for leaf in leaves)
        shapes = tuple(as_real(leaf).shape for leaf in leaves)
        return cls(ParamSpec(spec, is_complex), tuple(leaf_names(tree)), shapes)

    def leaves(self, tree: Tree, *, name: str = "v") -> list[Tensor]:
        """Return the leaves, as real tensors, of a tree that has this layout up to the order of keys.

        Raises:
            ValueError: ``tree`` has another structure or other shapes, or is real where parameters are complex.
        """
        leaves, spec = flatten(tree, name=name)
        for leaf in leaves:
            if leaf.is_nested or leaf.layout != torch.strided:
                check_dense(name, leaf)
        if spec != self.spec.tree:
            named = dict(zip(leaf_names(tree), leaves, strict=True))
            if sorted(named) != sorted(self.names):
                raise ValueError(
                    f"{name} must be a tree shaped like the parameters ({len(self.names)} leaves: "
                    f"{', '.join(self.names[:4])}{', ...' if len(self.names) > 4 else ''}); "
                    f"got another structure with {len(leaves)} leaves"
                )
            leaves = [named[key] for key in self.names]
        of_params = zip(self.names, self.shapes, self.spec.is_complex, strict=True)
        for leaf, (leaf_name, shape, is_complex) in zip(leaves, of_params, strict=True):
            if leaf.is_complex() != is_complex:
                kinds = ("complex", "real") if leaf.is_complex() else ("real", "complex")
                raise ValueError(
                    f"{name} must be like the parameters: leaf {leaf_name!r} is {kinds[0]}, expected {kinds[1]}"
                )
            expected = shape[:-1] if is_complex else shape
            if leaf.shape != expected:
                raise ValueError(
                    f"{name} must be shaped like the parameters: leaf {leaf_name!r} has shape "
                    f"{tuple(leaf.shape)}, expected {tuple(expected)}"
                )
        return [as_real(leaf) for leaf in leaves]

    def flatten(self, tree: Tree, *, name: str = "v") -> Tensor:
        """Return the flat vector ``[n]`` of a tree of this layout, a copy."""
        return join(self.leaves(tree, name=name))

    def split(self, vector: Tensor) -> list[Tensor]:
        """Split ``vector [n]`` into views with the shapes of the leaves."""
        pieces = vector.split(self.numels)
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def unflatten(self, vector: Tensor) -> Tree:
        """Return the tree whose flat vector is ``vector [n]``; its real leaves are views of ``vector``."""
        if vector.shape != (self.n,):
            raise ValueError(f"vector must have shape [{self.n}], got {list(vector.shape)}")
        return unflatten(self.split(vector), self.spec)


def join(leaves: Sequence[Tensor]) -> Tensor:
    """Concatenate the leaves to a flat vector, a copy."""
    return torch.cat([leaf.reshape(-1) for leaf in leaves])


def snapshot(leaf: Tensor) -> Tensor:
    """Return a detached copy that autograd can use, even inside inference mode."""
    with torch.inference_mode(False):
        return leaf.detach().clone()


def versions(tree: Tree) -> list[int]:
    """Return how often each tensor of a tree has been written to; nothing while torch compiles."""
    if torch.compiler.is_compiling():
        return []
    leaves = [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    with torch._C.DisableTorchFunction():  # twice as fast under overridden functions
        return [leaf._version for leaf in leaves if not leaf.is_inference()]


def usable(leaf: Tensor) -> Tensor:
    """Return the tensor, or a copy if it was made in inference mode, so that autograd can use it."""
    return snapshot(leaf) if leaf.is_inference() else leaf


def check_params(params: Tree, *, finite: bool = True) -> tuple[Layout, list[Tensor]]:
    """Validate a tree of parameters; return its layout and its detached leaves, as real tensors.

    Raises:
        TypeError: a leaf is not a tensor of floating dtype, real or complex.
        ValueError: no leaves at all, several dtypes or devices, or (unless ``finite=False``) NaN or infinity.
    """
    for name, leaf in zip(leaf_names(params), flatten(params, name="params")[0], strict=True):
        check_dense(f"params[{name!r}]" if name else "params", leaf)
    layout = Layout.of(params)
    leaves = [usable(leaf.detach()) for leaf in layout.leaves(params, name="params")]
    labels = [f"params[{name!r}]" if name else "params" for name in layout.names]
    if layout.n == 0:
        raise ValueError("params holds no parameters: nothing to differentiate (is everything frozen?)")
    for label, leaf in zip(labels, leaves, strict=True):
        if not leaf.dtype.is_floating_point:
            raise TypeError(
                f"{label} has dtype {leaf.dtype}; parameters must be floating point, real or complex "
                "(pass anything else as part of the batch, or close over it)"
            )
    check_alike(labels, leaves)
    if finite:
        for label, leaf in zip(labels, leaves, strict=True):
            if not bool(torch.isfinite(leaf).all()):
                raise ValueError(f"{label} contains NaN or infinity")
    return layout, leaves


def check_alike(labels: Sequence[str], leaves: Sequence[Tensor]) -> None:
    """Raise ValueError unless parameters share one dtype and one device."""
    for what, values in (
        ("dtype", [leaf.dtype for leaf in leaves]),
        ("device", [leaf.device for leaf in leaves]),
    ):
        for label, value in zip(labels, values, strict=True):
            if value != values[0]:
                raise ValueError(
                    f"params must share one {what}: {labels[0]} has {values[0]}, {label} has {value}; "
                    f"convert them first, as by model.to({value!r})"
                )
