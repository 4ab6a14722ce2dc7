"""Data: examples in batches, the same ones in every pass."""

from hvpkit.data.conversion import as_data
from hvpkit.data.examples import Data, WeightedBatch, prepare, whole_batch

__all__ = ["Data", "WeightedBatch", "as_data", "prepare", "whole_batch"]
