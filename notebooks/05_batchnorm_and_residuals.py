# %% [markdown]
# # What BatchNorm and residual connections do to the Hessian
#
# It is often said that BatchNorm and residual connections make the loss smoother. Yao, Gholami, Keutzer and Mahoney
# measured this with the Hessian ([PyHessian](https://arxiv.org/abs/1912.07145)), for ResNets of 20 to 56 layers on
# CIFAR-10. They found:
#
# - Without BatchNorm, **deep** networks end in sharper minima: larger top eigenvalue, larger trace.
# - Without BatchNorm, **shallow** networks do not. They found the opposite.
# - Without residual connections, networks end in sharper minima, at any depth.
#
# This notebook does the same with networks that train in seconds: 8 and 20 layers, four channels where the paper has
# 16, 300 digits of 8 x 8 pixels. The results are about *these* networks. The study at the paper's size is
# `benchmarks/study_batchnorm_residual.py`; it needs a GPU.

# %%
import math

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

import hvpkit as hk
from hvpkit.plots.style import STYLE
from hvpkit.zoo import cifar_resnet, digits, train_classifier

plt.rcParams.update(STYLE)

images, classes = digits()
data = images[:300].expand(-1, 3, -1, -1).contiguous(), classes[:300]
variants = {
    "both": {},
    "no BatchNorm": {"batchnorm": False},
    "no residual": {"residual": False},
}
depths, seeds = (8, 20), (0, 1)

# %% [markdown]
# ## Which Hessian
#
# BatchNorm normalises with the statistics of the batch in training, and with running statistics in evaluation. After a
# short training the running statistics lag behind, and the loss with them can be far from the training loss. So the
# Hessian here uses the statistics of the batch, `batchnorm="batch"`, with all examples in one batch.
#
# The magnitude of the Hessian depends on the loss: where every example is classified with certainty, it is small. To
# compare networks at the same loss, all of them are trained until the mean loss of an epoch is 0.1. The paper trained
# all for the same number of epochs instead.


# %%
def measured(depth, variant, seed):
    model = cifar_resnet(depth, width=4, shortcut="projection", seed=seed, **variants[variant])
    train_classifier(model, data, target_loss=0.1, max_epochs=100, seed=seed)
    objective, params = hk.from_module(model, F.cross_entropy, batchnorm="batch")
    H = hk.hessian(objective, params, data, batch_size=300, mode="reverse-over-reverse")
    return {
        "H": H,
        "loss": float(hk.loss(objective, params, data)),
        "top": hk.top_eigenvalues(H, 1, tol=0.1),
        "trace": hk.trace(H, num_matvecs=9),
    }


found = {
    (depth, variant, seed): measured(depth, variant, seed)
    for depth in depths
    for variant in variants
    for seed in seeds
}

# %%
print(f"{'layers':>6}  {'':<14}{'loss':>7}{'largest':>9}{'trace':>15}")
for (depth, variant, _), one in found.items():
    top, trace = one["top"].pair(0), one["trace"]
    print(
        f"{depth:>6}  {variant:<14}{one['loss']:>7.3f}{top.value:>9.2f}"
        f"{trace.value:>9.1f} ± {trace.stderr:<4.1f}"
    )

# %% [markdown]
# ## The largest eigenvalue and the trace
#
# Each dot is a network; there are two seeds of each kind.

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3.6))
for ax, name in zip(axes, ("largest eigenvalue", "trace"), strict=True):
    for place, depth in enumerate(depths):
        for number, variant in enumerate(variants):
            own = [found[depth, variant, seed] for seed in seeds]
            values = [one["trace"].value if name == "trace" else one["top"].pair(0).value for one in own]
            label = {"label": variant} if not place else {}
            ax.plot([4 * place + number] * len(own), values, "o", color=f"C{number}", **label)
    ax.set(yscale="log", title=name, xlim=(-0.8, 6.8))
    ticks = ax.set_xticks([1, 5], [f"{depth} layers" for depth in depths])
legend = figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)

# %% [markdown]
# ## The whole spectrum
#
# For the networks with 20 layers and the first seed: right of zero the share of all eigenvalues that are larger, left
# of zero the share of those that are smaller. Both axes are logarithmic, that of the eigenvalues on both sides of zero.
# The steps are the nodes of the Lanczos quadrature. A smoothed density has a width in proportion to the span, which
# makes wide spectra appear wider than they are.

# %%
sizes = torch.logspace(-2, 3.2, 300, dtype=torch.float64)
x = torch.cat([-sizes.flip(0), torch.zeros(1), sizes])
figure, ax = plt.subplots(figsize=(8, 4))
for variant in variants:
    d = hk.spectral_density(found[20, variant, 0]["H"], num_steps=20)
    share = torch.where(x < 0, d.cdf(x), 1 - d.cdf(x))
    ax.plot(x, torch.where((share > 1e-9) & (x != 0), share, torch.nan), label=variant)
ax.set(yscale="log", xlabel="eigenvalue", ylabel="share of eigenvalues beyond")
ax.set_xscale("symlog", linthresh=0.1)
legend = ax.legend()

# %% [markdown]
# ## Which findings hold here
#
# The ratio of the network without a part to the network with both, for each seed.


# %%
def ratios(depth, variant, of):
    return [of(found[depth, variant, seed]) / of(found[depth, "both", seed]) for seed in seeds]


quantities = {"largest": lambda one: one["top"].pair(0).value, "trace": lambda one: one["trace"].value}
for variant in ("no BatchNorm", "no residual"):
    for name, of in quantities.items():
        for depth in depths:
            values = ratios(depth, variant, of)
            mean = math.prod(values) ** (1 / len(values))
            shown = ", ".join(f"{value:.1f}" for value in values)
            print(f"{variant:<13} {name:<8} {depth:>2} layers: {mean:6.1f} times ({shown})")

# %% [markdown]
# - **Without BatchNorm, deep networks end sharper**: yes at 20 layers, by a factor of about seventeen in the top
#   eigenvalue. The trace grows much less: mainly the outliers grow.
# - **Shallow networks do not**: *not* found here. The network with 8 layers is also sharper without BatchNorm, and by
#   about the same factor.
# - **Without residual connections networks end sharper**: yes at 20 layers, by factors of 167 and 18 for the two seeds.
#   At 8 layers there is hardly a difference.
#
# The spectra agree: without either part they reach further out, on both sides of zero.
#
# ## Limits of this comparison
#
# - Two seeds show a spread and prove nothing. Rounding on another machine also changes the trained networks of 20
#   layers, and with them the factors.
# - Four channels and digits are not ResNet-20 on CIFAR-10. "Shallow" means 20 layers in the paper, and 8 here.
# - The comparison is at the same training loss. At the same number of epochs the losses differ, and so do the ratios:
#   `benchmarks/study_batchnorm_residual.py --small` compares that way, as the paper does, with three seeds and a
#   statistical test.
# - Eigenvalues depend on the magnitude of the weights. With BatchNorm, weights twice as large give the same loss and a
#   quarter of the curvature. So part of "flatter with BatchNorm" is due to larger weights.
