# %% [markdown]
# # Influence functions: what if an example had not been there?
#
# A network is trained to a minimum of its mean loss with weight decay. How would the loss on test data change if some
# training examples had been left out? Retraining tells; a linear system predicts it. At the minimum of
#
# $$\frac1N \sum_j \ell_j(\theta) + \frac\lambda2 \|\theta\|^2,$$
#
# leaving out example $i$ moves the minimum, to first order, by $\Delta\theta = \frac1N (H + \lambda I)^{-1} \nabla
# \ell_i(\theta)$, with the Hessian $H$ of the mean loss (Cook and Weisberg, 1982; for networks [Koh and Liang,
# 2017](https://arxiv.org/abs/1703.04730)). The test loss changes by $\nabla L_\text{test} \cdot \Delta\theta$.
#
# `hk.solve` solves such systems, for many right-hand sides in the same passes over the data. The network here is small,
# so that everything it predicts can be retrained.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

import hvpkit as hk
from hvpkit.plots.style import STYLE
from hvpkit.zoo import digits

plt.rcParams.update(STYLE)

images, classes = digits()
x, y = F.avg_pool2d(images, 2).flatten(1).double(), classes
train, test = (x[:600], y[:600]), (x[600:], y[600:])
decay = 1e-2

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 10)).double()
objective, start = hk.from_module(model, F.cross_entropy)
print(
    f"{sum(p.numel() for p in model.parameters())} parameters, {len(train[1])} examples, {len(test[1])} for testing"
)

# %% [markdown]
# ## Train to the minimum
#
# Gradient descent with `torch.optim`, then Newton's method, whose steps are solves with the Hessian: MINRES, as the
# matrix may be indefinite before the minimum. At the end the gradient is zero to rounding. That matters: the formula
# holds at a minimum.


# %%
def newton(params, data, num_steps):
    for _ in range(num_steps):
        H = hk.hessian(objective, params, data, mode="reverse-over-reverse")
        theta = H.flatten(params)
        gradient = H.flatten(hk.grad(objective, params, data)) + decay * theta
        params = H.unflatten(theta - hk.solve(H, gradient, damping=decay, tol=1e-8).x)
    return params, float(gradient.norm())


optimizer = torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=400, line_search_fn="strong_wolfe")


def loss():
    optimizer.zero_grad()
    total = F.cross_entropy(model(train[0]), train[1])
    total = total + decay / 2 * sum(p.square().sum() for p in model.parameters())
    total.backward()
    return total


optimizer.step(loss)
_, params = hk.from_module(model, F.cross_entropy)
params, norm = newton(params, train, 4)
H = hk.hessian(objective, params, train, mode="reverse-over-reverse")
lowest = hk.lanczos(H, 1, which="SA").values[0]
print(f"gradient {norm:.1e}; smallest eigenvalue of H + decay {lowest + decay:.4f}")

# %% [markdown]
# The smallest eigenvalue of $H + \lambda I$ is positive: it is a minimum, and conjugate gradients would do, too.
#
# ## Predict
#
# The 12 training examples with the largest gradients, and 8 others. Their gradients are the columns of one block: each
# pass over the data multiplies all that have not converged.

# %%
gradients = torch.stack(
    [H.flatten(hk.grad(objective, params, (train[0][[i]], train[1][[i]]))) for i in range(len(train[1]))],
    dim=1,
)
order = gradients.norm(dim=0).argsort(descending=True)
chosen = torch.cat([order[:12], order[30::70][:8]])
found = hk.solve(H, gradients[:, chosen], damping=decay, tol=1e-6)
print(f"{found.status}: {found.num_matvecs:g} matvecs in {found.num_passes:g} passes over the data")

moves = found.x / len(train[1])
slope = H.flatten(hk.grad(objective, params, test))
predicted = slope @ moves

# %% [markdown]
# ## Retrain
#
# Without each example, to the minimum again: two steps of Newton's method from the old one.


# %%
def change_without(left_out):
    kept = torch.ones(len(train[1]), dtype=torch.bool)
    kept[left_out] = False
    data = train[0][kept], train[1][kept]
    # the same weight decay per example: the mean is still over all N of them
    weight = kept.sum() / len(kept)
    scaled = hk.Objective(objective.forward, lambda z, batch: weight * objective.output_loss(z, batch))
    now = params
    for _ in range(2):
        K = hk.hessian(scaled, now, data, mode="reverse-over-reverse")
        theta = K.flatten(now)
        gradient = K.flatten(hk.grad(scaled, now, data)) + decay * theta
        now = K.unflatten(theta - hk.solve(K, gradient, damping=decay, tol=1e-6).x)
    return float(hk.loss(objective, now, test) - hk.loss(objective, params, test))


retrained = torch.tensor([change_without([i]) for i in chosen.tolist()], dtype=torch.float64)
correlation = float(torch.corrcoef(torch.stack([predicted, retrained]))[0, 1])
error = float((predicted - retrained).norm() / retrained.norm())
print(f"one example: correlation {correlation:.4f}, error {error:.1%} of the changes")

# %% [markdown]
# ## Several at once
#
# To first order the changes add up. Groups of 3 and of 8 of the influential ones, at random: how far does it hold?

# %%
generator = torch.Generator().manual_seed(0)
groups = {size: [torch.randperm(12, generator=generator)[:size] for _ in range(6)] for size in (3, 8)}
of_groups = {}
for size, members in groups.items():
    sums = torch.stack([predicted[group].sum() for group in members])
    true = torch.tensor([change_without(chosen[group]) for group in members], dtype=torch.float64)
    of_groups[size] = sums, true
    print(f"{size:>2} examples: error {float((sums - true).norm() / true.norm()):.1%} of the changes")

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3.8))
axes[0].plot(retrained, predicted, "o", label="one example")
for size, (sums, true) in of_groups.items():
    axes[1].plot(true, sums, "o", label=f"{size} examples")
for ax in axes:
    ends = ax.get_xlim()
    ax.plot(ends, ends, color="0.6", linewidth=1)
    ax.set(xlabel="change of the test loss, retrained", ylabel="predicted")
    legend = ax.legend()

# %% [markdown]
# ## What this shows, and its limits
#
# - For single examples the prediction is right to a few percent, at the price of one block solve for all of them.
# - Groups are predicted less well, as the second order grows with their size.
# - It holds at a minimum with enough weight decay. Large networks that are stopped early are not at one; there the
#   damping makes the system solvable, and the prediction is one about a different problem. Where `H + damping I` is
#   indefinite, `method="cg"` says so, with a direction of negative curvature, instead of an answer.
# - With many examples, `preconditioner="sample"` saves passes. This one has too few.
