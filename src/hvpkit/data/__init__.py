"""Data: examples in batches, the same ones in every pass."""

from hvpkit.data.examples import Data, as_data, prepare, whole_batch

__all__ = ["Data", "as_data", "prepare", "whole_batch"]
