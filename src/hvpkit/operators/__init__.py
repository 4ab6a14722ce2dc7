"""Symmetric linear operators and their algebra: vectors in, vectors out; nothing of data."""
