"""Corrections to torch's automatic differentiation: pytrees, exact settings, overrides, fixed random numbers."""
