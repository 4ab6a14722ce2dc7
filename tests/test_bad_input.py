"""Bad input, one row each: the error names the argument, what was given and what to do, before any work.

A row is a call and the words its error must contain, in any case; errors are TypeError, ValueError or those of hvpkit.
"""

from __future__ import annotations

# ruff: noqa: ARG005
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import hvpkit as hk
from hvpkit import train, zoo

N, D, CLASSES = 30, 4, 3
RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(N, D, generator=RANDOM)
Y = torch.randint(0, CLASSES, (N,), generator=RANDOM)
W = torch.ones(D)
NAN, INF = float("nan"), float("inf")

with warnings.catch_warnings(action="ignore"):  # of prototypes
    SPARSE = torch.eye(D).to_sparse_csr()
    QUANTIZED = torch.quantize_per_tensor(W, 0.1, 0, torch.quint8)
    NESTED = torch.nested.nested_tensor([X[0], X[1]])

Row = tuple[str, Callable[[], Any], str]


def quadratic(p: Tensor, batch: Tensor) -> Tensor:
    return 0.5 * (batch @ p) ** 2


@cache
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, CLASSES))


@cache
def problem() -> tuple[hk.Objective, dict[str, Tensor]]:
    return hk.from_module(model(), F.cross_entropy)


PRODUCTS: list[int] = []
"""One entry for each product of :func:`H`."""


@cache
def H() -> hk.CurvatureOperator:
    made = hk.hessian(quadratic, W, X)
    return replace(made, product=lambda vectors: PRODUCTS.append(1) or made.product(vectors))


@cache
def network() -> hk.CurvatureOperator:
    return hk.hessian(*problem(), (X, Y))


@cache
def sample() -> hk.CurvatureOperator:
    return H().coarsen(9, importance="loss")


@cache
def extremes() -> hk.ExtremeResult:
    return hk.extreme_eigenvalues(H())


@cache
def density() -> hk.Density:
    return hk.spectral_density(H(), num_steps=3)


def with_value(tensor: Tensor, index: int, value: float) -> Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


class Broken(Dataset):
    """Examples of which the twelfth cannot be read."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 11:
            raise OSError("cannot read image 11")
        return X[index], Y[index]


class MissingKey(Dataset):
    """Examples of which the twelfth has another key."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": X[index], ("labels" if index == 11 else "label"): Y[index]}


def in_eights(dataset: Dataset) -> DataLoader:
    return DataLoader(dataset, batch_size=8)


# What every function over data refuses: (name, params, data, words).

BAD_PARAMS: list[tuple[str, Any, str]] = [
    ("none", None, "params"),
    ("a number", 1.0, "params must be a tree of tensors"),
    ("a string", "w", "params must be a tree of tensors"),
    ("a NumPy array", np.ones(D), "params must be a tree.*ndarray.*torch.as_tensor"),
    ("an empty dict", {}, "params holds no parameters"),
    ("an empty tensor", torch.ones(0), "params holds no parameters"),
    ("a module", nn.Linear(D, 1), "params .*from_module"),
    ("a generator of parameters", nn.Linear(D, 1).parameters(), "params .*dict.model.named_parameters"),
    (
        "integers",
        torch.ones(D, dtype=torch.int64),
        "params has dtype torch.int64; parameters must be floating",
    ),
    ("booleans", torch.ones(D, dtype=torch.bool), "params has dtype torch.bool; parameters must be floating"),
    ("two dtypes", {"a": W, "b": W.double()}, "params must share one dtype.*convert"),
    ("two devices", {"a": W, "b": W.to("meta")}, "params.*meta"),
    ("NaN", with_value(W, 1, NAN), "params contains NaN or infinity"),
    ("infinity", {"w": with_value(W, 1, INF)}, "params.'w'. contains NaN or infinity"),
    ("a sparse tensor", W.to_sparse(), "params.*sparse.*to_dense"),
    ("a sparse matrix", {"w": SPARSE}, "params.'w'.*sparse.*to_dense"),
    ("a meta tensor", W.to("meta"), "params.*meta.*no values"),
    ("a quantized tensor", QUANTIZED, "params.*quint8"),
    ("a number among tensors", {"w": W, "lr": 0.1}, "params .*float.*torch.as_tensor"),
    ("none among tensors", {"w": W, "b": None}, "params .*'b'|params .*NoneType"),
]

BAD_DATA: list[tuple[str, Any, str]] = [
    ("none", None, "data must be tensors, a Dataset, a DataLoader.*NoneType"),
    ("a number", 7, "data must be tensors, a Dataset.*int"),
    ("a string", "cifar10", "data must be tensors, a Dataset.*str"),
    ("bytes", b"cifar10", "data must be tensors, a Dataset.*bytes"),
    ("a path", Path("cifar10"), "data must be tensors, a Dataset.*Path"),
    ("a NumPy array", X.numpy(), "data is a NumPy array.*torch.from_numpy"),
    ("a tuple of NumPy arrays", (X.numpy(), Y.numpy()), "data .*ndarray.*torch.as_tensor"),
    ("a list of lists", [[1.0, 2.0], [3.0, 4.0]], "data must be a tree of tensors.*float"),
    ("a list of tensors", [X, X], "data is a list of tensors.*tuple"),
    ("an empty list", [], "data is empty"),
    ("an empty tuple", (), "data holds a batch without any tensor"),
    ("an empty dict", {}, "data holds a batch without any tensor"),
    ("no examples", X[:0], "data is empty"),
    ("a 0-d tensor", torch.tensor(1.0), "data.*first dimension"),
    ("lengths that differ", (X, Y[:7]), "data.*share their first dimension.*30.*7"),
    ("an iterator", iter([X]), "data is a one-shot iterator"),
    ("a generator", (x for x in [X]), "data is a one-shot iterator"),
    ("a set", {1, 2}, "data must be a tree of tensors.*int"),
    ("a class", TensorDataset, "data.*class TensorDataset.*instance"),
    ("a function", lambda: X, "data must be tensors, a Dataset.*function"),
    ("a sparse tensor", X.to_sparse(), "data.*sparse.*to_dense"),
    ("a sparse matrix", SPARSE, "data.*sparse.*to_dense"),
    ("a meta tensor", X.to("meta"), "data.*meta.*no values"),
    ("a nested tensor", NESTED, "data.*nested.*num_examples"),
    ("text in a batch", [(X, "text")], "data must be a tree of tensors.*str.*num_examples"),
]

OVER_DATA: dict[str, Callable[..., Any]] = {
    "hessian": hk.hessian,
    "empirical_fisher": hk.empirical_fisher,
    "grad": hk.grad,
    "loss": hk.loss,
}


def over_data() -> Iterator[Row]:
    for name, function in OVER_DATA.items():
        for what, params, words in BAD_PARAMS:
            yield f"{name}: params: {what}", lambda f=function, p=params: f(quadratic, p, X), words
        for what, data, words in BAD_DATA:
            yield f"{name}: data: {what}", lambda f=function, d=data: f(quadratic, W, d), words
    for what, data, words in BAD_DATA:
        yield f"as_data: {what}", lambda d=data: hk.as_data(d), words
    for name in ("hvp", "fisher_vp"):
        function = getattr(hk, name)
        for what, params, words in BAD_PARAMS:
            if what in ("NaN", "infinity"):
                continue  # one product is not checked for values: it would wait for the device
            v = {"w": W} if isinstance(params, dict) and "w" in params else W
            yield f"{name}: params: {what}", lambda f=function, p=params, v=v: f(quadratic, p, X, v), words


def losses() -> Iterator[Row]:
    criterion = nn.CrossEntropyLoss
    for name in ("hessian", "grad", "loss", "empirical_fisher"):
        function = getattr(hk, name)
        rows: list[tuple[str, Any, str]] = [
            ("none", None, "loss_fn must be a function"),
            ("a module", nn.Linear(D, 1), "loss_fn.*from_module"),
            ("a criterion class", criterion, "loss_fn is the class CrossEntropyLoss.*CrossEntropyLoss\\(\\)"),
            ("a criterion", criterion(), "loss_fn.*from_module"),
            ("a tensor", X, "loss_fn must be a function.*Tensor"),
            ("a string", "mse", "loss_fn must be a function.*str"),
            ("what from_module returns", problem(), "loss_fn.*tuple.*from_module.*pass both"),
            ("one argument", lambda p: p.sum(), "loss_fn must take.*params.*batch"),
            ("three arguments", lambda p, x, y: p.sum(), "loss_fn must take.*params.*batch"),
            ("a number", lambda p, b: 1.0, "loss_fn must return a tensor, got float"),
            ("nothing", lambda p, b: None, "loss_fn must return a tensor, got NoneType"),
            ("a tuple", lambda p, b: (b @ p, b), "loss_fn must return a tensor, got tuple"),
            ("integers", lambda p, b: (b @ p).long(), "loss_fn returned dtype torch.int64"),
            ("complex", lambda p, b: (b @ p) * 1j, "loss_fn returned dtype torch.complex64"),
            ("a column", lambda p, b: (b @ p)[:, None], "loss_fn returned shape .30, 1.*squeeze"),
            ("one for each entry", lambda p, b: b * p, "loss_fn returned shape .30, 4.*reduce"),
            ("NaN", lambda p, b: (b @ p) * NAN, "NaN or infinity.*batch 0"),
        ]
        for what, loss_fn, words in rows:
            yield f"{name}: loss_fn: {what}", lambda f=function, g=loss_fn: f(g, W, X), words
    yield (
        "hessian: no params in it",
        lambda: hk.hessian(lambda p, b: b.sum(1), W, X),
        "does not depend on params",
    )
    yield (
        "hessian: detached",
        lambda: hk.hessian(lambda p, b: b @ p.detach(), W, X),
        "does not depend on params",
    )
    yield "hessian: random", lambda: hk.hessian(lambda p, b: b @ p * torch.rand(1), W, X), "random numbers"


def late() -> Iterator[Row]:
    """Faults that show while data are read, or in a batch that is not the first."""
    nan_x = with_value(X, 20, NAN)
    labels = with_value(Y, 20, 9)
    negative = with_value(Y, 20, -1)

    def run(data: Any, objective: Any = None) -> Any:
        loss_fn, params = problem() if objective is None else objective
        return hk.extreme_eigenvalues(hk.hessian(loss_fn, params, data, batch_size=8), max_matvecs=10)

    def result(data: Any) -> None:
        found = run(data)
        raise hk.NonFiniteError(found.message)

    yield "NaN in a later batch", lambda: result((nan_x, Y)), "NaN or infinity.*batch 2"
    yield (
        "grad: NaN in a later batch",
        lambda: hk.grad(*problem(), in_eights(TensorDataset(nan_x, Y))),
        "batch 2",
    )
    yield (
        "loss: NaN in a later batch",
        lambda: hk.loss(*problem(), in_eights(TensorDataset(nan_x, Y))),
        "batch 2",
    )
    yield "a label out of range", lambda: run((X, labels)), "batch 2.*examples 16 to 23.*9 .example 20"
    yield (
        "grad: a label out of range",
        lambda: hk.grad(*problem(), in_eights(TensorDataset(X, labels))),
        "batch 2.*9",
    )
    yield "a negative label", lambda: run((X, negative)), "batch 2.*-1 .example 20"
    yield "labels of a wrong type", lambda: run((X, Y.int())), "batch 0.*int32.*y.long"
    yield "labels in float", lambda: run((X, Y.float())), "batch 0.*float32 .8"
    yield "labels of two dimensions", lambda: run((X, Y[:, None])), "batch 0.*int64 .8, 1"
    yield "float64 data", lambda: run((X.double(), Y)), "parameters are float32.*convert"
    yield (
        "float64 parameters",
        lambda: hk.hessian(quadratic, W.double(), X),
        "parameters are float64.*convert",
    )
    yield "half data", lambda: run((X.half(), Y)), "parameters are float32.*convert"
    yield "integer inputs", lambda: run((torch.ones(N, D, dtype=torch.int64), Y)), "batch 0.*int64"
    yield "too few features", lambda: run((X[:, :2], Y)), "batch 0.*float32 .8, 2"
    yield "images for a network of vectors", lambda: run((X.view(N, 2, 2), Y)), "batch 0.*.8, 2, 2"
    yield (
        "a dataset that raises",
        lambda: run(in_eights(Broken())),
        "cannot read image 11.*example 11.*batch 1",
    )
    yield "a key that is missing", lambda: run(in_eights(MissingKey())), "batch 1|'label'"
    yield "no targets", lambda: run((X,)), "batch"
    yield "one tensor for a pair", lambda: run(X), "batch"
    yield "a dict for a pair", lambda: run({"x": X, "y": Y}), "batch"
    yield (
        "a dict without its key",
        lambda: hk.hessian(lambda p, b: b["z"] @ p, W, {"x": X}),
        "'z'.*batch 0.*x: float32",
    )
    yield (
        "another batch size",
        lambda: hk.hessian(lambda p, b: (b @ p)[:8], W, X, batch_size=16),
        "returned shape .8",
    )
    sizes = [X[:8], X[8:10, :2]]
    yield "batches of other shapes", lambda: hk.loss(quadratic, W, [(x,) for x in sizes]), "batch 0|batch 1"
    yield "a loss that raises", lambda: hk.hessian(lambda p, b: b @ p[:2], W, X), "batch 0.*examples 0 to 29"
    yield "one-hot targets in integers", lambda: run((X, F.one_hot(Y))), "batch 0.*int64 .8, 3"
    yield (
        "a raising stream",
        lambda: hk.as_data(DataLoader(Broken(), sampler=range(N), batch_size=8)),
        "batch 1",
    )


def options() -> Iterator[Row]:
    """Options of the constructors."""

    def made(**changes: Any) -> Callable[[], Any]:
        return lambda: hk.hessian(*problem(), (X, Y), **changes)

    yield "wrt: no match", made(wrt="conv*"), "wrt='conv.'.*matches no parameter; their names: 0.weight"
    yield "wrt: a number", made(wrt=5), "wrt must be .*int"
    yield "wrt: numbers", made(wrt=[1, 2]), "wrt.*names.*int"
    yield "wrt: an empty list", made(wrt=[]), "wrt.*matches no parameter"
    yield "wrt: True", made(wrt=True), "wrt must be .*bool"
    yield "wrt: a tensor", made(wrt=W), "wrt must be .*Tensor"
    yield "wrt: a parameter", made(wrt=[next(model().parameters())]), "wrt.*names.*Parameter"
    yield "wrt: a module", made(wrt=model()), "wrt must be .*Sequential"
    yield "wrt: bytes", made(wrt=b"0.weight"), "wrt must be .*bytes"
    yield "batch_size: zero", made(batch_size=0), "batch_size must be at least 1"
    yield "batch_size: negative", made(batch_size=-4), "batch_size must be at least 1"
    yield "batch_size: a float", made(batch_size=2.0), "batch_size must be an int"
    yield "batch_size: a string", made(batch_size="big"), "batch_size must be .*'auto'.*'big'"
    yield "batch_size: True", made(batch_size=True), "batch_size must be an int"
    yield "mode: unknown", made(mode="fast"), "mode must be one of .*'fast'"
    yield "mode: none", made(mode=None), "mode must be one of .*None"
    yield "mode: a list", made(mode=["auto"]), "mode must be one of"
    yield "arithmetic: unknown", made(arithmetic="fp8"), "arithmetic must be one of .*'fp8'"
    yield "arithmetic: tf32 on a CPU", made(arithmetic="tf32"), "arithmetic='tf32' needs a CUDA device"
    yield "memory_limit: a string", made(memory_limit="1GB"), "memory_limit must be a number.*'1GB'"
    yield "memory_limit: negative", made(memory_limit=-1.0), "memory_limit must be .*at least 0"
    yield "memory_limit: NaN", made(memory_limit=NAN), "memory_limit must be .*at least 0"
    yield "compile: a string", made(compile="no"), "compile must be True or False.*'no'"
    yield "progress: a string", made(progress="no"), "progress must be True or False.*'no'"
    yield "progress: a number", made(progress=3), "progress must be True or False.*3"
    yield (
        "likelihood: unknown",
        lambda: hk.fisher(*problem(), (X, Y), likelihood="poisson"),
        "likelihood must be one of",
    )
    yield "likelihood: another", lambda: hk.fisher(*problem(), (X, Y), likelihood="gaussian"), "likelihood"
    yield (
        "num_samples: zero",
        lambda: hk.fisher(*problem(), (X, Y), num_samples=0),
        "num_samples must be at least 1",
    )
    yield (
        "num_samples: a float",
        lambda: hk.fisher(*problem(), (X, Y), num_samples=1.5),
        "num_samples must be an int",
    )
    yield (
        "fisher: seed",
        lambda: hk.fisher(*problem(), (X, Y), num_samples=1, seed="a"),
        "seed must be an int",
    )
    yield "fisher: a function", lambda: hk.fisher(quadratic, W, X), "objective.*Objective"
    yield "ggn: a function", lambda: hk.ggn(quadratic, W, X), "objective.*Objective"
    yield "ggn: a module", lambda: hk.ggn(model(), W, X), "objective.*Objective"
    yield "ggn: none", lambda: hk.ggn(None, W, X), "objective.*Objective"
    yield "ggnvp: a function", lambda: hk.ggnvp(quadratic, W, X, W), "objective.*Objective"
    yield (
        "empirical_fisher: a mean",
        lambda: hk.empirical_fisher(lambda p, b: (b @ p).mean(), W, X),
        "one loss",
    )
    for name in ("hvp", "fisher_vp"):
        function = getattr(hk, name)
        yield f"{name}: mode", lambda f=function: f(quadratic, W, X, W, mode="auto"), "mode must be one of"
        yield f"{name}: v: none", lambda f=function: f(quadratic, W, X, None), "v "
        yield (
            f"{name}: v: too long",
            lambda f=function: f(quadratic, W, X, torch.ones(9)),
            "v must be shaped like",
        )
        yield (
            f"{name}: v: another dtype",
            lambda f=function: f(quadratic, W, X, W.double()),
            "v has dtype.*to",
        )
        yield (
            f"{name}: v: a dict",
            lambda f=function: f(quadratic, W, X, {"w": W}),
            "v must be a tree shaped like",
        )
        yield f"{name}: v: integers", lambda f=function: f(quadratic, W, X, W.long()), "v has dtype"
        yield f"{name}: v: an array", lambda f=function: f(quadratic, W, X, np.ones(D)), "v .*ndarray"
        yield (
            f"{name}: v: sparse",
            lambda f=function: f(quadratic, W, X, W.to_sparse()),
            "v.*sparse.*to_dense",
        )
        yield f"{name}: v: meta", lambda f=function: f(quadratic, W, X, W.to("meta")), "v .*meta"
    yield (
        "quadratic_form: v",
        lambda: hk.quadratic_form(quadratic, W, X, torch.ones(9)),
        "v must be shaped like",
    )
    yield "quadratic_form: loss_fn", lambda: hk.quadratic_form(None, W, X, W), "loss_fn must be a function"
    yield "hvp: batch: a loader", lambda: hk.hvp(quadratic, W, in_eights(TensorDataset(X)), W), "batch|data"
    yield "as_data: batch_size", lambda: hk.as_data(X, batch_size="8"), "batch_size must be an int"
    yield "as_data: num_examples", lambda: hk.as_data([X], num_examples=5), "num_examples must be a function"
    yield (
        "as_data: num_examples returns text",
        lambda: hk.as_data([X], num_examples=lambda b: "8"),
        "num_examples",
    )
    yield (
        "as_data: num_examples returns a negative",
        lambda: hk.as_data([X], num_examples=lambda b: -1),
        "num_examples",
    )
    yield (
        "as_data: num_examples and batch_size",
        lambda: hk.as_data([X], batch_size=2, num_examples=len),
        "exclude",
    )
    yield "as_data: device", lambda: hk.as_data(X, device="gpu"), "device.*'gpu'"
    yield "as_data: device that is not there", lambda: hk.as_data(X, device="cuda:77"), "device.*cuda:77"
    yield "as_data: device: a number", lambda: hk.as_data(X, device=1.5), "device"
    data = hk.as_data(X)
    yield "subset: a mask", lambda: data.subset(X[:, 0] > 0), "indices must be whole numbers.*nonzero"
    yield "subset: out of range", lambda: data.subset([99]), r"indices must be in .0, 30"
    yield "subset: none", lambda: data.subset([]), "indices must be"
    yield (
        "subset: weights",
        lambda: data.subset([1, 2], torch.ones(3)),
        "weights must have one entry for each index",
    )
    yield "subset: text", lambda: data.subset("all"), "indices must be"
    yield "subset: NaN weights", lambda: data.subset([1], torch.tensor([NAN])), "weights.*NaN"


def modules() -> Iterator[Row]:
    """from_module and Objective."""

    def run(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return lambda: hk.from_module(*args, **kwargs)

    yield "model: a class", run(nn.Linear, F.mse_loss), "model.*class Linear.*instance|model.*Linear\\("
    yield "model: a function", run(quadratic, F.mse_loss), "model must be .*Module.*function"
    yield "model: a dict", run(model().state_dict(), F.mse_loss), "model must be .*Module"
    yield "model: none", run(None, F.mse_loss), "model must be .*Module"
    yield "model: no parameters", run(nn.ReLU(), F.mse_loss), "model.*no .*parameters"
    yield "model: all frozen", run(nn.Linear(2, 1).requires_grad_(False), F.mse_loss), "include_frozen"
    yield "model: on meta", run(nn.Linear(2, 1, device="meta"), F.mse_loss), "meta"
    yield (
        "criterion: a class",
        run(model(), nn.CrossEntropyLoss),
        "criterion.*class CrossEntropyLoss.*CrossEntropyLoss\\(",
    )
    yield "criterion: a string", run(model(), "mse"), "criterion must be a function.*str"
    yield "criterion: a number", run(model(), 5), "criterion must be a function.*int"
    yield "criterion: a tensor", run(model(), X), "criterion must be a function.*Tensor"
    yield "batchnorm: unknown", run(model(), F.mse_loss, batchnorm="train"), "batchnorm must be one of"
    yield "batchnorm: True", run(model(), F.mse_loss, batchnorm=True), "batchnorm must be one of"
    yield "dropout: a rate", run(model(), F.mse_loss, dropout=0.5), "dropout must be an int"
    yield "dropout: True", run(model(), F.mse_loss, dropout=True), "dropout must be an int"
    yield "dropout: negative", run(model(), F.mse_loss, dropout=-1), "dropout must be at least 0"
    yield (
        "include_frozen: a string",
        run(model(), F.mse_loss, include_frozen="no"),
        "include_frozen must be True or False",
    )
    yield "targets: a number with a fraction", run(model(), F.mse_loss, targets=1.5), "targets"
    yield "Objective: no function", lambda: hk.Objective(None, quadratic), "forward must be a function"
    yield "Objective: a module", lambda: hk.Objective(model(), quadratic), "forward.*from_module"
    yield "Objective: loss", lambda: hk.Objective(quadratic, "mse"), "output_loss must be a function"
    yield (
        "Objective: a criterion class",
        lambda: hk.Objective(quadratic, nn.MSELoss),
        "output_loss.*class MSELoss",
    )
    yield (
        "Objective: weights",
        lambda: hk.Objective(quadratic, quadratic, 3),
        "example_weight must be a function",
    )
    yield (
        "Objective: batchnorm",
        lambda: hk.Objective(quadratic, quadratic, None, "no"),
        "batchnorm must be one of",
    )
    yield "targets of another length", lambda: hk.hessian(*problem(), (X, Y[:5])), "first dimension"


SOLVERS = ("lanczos", "lobpcg", "chebyshev", "power", "accelerated_power", "stochastic_power", "oja", "eigsh")
SHARED: list[tuple[str, dict[str, Any], str]] = [
    ("tol: two", {"tol": 2.0}, "tol must be positive and less than 1.*2.0"),
    ("tol: zero", {"tol": 0.0}, "tol must be .*positive"),
    ("tol: negative", {"tol": -0.1}, "tol must be .*positive"),
    ("tol: NaN", {"tol": NAN}, "tol must be .*positive"),
    ("tol: a string", {"tol": "0.1"}, "tol must be a number.*'0.1'"),
    ("tol: none", {"tol": None}, "tol must be a number.*None"),
    ("tol: True", {"tol": True}, "tol must be a number.*True"),
    ("max_matvecs: zero", {"max_matvecs": 0}, "max_matvecs must be"),
    ("max_matvecs: a string", {"max_matvecs": "10"}, "max_matvecs must be a number"),
    ("max_matvecs: infinity", {"max_matvecs": INF}, "max_matvecs must be a positive finite"),
    ("time_limit: zero", {"time_limit": 0}, "time_limit must be a positive"),
    ("time_limit: a string", {"time_limit": "1h"}, "time_limit must be a number"),
    ("seed: a float", {"seed": 0.5}, "seed must be an int"),
    ("seed: none", {"seed": None}, "seed must be an int"),
    ("seed: negative", {"seed": -1}, "seed must not be negative"),
    ("seed: a string", {"seed": "0"}, "seed must be an int"),
    ("monitor: a number", {"monitor": 5}, "monitor must be a function.*5"),
    ("monitor: a list", {"monitor": [print]}, "monitor must be a function"),
    ("monitor: what makes one", {"monitor": hk.progress_bar}, "monitor must take the arguments of monitor"),
]
PAIRS: list[tuple[str, dict[str, Any], str]] = [
    ("atol: negative", {"atol": -1.0}, "atol must be"),
    ("atol: a string", {"atol": "1"}, "atol must be a number"),
    ("atol: one", {"atol": 1.0}, "atol must be less than 1"),
    ("v0: a string", {"v0": "random"}, "v0 must be a tensor.*str"),
    ("v0: an array", {"v0": np.ones(D)}, "v0 must be a tensor.*ndarray"),
    ("v0: a wrong length", {"v0": torch.ones(9)}, "v0 must be a tensor of shape .4"),
    ("v0: zero", {"v0": torch.zeros(D)}, "v0 has a column that is zero"),
    ("v0: NaN", {"v0": with_value(W, 0, NAN)}, "v0 has a column.*NaN"),
    ("v0: another dtype", {"v0": W.double()}, "v0 has dtype.*to"),
    ("v0: sparse", {"v0": W.to_sparse()}, "v0.*sparse.*to_dense"),
    ("v0: meta", {"v0": W.to("meta")}, "v0.*meta"),
]
COUNTS: list[tuple[str, dict[str, Any], str]] = [
    ("k: zero", {"k": 0}, "k must be between 1 and 4"),
    ("k: too many", {"k": 99}, "k must be between 1 and 4"),
    ("k: a float", {"k": 1.0}, "k must be an int"),
    ("k: a string", {"k": "1"}, "k must be an int"),
    ("which: unknown", {"which": "XX"}, "which must be one of.*'XX'"),
    ("which: none", {"which": None}, "which must be one of.*None"),
    ("which: a list", {"which": ["LA"]}, "which must be one of"),
]
CONFIDENT: list[tuple[str, dict[str, Any], str]] = [
    ("confidence: a string", {"confidence": "0.9"}, "confidence must be a number.*'0.9'"),
    ("confidence: one", {"confidence": 1.0}, "confidence must be between 0 and 1"),
    ("confidence: in per cent", {"confidence": 99}, "confidence must be between 0 and 1"),
    ("confidence: none", {"confidence": None}, "confidence must be a number"),
    ("confidence: NaN", {"confidence": NAN}, "confidence must be between 0 and 1"),
    ("certify: a string", {"certify": "no"}, "certify must be True or False.*'no'"),
    ("certify: a number", {"certify": 0.95}, "certify must be True or False.*0.95"),
]
BAD_OPERATORS: list[tuple[str, Any, str]] = [
    ("a matrix that is not square", torch.ones(D, D + 1), r"A must be square.*\[4, 5\]"),
    ("none", None, "A must be a tensor.*got NoneType"),
    ("a function", quadratic, r"A must be a tensor.*\(matvec, n, dtype\); got function"),
    ("an array of integers", np.eye(D, dtype=int), "A must have a real floating dtype.*convert it"),
]


def solvers() -> Iterator[Row]:
    for name in SOLVERS:
        solver = getattr(hk, name)
        for what, changes, words in SHARED + PAIRS + COUNTS:
            if name not in ("lanczos", "lobpcg") and what not in (
                "tol: two",
                "monitor: a number",
                "k: zero",
                "seed: none",
            ):
                continue  # one validation for all: the rest is spot checks
            yield f"{name}: {what}", lambda s=solver, c=changes: s(H(), **c), words
        yield f"{name}: no operator", lambda s=solver: s(None), BAD_OPERATORS[1][2]
    for what, changes, words in SHARED + PAIRS + CONFIDENT:
        yield f"extreme_eigenvalues: {what}", lambda c=changes: hk.extreme_eigenvalues(H(), **c), words
    for what, changes, words in CONFIDENT:
        yield f"lanczos: {what}", lambda c=changes: hk.lanczos(H(), **c), words
        yield f"multifidelity: {what}", lambda c=changes: hk.multifidelity([sample(), H()], **c), words
    for what, op, words in BAD_OPERATORS:
        yield f"extreme_eigenvalues: {what}", lambda o=op: hk.extreme_eigenvalues(o), words
    yield "method", lambda: hk.extreme_eigenvalues(H(), method="qr"), "method must be one of.*'qr'"
    yield "method: none", lambda: hk.extreme_eigenvalues(H(), method=None), "method must be one of"
    plain = hk.aslinearoperator(torch.eye(D))
    yield (
        "method: no data",
        lambda: hk.extreme_eigenvalues(plain, method="multifidelity"),
        "multifidelity.*lanczos",
    )
    yield (
        "checkpoint: a number",
        lambda: hk.extreme_eigenvalues(H(), checkpoint=5),
        "checkpoint must be a path.*int",
    )
    yield "checkpoint: True", lambda: hk.lanczos(H(), checkpoint=True), "checkpoint must be a path.*bool"
    yield "ncv: too few", lambda: hk.lanczos(H(), ncv=1), "ncv must be"
    yield "ncv: a float", lambda: hk.lanczos(H(), ncv=4.0), "ncv must be an int"
    yield "block_size", lambda: hk.lanczos(H(), block_size=0), "block_size must be"
    yield "block_size: a float", lambda: hk.lanczos(H(), block_size=1.5), "block_size must be an int"
    for name, solve in {"lanczos": hk.lanczos, "top": hk.top_eigenvalues}.items():
        yield f"{name}: no sigma", lambda s=solve: s(H(), 1, which="CLOSEST"), "needs sigma"
        yield f"{name}: sigma of an end", lambda s=solve: s(H(), 1, sigma=1.0), "sigma goes with which="
        yield (
            f"{name}: sigma NaN",
            lambda s=solve: s(H(), 1, which="CLOSEST", sigma=NAN),
            "sigma must be a finite",
        )
    yield (
        "top: samples inside",
        lambda: hk.top_eigenvalues(H(), 1, which="CLOSEST", sigma=1.0, method="multifidelity"),
        "is by Lanczos",
    )
    yield "check_copies", lambda: hk.lanczos(H(), check_copies="no"), "check_copies must be True or False"
    yield "preconditioner", lambda: hk.lobpcg(H(), preconditioner=5), "preconditioner must be a function"
    yield (
        "preconditioner: a matrix",
        lambda: hk.lobpcg(H(), preconditioner=torch.eye(D)),
        "preconditioner must be",
    )
    yield "momentum: a string", lambda: hk.accelerated_power(H(), momentum="0.9"), "momentum must be a number"
    yield "momentum: negative", lambda: hk.accelerated_power(H(), momentum=-1.0), "momentum must be"
    yield (
        "variance_reduced",
        lambda: hk.accelerated_power(H(), variance_reduced="no"),
        "variance_reduced must be True",
    )
    yield (
        "batch_schedule",
        lambda: hk.stochastic_power(H(), batch_schedule="grow"),
        "batch_schedule must be a function",
    )
    yield "stochastic momentum", lambda: hk.stochastic_power(H(), momentum="0.9"), "momentum must be a number"
    yield "stochastic: no data", lambda: hk.stochastic_power(plain), "sample"
    yield "oja: batch_size", lambda: hk.oja(H(), batch_size=0), "batch_size must be"
    yield "oja: step_size", lambda: hk.oja(H(), step_size="0.1"), "step_size must be"
    yield "oja: no data", lambda: hk.oja(plain), "sample"
    yield "chebyshev: block_size", lambda: hk.chebyshev(H(), block_size=0), "block_size must be"
    yield "eigsh: ncv", lambda: hk.eigsh(H(), ncv="9"), "ncv must be an int"
    yield "scipy_lobpcg: tol", lambda: hk.scipy_lobpcg(H(), tol=2.0), "tol must be"
    yield (
        "levels: an operator",
        lambda: hk.multifidelity(H()),
        "levels must be a list.*got a CurvatureOperator",
    )
    yield "levels: empty", lambda: hk.multifidelity([]), "levels"
    yield (
        "levels: matrices",
        lambda: hk.multifidelity([torch.eye(D)]),
        "levels.*LinearOperator.*got a list of Tensor",
    )
    yield "levels: other sizes", lambda: hk.multifidelity([network(), H()]), "levels"
    yield "levels: ncv", lambda: hk.multifidelity([sample(), H()], ncv=1), "ncv must be"
    yield "levels: num_inner", lambda: hk.multifidelity([sample(), H()], num_inner=0), "num_inner must be"
    yield "levels: which", lambda: hk.multifidelity([sample(), H()], which="LM"), "which must be one of"


def estimators() -> Iterator[Row]:
    for name in ("trace", "diagonal", "frobenius_norm"):
        estimator = getattr(hk, name)
        rows: list[tuple[str, dict[str, Any], str]] = [
            ("method", {"method": "exact"}, "method must be one of.*'exact'"),
            ("num_matvecs: zero", {"num_matvecs": 0}, "num_matvecs must be"),
            ("num_matvecs: a string", {"num_matvecs": "100"}, "num_matvecs must be a number"),
            ("num_matvecs: NaN", {"num_matvecs": NAN}, "num_matvecs must be"),
            ("tol: two", {"tol": 2.0}, "tol must be positive and less than 1.*2.0"),
            ("tol: a string", {"tol": "0.1"}, "tol must be a number"),
            ("block_size: zero", {"block_size": 0}, "block_size must be at least 1"),
            ("block_size: a float", {"block_size": 2.0}, "block_size must be an int"),
            ("time_limit", {"time_limit": -1}, "time_limit must be a positive"),
            ("seed", {"seed": None}, "seed must be an int"),
            ("monitor", {"monitor": 5}, "monitor must be a function"),
        ]
        for what, changes, words in rows:
            yield f"{name}: {what}", lambda e=estimator, c=changes: e(H(), **c), words
        for what, op, words in BAD_OPERATORS:
            yield f"{name}: {what}", lambda e=estimator, o=op: e(o), words
    yield "trace: probe", lambda: hk.trace(H(), probe="normal"), "probe must be one of"
    yield "spectral_density: method", lambda: hk.spectral_density(H(), method="kde"), "method must be one of"
    yield "spectral_density: num_steps", lambda: hk.spectral_density(H(), num_steps=0), "num_steps must be"
    yield (
        "spectral_density: num_steps float",
        lambda: hk.spectral_density(H(), num_steps=5.0),
        "num_steps must be an int",
    )
    yield "spectral_density: num_probes", lambda: hk.spectral_density(H(), num_probes=0), "num_probes must be"
    yield "spectral_density: block_size", lambda: hk.spectral_density(H(), block_size=0), "block_size must be"
    yield (
        "spectral_density: monitor",
        lambda: hk.spectral_density(H(), monitor=5),
        "monitor must be a function",
    )
    yield "spectral_density: seed", lambda: hk.spectral_density(H(), seed="a"), "seed must be an int"
    yield (
        "spectral_density: none",
        lambda: hk.spectral_density(None),
        "A must be a tensor.*got NoneType",
    )
    yield "moments: order", lambda: hk.moments(H(), 0), "order must be"
    yield "moments: order float", lambda: hk.moments(H(), 2.0), "order must be an int"
    yield "moments: num_matvecs", lambda: hk.moments(H(), 2, num_matvecs="9"), "num_matvecs must be a number"
    yield "moments: monitor", lambda: hk.moments(H(), 2, monitor=5), "monitor must be a function"
    estimate = hk.trace(H())
    yield "interval: a string", lambda: estimate.interval("0.9"), "confidence must be a number"
    yield "interval: two", lambda: estimate.interval(2.0), "confidence must be between 0 and 1"
    yield "sampling_error: a whole operator", lambda: hk.sampling_error(H(), W), "sample"
    yield "sampling_error: vectors", lambda: hk.sampling_error(sample(), torch.ones(7)), "vectors must"
    yield (
        "sampling_error: an array",
        lambda: hk.sampling_error(sample(), np.ones(D)),
        "vectors must be a tensor",
    )
    yield "sampling_error: an operator", lambda: hk.sampling_error(torch.eye(D), W), "sample must be.*Tensor"
    yield "check: none", lambda: hk.check(None), "A must be a tensor.*got NoneType"
    yield "check: seed", lambda: hk.check(H(), seed=None), "seed must be an int"
    yield "density: integrate", lambda: density().integrate(5), "values must be a tensor"
    yield "density: cdf", lambda: density().cdf("a"), "x must be a number"
    yield "density: expectation", lambda: density().expectation("x"), "f must be a function"


def operators() -> Iterator[Row]:
    v = torch.ones(D)
    yield "@: a number", lambda: H() @ 2.0, "v must"
    yield "@: a wrong length", lambda: H() @ torch.ones(9), "v must have shape"
    yield "@: three dimensions", lambda: H() @ torch.ones(D, 2, 2), "v must have shape"
    yield "@: another dtype", lambda: H() @ v.double(), "v has dtype torch.float64, expected torch.float32"
    yield "@: integers", lambda: H() @ v.long(), "v has dtype torch.int64"
    yield "@: an array of a wrong length", lambda: H() @ np.ones(9, dtype=np.float32), "v must have shape"
    yield "@: a list", lambda: H() @ [1.0, 2.0, 3.0, 4.0], "v "
    yield "@: none", lambda: H() @ None, "v "
    yield "@: sparse", lambda: H() @ v.to_sparse(), "v.*sparse.*to_dense"
    yield "@: meta", lambda: H() @ v.to("meta"), "v has device meta"
    yield "@: a tree of another shape", lambda: network() @ {"a": v}, "v must be a tree shaped like"
    yield "*: a string", lambda: H() * "2", "."
    yield "*: NaN", lambda: H() * NAN, "finite"
    yield "*: a tensor", lambda: H() * torch.ones(3), "multiplied by a number, got Tensor"
    yield "*: an operator", lambda: H() * H(), "multiplied by a number, got CurvatureOperator"
    yield "+: a number", lambda: H() + 1.0, "shift"
    yield "+: a matrix", lambda: H() + torch.eye(D), "aslinearoperator"
    yield "+: another size", lambda: H() + network(), "shape|size|4 x 4"
    yield "shift: a string", lambda: H().shift("1"), "sigma must be a number"
    yield "shift: NaN", lambda: H().shift(NAN), "sigma must be a finite"
    yield "unflatten: length", lambda: H().unflatten(torch.ones(9)), "vector must have shape"
    yield "flatten: a dict", lambda: H().flatten({"a": v}), "must be a tree shaped like"
    yield "coarsen: zero", lambda: H().coarsen(0), "num_examples must be between 1 and 30"
    yield "coarsen: too many", lambda: H().coarsen(99), "num_examples must be between 1 and 30"
    yield "coarsen: a share", lambda: H().coarsen(0.1), "num_examples must be an int"
    yield "coarsen: importance", lambda: H().coarsen(9, importance="hessian"), "importance must be"
    yield "coarsen: outputs", lambda: H().coarsen(9, importance="residual"), "residual.*Objective"
    yield "coarsen: a list", lambda: H().coarsen(9, importance=[1.0]), "importance must be"
    yield "coarsen: seed", lambda: network().coarsen(9, seed=1.5), "seed must be an int"
    yield (
        "coarsen: NaN scores",
        lambda: H().coarsen(9, importance=lambda p, b: b[:, 0] * NAN),
        "not finite|NaN",
    )
    yield "coarsen: no data", lambda: hk.aslinearoperator(torch.eye(3)).coarsen(1), "examples"
    yield "rebatched: zero", lambda: H().rebatched(0), "batch_size must be at least 1"
    make = hk.aslinearoperator
    yield "aslinearoperator: a list", lambda: make([[1.0]]), "aslinearoperator|A must|matrix"
    yield "aslinearoperator: none", lambda: make(None), "NoneType"
    yield "aslinearoperator: not square", lambda: make(torch.ones(3, 2)), "square"
    yield "aslinearoperator: a vector", lambda: make(torch.ones(3)), "square"
    yield "aslinearoperator: integers", lambda: make(torch.eye(3, dtype=torch.int64)), "dtype|float"
    yield "aslinearoperator: complex", lambda: make(torch.eye(3, dtype=torch.complex64)), "complex|real"
    yield "aslinearoperator: NaN", lambda: make(torch.full((3, 3), NAN)), "NaN"
    yield "aslinearoperator: meta", lambda: make(torch.eye(3, device="meta")), "meta"
    yield "aslinearoperator: a function", lambda: make(quadratic), "function"
    yield "aslinearoperator: an array of objects", lambda: make(np.array([[None]])), "dtype|object"
    yield "aslinearoperator: device", lambda: make(torch.eye(3), device="gpu"), "device.*'gpu'"
    skew = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    yield "lanczos: not symmetric", lambda: hk.lanczos(make(skew)), "symmetric"
    yield (
        "LinearOperator: product",
        lambda: hk.LinearOperator(None, 3, torch.float32, torch.device("cpu")),
        "product must",
    )
    yield (
        "LinearOperator: n",
        lambda: hk.LinearOperator(lambda v: v, 0, torch.float32, torch.device("cpu")),
        "n must be",
    )
    yield (
        "LinearOperator: dtype",
        lambda: hk.LinearOperator(lambda v: v, 3, "float32", torch.device("cpu")),
        "dtype",
    )
    yield "LinearOperator: device", lambda: hk.LinearOperator(lambda v: v, 3, torch.float32, "cpu"), "device"
    yield (
        "LinearOperator: integers",
        lambda: hk.LinearOperator(lambda v: v, 3, torch.int64, torch.device("cpu")),
        "dtype",
    )


def training() -> Iterator[Row]:
    loader = in_eights(TensorDataset(X, Y))

    def tracker(**changes: Any) -> Callable[[], Any]:
        return lambda: train.SpectrumTracker(problem()[0], loader, **changes)

    yield "tracker: loss_fn", lambda: train.SpectrumTracker(model(), loader), "loss_fn.*for_module"
    yield "tracker: no loss_fn", lambda: train.SpectrumTracker(None, loader), "loss_fn must be a function"
    yield "tracker: data", lambda: train.SpectrumTracker(problem()[0], 5), "data must be tensors"
    yield "tracker: every", tracker(every=0), "every must be at least 1"
    yield "tracker: every float", tracker(every=1.5), "every must be an int"
    yield "tracker: tol", tracker(tol=2.0), "tol must be"
    yield "tracker: tol string", tracker(tol="0.1"), "tol must be a number"
    yield "tracker: atol", tracker(atol=-1), "atol must be"
    yield "tracker: certify", tracker(certify=1), "certify must be True or False"
    yield "tracker: method", tracker(method="qr"), "method must be one of"
    yield "tracker: max_matvecs", tracker(max_matvecs="9"), "max_matvecs must be a number"
    yield "tracker: time_limit", tracker(time_limit=0), "time_limit must be a positive"
    yield "tracker: batch_size", tracker(batch_size=0), "batch_size must be"
    yield "tracker: wrt", tracker(wrt=5), "wrt must be"
    yield "tracker: mode", tracker(mode="fast"), "mode must be one of"
    yield "tracker: seed", tracker(seed=None), "seed must be an int"
    yield "tracker: path", tracker(path=5), "path must be a path"
    yield "tracker: monitor", tracker(monitor=5), "monitor must be a function"
    yield "tracker: params", lambda: train.SpectrumTracker(problem()[0], loader)(None), "params"

    knee = {"peak_lr": 0.1, "explore_steps": 5, "total_steps": 10}
    for what, changes, words in (
        ("peak_lr: a string", {"peak_lr": "0.1"}, "peak_lr must be a number"),
        ("peak_lr: negative", {"peak_lr": -0.1}, "peak_lr must be"),
        ("peak_lr: NaN", {"peak_lr": NAN}, "peak_lr must be"),
        ("explore_steps: negative", {"explore_steps": -1}, "explore_steps must be"),
        ("explore_steps: a float", {"explore_steps": 2.5}, "explore_steps must be an int"),
        ("total_steps: too few", {"total_steps": 2}, "total_steps must be"),
        ("warmup_steps: a string", {"warmup_steps": "1"}, "warmup_steps must be an int"),
    ):
        yield f"knee_lr: {what}", lambda c=changes: train.knee_lr(0, **{**knee, **c}), words
    yield "knee_lr: step", lambda: train.knee_lr("1", **knee), "step must be a number"
    yield "knee_lr: step NaN", lambda: train.knee_lr(NAN, **knee), "step must be"
    yield (
        "KneeLR: no optimizer",
        lambda: train.KneeLR(model(), explore_steps=1, total_steps=2),
        "optimizer must be",
    )
    sgd = torch.optim.SGD(model().parameters(), lr=0.1)
    yield "KneeLR: steps", lambda: train.KneeLR(sgd, explore_steps=5, total_steps=2), "total_steps must be"
    yield (
        "KneeLR: peak_lr",
        lambda: train.KneeLR(sgd, peak_lr="a", explore_steps=1, total_steps=2),
        "peak_lr must be",
    )
    yield (
        "KneeLR: peak_lr list",
        lambda: train.KneeLR(sgd, peak_lr=[1.0, 2.0], explore_steps=1, total_steps=2),
        "peak_lr",
    )

    def sharp(**changes: Any) -> Callable[[], Any]:
        return lambda: train.keskar_sharpness(quadratic, W, X, **{"max_steps": 2, **changes})

    for what, changes, words in (
        ("epsilon: zero", {"epsilon": 0.0}, "epsilon must be a positive"),
        ("epsilon: a string", {"epsilon": "1e-4"}, "epsilon must be a number"),
        ("lr", {"lr": -1.0}, "lr must be a positive"),
        ("max_steps", {"max_steps": 0}, "max_steps must be at least 1"),
        ("max_steps: a float", {"max_steps": 5.0}, "max_steps must be an int"),
        ("optimizer", {"optimizer": "lion"}, "optimizer must be one of"),
        ("optimizer: a number", {"optimizer": 5}, "optimizer must be"),
        ("num_starts", {"num_starts": 0}, "num_starts must be at least 1"),
        ("subspace_dim", {"subspace_dim": 0}, "subspace_dim must be"),
        ("tol", {"tol": "0.1"}, "tol must be a number"),
        ("seed", {"seed": None}, "seed must be an int"),
        ("monitor", {"monitor": 5}, "monitor must be a function"),
    ):
        yield f"keskar_sharpness: {what}", sharp(**changes), words
    yield (
        "keskar_sharpness: loss_fn",
        lambda: train.keskar_sharpness(None, W, X),
        "loss_fn must be a function",
    )
    yield "keskar_sharpness: params", lambda: train.keskar_sharpness(quadratic, None, X), "params"
    yield "keskar_sharpness: data", lambda: train.keskar_sharpness(quadratic, W, 5), "data must be tensors"

    state = train.absa_init(8, 0.1)
    for what, changes, words in (
        ("batch_size", {"batch_size": 0}, "batch_size must be"),
        ("lr", {"lr": "0.1"}, "lr must be a number"),
        ("alpha", {"alpha": 0.5}, "alpha must be"),
        ("beta", {"beta": "2"}, "beta must be a number"),
        ("kappa", {"kappa": 0}, "kappa must be"),
        ("max_batch_size", {"max_batch_size": 1}, "max_batch_size must be"),
        ("adversarial_share", {"adversarial_share": 2.0}, "adversarial_share must be"),
        ("lr_decay", {"lr_decay": -1.0}, "lr_decay must be"),
        ("lr_decay_epochs", {"lr_decay_epochs": 5}, "lr_decay_epochs must be"),
    ):
        yield (
            f"absa_init: {what}",
            lambda c=changes: train.absa_init(**{"batch_size": 8, "lr": 0.1, **c}),
            words,
        )
    yield "absa_update: state", lambda: train.absa_update(None, 1.0), "state must be"
    yield "absa_update: eigenvalue", lambda: train.absa_update(state, "1"), "eigenvalue must be a number"
    yield "absa_update: NaN", lambda: train.absa_update(state, NAN), "eigenvalue must be"

    def absa(**changes: Any) -> Callable[[], Any]:
        options = {"num_epochs": 1, **changes}
        return lambda: train.absa(*problem(), (X, Y), options.pop("state", state), **options)

    for what, changes, words in (
        ("state", {"state": None}, "state must be"),
        ("num_epochs", {"num_epochs": -1}, "num_epochs must be"),
        ("num_epochs: a float", {"num_epochs": 1.5}, "num_epochs must be an int"),
        ("momentum", {"momentum": 2.0}, "momentum must be"),
        ("momentum: a string", {"momentum": "0.9"}, "momentum must be a number"),
        ("weight_decay", {"weight_decay": -1.0}, "weight_decay must be"),
        ("epsilon", {"epsilon": "a"}, "epsilon must be a number"),
        ("hessian_examples", {"hessian_examples": 0}, "hessian_examples must be"),
        ("tol", {"tol": 2.0}, "tol must be"),
        ("mode", {"mode": "fast"}, "mode must be one of"),
        ("microbatch_size", {"microbatch_size": 0}, "microbatch_size must be"),
        ("seed", {"seed": None}, "seed must be an int"),
        ("monitor", {"monitor": 5}, "monitor must be a function"),
        ("resume", {"resume": 5}, "resume must be"),
    ):
        yield f"absa: {what}", absa(**changes), words
    yield "fgsm: epsilon", lambda: train.fgsm(*problem(), (X, Y), "a"), "epsilon must be a number"
    yield "fgsm: epsilon negative", lambda: train.fgsm(*problem(), (X, Y), -1.0), "epsilon must be"
    yield "fgsm: loss_fn", lambda: train.fgsm(None, W, X, 0.1), "loss_fn must be a function"

    for what, changes, words in (
        ("lr", {"lr": -1.0}, "lr must be"),
        ("lr: a string", {"lr": "0.1"}, "lr must be a number"),
        ("betas", {"betas": (1.5, 0.9)}, "betas must be|betas.0"),
        ("betas: a number", {"betas": 0.9}, "betas must be"),
        ("eps", {"eps": -1.0}, "eps must be"),
        ("weight_decay", {"weight_decay": NAN}, "weight_decay must be"),
        ("hessian_power", {"hessian_power": -1.0}, "hessian_power must be"),
        ("block_size", {"block_size": 0}, "block_size must be"),
        ("update_every", {"update_every": 0}, "update_every must be"),
        ("num_probes", {"num_probes": 0}, "num_probes must be"),
        ("seed", {"seed": None}, "seed must be an int"),
        ("average_kernels", {"average_kernels": "no"}, "average_kernels must be True or False"),
        ("absolute", {"absolute": "no"}, "absolute must be True or False"),
        ("maximize", {"maximize": "no"}, "maximize must be True or False"),
        ("foreach", {"foreach": "no"}, "foreach must be True or False"),
        ("diagonal", {"diagonal": 5}, "diagonal must be a function"),
    ):
        yield (
            f"AdaHessian: {what}",
            lambda c=changes: train.AdaHessian(nn.Linear(2, 1).parameters(), **c),
            words,
        )
    yield "AdaHessian: a module", lambda: train.AdaHessian(model()), "params.*parameters\\(\\)"
    yield "AdaHessian: empty", lambda: train.AdaHessian([]), "empty"
    yield "AdaHessian: numbers", lambda: train.AdaHessian([1.0]), "Tensor"
    yield "block_average: block_size", lambda: train.block_average(W, 0), "block_size must be"
    yield "block_average: a list", lambda: train.block_average([1.0], 1), "diagonal must be a tensor"


def drawings() -> Iterator[Row]:
    plots = pytest.importorskip("hvpkit.plots", exc_type=ImportError)
    yield "density: extremes", lambda: plots.density(extremes()), "d must be.*Density"
    yield "density: none", lambda: plots.density(None), "d must be.*Density"
    yield (
        "density: other extremes",
        lambda: plots.density(density(), extremes=5),
        "extremes must be.*ExtremeResult",
    )
    yield "convergence: density", lambda: plots.convergence(density()), "ex must be.*ExtremeResult"
    yield "convergence: end", lambda: plots.convergence(extremes(), "top"), "end must be one of"
    yield "residuals: extremes", lambda: plots.residuals(extremes()), "found must be.*SolveResult"
    yield (
        "residuals: of nothing",
        lambda: plots.residuals(hk.solve(torch.eye(3), torch.zeros(3))),
        "found has no history",
    )
    yield "layers: a list", lambda: plots.layers([extremes()]), "results must be.*by name"
    yield "layers: empty", lambda: plots.layers({}), "results"
    yield "layers: numbers", lambda: plots.layers({"a": 1.0}), "results"
    yield "layers: log", lambda: plots.layers({"a": extremes()}, log="x"), "log must be True or False"
    yield "training: log", lambda: plots.training([(0, extremes())], log="x"), "log must be True or False"
    yield "training: unit", lambda: plots.training([(0, extremes())], unit=5), "unit must be"
    yield "training: a result", lambda: plots.training(extremes()), "results must be"
    yield "training: empty", lambda: plots.training([]), "results"
    yield "training: numbers", lambda: plots.training([1.0]), "results"
    yield "extremes: ex", lambda: plots.extremes(density(), quadratic, W, X), "ex must be.*ExtremeResult"
    yield "landscape: ex", lambda: plots.loss_landscape(quadratic, W, X, None), "ex must be.*ExtremeResult"
    yield (
        "landscape: points",
        lambda: plots.loss_landscape(quadratic, W, X, extremes(), num_points=1),
        "num_points must be",
    )
    yield (
        "landscape: distances",
        lambda: plots.loss_landscape(quadratic, W, X, extremes(), distances=3.0),
        "distances must be",
    )
    largest = extremes().largest
    yield (
        "along: pair",
        lambda: plots.loss_along_eigenvector(quadratic, W, X, extremes()),
        "pair must be.*Eigenpair",
    )
    yield (
        "along: distance",
        lambda: plots.loss_along_eigenvector(quadratic, W, X, largest, distance=-1.0),
        "distance must be",
    )
    yield (
        "along: params",
        lambda: plots.loss_along_eigenvector(quadratic, torch.ones(7), X, largest),
        "params|vector",
    )
    yield "report: operator", lambda: hk.report(torch.eye(3), extremes()), "LinearOperator"
    yield "report: ex", lambda: hk.report(H(), None), "ex must be.*ExtremeResult"
    yield "report: density", lambda: hk.report(H(), extremes(), 5), "density must be.*Density"
    yield "report: path", lambda: hk.report(H(), extremes(), path=5), "path must be a path"


def zoos() -> Iterator[Row]:
    for name in ("c1", "c2", "cifar_resnet", "resnet18_cifar", "digits_cnn", "mlp", "tiny_gpt", "tiny_vit"):
        make = getattr(zoo, name)
        yield f"{name}: seed", lambda m=make: m(seed=None), "seed must be an int"
        if name != "digits_cnn" and name != "tiny_gpt":
            yield f"{name}: num_classes", lambda m=make: m(num_classes=0), "num_classes must be"
    yield "cifar_resnet: depth", lambda: zoo.cifar_resnet(21), "depth must be"
    yield "cifar_resnet: depth float", lambda: zoo.cifar_resnet(20.0), "depth must be an int"
    yield "cifar_resnet: shortcut", lambda: zoo.cifar_resnet(20, shortcut="x"), "shortcut must be one of"
    yield "cifar_resnet: width", lambda: zoo.cifar_resnet(20, width=0), "width must be"
    yield (
        "cifar_resnet: batchnorm",
        lambda: zoo.cifar_resnet(20, batchnorm="no"),
        "batchnorm must be True or False",
    )
    yield (
        "cifar_resnet: residual",
        lambda: zoo.cifar_resnet(20, residual="no"),
        "residual must be True or False",
    )
    yield "digits_cnn: width", lambda: zoo.digits_cnn("8"), "width must be an int"
    yield "mlp: hidden", lambda: zoo.mlp(hidden=64), "hidden must be"
    yield "mlp: hidden zero", lambda: zoo.mlp(hidden=(0,)), "hidden.0. must be"
    yield "mlp: activation", lambda: zoo.mlp(activation="relu"), "activation must make"
    yield "tiny_gpt: heads", lambda: zoo.tiny_gpt(width=30, num_heads=4), "num_heads|width"
    yield "tiny_gpt: context", lambda: zoo.tiny_gpt(context=0), "context must be"
    yield "tiny_vit: patch", lambda: zoo.tiny_vit(image_size=30, patch_size=4), "patch_size|image_size"
    yield "cifar100: a number", lambda: zoo.cifar100(5), "dir must be a path"
    yield "cifar10: a number", lambda: zoo.cifar10(5), "dir must be a path"
    yield "train_classifier: model", lambda: zoo.train_classifier(None, (X, Y)), "model must be"
    yield "train_classifier: data", lambda: zoo.train_classifier(model(), X), "data must be"
    yield (
        "train_classifier: target_loss",
        lambda: zoo.train_classifier(model(), (X, Y), target_loss="0"),
        "target_loss must",
    )
    yield (
        "train_classifier: max_epochs",
        lambda: zoo.train_classifier(model(), (X, Y), max_epochs=0),
        "max_epochs must be",
    )
    yield (
        "train_classifier: monitor",
        lambda: zoo.train_classifier(model(), (X, Y), monitor=5),
        "monitor must be a function",
    )


def variables() -> Iterator[Row]:
    objective, params = problem()
    maps: list[tuple[str, Any, Any, str]] = [
        ("a number", 5, None, "map must be a function map.z."),
        ("a matrix of other rows", torch.ones(3, 2), None, "map must be a matrix .n, m.*43 parameters"),
        ("a vector", torch.ones(43), None, "map must be a matrix"),
        ("float64", torch.ones(43, 2).double(), None, "map has dtype"),
        ("z0 of other columns", torch.ones(43, 2), torch.ones(3), "z0 must be a vector .m. with m = 2"),
        ("z0 in float64", torch.ones(43, 2), torch.ones(2).double(), "z0 has dtype"),
        ("a function without z0", lambda z: z, None, "z0 must be given"),
        ("of another name", lambda z: {"other": z}, W, "map.z. must be a tree shaped like the parameters"),
        ("of another shape", lambda z: {"0.bias": z}, W, "'0.bias' has shape .4,., expected .5,."),
        ("of another dtype", lambda z: {"0.bias": z.new_zeros(5).double()}, W, "map.z0.*0.bias.*dtype"),
        ("of no tensor", lambda z: {"0.bias": 1.0}, W, "map.z. must be a tree of tensors"),
        ("of no arguments", lambda: 0, W, "map must take the arguments"),
    ]
    for name, changed, z0, words in maps:
        yield f"map: {name}", lambda m=changed, z=z0: hk.reparametrize(objective, params, m, z), words
    yield (
        "map: no function of z",
        lambda: hk.hessian(*hk.reparametrize(objective, params, lambda z: params, W), (X, Y)),
        "does not depend on",
    )
    yield (
        "inputs: loader",
        lambda: hk.perturb_inputs(objective, params, [(X, Y)]),
        "data must be tensors.*shared",
    )
    yield (
        "inputs: weighted",
        lambda: hk.perturb_inputs(objective, params, hk.as_data((X, Y)).subset([0, 1], torch.ones(2))),
        "data must be tensors",
    )
    yield (
        "inputs: name",
        lambda: hk.perturb_inputs(objective, params, (X, Y), "x"),
        "inputs must name.*'0', '1'",
    )
    yield "inputs: a dict", lambda: hk.perturb_inputs(quadratic, W, {"x": X}), "inputs must name.*'x'"
    yield (
        "inputs: targets",
        lambda: hk.perturb_inputs(objective, params, (X, Y), 1),
        "inputs must be a floating",
    )
    yield (
        "inputs: shared",
        lambda: hk.perturb_inputs(quadratic, W, X, shared=1),
        "shared must be True or False",
    )
    yield "activations: a function", lambda: hk.perturb_activations(quadratic, W, X, "0"), "objective must be"
    yield (
        "activations: module",
        lambda: hk.perturb_activations(objective, params, (X, Y), "3"),
        "module must be the name of a module.*0, 1, 2",
    )
    yield (
        "activations: sampled",
        lambda: hk.hessian(*hk.perturb_activations(objective, params, (X, Y), "1")).coarsen(5),
        "not over examples that may be left out",
    )


AREAS = (
    over_data,
    losses,
    variables,
    late,
    options,
    modules,
    solvers,
    estimators,
    operators,
    training,
    drawings,
    zoos,
)
ERRORS = (TypeError, ValueError, ArithmeticError, hk.UnstableDataError)
FAULTS: tuple[type[Exception], ...] = (*ERRORS, RuntimeError, OSError, LookupError)
"""Errors of the user's own code and of torch's in it, to which notes are added."""


@pytest.mark.parametrize("area", AREAS, ids=lambda area: area.__name__)
def test_bad_input_is_refused_with_the_argument_and_the_remedy(area: Callable[[], Iterator[Row]]) -> None:
    rows = list(area())
    assert len({name for name, _, _ in rows}) == len(rows)
    wrong, expected = [], FAULTS if area is late else ERRORS
    for name, call, words in rows:
        try:
            found = f"accepted: {call()}"
        except expected as error:
            told = " ".join([str(error), *getattr(error, "__notes__", ())]).replace("\n", " ")
            if re.search(words, told, re.IGNORECASE):
                continue
            found = f"{type(error).__name__}: {told}"
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        wrong.append(f"{name}: expected {words!r}, {found:.300}")
    assert not wrong, "\n".join(wrong)


class Late(Dataset):
    """Examples of which one changes from the tenth pass on."""

    def __init__(self, change: Callable[[Tensor, Tensor], Any], passes: float = INF) -> None:
        self.change, self.passes, self.reads = change, passes, 0

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        self.reads += index == 20
        late = index == 20 and 10 <= self.reads < 10 + self.passes
        return self.change(X[index], Y[index]) if late else (X[index], Y[index])


def raise_lost(*_: Tensor) -> None:
    raise OSError("disk lost")


LATE: list[tuple[str, Callable[[Tensor, Tensor], Any], str]] = [
    ("raises", raise_lost, "disk lost.*example 20 of the dataset.*batch 2"),
    ("label", lambda x, y: (x, y + 9), "batch 2.*examples 16 to 23.*example 20"),
    ("dtype", lambda x, y: (x.double(), y), "batch 2.*parameters are float32: convert"),
    ("shape", lambda x, y: (x[:2], y), "equal size.*batch 2"),
    ("no label", lambda x, y: (x,), "batch 2"),
    ("text", lambda x, y: (x, "cat"), "batch 2"),
]


def late_solve(dataset: Late) -> hk.ExtremeResult:
    H = hk.hessian(*problem(), in_eights(dataset), mode="reverse-over-reverse", memory_limit=0)
    return hk.extreme_eigenvalues(H, tol=1e-6, max_matvecs=30)


@pytest.mark.parametrize(("change", "words"), [row[1:] for row in LATE], ids=[row[0] for row in LATE])
def test_a_fault_in_the_tenth_pass_names_the_batch(change: Callable, words: str) -> None:
    with pytest.raises(FAULTS) as found:
        late_solve(Late(change))
    told = " ".join([str(found.value), *found.value.__notes__])
    assert re.search(words, told)
    assert "mode=" not in told


def test_numbers_that_stop_being_finite_are_located() -> None:
    found = late_solve(Late(lambda x, y: (x * NAN, y)))
    assert found.status is hk.Status.NON_FINITE
    assert "batch 2" in found.message


def test_numbers_that_are_not_finite_in_one_pass_only_are_told_as_that() -> None:
    found = late_solve(Late(lambda x, y: (x * NAN, y), passes=1))
    assert found.status is hk.Status.NON_FINITE
    assert "other numbers in each pass" in found.message


def test_the_table_is_long() -> None:
    assert sum(len(list(area())) for area in (over_data, losses, options, modules, training)) > 400


def test_solvers_and_estimators_refuse_before_the_first_product() -> None:
    calls = [
        (function, changes)
        for function in (
            hk.extreme_eigenvalues,
            hk.lanczos,
            hk.lobpcg,
            hk.chebyshev,
            hk.power,
            hk.oja,
            hk.eigsh,
        )
        for _, changes, _ in SHARED
    ]
    calls += [(hk.lanczos, changes) for _, changes, _ in (*PAIRS, *COUNTS, *CONFIDENT)]
    calls += [
        (estimate, {"monitor": 5})
        for estimate in (hk.trace, hk.diagonal, hk.spectral_density, hk.frobenius_norm)
    ]
    H()
    PRODUCTS.clear()
    for function, changes in calls:
        with pytest.raises((TypeError, ValueError)):
            function(H(), **changes)
    assert not PRODUCTS


def test_counts_may_be_integers_of_numpy() -> None:
    op, many, few = hk.aslinearoperator(torch.diag(torch.arange(1.0, 31.0))), np.int64(4), np.int32(2)
    for ask in (
        lambda k, w: hk.lanczos(op, k, block_size=w).values,
        lambda k, w: hk.top_eigenvalues(op, k).values,
        lambda k, w: hk.follow_top(op, k)[0].values,
        lambda k, w: hk.spectral_density(op, num_steps=k, num_probes=w, block_size=w).nodes,
        lambda k, w: torch.tensor(hk.logdet(op, num_steps=k, num_probes=w).value),
        lambda k, w: hk.moments(op, k).value,
        lambda k, w: op.to_dense(w),
        lambda k, w: (
            hk.blocks(lambda p, b: (b @ p) ** 2, W, X, num_probes=w, num_steps=k, density=True)[
                "params"
            ].density.nodes
        ),
    ):
        assert torch.equal(ask(few, many), ask(int(few), int(many)))
