"""Residual networks for CIFAR, with and without BatchNorm, with and without the residual connections.

Source: He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition, CVPR 2016, doi:10.1109/CVPR.2016.90,
arXiv 1512.03385; the variants are those of Yao, Gholami, Keutzer and Mahoney, PyHessian, arXiv 1912.07145.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_choice, check_count, check_flag
from hvpkit.zoo.seeding import seeded


def cifar_resnet(
    depth: int = 20,
    *,
    batchnorm: bool = True,
    residual: bool = True,
    shortcut: str = "identity",
    width: int = 16,
    num_classes: int = 10,
    seed: Seed = 0,
) -> ResNet:
    r"""Make the ResNet of 6 n + 2 layers for CIFAR (section 4.2 of the paper): 20, 32, 38, 56.

    For images ``[B, 3, H, W]``, H = W = 32 in the paper. A 3 x 3 convolution, three stages of n blocks with 16, 32
    and 64 channels, of which the second and the third halve the image, the mean over the image, and a linear layer.
    A block adds its input to the output of two 3 x 3 convolutions.

    Parameters for 10 classes: 269,722 (20 layers), 464,154 (32), 561,370 (38), 853,018 (56). The paper says 0.27,
    0.46 and 0.85 million for 20, 32 and 56.

    Initialisation: convolutions normal with variance 2 / fan-out (He et al. 2015, arXiv 1502.01852), the linear
    layer by PyTorch's default. Without BatchNorm each of the L residual blocks would double the variance, a factor of
    2^27 in 56 layers. So the second convolution of each block is divided by the square root of L, and all blocks
    together multiply the variance by at most :math:`(1 + 1/L)^L < e`. Convolutions have no bias, as in PyHessian, even
    without BatchNorm. With neither BatchNorm nor residual connections the features of different images become more
    correlated with depth (0.9 after 38 layers): by SGD with momentum, 20 layers train at a learning rate of 0.02 and
    not at 0.1, and 38 and 56 layers were still at chance after 160 and 260 steps of 32 images.

    Args:
        depth: 6 n + 2.
        batchnorm: put BatchNorm after each convolution.
        residual: add the input of a block to its output; if False, the plain network of the paper.
        shortcut: of a residual block that changes the shape: ``"identity"``, option A of the paper, every second
            pixel and zeros for the new channels, without parameters; ``"projection"``, option B, a 1 x 1 convolution,
            as in the PyHessian study (272,474 parameters for 20 layers).
        width: channels of the first stage; 16 in the paper.
        num_classes: number of outputs.
        seed: of the initial parameters; the global random state is not changed.

    Raises:
        ValueError: ``depth`` is not 6 n + 2, a count is not positive, an unknown ``shortcut``.

    Source:
        arXiv 1512.03385, arXiv 1912.07145. The factor follows the analysis of Zhang, Dauphin and Ma, Fixup, ICLR
        2019, arXiv 1901.09321, without its zeros, which would make the initial Hessian degenerate.

    Example:
        >>> sum(p.numel() for p in cifar_resnet(20).parameters())
        269722
    """
    check_count("depth", depth, 8)
    if depth % 6 != 2:
        raise ValueError(f"depth must be 6 n + 2, as 20, 32, 38 or 56, got {depth}")
    check_count("width", width, 1)
    check_count("num_classes", num_classes, 1)
    check_flag("batchnorm", batchnorm)
    check_flag("residual", residual)
    check_choice("shortcut", shortcut, ("identity", "projection"))
    with seeded(seed):
        return ResNet(
            [width, 2 * width, 4 * width],
            (depth - 2) // 6,
            batchnorm=batchnorm,
            residual=residual,
            projection=shortcut == "projection",
            num_classes=num_classes,
        )


def resnet18_cifar(*, width: int = 64, num_classes: int = 10, seed: Seed = 0) -> ResNet:
    """Make ResNet-18 as it is used on CIFAR: the paper's four stages of two blocks after a small first convolution.

    For images ``[B, 3, H, W]``. The first layers for ImageNet, a 7 x 7 convolution and pooling, are replaced by a 3 x 3
    convolution; 64, 128, 256 and 512 channels, BatchNorm, projection shortcuts. 11,173,962 parameters for 10 classes.
    Initialisation as in :func:`cifar_resnet`.

    Args:
        width: channels of the first stage.
        num_classes: number of outputs.
        seed: of the initial parameters; the global random state is not changed.

    Raises:
        ValueError: a count is not positive.

    Source:
        arXiv 1512.03385.

    Example:
        >>> sum(p.numel() for p in resnet18_cifar().parameters())
        11173962
    """
    check_count("width", width, 1)
    check_count("num_classes", num_classes, 1)
    with seeded(seed):
        return ResNet(
            [width, 2 * width, 4 * width, 8 * width],
            2,
            batchnorm=True,
            residual=True,
            projection=True,
            num_classes=num_classes,
        )


class ResNet(nn.Module):
    """A convolution, stages of basic blocks, the mean over the image, and a linear layer."""

    def __init__(
        self,
        widths: Sequence[int],
        blocks_per_stage: int,
        *,
        batchnorm: bool,
        residual: bool,
        projection: bool,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.stem = convolution(3, widths[0], batchnorm=batchnorm)
        blocks, num_in = [], widths[0]
        for stage, num_out in enumerate(widths):
            for place in range(blocks_per_stage):
                stride = 2 if stage and not place else 1
                shortcut = make_shortcut(num_in, num_out, stride, projection, batchnorm) if residual else None
                blocks.append(BasicBlock(num_in, num_out, stride, shortcut, batchnorm=batchnorm))
                num_in = num_out
        if residual and not batchnorm:
            with torch.no_grad():
                for weight in [weight for block in blocks for weight in block.second.parameters()]:
                    weight.div_(len(blocks) ** 0.5)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(num_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.blocks(F.relu(self.stem(x)))
        outputs: Tensor = self.head(features.mean((2, 3)))
        return outputs


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions, with the input added to their output if there is a shortcut."""

    def __init__(
        self, num_in: int, num_out: int, stride: int, shortcut: nn.Module | None, *, batchnorm: bool
    ) -> None:
        super().__init__()
        self.first = convolution(num_in, num_out, stride=stride, batchnorm=batchnorm)
        self.second = convolution(num_out, num_out, batchnorm=batchnorm)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        z = self.second(F.relu(self.first(x)))
        return F.relu(z if self.shortcut is None else z + self.shortcut(x))


def convolution(
    num_in: int, num_out: int, *, size: int = 3, stride: int = 1, batchnorm: bool
) -> nn.Sequential:
    """Make a convolution without bias, with He's initialisation, and BatchNorm after it."""
    conv = nn.Conv2d(num_in, num_out, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(num_out)) if batchnorm else nn.Sequential(conv)


def make_shortcut(num_in: int, num_out: int, stride: int, projection: bool, batchnorm: bool) -> nn.Module:
    """Make the shortcut from a block's input to its output."""
    if num_in == num_out and stride == 1:
        return nn.Identity()
    if projection:
        return convolution(num_in, num_out, size=1, stride=stride, batchnorm=batchnorm)
    return Subsample(num_out - num_in, stride)


class Subsample(nn.Module):
    """Every ``stride``-th pixel of the input, with zeros in new channels."""

    def __init__(self, num_new: int, stride: int) -> None:
        super().__init__()
        self.num_new, self.stride = num_new, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.num_new))
