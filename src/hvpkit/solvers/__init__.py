"""Eigensolvers over a linear operator."""
