"""Objectives: a loss in two parts, and how a module gives one."""

from hvpkit.objective.modules import from_module
from hvpkit.objective.objective import Objective, check_batches, check_loss_fn, goes_by_batches
from hvpkit.objective.variables import composed, perturb_activations, perturb_inputs, reparametrize
from hvpkit.objective.weighting import normalized, normalized_in_batch

__all__ = [
    "Objective",
    "check_batches",
    "check_loss_fn",
    "composed",
    "from_module",
    "goes_by_batches",
    "normalized",
    "normalized_in_batch",
    "perturb_activations",
    "perturb_inputs",
    "reparametrize",
]
