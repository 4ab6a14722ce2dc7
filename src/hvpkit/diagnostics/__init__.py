"""Checks of an operator before it is trusted."""
