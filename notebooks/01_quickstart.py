# %% [markdown]
# # Quickstart: both ends of a Hessian's spectrum
#
# The Hessian of the training loss says how the loss bends around the current weights. Its largest eigenvalue limits
# the learning rate. Its smallest one says whether there is still a way down that the gradient does not see.
#
# A network with n weights has a Hessian with n² entries. hvpkit never writes it out. It multiplies it with vectors,
# over all of your data, and finds both ends from a few dozen such products. It also says how far each value can be
# off.
#
# This notebook takes a trained network and goes through what you will need most. It runs in less than a minute on one
# CPU core.

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
# `from_module` takes the module apart: into a pure function and a dict of its parameters. `hessian` puts both
# together with the data. The result is a linear operator. It stands for the Hessian of the **mean loss over all
# examples**, however they are cut into batches. You can pass tensors, as here, or a `Dataset`, or your `DataLoader`.
#
# The operator keeps a copy of the parameters. You can go on training: it does not change.

# %%
objective, params = hk.from_module(model, F.cross_entropy)
H = hk.hessian(objective, params, data)
print(H)
print(f"loss over all examples {float(hk.loss(objective, params, data)):.4f}")

# %% [markdown]
# `H @ v` is a product. `v` is a vector `[n]`, a block of vectors `[n, k]`, or a dict of tensors like `params`; the
# product has the same form. One product is one pass over the data, at about the cost of three gradients.

# %%
v = torch.ones(H.n)
print((H @ v).shape, (H @ torch.eye(H.n)[:, :3]).shape)
print({name: tuple(part.shape) for name, part in (H @ params).items()})

# %% [markdown]
# ## Check first
#
# `check` spends seven products on the question whether the operator is what a solver takes it for: the same at each
# call, linear, symmetric, and in agreement with finite differences. If something is wrong, as with dropout or with a
# layer whose second derivative torch gets wrong, it names the module and says what to do.

# %%
report = hk.check(H)
print(report)

# %% [markdown]
# Each line has a figure, zero at best, and the most that is allowed.
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
# - **value** is a Ritz value, $u^\top H u$ for a unit vector $u$. It never lies outside of the spectrum. So the true
#   smallest eigenvalue is at most the value given, and the true largest one at least the value given.
# - **residual** is $\|Hu - \theta u\|$ for the value $\theta$. Some eigenvalue lies within this distance of the
#   value. The error of the value itself is usually far smaller: about the residual squared over the gap to the next
#   eigenvalue. That is why a solver need not go on until the residual is small.
# - **interval** says where the eigenvalue lies, and its `kind` on what that rests. `residual` means: an eigenvalue is
#   inside, and nothing is claimed about others further out. With many parameters and many examples, most of the work
#   is done on samples of the data, for fewer passes, and this is what can be said then.
# - **status** says why the solver stopped. It never raises because it ran out of passes or time (`max_matvecs`,
#   `time_limit`). It returns what it has, with intervals that say how good it is.
#
# Could there be an eigenvalue further out that was never seen? `method="lanczos"` does all of the work on all of the
# data, from a random vector, and its intervals answer that: with the probability `confidence`, nothing lies beyond the
# outer end. They may be wider than `tol`; `certify=True` goes on until they are not.

# %%
sure = hk.extreme_eigenvalues(H, method="lanczos")
interval = sure.smallest.interval
print(f"[{interval.lower:.5g}, {interval.upper:.5g}]: {interval.kind}, {interval.confidence}")
print(f"{sure.num_matvecs:g} passes instead of {ex.num_matvecs:.1f}")

# %% [markdown]
# `ex.summary()` prints all of this as a table, with seconds. `monitor=hk.progress_bar()` shows both values as they
# converge.
#
# The picture shows how both values were found. Each is divided by its final size, so that both settle at plus or
# minus one.

# %%
ax = plots.convergence(ex)

# %% [markdown]
# The largest eigenvalue stands alone and is found at once. The smallest one sits at the edge of a crowd near zero,
# and takes nearly all the passes. On the way its value seems to have settled, and has not: two eigenvalues are near
# each other there. This is why the solver asks for more than a small residual before it stops.
# [02_both_extremes](02_both_extremes.ipynb) is about this.
#
# The eigenvectors come with the values. Here is the loss along the one of the smallest eigenvalue. The weights are
# not at a minimum: along this line the loss bends downwards.

# %%
print({name: f"{float(part.norm()):.2f}" for name, part in H.unflatten(ex.smallest.vector).items()})
ax = plots.loss_along_eigenvector(objective, params, data, ex.smallest)

# %% [markdown]
# For a log or a file, `to_dict` gives plain numbers and strings. The history, with an entry for each look at the
# solve, and the seconds are left out here.

# %%
plain = {key: value for key, value in ex.to_dict().items() if key not in ("history", "seconds")}
print(json.dumps(plain, indent=2))

# %% [markdown]
# ## The same from SciPy
#
# Every operator goes out to SciPy, and any symmetric SciPy operator comes in by `hk.aslinearoperator`. SciPy's `tol`
# is about its own estimate of the residual, and it does not say how many products it took. `hk.eigsh` is the same
# method with `tol` about the eigenvalue, and counts them.

# %%
start = torch.randn(H.n, generator=torch.Generator().manual_seed(0)).numpy()
values = eigsh(H.to_scipy(), k=2, which="BE", tol=1e-2, v0=start, return_eigenvectors=False)
print(f"SciPy  {values[0]:.5g} and {values[1]:.5g}")
print(f"hvpkit {ex.smallest.value:.5g} and {ex.largest.value:.5g}")

# %% [markdown]
# ## Gauss-Newton
#
# The generalised Gauss-Newton matrix leaves out the curvature of the network itself. It has no negative eigenvalues,
# and in late training its large ones are those of the Hessian. All solvers take it as they take the Hessian.

# %%
G = hk.ggn(objective, params, data)
of_ggn = hk.extreme_eigenvalues(G)
print(of_ggn)
print(of_ggn.message)

# %% [markdown]
# Its smallest eigenvalue is zero, to the rounding of float32. A zero has no relative digits. So the solver stops
# there and says so. It would be wrong to print digits, and a waste to search for them.
#
# `hk.fisher` and `hk.empirical_fisher` are made in the same way.
#
# ## Layer by layer
#
# `wrt` takes names of parameters, with `*` as in file names. It gives the block of the Hessian that belongs to them.
# The others are held constant.

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
# The whole distribution of eigenvalues is the subject of [03_spectral_density](03_spectral_density.ipynb).
#
# ## A second checkpoint
#
# After another epoch the Hessian is another one. Here is the same question again, and both results in one picture.
# `v0` takes the old eigenvectors as a start.

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
# Both give the same values. Old vectors are a natural thing to begin with, but compare the passes: they save little, if
# anything. The old vectors hold little of what is new, and it is this that has to be found, or excluded, before the
# solver may stop. A random vector holds a bit of everything. Measure before you pass `v0`.
#
# Note that `from_module` was called again for the second checkpoint. BatchNorm's running statistics are constants of
# the objective, and training changed them.
#
# ## Your own
#
# ```python
# objective, params = hk.from_module(your_model, your_criterion)
# H = hk.hessian(objective, params, your_loader)
# ex = hk.extreme_eigenvalues(H, monitor=hk.progress_bar())
# ```
#
# Or leave out the module. A loss is any function `loss_fn(params, batch)` that returns a loss for each example:

# %%
weights = torch.tensor([1.0, -2.0])
points = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
logistic = hk.hessian(lambda w, batch: F.softplus(batch @ w), weights, points)
print(hk.extreme_eigenvalues(logistic))
