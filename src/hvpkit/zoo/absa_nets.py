"""C1 and C2, the two small networks for CIFAR in the papers on ABSA.

Source: Yao, Gholami, Lei, Keutzer and Mahoney, Hessian-based Analysis of Large Batch Training and Robustness to
Adversaries, NeurIPS 2018, arXiv 1802.08241; Yao, Gholami, Keutzer and Mahoney, Large Batch Size Training of Neural
Networks with Adversarial Training and Second-Order Information, arXiv 1810.01021. Kernel sizes, padding and the order
of layers are those of the code that the authors published with them (HessianFlow, ``models/c1.py``).
"""

from __future__ import annotations

from torch import nn

from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_count
from hvpkit.zoo.seeding import seeded
from hvpkit.zoo.small_networks import linear_layers


def c1(*, num_classes: int = 10, seed: Seed = 0) -> nn.Sequential:
    """Make C1: two 5 x 5 convolutions of 64 channels, and linear layers of 384, 192 and ``num_classes``.

    For images ``[B, 3, 32, 32]``. The convolutions keep the size (padding 2). Each is followed by ReLU, BatchNorm and
    3 x 3 max pooling with stride 2 (padding 1), so that 64 x 8 x 8 features reach the linear layers, which have ReLU
    between them. 1,756,682 parameters for 10 classes. PyTorch's default initialisation.

    Args:
        num_classes: number of outputs.
        seed: of the initial parameters; the global random state is not changed.

    Raises:
        ValueError: ``num_classes`` is not positive.

    Source:
        arXiv 1802.08241 and 1810.01021; layers as in HessianFlow.

    Example:
        >>> sum(p.numel() for p in c1().parameters())
        1756682
    """
    check_count("num_classes", num_classes, 1)
    with seeded(seed):
        return nn.Sequential(
            *_stage(3, 64, size=5, padding=2),
            nn.MaxPool2d(3, stride=2, padding=1),
            *_stage(64, 64, size=5, padding=2),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Flatten(),
            *linear_layers([64 * 8 * 8, 384, 192, num_classes], nn.ReLU),
        )


def c2(*, num_classes: int = 10, seed: Seed = 0) -> nn.Sequential:
    """Make C2: 3 x 3 convolutions of 64, 64, 128 and 128 channels, and linear layers of 256, 256 and ``num_classes``.

    For images ``[B, 3, 32, 32]``. The convolutions have no padding. Each is followed by ReLU and BatchNorm, the second
    and the fourth also by 2 x 2 max pooling, so that 128 x 5 x 5 features reach the linear layers, which have ReLU
    between them. The dropout layers that the published code defines and does not call are left out.
    1,148,746 parameters for 10 classes. PyTorch's default initialisation.

    Args:
        num_classes: number of outputs.
        seed: of the initial parameters; the global random state is not changed.

    Raises:
        ValueError: ``num_classes`` is not positive.

    Source:
        arXiv 1802.08241 and 1810.01021; layers as in HessianFlow.

    Example:
        >>> sum(p.numel() for p in c2().parameters())
        1148746
    """
    check_count("num_classes", num_classes, 1)
    with seeded(seed):
        return nn.Sequential(
            *_stage(3, 64, size=3),
            *_stage(64, 64, size=3),
            nn.MaxPool2d(2),
            *_stage(64, 128, size=3),
            *_stage(128, 128, size=3),
            nn.MaxPool2d(2),
            nn.Flatten(),
            *linear_layers([128 * 5 * 5, 256, 256, num_classes], nn.ReLU),
        )


def _stage(num_in: int, num_out: int, *, size: int, padding: int = 0) -> list[nn.Module]:
    return [nn.Conv2d(num_in, num_out, size, padding=padding), nn.ReLU(), nn.BatchNorm2d(num_out)]
