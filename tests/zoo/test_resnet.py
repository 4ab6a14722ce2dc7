from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvpkit import zoo


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_batchnorm_is_there_only_where_asked_for(shortcut: str) -> None:
    def num_norms(batchnorm: bool) -> int:
        model = zoo.cifar_resnet(8, batchnorm=batchnorm, shortcut=shortcut)
        return sum("Norm" in type(module).__name__ for module in model.modules())

    assert num_norms(False) == 0
    assert num_norms(True) == 7 + 2 * (shortcut == "projection")


@pytest.mark.parametrize("batchnorm", [True, False])
def test_a_block_without_residual_connection_passes_nothing_around_its_convolutions(batchnorm: bool) -> None:
    model = zoo.cifar_resnet(8, residual=False, batchnorm=batchnorm, width=4)
    for block in model.blocks:
        block.second[0].weight.data.zero_()
        assert not block(images(2, block.first[0].in_channels, 8, 8)).any()


def test_a_residual_block_passes_its_input_around_its_convolutions() -> None:
    same, halved, _ = zoo.cifar_resnet(8, width=4).blocks
    for block in (same, halved):
        block.second[0].weight.data.zero_()
    x = images(2, 4, 8, 8)
    assert torch.equal(same(x), x.relu())
    passed = halved(x)
    assert passed.shape == (2, 8, 4, 4)
    assert torch.equal(passed[:, :4], x[:, :, ::2, ::2].relu())
    assert not passed[:, 4:].any()


def test_a_projection_is_a_convolution_of_every_second_pixel() -> None:
    halved = zoo.cifar_resnet(8, width=4, shortcut="projection", batchnorm=False).blocks[1]
    halved.second[0].weight.data.zero_()
    x, weight = images(2, 4, 8, 8), halved.shortcut[0].weight
    expected = torch.einsum("oi,bihw->bohw", weight[:, :, 0, 0], x[:, :, ::2, ::2]).relu()
    torch.testing.assert_close(halved(x), expected)


@pytest.mark.parametrize("make", [zoo.cifar_resnet, zoo.resnet18_cifar])
def test_depth_counts_the_layers_with_weights(make: type) -> None:
    model = make()
    paths = [
        m
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in name
    ]
    assert len(paths) == (20 if make is zoo.cifar_resnet else 18)
    strides = [block.first[0].stride[0] for block in model.blocks]
    assert strides == ([1, 1, 1, 2, 1, 1, 2, 1, 1] if make is zoo.cifar_resnet else [1, 1, 2, 1, 2, 1, 2, 1])


def test_convolutions_have_hes_variance() -> None:
    for block in zoo.cifar_resnet(20).blocks:
        for conv in (block.first[0], block.second[0]):
            variance = 2 / (9 * conv.out_channels)
            stderr = variance * (2 / conv.weight.numel()) ** 0.5
            assert abs(float(conv.weight.detach().square().mean()) - variance) < 4.5 * stderr


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_depth_does_not_blow_up_activations_without_batchnorm(shortcut: str) -> None:
    model = zoo.cifar_resnet(56, batchnorm=False, shortcut=shortcut)
    x = images(4, 3, 32, 32)
    with torch.no_grad():
        start = model.stem(x).relu()
        end = model.blocks[:9](start)  # one stage: blocks of one shape
        assert float(end.square().mean() / start.square().mean()) < torch.e
        assert 0.01 < float(model(x).std()) < 10


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("batchnorm", [True, False])
def test_every_variant_can_be_trained(batchnorm: bool, residual: bool) -> None:
    model = zoo.cifar_resnet(20, batchnorm=batchnorm, residual=residual, width=8, num_classes=2)
    y = torch.arange(16) % 2
    x = images(16, 3, 16, 16) + (2 * y - 1)[:, None, None, None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < math.log(2) / 2
