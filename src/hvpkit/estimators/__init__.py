"""Estimates of the whole spectrum from random probes: trace, diagonal, norm, moments, density."""
