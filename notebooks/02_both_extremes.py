# %% [markdown]
# # Both extreme eigenvalues, and why the smallest one is hard
#
# A researcher asked: *I train a ResNet on CIFAR-10. After each epoch I want the largest and the smallest eigenvalue
# of the Hessian over all the data, with a reasonable relative error, in a minute. The largest is about 100, the
# smallest about -1/2 or closer to zero. I have tried power iteration, accelerated and stochastic power methods, and
# Oja's rule. They are too slow, or they give a different answer in every run.*
#
# This notebook asks the same on a small scale, where the answer is known: it forms the Hessian of a small network and
# computes all of its eigenvalues. Then it compares each of these methods with those that hvpkit recommends. The cost is
# counted in **passes over the data**, which dominate the time for a large network.

# %%
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

import hvpkit as hk
from hvpkit.plots.style import COLORS, STYLE
from hvpkit.zoo import digits, digits_cnn, train_classifier

plt.rcParams.update(STYLE)

# %%
data = digits()
model = digits_cnn(4)
train_classifier(model, data, target_loss=0.001)
objective, params = hk.from_module(model, F.cross_entropy)
network = hk.hessian(objective, params, data, batch_size=600)
print(network)
print(f"loss over all examples {float(hk.loss(objective, params, data)):.4f}")

# %% [markdown]
# ## The exact spectrum
#
# 678 matvecs give the whole matrix. From here on a matvec over **all** data uses this matrix and takes no time, so that
# slow methods can be run for long. Matvecs over minibatches still use the network.

# %%
blocks = torch.eye(network.n).split(113, dim=1)
matrix = torch.cat([network @ block for block in blocks], dim=1)
matrix = (matrix + matrix.mT) / 2
H = replace(network, product=lambda vectors: matrix @ vectors)

exact = torch.linalg.eigvalsh(matrix.double())
low, high = float(exact[0]), float(exact[-1])
print("smallest", [f"{value:.4f}" for value in exact[:4].tolist()])
print("largest ", [f"{value:.4f}" for value in exact[-4:].tolist()])
print(f"the largest is {high / -low:.0f} times the smallest in magnitude")

# %% [markdown]
# The situation is that of the question. The largest eigenvalue is well separated. The smallest one is tiny in
# comparison, and has close neighbours.
#
# ## Every method on the same operator
#
# Each computes both ends (`which="BE"`) to one per cent, with at most 2,000 passes; the methods on minibatches, whose
# matvecs take real time here, with at most 60.

# %%
both = {"k": 2, "which": "BE", "tol": 1e-2}
tried = {
    "power": partial(hk.power, **both, max_matvecs=2000),
    "accelerated power": partial(hk.accelerated_power, **both, max_matvecs=2000),
    "stochastic power": partial(hk.stochastic_power, **both, max_matvecs=60),
    "Oja": partial(hk.oja, **both, max_matvecs=60),
}
recommended = {
    "Lanczos": partial(hk.extreme_eigenvalues, tol=1e-2),
    "multifidelity": partial(hk.extreme_eigenvalues, tol=1e-2, method="multifidelity"),
    "Chebyshev": partial(hk.chebyshev, **both),
    "LOBPCG": partial(hk.lobpcg, **both),
    "ARPACK (SciPy's eigsh)": partial(hk.eigsh, **both),
}
results = {name: solve(H) for name, solve in (tried | recommended).items()}


# %%
def ends(found):
    """Return the pairs of both ends."""
    if isinstance(found, hk.ExtremeResult):
        return found.smallest, found.largest
    return found.pair(0), found.pair(1)


def error(value, truth):
    return abs(value - truth) / abs(truth)


titles = f"{'passes':>7}{'largest':>10}{'error':>9}{'smallest':>10}{'error':>10}"
print(f"{'':<23}{titles}  {'interval':<19}{'holds':<6}status")
print(f"{'exact':<23}{'':>7}{high:>10.4f}{'':>9}{low:>10.4f}")
for name, found in results.items():
    smallest, largest = ends(found)
    interval = f"[{smallest.interval.lower:.4f}, {smallest.interval.upper:.4f}]"
    held = low in smallest.interval and high in largest.interval
    print(
        f"{name:<23}{found.num_matvecs:>7.0f}"
        f"{largest.value:>10.4f}{100 * error(largest.value, high):>7.2f} %"
        f"{smallest.value:>10.4f}{100 * error(smallest.value, low):>8.2f} %"
        f"  {interval:<19}{'yes' if held else 'no':<6}{found.status}"
    )

# %% [markdown]
# All methods find the largest eigenvalue. The smallest one takes most of the passes. Power iteration has not found it
# after 2,000. The two methods on minibatches do not even have its sign; their status is not `converged`.
#
# The interval is that of the smallest eigenvalue, and "holds" is "yes" if both intervals contain their eigenvalues. For
# methods other than Lanczos an interval only says that *some* eigenvalue lies inside: see its `kind`. So a "no" does
# not contradict the interval: it contains an eigenvalue, but not the smallest.
#
# The picture shows the error of both ends against passes, computed with the exact values.

# %%
figure, axes = plt.subplots(1, 2, figsize=(7.6, 4), dpi=85, sharey=True)
for place, (ax, truth, title) in enumerate(zip(axes, (low, high), ("smallest", "largest"), strict=True)):
    for number, (name, found) in enumerate(results.items()):
        passes = [entry.num_matvecs for entry in found.history] + [found.num_matvecs]
        values = [getattr(entry, title) for entry in found.history] + [ends(found)[place].value]
        errors = [max(error(value, truth), 1e-6) for value in values]
        style = {"linestyle": "--"} if name in tried else {}
        ax.plot(passes, errors, color=f"C{number}", linewidth=1.4, label=name, **style)
        ax.plot(passes[-1], errors[-1], "o", color=f"C{number}", markersize=4)
    ax.axhline(1e-2, color="0.5", linestyle=":", linewidth=1)
    ax.set(xscale="log", yscale="log", ylim=(5e-7, 1e3), xlabel="passes over the data", title=f"the {title}")
label = axes[0].set_ylabel("relative error")
legend = figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)

# %% [markdown]
# ## Why power iteration takes so long
#
# Power iteration applies the operator to a vector again and again, and the eigenvector of the eigenvalue of largest
# magnitude comes to dominate. For the smallest eigenvalue $\lambda_1$ the operator is shifted by the largest one, so
# that $\lambda_1 - \lambda_n$ has the largest magnitude. Then each step reduces the component of the second smallest,
# relative to that of the smallest, only by the factor $(\lambda_n - \lambda_2) / (\lambda_n - \lambda_1)$. It is close
# to one because the gap is divided by the **span** of the whole spectrum:

# %%
gap, span = float(exact[1] - exact[0]), high - low
print(f"gap {gap:.4f}, span {span:.1f}: a step reduces the neighbour by a factor of {1 - gap / span:.6f}")
print(f"steps for a factor of 1/e: {span / gap:,.0f}, or {(span / gap) ** 0.5 / 2:,.0f} with momentum")

# %% [markdown]
# Several times as many are needed for the required accuracy. Tuned momentum takes about the square root of the number
# of steps, and so does Lanczos in the worst case. But Lanczos finds the best of all polynomials of the operator, for
# both ends at once, and needs no shift. It resolves the few outliers in a step or two each. After that only the span of
# the bulk matters, which is far smaller. That is why it is so much better in this situation. The price is memory: one
# vector for each step.
#
# ## Why a small change is not a stopping criterion
#
# A common loop stops when the value changes little from one step to the next. This is its result here.

# %%
v = torch.randn(H.n, generator=torch.Generator().manual_seed(0))
value, steps, change = 0.0, 0, 1.0
while change > 1e-2 or steps < 10:
    image = H @ v
    new = float(v @ image / (v @ v))
    change, value, steps = abs(new - value) / abs(new), new, steps + 1
    residual = float((image - new * v).norm() / v.norm())
    v = image - high * v
    v /= v.norm()
print(f"stopped after {steps} steps at {value:.4f}, where the last one changed it by {100 * change:.2f} %")
print(f"the smallest eigenvalue is {low:.4f}; the residual at the stop was {residual:.4f}")

# %% [markdown]
# A slow method changes little in a step *because* it is slow. The value even has the wrong sign. The **residual**
# $\|Hv - \theta v\|$ would have shown it: an eigenvalue lies within that distance of the value, and it is larger than
# the value itself.
#
# The residual is a safe bound, but a wide one. For symmetric matrices the error of the eigenvalue is at most the
# residual *squared* over the gap to the next one. So hvpkit's `tol` refers to the eigenvalue, and the solver stops by
# the smaller of the two bounds:

# %%
ex = results["Lanczos"]
print(f"residual of the smallest over its magnitude: {100 * ex.smallest.residual_norm / -low:6.2f} %")
print(f"error bound that the solver stops by:        {100 * ex.smallest.error_bound / -low:6.2f} %")
print(f"true error:                                  {100 * error(ex.smallest.value, low):6.2f} %")
strict = hk.lanczos(H, 2, which="BE", tol=1e-2, certify=True)
print(f"passes: {ex.num_matvecs:g}, or {strict.num_matvecs:g} until the interval is as narrow as tol")

# %% [markdown]
# A residual cannot exclude that another eigenvalue lies further out. The interval of Lanczos can, with its confidence:
# see [01_quickstart](01_quickstart.ipynb).
#
# ## Why minibatches give a different answer in every run
#
# A minibatch is cheaper, so why not take its smallest eigenvalue? Because it is not the same number. The Hessian of a
# sample is the full one plus noise. The largest eigenvalue is large beside the noise. The smallest one is the minimum
# over all directions, and the minimum selects the direction in which the noise is most negative. So its mean over
# samples always lies further out than the true one, and further for smaller samples.

# %%
sizes = (64, 128, 256, 512, 1024)
seeds = range(4)
of_samples = {
    size: [hk.extreme_eigenvalues(H.sample(size, seed), tol=0.05) for seed in seeds] for size in sizes
}
print("examples   smallest eigenvalue of the sample's Hessian, four samples    over the full one, mean")
for size, found in of_samples.items():
    values = [ex.smallest.value for ex in found]
    shown = "".join(f"{value:10.3f}" for value in values)
    print(f"{size:>8}   {shown}{sum(values) / len(values) / low:>32.1f}")
print(f"{network.num_examples:>8}   {low:10.3f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3.6))
for ax, name, truth in zip(axes, ("smallest", "largest"), (low, high), strict=True):
    for size, found in of_samples.items():
        ax.plot(
            [size] * len(found),
            [getattr(ex, name).value for ex in found],
            "o",
            color=COLORS[name],
            markersize=5,
        )
    ax.axhline(truth, color="0.5", linestyle="--", linewidth=1, label="all examples")
    ax.set(xscale="log", xlabel="examples in the sample", title=f"the {name} eigenvalue")
    ax.legend()
axes[0].set_yscale("symlog", linthresh=0.1)
axes[0].set_ylim(-10, 0)
label = axes[0].set_ylabel("of the sample's Hessian")

# %% [markdown]
# Each step of the stochastic methods contains the same noise. They can average it out, with smaller and smaller steps
# or larger and larger batches. But the noise is as large as the largest eigenvalues, and the smallest one is hundreds
# of times smaller.
#
# Samples are still useful: they show in which *directions* to search, and in which *metric* Lanczos needs fewer steps
# on all data. `method="multifidelity"` does both, with the same promise as Lanczos, however good the sample is. With
# tens of thousands of examples that saves a third of the passes.
#
# ## Which method to use
#
# - `hk.extreme_eigenvalues(H)` for both ends. From 1,000 parameters and 20,000 examples on it uses
#   `method="multifidelity"`, else Lanczos. `confidence` is that of values and intervals; `certify=True` halves what a
#   value may be off.
# - `hk.chebyshev` or `hk.lobpcg` if memory does not hold some dozens of vectors.
# - float64 if the smallest is more than about a thousand times smaller than the largest: the rounding of float32
#   matvecs is then too large for one per cent. The status says so (`rounding-limited`, `zero-within-atol`).
# - Power iteration at most for the largest eigenvalue alone, never for the smallest.
