# %% [markdown]
# # The whole spectrum: where the eigenvalues of a Hessian lie
#
# The two ends say how sharp the loss is at most. The density describes all other eigenvalues: how many are zero to
# rounding, how wide the bulk is, and which ones are well separated.
#
# The Hessian of a real network is too large to form. Its density can still be estimated, from matvecs with random
# vectors. This notebook does so in two ways, on a network so small that we **can** form its Hessian. So each estimate
# is compared with the exact spectrum.

# %%
import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

import hvpkit as hk
from hvpkit import plots
from hvpkit.plots.style import COLORS, STYLE
from hvpkit.zoo import digits, digits_cnn, train_classifier

plt.rcParams.update(STYLE)

# %% [markdown]
# ## A network, before and after training
#
# A narrow convolutional network with 678 weights, and the first 600 of scikit-learn's digits: as small as this so
# that the exact spectrum takes seconds.

# %%
images, classes = digits()
data = images[:600], classes[:600]
model = digits_cnn(4)


def hessian_now():
    objective, params = hk.from_module(model, F.cross_entropy)
    print(f"mean loss {float(hk.loss(objective, params, data)):.3f}")
    return hk.hessian(objective, params, data, batch_size=600)


before = hessian_now()
train_classifier(model, data)
after = hessian_now()

# %% [markdown]
# ## The exact spectrum
#
# The Hessian times the identity is the Hessian. We compute it in blocks of columns, which share passes over the data.
# This is not possible for a real network: it takes n matvecs.


# %%
def exact_spectrum(H):
    blocks = torch.eye(H.n).split(113, dim=1)
    matrix = torch.cat([H @ block for block in blocks], dim=1).double()
    return torch.linalg.eigvalsh((matrix + matrix.mT) / 2)


exact = exact_spectrum(after)
print("smallest", [f"{value:.3g}" for value in exact[:5].tolist()])
print("largest ", [f"{value:.3g}" for value in exact[-12:].tolist()])
print(
    f"{int((exact.abs() < 1e-3 * exact[-1]).sum())} of {after.n} are smaller than a thousandth of the largest"
)

# %% [markdown]
# Spectra of trained networks are like this: very many eigenvalues at zero, a few negative ones close to it, and about
# as many large ones as there are classes.
#
# ## Lanczos quadrature
#
# Run 40 steps of Lanczos from a random vector. The Ritz values, weighted by the squares of the first entries of their
# vectors, are a quadrature rule for the density. The mean over several random vectors is the estimate, and their spread
# gives its standard error, which takes two vectors or more. Eight vectors cost 320 matvecs, and share each pass over
# the data.

# %%
density = hk.spectral_density(after, num_steps=40, num_probes=8)
print(density)
ax = plots.density(density)

# %% [markdown]
# How to read the picture:
#
# - The **curve** is the density; its integral is one. Each node of the quadrature is drawn as a narrow Gaussian. The
#   axis is logarithmic: nearly all of the eigenvalues are in the peak at zero.
# - The **band** is one standard error. Where it reaches the bottom, the density is unknown.
# - The **spikes** are well separated eigenvalues that have converged to rounding. Their height is that of one
#   eigenvalue out of n.
# - The **dotted lines** are both ends, as far as this run found them. For their intervals pass
#   `extremes=hk.extreme_eigenvalues(H)`.
#
# The same around zero:

# %%
ax = plt.subplots(figsize=(6.4, 4))[1]
ax.set_xlim(-1, 6)
ax = plots.density(density, ax=ax)

# %% [markdown]
# `outliers` returns the spikes as numbers. They agree with the exact eigenvalues.

# %%
outliers, masses = density.outliers()
for value, mass in zip(outliers.flip(0).tolist(), masses.flip(0).tolist(), strict=True):
    nearest = float(exact[(exact - value).abs().argmin()])
    print(f"{value:10.5f}   exact {nearest:10.5f}   counted {after.n * mass:5.2f} times")

# %% [markdown]
# The values are accurate. The counts are not: they are random, the share of the probe vectors in one direction. More
# probes improve them.
#
# ## Kernel polynomials
#
# The other method expands the density in Chebyshev polynomials, damped by Jackson's kernel against oscillations. It
# keeps four vectors instead of a basis. In return its resolution is the same everywhere, about $\pi/4$ times the span
# over the number of steps: outliers become broad peaks.

# %%
smooth = hk.spectral_density(after, method="chebyshev", num_steps=40, num_probes=8)
print(smooth)
print(f"resolution: {density.width:.3g} by Lanczos, {smooth.width:.3g} by kernel polynomials")

# %% [markdown]
# ## Both against the exact spectrum
#
# The cumulative distribution needs no smoothing, and so shows the errors best. The axis of eigenvalues is linear around
# zero and logarithmic further out.

# %%
sizes = torch.logspace(-4, float(exact[-1].log10()) + 0.1, 300, dtype=torch.float64)
x = torch.cat([-sizes[sizes < 3 * -exact[0]].flip(0), sizes])
truth = torch.searchsorted(exact, x, right=True) / after.n

figure, ax = plt.subplots()
ax.plot(x, truth, color="black", linewidth=3, alpha=0.3, label="exact")
ax.plot(x, density.cdf(x), color=COLORS["measured"], label="Lanczos quadrature")
ax.plot(x, smooth.cdf(x), color=COLORS["single"], linestyle="--", label="kernel polynomials")
ax.set_xscale("symlog", linthresh=1e-3)
ax.set_xlabel("eigenvalue")
ax.set_ylabel("cumulative share of eigenvalues")
legend = ax.legend(loc="upper left")


# %%
def distance(d):
    """Return the Wasserstein distance to the exact spectrum: the area between the cumulative distributions."""
    grid = torch.linspace(float(exact[0]) - 1, float(exact[-1]) + 1, 200_001, dtype=torch.float64)
    steps = torch.searchsorted(exact, grid, right=True) / after.n
    return float(torch.trapezoid((d.cdf(grid) - steps).abs(), grid))


print(f"mean magnitude of an eigenvalue {float(exact.abs().mean()):.4f}")
print(
    f"distance to the exact spectrum: {distance(density):.4f} by Lanczos, {distance(smooth):.4f} by kernel polynomials"
)

# %% [markdown]
# ## Many decades: the logarithmic form
#
# Most eigenvalues are far too small for a linear axis. `log_density` gives the density for each decade of magnitude,
# separately for positive and negative eigenvalues. The grey steps are the exact counts.

# %%
grid, positive, negative = density.log_density(width=0.15)
bins = torch.arange(-7, 3, 0.25, dtype=torch.float64)

figure, axes = plt.subplots(1, 2, sharey=True, figsize=(8, 3.6))
for ax, sign, curve, name in zip(axes, (1, -1), (positive, negative), ("largest", "smallest"), strict=True):
    of_sign = (sign * exact)[sign * exact > 0].log10()
    counts = torch.histogram(of_sign, bins)[0] / (0.25 * after.n)
    ax.stairs(counts, 10**bins, fill=True, color="0.8", label="exact")
    ax.plot(grid, curve, color=COLORS[name], label="Lanczos quadrature")
    ax.axvline(density.noise, color="0.5", linestyle=":", label="rounding of matvecs")
    ax.set_xscale("log")
    ax.set_xlabel(f"magnitude of {'positive' if sign > 0 else 'negative'} eigenvalues")
    ax.legend(loc="upper left", fontsize=8)
label = axes[0].set_ylabel("density per decade")

# %% [markdown]
# Forty steps cannot resolve seven decades. Large eigenvalues are right. Those smaller than about the span over the
# number of steps appear as a few separate peaks, which only show how the mass is distributed over the decades.
# Eigenvalues below the dotted line are zero to the rounding of float32 matvecs, for every method.
#
# ## Functions of the spectrum
#
# `expectation(f)` is the mean of f over all eigenvalues; n times it is the trace of f of the matrix. It has a standard
# error. Two common ones:
#
# - the **effective dimension** $\sum_i \lambda_i / (\lambda_i + \delta)$: the number of directions that the data
#   determine, given a prior of precision $\delta$;
# - the **log-determinant** $\sum_i \log(\lambda_i + \delta)$, as in the Laplace approximation of the evidence.
#
# $\delta$ must be larger than the most negative eigenvalue, so that all are positive.

# %%
delta = 2 * float(-exact[0])
functions = {
    "trace": lambda x: x,
    "effective dimension": lambda x: x / (x + delta),
    "log-determinant": lambda x: torch.log(x + delta),
    "number below zero": lambda x: x < 0,
    "number above 1": lambda x: x > 1,
}
print(f"delta = {delta:.3g}")
for name, f in functions.items():
    found, truth = density.expectation(f), float(f(exact).double().sum())
    value, stderr = after.n * found.value, after.n * found.stderr
    off = f"{(value - truth) / stderr:4.1f}" if stderr else "none: no"
    print(f"{name:<20}{value:9.2f} ± {stderr:6.2f}   exact {truth:9.2f}   off by {off} standard errors")

# %% [markdown]
# All errors are within two standard errors. The trace is dominated by a few outliers; these have converged in the
# Krylov spaces, so the density knows them without the error of random vectors. The other functions are flat there, and
# are known well.
#
# The standard error covers the random vectors only, not the error of the quadrature, which is small for smooth
# functions and large for a **step in the middle of many eigenvalues**, such as the one at zero. More steps help there,
# not more probes. If many eigenvalues are zero to rounding, the number of those below zero has little meaning.
#
# ## Before and after training

# %%
untrained = hk.spectral_density(before, num_steps=40, num_probes=8)
figure, axes = plt.subplots(1, 2, figsize=(8, 3.8))
for ax, d, title in zip(axes, (untrained, density), ("before training", "after training"), strict=True):
    plots.density(d, ax=ax)
    ax.set_title(title)

# %%
for name, d in (("before", untrained), ("after", density)):
    mean = d.expectation(lambda x: x)
    outside = d.outliers()[0]
    print(f"{name:<7} from {float(d.nodes[0]):.3f} to {float(d.nodes[-1]):.3f}, {len(outside)} outliers")
    print(f"{'':<7} mean {mean.value:.4f} ± {mean.stderr:.4f}")

# %% [markdown]
# Before training the spectrum is narrow, and its negative side is a third as long as its positive one. After training
# the positive side is hundreds of times longer than the negative one, because of a few outliers.
#
# ## Notes
#
# - `density.save(path)` and `hk.load(path)` save and load it; the same `seed` gives the same numbers.
# - For `n` up to 1,000, if `num_steps * num_probes` is at least n, the whole matrix is computed instead, and the
#   density is exact. So no estimate costs more than the exact spectrum.
# - Twice the steps give twice the resolution; four times the probes halve the standard errors. On a large network one
#   probe is often enough, as standard errors also fall as one over the square root of n.
