from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from hvpkit import zoo

MODELS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "c1": (zoo.c1, (3, 32, 32), (10,)),
    "c2": (zoo.c2, (3, 32, 32), (10,)),
    "cifar_resnet": (zoo.cifar_resnet, (3, 32, 32), (10,)),
    "resnet18_cifar": (partial(zoo.resnet18_cifar, width=8), (3, 32, 32), (10,)),
    "digits_cnn": (zoo.digits_cnn, (1, 8, 8), (10,)),
    "mlp": (zoo.mlp, (1, 8, 8), (10,)),
    "tiny_vit": (zoo.tiny_vit, (3, 32, 32), (10,)),
    "tiny_gpt": (zoo.tiny_gpt, (32,), (32, 64)),
}
every_model = pytest.mark.parametrize("name", MODELS)


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (32, 464_154), (38, 561_370), (56, 853_018)])
def test_resnets_have_the_known_number_of_parameters(depth: int, count: int) -> None:
    assert num_parameters(zoo.cifar_resnet(depth)) == count
    plain = zoo.cifar_resnet(depth, residual=False)
    assert num_parameters(plain) == count, "identity shortcuts have none"


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (56, 0.85)])
def test_resnets_have_the_number_of_parameters_that_the_paper_says(depth: int, millions: float) -> None:
    assert round(num_parameters(zoo.cifar_resnet(depth)) / 1e6, 2) == millions


def test_projections_are_counted() -> None:
    assert num_parameters(zoo.cifar_resnet(20, shortcut="projection")) == 272_474
    assert num_parameters(zoo.cifar_resnet(20, shortcut="projection", residual=False)) == 269_722


def test_without_batchnorm_its_scales_and_offsets_are_not_there() -> None:
    channels = 7 * 16 + 6 * 32 + 6 * 64
    assert num_parameters(zoo.cifar_resnet(20, batchnorm=False)) == 269_722 - 2 * channels


def test_resnet18_has_the_known_number_of_parameters() -> None:
    assert num_parameters(zoo.resnet18_cifar()) == 11_173_962
    assert num_parameters(zoo.resnet18_cifar(num_classes=100)) == 11_173_962 + 90 * 513


def test_c1_has_the_published_layers() -> None:
    shapes = [(64, 3, 5, 5), (64, 64, 5, 5), (384, 4096), (192, 384), (10, 192)]
    assert [tuple(p.shape) for p in zoo.c1().parameters() if p.ndim > 1] == shapes
    assert num_parameters(zoo.c1()) == 1_756_682
    stage, tail = "Conv2d ReLU BatchNorm2d MaxPool2d", "Flatten Linear ReLU Linear ReLU Linear"
    assert " ".join(type(m).__name__ for m in zoo.c1()) == f"{stage} {stage} {tail}"
    assert zoo.c1()[:4](torch.zeros(1, 3, 32, 32)).shape == (1, 64, 16, 16)
    assert zoo.c1()[:8](torch.zeros(1, 3, 32, 32)).shape == (1, 64, 8, 8)


def test_c2_has_the_published_layers() -> None:
    shapes = [(64, 3, 3, 3), (64, 64, 3, 3), (128, 64, 3, 3), (128, 128, 3, 3)]
    shapes += [(256, 3200), (256, 256), (10, 256)]
    assert [tuple(p.shape) for p in zoo.c2().parameters() if p.ndim > 1] == shapes
    stage, tail = "Conv2d ReLU BatchNorm2d", "Flatten Linear ReLU Linear ReLU Linear"
    assert " ".join(type(m).__name__ for m in zoo.c2()) == " ".join(
        [f"{stage} {stage} MaxPool2d"] * 2 + [tail]
    )
    assert num_parameters(zoo.c2()) == 1_148_746


def test_an_mlp_has_the_widths_asked_for() -> None:
    model = zoo.mlp(in_features=5, hidden=[4, 3], num_classes=2, activation=nn.Tanh)
    assert [type(m) for m in model] == [nn.Flatten, nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    assert [tuple(p.shape) for p in model.parameters()] == [(4, 5), (4,), (3, 4), (3,), (2, 3), (2,)]
    assert [type(m) for m in zoo.mlp(hidden=())] == [nn.Flatten, nn.Linear]


def test_transformers_have_the_number_of_parameters_of_their_formula() -> None:
    w, layers = 12, 3
    blocks = layers * (12 * w**2 + 13 * w) + 2 * w
    gpt = zoo.tiny_gpt(vocab_size=11, context=7, width=w, num_layers=layers, num_heads=3)
    assert num_parameters(gpt) == (11 + 7) * w + blocks
    vit = zoo.tiny_vit(
        image_size=9, channels=2, patch_size=3, width=w, num_layers=layers, num_heads=2, num_classes=5
    )
    assert num_parameters(vit) == (2 * 9 + 1 + 9) * w + blocks + (w + 1) * 5
    assert num_parameters(zoo.tiny_gpt()) == 28_544
    assert num_parameters(zoo.tiny_vit()) == 119_098


@every_model
def test_outputs_have_a_row_for_each_example(name: str) -> None:
    make, shape, outputs = MODELS[name]
    x = torch.zeros(2, *shape, dtype=torch.int64 if name == "tiny_gpt" else torch.float32)
    assert make()(x).shape == (2, *outputs)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("tiny_gpt", "digits_cnn")])
def test_the_number_of_classes_is_the_callers(name: str) -> None:
    make, shape, _ = MODELS[name]
    assert make(num_classes=3)(torch.zeros(2, *shape)).shape == (2, 3)


@every_model
def test_a_seed_gives_the_same_parameters_and_another_one_others(name: str) -> None:
    make = MODELS[name][0]
    torch.manual_seed(1)
    first = flat(make(seed=3))
    torch.manual_seed(2)
    assert torch.equal(first, flat(make(seed=3)))
    assert float((first == flat(make(seed=4))).double().mean()) < 0.2
    assert torch.equal(flat(make()), flat(make(seed=0)))


def test_a_generator_is_a_seed() -> None:
    generator = torch.Generator().manual_seed(5)
    first, second = zoo.mlp(seed=generator), zoo.mlp(seed=generator)
    assert not torch.equal(flat(first), flat(second))
    assert torch.equal(flat(first), flat(zoo.mlp(seed=torch.Generator().manual_seed(5))))


@every_model
def test_the_global_generator_stays_as_it_is(name: str) -> None:
    before = torch.get_rng_state()
    MODELS[name][0](seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters_do_not_depend_on_the_default_device() -> None:
    with torch.device("meta"):
        model = zoo.mlp()
    assert torch.equal(flat(model), flat(zoo.mlp()))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: zoo.c1(num_classes=0), "num_classes"),
        (lambda: zoo.c2(num_classes=0), "num_classes"),
        (lambda: zoo.mlp(hidden=[4, 0]), r"hidden\[1\]"),
        (lambda: zoo.mlp(in_features=0), "in_features"),
        (lambda: zoo.mlp(num_classes=0), "num_classes"),
        (lambda: zoo.cifar_resnet(21), "depth must be 6 n"),
        (lambda: zoo.cifar_resnet(2), "depth"),
        (lambda: zoo.cifar_resnet(width=0), "width"),
        (lambda: zoo.cifar_resnet(num_classes=0), "num_classes"),
        (lambda: zoo.cifar_resnet(shortcut="A"), "shortcut"),
        (lambda: zoo.resnet18_cifar(width=0), "width"),
        (lambda: zoo.resnet18_cifar(num_classes=0), "num_classes"),
        (lambda: zoo.tiny_gpt(vocab_size=0), "vocab_size"),
        (lambda: zoo.tiny_gpt(context=0), "context"),
        (lambda: zoo.tiny_gpt(num_layers=0), "num_layers"),
        (lambda: zoo.tiny_gpt(num_heads=0), "num_heads"),
        (lambda: zoo.tiny_gpt(width=6, num_heads=4), "width must be a multiple"),
        (lambda: zoo.tiny_vit(width=0), "width"),
        (lambda: zoo.tiny_vit(channels=0), "channels"),
        (lambda: zoo.tiny_vit(image_size=0), "image_size"),
        (lambda: zoo.tiny_vit(patch_size=0), "patch_size"),
        (lambda: zoo.tiny_vit(num_classes=0), "num_classes"),
        (lambda: zoo.tiny_vit(image_size=30), "image_size must be a multiple"),
        (lambda: zoo.mlp(seed=-1), "seed"),
    ],
)
def test_bad_arguments_are_refused_by_name(make: Callable[[], nn.Module], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        make()
