"""Data: examples in batches, the same ones in every pass."""

from hvpkit.data.conversion import as_data
from hvpkit.data.description import describe
from hvpkit.data.digest import digest_of
from hvpkit.data.examples import Data, prepare, whole_batch

__all__ = ["Data", "as_data", "describe", "digest_of", "prepare", "whole_batch"]
