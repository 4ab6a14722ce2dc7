"""The curvature of a loss over data: operators and functions of it."""
