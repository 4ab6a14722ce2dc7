"""Curvature in training: tracking, sharpness, a schedule, adaptive batch sizes, an optimiser."""

from hvpkit.train.absa_controller import AbsaState, absa_init, absa_update
from hvpkit.train.absa_training import AbsaEpoch, AbsaResult, absa
from hvpkit.train.adahessian import AdaHessian, block_average
from hvpkit.train.adversarial import fgsm
from hvpkit.train.knee import KneeLR, knee_lr
from hvpkit.train.sharpness import Sharpness, keskar_sharpness
from hvpkit.train.tracker import Alignment, SpectrumTracker

__all__ = [
    "AbsaEpoch",
    "AbsaResult",
    "AbsaState",
    "AdaHessian",
    "Alignment",
    "KneeLR",
    "Sharpness",
    "SpectrumTracker",
    "absa",
    "absa_init",
    "absa_update",
    "block_average",
    "fgsm",
    "keskar_sharpness",
    "knee_lr",
]
