from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.backends import cudnn, mkldnn

import hvpkit as hk
from hvpkit.autodiff.exact import FLOAT32_BACKENDS, full_float32

ALL = [kind for kinds in FLOAT32_BACKENDS.values() for kind in kinds]


def read(setting: Callable[[], object]) -> object:
    try:
        return setting()
    except RuntimeError:
        return "mixed"


def settings() -> list[object]:
    older = (
        torch.get_float32_matmul_precision,
        lambda: cudnn.allow_tf32,
        lambda: torch.backends.cuda.matmul.allow_tf32,
    )
    return [*(kind.fp32_precision for kind in ALL), torch.backends.fp32_precision, *map(read, older)]


def set_generic() -> None:
    torch.backends.fp32_precision = "tf32"


def set_conv() -> None:
    cudnn.conv.fp32_precision = "ieee"


def set_both_ways() -> None:
    torch.set_float32_matmul_precision("high")
    mkldnn.matmul.fp32_precision = "bf16"
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def set_older() -> None:
    cudnn.allow_tf32 = False


CALLERS: dict[str, Callable[[], None]] = {
    "default": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "older": set_older,
    "generic": set_generic,
    "one kind": set_conv,
    "both ways": set_both_ways,
}


@pytest.fixture(autouse=True)
def _settings_are_restored() -> Iterator[None]:
    before = settings()
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = True
    for kind in ALL:
        kind.fp32_precision = "none"
    for kind in FLOAT32_BACKENDS["cuda"][1:]:
        kind.fp32_precision = "tf32"
    assert settings() == before


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("device", ["cuda", "cpu", "meta"])
def test_float32_is_full_inside_and_the_callers_settings_are_restored(caller: str, device: str) -> None:
    CALLERS[caller]()
    before = settings()
    for _ in range(2):
        with full_float32(torch.device(device)):
            assert {kind.fp32_precision for kind in FLOAT32_BACKENDS.get(device, ())} <= {"none", "ieee"}
        assert settings() == before
    with pytest.raises(KeyError), full_float32(torch.device(device)):
        raise KeyError
    assert settings() == before


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("caller", ["default", "high", "medium"])
def test_older_names_can_be_read_inside(caller: str, device: str) -> None:
    CALLERS[caller]()
    with full_float32(torch.device(device)):
        with cudnn.flags(enabled=False):
            assert not cudnn.enabled
        if device == "cuda":
            assert not cudnn.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest"


def test_products_run_in_full_float32() -> None:
    CALLERS["medium"]()
    before, seen = settings(), []

    def loss_fn(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        seen.append(mkldnn.matmul.fp32_precision)
        return (x @ p) ** 2

    p, x = torch.ones(2), torch.ones(3, 2)
    hk.hvp(loss_fn, p, x, p)
    hk.hessian(loss_fn, p, x) @ p
    assert set(seen) == {"ieee"}
    assert settings() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("caller", ["default", "high"])
def test_float32_products_with_convolutions_on_a_gpu_have_the_digits_of_float32(caller: str) -> None:
    CALLERS[caller]()
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(8, 8, 3, 3, generator=generator), torch.randn(4, 8, 16, 16, generator=generator)

    def loss_fn(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, w).tanh().square().sum((1, 2, 3))

    expected = hk.hvp(loss_fn, w.double(), x.double(), w.double())
    found = hk.hvp(loss_fn, w.cuda(), x.cuda(), w.cuda()).cpu()
    assert float((found - expected).norm() / expected.norm()) < 2e-6
