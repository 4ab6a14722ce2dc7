"""The handwritten digits that scikit-learn ships."""

from __future__ import annotations

import torch
from torch import Tensor


def digits() -> tuple[Tensor, Tensor]:
    """Return all 1,797 digits of scikit-learn.

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
