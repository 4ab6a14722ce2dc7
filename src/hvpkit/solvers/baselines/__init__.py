"""Methods that serve as baselines, and those of SciPy."""
