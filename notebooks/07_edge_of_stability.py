# %% [markdown]
# # The edge of stability: how sharp training gets
#
# Gradient descent with learning rate $\eta$ on a quadratic diverges where an eigenvalue of the Hessian is above $2 /
# \eta$. Networks trained with full batches do not diverge there. Their largest eigenvalue, the sharpness, grows until
# it is $2 / \eta$, and stays ([Cohen et al., 2021](https://arxiv.org/abs/2103.00065)).
#
# Adam divides each entry of its momentum by a number of its own. What it feels is not the sharpness of $H$ but that of
# $D^{-1/2} H D^{-1/2}$ with the diagonal $D$ of these numbers. That one settles, too
# ([Cohen et al., 2022](https://arxiv.org/abs/2207.14484)):
#
# | optimizer | $D$ | settles at |
# |---|---|---|
# | gradient descent | 1 | $2 / \eta$ |
# | RMSprop | $\sqrt v + \epsilon$ | $2 / \eta$ |
# | Adam | $\sqrt{\hat v} + \epsilon$ | $\frac{2 + 2 \beta_1}{(1 - \beta_1)\, \eta}$, $38 / \eta$ for $\beta_1 = 0.9$ |
#
# `hk.precondition(H, optimizer)` is that operator, with $D$ from the optimizer's state. This notebook trains a small
# network with each of the three. `benchmarks/study_edge_of_stability.py` does the same from several seeds.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

import hvpkit as hk
from hvpkit.plots.style import COLORS, STYLE
from hvpkit.zoo import digits

plt.rcParams.update(STYLE)

images, classes = digits()
x = images[:200].flatten(1)
x = x - x.mean(dim=0)
data = x, F.one_hot(classes[:200], 10).float()


def squared_error(outputs, targets):
    return 0.5 * (outputs - targets).square().sum(dim=-1)


optimizers = {
    "gradient descent": (lambda params: torch.optim.SGD(params, lr=0.5), 2 / 0.5),
    "RMSprop": (lambda params: torch.optim.RMSprop(params, lr=5e-4, alpha=0.998, eps=1e-7), 2 / 5e-4),
    "Adam": (lambda params: torch.optim.Adam(params, lr=2e-3, betas=(0.9, 0.99), eps=1e-7), 38 / 2e-3),
}

# %% [markdown]
# ## Train, and measure on the way
#
# Of the spectrum only the largest eigenvalue is needed: `hk.lanczos`. A new operator is made at each measurement, as an
# operator is a snapshot of the parameters; the optimizer's state belongs to them. The last line of the function also
# asks for the sharpness of $H$ itself.


# %%
def largest(op):
    return float(hk.lanczos(op, 1, which="LA", tol=1e-2).values[0])


def trained(make, num_steps=1500, every=75):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 10))
    optimizer = make(model.parameters())
    history = []
    for step in range(1, num_steps + 1):
        optimizer.zero_grad()
        loss = squared_error(model(data[0]), data[1]).mean()
        loss.backward()
        optimizer.step()
        if step % every == 0 or step == 10:
            objective, params = hk.from_module(model, squared_error)
            H = hk.hessian(objective, params, data, mode="reverse-over-reverse")
            preconditioned = hk.precondition(H, optimizer)
            history.append((step, float(loss.detach()), largest(preconditioned), largest(H)))
    return history


found = {name: trained(make) for name, (make, _) in optimizers.items()}

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 3.2))
for ax, (name, (_, published)) in zip(axes, optimizers.items(), strict=True):
    steps, _, felt, _ = zip(*found[name], strict=True)
    ax.plot(steps, felt, marker=".", color=COLORS["measured"])
    ax.axhline(published, color="0.5", linestyle="--", linewidth=1, label=f"published: {published:g}")
    ax.set(title=name, xlabel="step", ylim=(0, 1.3 * published))
    legend = ax.legend(loc="lower right")
text = axes[0].set_ylabel("sharpness that the optimizer feels")

# %% [markdown]
# ## A verdict for each
#
# The mean over the last half of the measurements, over the published value. It holds if that is within 10 percent.

# %%
print(f"{'':<17}{'published':>10}{'settled':>10}{'ratio':>7}   verdict")
for name, (_, published) in optimizers.items():
    last = [felt for _, _, felt, _ in found[name]][len(found[name]) // 2 :]
    mean = sum(last) / len(last)
    verdict = "holds" if abs(mean / published - 1) <= 0.1 else "does not hold"
    print(f"{name:<17}{published:>10.4g}{mean:>10.4g}{mean / published:>7.3f}   {verdict}")

# %% [markdown]
# The loss goes on falling all the time, and the sharpness of $H$ itself says nothing about Adam and RMSprop:

# %%
print(f"{'':<17}{'loss, first':>12}{'last':>9}{'sharpness of H, first':>23}{'last':>8}")
for name, history in found.items():
    (_, first, _, before), (_, last, _, after) = history[0], history[-1]
    print(f"{name:<17}{first:>12.4f}{last:>9.5f}{before:>23.2f}{after:>8.2f}")

# %% [markdown]
# ## Limits
#
# - Full batches. With minibatches the sharpness stays below these values.
# - $D$ must change slowly. RMSprop's decay is 0.998 here; with 0.99 its diagonal follows the oscillation along the
#   sharpest direction, and it settles some 10 percent above $2 / \eta$.
# - A small network, one seed. `hk.precondition` works as well with samples of the data and with the default solver,
#   `hk.extreme_eigenvalues`, on large ones.
