"""What curvature is for while training: tracking, schedules, sharpness, batch sizes, an optimiser."""

from hvpkit.train.adahessian import AdaHessian, block_average
from hvpkit.train.adaptive_batch_size import (
    AbsaEpoch,
    AbsaResult,
    AbsaState,
    absa,
    absa_init,
    absa_update,
    fgsm,
)
from hvpkit.train.knee import KneeLR, knee_lr
from hvpkit.train.sharpness import Sharpness, keskar_sharpness
from hvpkit.train.tracker import SpectrumTracker

__all__ = [
    "AbsaEpoch",
    "AbsaResult",
    "AbsaState",
    "AdaHessian",
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
