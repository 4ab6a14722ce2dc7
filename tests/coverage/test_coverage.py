"""The table in docs/coverage.md holds, and names every module of torch.nn."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hvpkit as hk
from oracles import ggn_by_differences, hessian_by_differences
from torch_nn import DOCUMENT, LACKING, MODES, NOT_COVERED, ROWS, case, document, log_cosh, modules_of_torch


def test_every_module_of_torch_is_in_the_table_or_named_with_its_reason() -> None:
    in_table = {row.split()[0] for row in ROWS}
    assert set(modules_of_torch()) - in_table - set(NOT_COVERED) == set()
    assert in_table & set(NOT_COVERED) == set()
    assert len(in_table) > 140


def test_the_document_is_what_the_table_says() -> None:
    assert DOCUMENT.read_text() == document(), "run: python tests/torch_nn.py"


@pytest.mark.filterwarnings(
    "ignore:`torch.nn.utils.weight_norm` is deprecated", "ignore:enable_nested_tensor is True"
)
@pytest.mark.parametrize("row", [row for row in ROWS if "." in row or hasattr(nn, row.split()[0])])
def test_products_equal_central_differences(row: str) -> None:
    problem = case(row)
    objective, params = hk.from_module(problem.model, problem.criterion)

    def loss_fn(params: dict, batch: tuple) -> torch.Tensor:
        return problem.losses(problem.outputs(params, batch), batch)

    with sdpa_kernel(SDPBackend.MATH):
        hessian = hessian_by_differences(loss_fn, params, problem.batch)
        ggn = ggn_by_differences(problem.outputs, problem.losses, params, problem.batch)
    scale = float(torch.linalg.matrix_norm(hessian) + torch.linalg.matrix_norm(ggn))
    assert torch.linalg.matrix_norm(hessian - hessian.mT) < 1e-6 * scale, "torch's own gradient is wrong"
    v = torch.randn(len(hessian), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    allowed = 1e-7 * scale * torch.linalg.matrix_norm(v)
    for kind, oracle in ((hk.hessian, hessian), (hk.ggn, ggn)):
        for mode in MODES:
            operator = kind(objective, params, problem.batch, mode=mode)
            if mode in LACKING.get(row, ()):
                with pytest.raises(NotImplementedError):
                    operator @ v
            else:
                error = torch.linalg.matrix_norm(operator @ v - oracle @ v)
                assert error < allowed, f"{operator!r}: {float(error / allowed):g} times what is allowed"


@pytest.mark.parametrize("row", LACKING)
def test_auto_confirms_the_only_mode_that_works_by_differences(row: str) -> None:
    problem = case(row)
    for kind in (hk.hessian, hk.ggn):
        H = kind(*hk.from_module(problem.model, problem.criterion), problem.batch)
        if H.mode != "finite-difference":
            assert "agrees with finite differences to" in H.mode_reason


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.CrossMapLRN2d(2), "model: torch's gradient of CrossMapLRN2d is wrong; use LocalResponseNorm"),
        (
            nn.FractionalMaxPool2d(2, 2),
            "model: FractionalMaxPool2d draws other regions .* pass it _random_samples",
        ),
        (
            nn.FractionalMaxPool3d(2, 2),
            "model: FractionalMaxPool3d draws other regions .* pass it _random_samples",
        ),
        (nn.LazyLinear(2), "model: lazy parameter '.*weight' has no shape yet; run one forward pass first"),
        (nn.LazyBatchNorm2d(), "model: lazy parameter '.*weight' has no shape yet"),
        (nn.Embedding(4, 2, max_norm=1.0), "model: an embedding with max_norm rescales its weight"),
        (nn.EmbeddingBag(4, 2, max_norm=1.0), "model: an embedding with max_norm rescales its weight"),
    ],
)
def test_modules_that_have_no_right_product_are_refused_by_name(model: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        hk.from_module(nn.Sequential(nn.Linear(2, 2), model), log_cosh)
