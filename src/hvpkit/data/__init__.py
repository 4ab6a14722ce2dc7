"""Data: examples in batches, the same ones in every pass."""

from hvpkit.data.conversion import as_data
from hvpkit.data.description import describe
from hvpkit.data.examples import Data, prepare, whole_batch

__all__ = ["Data", "as_data", "describe", "prepare", "whole_batch"]
