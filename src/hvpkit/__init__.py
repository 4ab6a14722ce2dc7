"""Curvature of neural networks: matrix-free Hessians, and both ends of their spectra with error intervals.

From a pure loss function, parameters and data, :func:`hessian` makes a symmetric linear operator, and
:func:`extreme_eigenvalues` finds its smallest and largest eigenvalue over all the data.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hvpkit import hf
from hvpkit.block_spectra import blocks
from hvpkit.curvature.constructors import empirical_fisher, fisher, ggn, hessian
from hvpkit.curvature.fisher import fisher_vp
from hvpkit.curvature.forward_over_forward import quadratic_form
from hvpkit.curvature.functional import grad, hvp, loss
from hvpkit.curvature.ggn import ggnvp
from hvpkit.curvature.importance_sampling import sampling_error
from hvpkit.curvature.operator import CurvatureOperator
from hvpkit.curvature.preconditioning import precondition
from hvpkit.data import Data, as_data
from hvpkit.diagnostics.check import Finding, Report, check
from hvpkit.diagnostics.report_html import report
from hvpkit.errors import (
    AsymmetryWarning,
    CapturedParameterWarning,
    CompileWarning,
    DerivativeWarning,
    NonFiniteError,
    NotConvergedError,
    NotSymmetricError,
    RemoteError,
    SharedGeneratorWarning,
    UnsavedWarning,
    UnstableDataError,
)
from hvpkit.estimators.diagonal import diagonal
from hvpkit.estimators.norm import frobenius_norm
from hvpkit.estimators.spectral_density import moments, spectral_density
from hvpkit.estimators.trace import trace
from hvpkit.estimators.trace_functions import count_eigenvalues, effective_dimension, logdet
from hvpkit.extreme import extreme_eigenvalues, top_eigenvalues
from hvpkit.linear_systems import inverse, solve
from hvpkit.matrix_functions import matrix_function
from hvpkit.objective import Objective, from_module, perturb_activations, perturb_inputs, reparametrize
from hvpkit.operators.base import LinearOperator
from hvpkit.operators.interop import aslinearoperator
from hvpkit.planning import plan
from hvpkit.results.blocks import BlockSpectra, BlockSpectrum, BlocksProgress
from hvpkit.results.cost_plan import Plan, PlannedTask, Range
from hvpkit.results.density import Density
from hvpkit.results.eigen import Eigenpair, EigenResult, ExtremeResult, Interval, Progress, Status
from hvpkit.results.estimate import Estimate, EstimateProgress
from hvpkit.results.function import FunctionResult
from hvpkit.results.linear import NegativeCurvature, SolveProgress, SolveResult
from hvpkit.results.recycled import RecycledSpace
from hvpkit.results.saving import load
from hvpkit.solvers.baselines.oja import oja
from hvpkit.solvers.baselines.power import accelerated_power, power
from hvpkit.solvers.baselines.scipy_eigs import eigsh, scipy_lobpcg
from hvpkit.solvers.baselines.stochastic_power import stochastic_power
from hvpkit.solvers.chebyshev import chebyshev
from hvpkit.solvers.lanczos import lanczos
from hvpkit.solvers.lobpcg import lobpcg
from hvpkit.solvers.monitors import progress_bar
from hvpkit.solvers.multifidelity import multifidelity
from hvpkit.solvers.recycling import follow_top

if TYPE_CHECKING:
    from hvpkit import plots as plots
    from hvpkit import train, zoo

__version__ = "0.2.0"

__all__ = [
    "AsymmetryWarning",
    "BlockSpectra",
    "BlockSpectrum",
    "BlocksProgress",
    "CapturedParameterWarning",
    "CompileWarning",
    "CurvatureOperator",
    "Data",
    "Density",
    "DerivativeWarning",
    "EigenResult",
    "Eigenpair",
    "Estimate",
    "EstimateProgress",
    "ExtremeResult",
    "Finding",
    "FunctionResult",
    "Interval",
    "LinearOperator",
    "NegativeCurvature",
    "NonFiniteError",
    "NotConvergedError",
    "NotSymmetricError",
    "Objective",
    "Plan",
    "PlannedTask",
    "Progress",
    "Range",
    "RecycledSpace",
    "RemoteError",
    "Report",
    "SharedGeneratorWarning",
    "SolveProgress",
    "SolveResult",
    "Status",
    "UnsavedWarning",
    "UnstableDataError",
    "accelerated_power",
    "as_data",
    "aslinearoperator",
    "blocks",
    "chebyshev",
    "check",
    "count_eigenvalues",
    "diagonal",
    "effective_dimension",
    "eigsh",
    "empirical_fisher",
    "extreme_eigenvalues",
    "fisher",
    "fisher_vp",
    "follow_top",
    "frobenius_norm",
    "from_module",
    "ggn",
    "ggnvp",
    "grad",
    "hessian",
    "hf",
    "hvp",
    "inverse",
    "lanczos",
    "load",
    "lobpcg",
    "logdet",
    "loss",
    "matrix_function",
    "moments",
    "multifidelity",
    "oja",
    "perturb_activations",
    "perturb_inputs",
    "plan",
    "power",
    "precondition",
    "progress_bar",
    "quadratic_form",
    "reparametrize",
    "report",
    "sampling_error",
    "scipy_lobpcg",
    "solve",
    "spectral_density",
    "stochastic_power",
    "top_eigenvalues",
    "trace",
    "train",
    "zoo",
]


def __getattr__(name: str) -> Any:
    """Import, at first use, the subpackages that are slow to import or need optional packages."""
    if name in ("plots", "train", "zoo"):
        return import_module(f"hvpkit.{name}")
    raise AttributeError(f"module 'hvpkit' has no attribute {name!r}")
