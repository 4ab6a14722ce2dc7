"""Pickles of plain data, read without running code in them.

A pickle is a program: it can name any function of any module and call it. Here only the few names that dicts, lists,
bytes, numbers and arrays need are allowed, with harmless stand-ins for them; every other name is refused.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np


def load_plain(raw: bytes) -> Any:
    """Return the dicts, lists, bytes, numbers and NumPy arrays in a pickle; Python 2 strings become bytes.

    Raises:
        ValueError: the pickle is truncated or corrupt, or asks for anything else.

    Example:
        >>> load_plain(pickle.dumps({"classes": np.arange(3)}))
        {'classes': array([0, 1, 2])}
    """
    try:
        return PlainUnpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a corrupt pickle can raise anything
        raise ValueError(f"its pickle cannot be read ({type(error).__name__}: {error})") from error


class PlainUnpickler(pickle.Unpickler):
    """An unpickler that knows the names of plain data only."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for ``module.name``, under its NumPy 1 or NumPy 2 name."""
        plain = {  # a new dict each time, as a pickle can set attributes of objects that it names
            "numpy.ndarray": object,  # only passed as an argument
            "numpy.dtype": np.dtype,
            "numpy._core.multiarray._reconstruct": lambda *_: np.empty(
                0
            ),  # shape, dtype and content are set later
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
