"""Curvature of neural networks: matrix-free Hessians, and both ends of their spectra with error intervals.

From a pure loss function, parameters and data, :func:`hessian` makes a symmetric linear operator, and
:func:`extreme_eigenvalues` finds its smallest and largest eigenvalue over all the data.
"""

from hvpkit.curvature import hessian
from hvpkit.data import Data, as_data
from hvpkit.errors import NonFiniteError, NotSymmetricError, UnstableDataError
from hvpkit.extreme import extreme_eigenvalues
from hvpkit.objective import Objective, from_module
from hvpkit.operators import LinearOperator, aslinearoperator
from hvpkit.products import grad, hvp, loss
from hvpkit.progress import progress_bar
from hvpkit.results import Eigenpair, EigenResult, ExtremeResult, Interval, Progress, Status
from hvpkit.solvers.lanczos import lanczos

__version__ = "0.1.0"

__all__ = [
    "Data",
    "EigenResult",
    "Eigenpair",
    "ExtremeResult",
    "Interval",
    "LinearOperator",
    "NonFiniteError",
    "NotSymmetricError",
    "Objective",
    "Progress",
    "Status",
    "UnstableDataError",
    "as_data",
    "aslinearoperator",
    "extreme_eigenvalues",
    "from_module",
    "grad",
    "hessian",
    "hvp",
    "lanczos",
    "loss",
    "progress_bar",
]
