"""Pictures. Each function draws one and returns its axes; matplotlib comes with ``hvpkit[plots]``.

All have one size and one style, with colours that are visible on light and on dark ground; other text is as the style
in use has it. Blue is the smallest end and orange the largest, in every picture.
"""

from hvpkit.results.drawing import NO_MATPLOTLIB

try:
    import matplotlib as matplotlib
except ImportError as error:
    raise ImportError(NO_MATPLOTLIB) from error

from hvpkit.plots.linear import residuals
from hvpkit.plots.loss import extremes, loss_along_eigenvector, loss_landscape
from hvpkit.plots.spectrum import convergence, density, eigenvalues, layers, layers_height, training
from hvpkit.plots.style import HEIGHT

__all__ = [
    "HEIGHT",
    "convergence",
    "density",
    "eigenvalues",
    "extremes",
    "layers",
    "layers_height",
    "loss_along_eigenvector",
    "loss_landscape",
    "residuals",
    "training",
]
