# %% [markdown]
# # Quickstart: both ends of a Hessian's spectrum
#
# The Hessian of the training loss says how the loss bends around the current weights. Its largest eigenvalue limits
# the learning rate. Its smallest one says whether there is still a way down that the gradient does not see.
#
# A network with n weights has a Hessian with n² entries. hvpkit never forms this matrix. It computes matrix-vector
# products (matvecs) over all of your data, and finds both ends from a few dozen of them. It also gives an error
# interval for each value.
#
# This notebook shows the most common tasks on a trained network. It runs in about a minute on one CPU core.

# %%
import json

import torch
from scipy.sparse.linalg import eigsh
from torch.nn import functional as F

import hvpkit as hk
from hvpkit import plots
from hvpkit.zoo import digits, digits_cnn, train_classifier

# %% [markdown]
# ## A trained network
#
# Any `torch.nn.Module` will do. This one has two convolutions with BatchNorm and a linear layer. The data are the
# 1,797 handwritten digits of scikit-learn. `train_classifier` is a plain loop with Adam.

# %%
data = digits()
model = digits_cnn()
mean_loss = train_classifier(model, data, target_loss=0.01)
print(model)
print(f"{sum(p.numel() for p in model.parameters()):,} weights, mean loss while training {mean_loss:.3f}")

# %% [markdown]
# ## From a module to an operator
#
# `from_module` splits the module into a pure function and a dict of its parameters. `hessian` combines both
# with the data. The result is a linear operator. It represents the Hessian of the **mean loss over all
# examples**, however they are cut into batches. You can pass tensors, as here, or a `Dataset`, or your `DataLoader`.
#
# The operator keeps a copy of the parameters, so that it does not change if you continue training.

# %%
objective, params = hk.from_module(model, F.cross_entropy)
H = hk.hessian(objective, params, data)
print(H)
print(f"loss over all examples {float(hk.loss(objective, params, data)):.4f}")

# %% [markdown]
# `H @ v` is a matvec. `v` is a vector `[n]`, a block of vectors `[n, k]`, or a dict of tensors like `params`; the
# result has the same form. A matvec is a pass over the data, at about the cost of three gradients.

# %%
v = torch.ones(H.n)
print((H @ v).shape, (H @ torch.eye(H.n)[:, :3]).shape)
print({name: tuple(part.shape) for name, part in (H @ params).items()})

# %% [markdown]
# ## Check first
#
# Solvers assume that an operator is the same at each call, linear and symmetric. `check` tests this with seven
# matvecs, and compares the operator with finite differences. If something is wrong, as with dropout or with a layer
# whose second derivative is wrong in PyTorch, it names the module and the remedy.

# %%
report = hk.check(H)
print(report)

# %% [markdown]
# Each line shows an error and the largest error that is allowed.
#
# ## Both ends
#
# `tol` is the relative error of each **eigenvalue**. Here we ask for one per cent.

# %%
ex = hk.extreme_eigenvalues(H, tol=1e-2)
for name, pair in (("smallest", ex.smallest), ("largest", ex.largest)):
    interval = pair.interval
    print(f"{name:<9}{pair.value:>11.5g}   residual norm {pair.residual_norm:.2g}")
    print(f"{'':<9}in [{interval.lower:.5g}, {interval.upper:.5g}]: {interval.kind}, {interval.confidence}")
print(f"{ex.status} after {ex.num_matvecs:g} passes: {ex.message}")

# %% [markdown]
# How to read this:
#
# - **value** is a Ritz value, $u^\top H u$ for a unit vector $u$. It always lies within the spectrum. So the true
#   smallest eigenvalue is at most this value, and the true largest one at least this value.
# - **residual** is $\|Hu - \theta u\|$ for the value $\theta$. Some eigenvalue lies within this distance of the value.
#   The error of the value itself is usually far smaller: about the residual squared over the gap to the next
#   eigenvalue. That is why a solver need not go on until the residual is small.
# - **interval** says where the eigenvalue lies, and its `kind` says why. `random-start` means: Lanczos started from a
#   random vector, and with the probability `confidence` no eigenvalue lies beyond the outer end. The interval may be
#   wider than `tol`; with `certify=True` the solver continues until it is not.
# - **status** says why the solver stopped. It does not raise an error if passes or time run out (`max_matvecs`,
#   `time_limit`). It returns the values it has, with their intervals.
#
# From 20,000 examples on, and from 5,000 where two samples agree, the default method is `"multifidelity"`: part of the
# work is done on samples of the data, which saves passes. Its intervals claim the same, whatever the sample is.

# %%
sampled = hk.extreme_eigenvalues(H, method="multifidelity")
interval = sampled.smallest.interval
print(f"[{interval.lower:.5g}, {interval.upper:.5g}]: {interval.kind}, {interval.confidence}")
print(f"{sampled.num_matvecs:.1f} passes instead of {ex.num_matvecs:g}")

# %% [markdown]
# `ex.summary()` prints all of this as a table, with seconds. `monitor=hk.progress_bar()` shows both values as they
# converge.
#
# The picture shows both values against passes. Each is divided by the magnitude of its final value, so that both end at
# plus or minus one.

# %%
ax = plots.convergence(ex)

# %% [markdown]
# The largest eigenvalue is well separated and is found at once. The smallest one has many neighbours near zero, and
# takes nearly all of the passes. For a while its value seems to have converged, but has not: two eigenvalues are close
# to each other there. This is why the solver requires more than a small residual before it stops.
# [02_both_extremes](02_both_extremes.ipynb) is about this.
#
# The eigenvectors come with the values. Here is the loss along the one of the smallest eigenvalue. The weights are not
# at a minimum: along this line the loss bends downwards.

# %%
print({name: f"{float(part.norm()):.2f}" for name, part in H.unflatten(ex.smallest.vector).items()})
ax = plots.loss_along_eigenvector(objective, params, data, ex.smallest)

# %% [markdown]
# For a log or a file, `to_dict` gives plain numbers and strings. The history, with an entry for each assessment
# of the solve, and the seconds are left out here.

# %%
plain = {key: value for key, value in ex.to_dict().items() if key not in ("history", "seconds")}
print(json.dumps(plain, indent=2))

# %% [markdown]
# ## The same from SciPy
#
# `to_scipy` makes a SciPy operator of any hvpkit operator, and `hk.aslinearoperator` does the reverse. SciPy's `tol`
# refers to its own estimate of the residual, and SciPy does not report the number of matvecs. `hk.eigsh` is the same
# method with `tol` as the relative error of the eigenvalue, and it counts matvecs.

# %%
start = torch.randn(H.n, generator=torch.Generator().manual_seed(0)).numpy()
values = eigsh(H.to_scipy(), k=2, which="BE", tol=1e-2, v0=start, return_eigenvectors=False)
print(f"SciPy  {values[0]:.5g} and {values[1]:.5g}")
print(f"hvpkit {ex.smallest.value:.5g} and {ex.largest.value:.5g}")

# %% [markdown]
# ## Gauss-Newton
#
# The generalised Gauss-Newton matrix is the Hessian without the term of the network's own curvature. It has no negative
# eigenvalues, and late in training its large ones are close to those of the Hessian. All solvers accept it.

# %%
G = hk.ggn(objective, params, data)
of_ggn = hk.extreme_eigenvalues(G)
print(of_ggn)
print(of_ggn.message)

# %% [markdown]
# Its smallest eigenvalue is zero to the rounding of float32, and a zero has no relative accuracy. The solver stops
# there, with this status.
#
# `hk.fisher` and `hk.empirical_fisher` have the same form.
#
# ## Layer by layer
#
# `wrt` takes names of parameters, with `*` as in file names. The result is the block of the Hessian for these
# parameters; the others are constants.

# %%
names = {"first convolution": "0.*", "second convolution": "4.*", "linear": "9.*"}
blocks = {name: hk.hessian(objective, params, data, wrt=glob) for name, glob in names.items()}
by_layer = {name: hk.extreme_eigenvalues(block) for name, block in blocks.items()}
ax = plots.layers(by_layer)

# %% [markdown]
# The sharpest direction is one of the first convolution. The loss is convex in the weights of the last layer, so that
# the smallest eigenvalue of its block is zero, to rounding.

# %% [markdown]
# ## Trace and diagonal
#
# Both are estimated with random vectors and come with standard errors. The trace is the sum of all eigenvalues. The
# diagonal is the curvature along each single weight.

# %%
trace = hk.trace(H, num_matvecs=40)
print(f"trace    {trace.value:.5g} ± {trace.stderr:.2g}")
diagonal = hk.diagonal(H, method="xdiag", num_matvecs=40)
curvatures, errors = H.unflatten(diagonal.value), H.unflatten(diagonal.stderr)
for name in curvatures:
    entry, stderr = float(curvatures[name].flatten()[0]), float(errors[name].flatten()[0])
    print(f"{name:<9}first entry {entry:>8.4f} ± {stderr:.4f}, mean {float(curvatures[name].mean()):>8.4f}")

# %% [markdown]
# For the distribution of all eigenvalues see [03_spectral_density](03_spectral_density.ipynb).
#
# ## A second checkpoint
#
# Another epoch of training changes the Hessian. Here are both ends again, with both results in one picture. `v0` starts
# the solver from the eigenvectors of an earlier result.

# %%
train_classifier(model, data, max_epochs=1, seed=1)
later_objective, later = hk.from_module(model, F.cross_entropy)
H_later = hk.hessian(later_objective, later, data)

cold = hk.extreme_eigenvalues(H_later)
warm = hk.extreme_eigenvalues(H_later, v0=ex)
print("random start", cold)
print("old vectors ", warm)
ax = plots.training([(0, ex), (1, cold)])
label = ax.set_xlabel("epochs later")

# %% [markdown]
# Both agree to within `tol`. Compare the passes: earlier eigenvectors save few or none. The solver has to find, or to
# exclude, directions that the earlier eigenvectors do not contain, and a random vector contains a part of every
# direction. Measure before you use `v0`.
#
# Note that `from_module` was called again for the second checkpoint. BatchNorm's running statistics are constants of
# the objective, and training changed them.
#
# ## Your own model
#
# ```python
# objective, params = hk.from_module(your_model, your_criterion)
# H = hk.hessian(objective, params, your_loader)
# ex = hk.extreme_eigenvalues(H, monitor=hk.progress_bar())
# ```
#
# Or without a module: a loss is any function `loss_fn(params, batch)` that returns a loss for each example:

# %%
weights = torch.tensor([1.0, -2.0])
points = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
logistic = hk.hessian(lambda w, batch: F.softplus(batch @ w), weights, points)
print(hk.extreme_eigenvalues(logistic))
