"""The results of solvers and estimators."""
