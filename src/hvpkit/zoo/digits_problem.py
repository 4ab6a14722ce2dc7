"""Scikit-learn's handwritten digits, and a convolutional network of their size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvpkit._utils.typing import Seed
from hvpkit.zoo.seeding import seeded


def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 digits that scikit-learn ships.

    Returns:
        Images ``[1797, 1, 8, 8]`` in [0, 1], float32, and their classes ``[1797]``.

    Raises:
        ImportError: scikit-learn is not installed.

    Source:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, doi:10.24432/C50P49.

    Example:
        >>> x, y = digits()
        >>> list(x.shape), int(y.max())
        ([1797, 1, 8, 8], 9)
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits come with scikit-learn: pip install 'hvpkit[demo]'") from error
    images, classes = load_digits(return_X_y=True)
    x = torch.from_numpy(images).to(torch.float32).reshape(-1, 1, 8, 8) / 16
    return x, torch.from_numpy(classes).to(torch.int64)


def digits_cnn(width: int = 8, *, seed: Seed = 0) -> nn.Sequential:
    """Two convolutions with BatchNorm and a linear layer, for 8 x 8 images in 10 classes.

    Args:
        width: channels of the first convolution; the second has twice as many.
        seed: of the initial parameters; the global random state stays as it is.

    Example:
        >>> sum(p.numel() for p in digits_cnn().parameters())
        1922
    """
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, 10),
        )
