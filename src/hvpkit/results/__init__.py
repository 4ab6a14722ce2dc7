"""What solvers and estimators return."""
