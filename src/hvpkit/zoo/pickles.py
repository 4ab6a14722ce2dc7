"""Pickles of plain data, read without running what they may ask for.

A pickle is a program: it can name any function of any module and call it. Here the few names that dicts, lists,
bytes, numbers and arrays need are answered by functions that do no more than that, and every other one is refused.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np


def load_plain(raw: bytes) -> Any:
    """The dicts, lists, bytes, numbers and numpy arrays in a pickle; text of Python 2 comes as bytes.

    Raises:
        ValueError: the pickle is cut short or corrupt, or asks for anything else.

    Example:
        >>> load_plain(pickle.dumps({"classes": np.arange(3)}))
        {'classes': array([0, 1, 2])}
    """
    try:
        return PlainUnpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a corrupt pickle can raise anything
        raise ValueError(f"its pickle cannot be read ({type(error).__name__}: {error})") from error


class PlainUnpickler(pickle.Unpickler):
    """Answers the names of plain data only."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for ``module.name``, under NumPy 1's names or NumPy 2's."""
        plain = {  # made anew each time, as a pickle can also set attributes of what it names
            "numpy.ndarray": object,  # an argument only
            "numpy.dtype": np.dtype,
            "numpy._core.multiarray._reconstruct": lambda *_: np.empty(
                0
            ),  # shape, dtype and content come later
            "numpy._core.numeric._frombuffer": lambda buffer, dtype, shape, order: np.frombuffer(
                buffer, dtype
            ).reshape(shape, order=order),
            "_codecs.encode": lambda text, _: text.encode("latin1"),  # bytes in protocols before the third
            "__builtin__.bytes": lambda: b"",
        }
        wanted = f"{module.replace('numpy.core', 'numpy._core')}.{name}"
        if wanted not in plain:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which plain data does not need: refused"
            )
        return plain[wanted]
