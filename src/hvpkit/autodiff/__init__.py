"""Torch's derivatives as they are: pytrees, exact second derivatives, and what torch gets wrong, written out."""
