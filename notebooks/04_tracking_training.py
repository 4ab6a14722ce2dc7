# %% [markdown]
# # Tracking training: both ends along the way
#
# The largest eigenvalue of the Hessian limits the learning rate. Gradient descent with the rate $\eta$ is stable along
# a direction only while its curvature is less than $2/\eta$. Beyond that each step overshoots by more than it gains.
#
# This suggests to find the largest eigenvalue first, and then to choose the rate. But the network adapts to the rate:
# its largest eigenvalue grows until it reaches $2/\eta$, and stays close to it. Cohen et al. call this the edge of
# stability ([arXiv:2103.00065](https://arxiv.org/abs/2103.00065)). This notebook shows it with `SpectrumTracker`.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

from hvpkit.plots.style import COLORS, STYLE
from hvpkit.train import KneeLR, SpectrumTracker, knee_lr
from hvpkit.zoo import digits, mlp

plt.rcParams.update(STYLE)

# %% [markdown]
# ## Data, network, loss
#
# As in the paper: the squared error, a network with tanh, and all examples in each step, so that nothing is random. The
# data are the first 500 of scikit-learn's digits.

# %%
images, classes = digits()
data = images[:500], classes[:500]


def new_model():
    return mlp(hidden=[32, 32], activation=nn.Tanh)


def squared_error(outputs, targets):
    return (outputs - F.one_hot(targets, 10)).square().sum(1) / 2


print(f"{sum(p.numel() for p in new_model().parameters()):,} weights")

# %% [markdown]
# ## A tracker in a training loop
#
# `for_module` takes the criterion and **all** the data, whatever batches you train on. Call the tracker once in each
# step, with the module. It measures every 50 steps; the other calls return at once.
#
# It does not change the training: the weights, `.grad`, `train()` or `eval()`, and the global random state. A run with
# a tracker has the same weights as one without it, to the bit.


# %%
def train(model, optimizer, tracker, steps, scheduler=None):
    losses = []
    for step in steps:
        tracker(model, step=step)
        optimizer.zero_grad()
        loss = squared_error(model(data[0]), data[1]).mean()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(float(loss.detach()))
    return losses


rates = {0.2: "largest", 2 / 15: "smallest"}  # and the names of their colours
trackers, losses = {}, {}
for lr in rates:
    model = new_model()
    trackers[lr] = SpectrumTracker.for_module(squared_error, data, every=50)
    losses[lr] = train(model, torch.optim.SGD(model.parameters(), lr=lr), trackers[lr], range(1201))
    print(f"rate {lr:.3f}: loss {losses[lr][-1]:.3f}, {len(trackers[lr].results)} measurements")

# %% [markdown]
# ## The edge of stability

# %%
figure, axes = plt.subplots(1, 2, figsize=(7.4, 3.1))
for lr, color in rates.items():
    steps = [step for step, _ in trackers[lr].results]
    axes[0].plot(losses[lr], color=COLORS[color], label=f"rate {lr:.3f}")
    values = [ex.largest.value for _, ex in trackers[lr].results]
    axes[1].plot(steps, values, color=COLORS[color], marker="o", markersize=3, label=f"rate {lr:.3f}")
    axes[1].axhline(2 / lr, color=COLORS[color], linestyle=":", label=f"2 / {lr:.3f}")
axes[0].set_ylim(0, 0.4)
axes[0].set_ylabel("loss")
axes[1].set_ylabel("largest eigenvalue")
for ax in axes:
    ax.set_xlabel("training step")
    ax.legend()

# %% [markdown]
# Both runs start from the same weights. The largest eigenvalue grows until it is somewhat above $2/\eta$ of its run,
# and stays there. With the larger rate it gets there first.
#
# From then on the losses do not decrease in each step any more. A quadratic loss would diverge. This one goes up and
# down instead, and decreases in the long run.

# %%
for lr in rates:
    late = [ex.largest.value for step, ex in trackers[lr].results if step >= 1000]
    rises = sum(after > before for before, after in zip(losses[lr], losses[lr][1:], strict=False))
    print(
        f"rate {lr:.3f}: 2/rate = {2 / lr:.1f}, largest after step 1000 "
        f"{min(late):.1f} to {max(late):.1f}; the loss rose in {rises} of 1200 steps"
    )

# %% [markdown]
# ## Both ends
#
# `plot` draws both ends with their intervals. The axis is logarithmic on both sides of zero.

# %%
ax = trackers[0.2].plot()
legend = ax.legend(loc=(0.8, 0.65))

# %% [markdown]
# At first there is a direction of strong negative curvature. After 50 steps it is about thirty times weaker. At the
# edge of stability negative curvature comes back: it lasts while the loss goes up and down, and varies between
# measurements. The largest eigenvalue alone would not have shown this.
#
# ## Records
#
# `records` has one flat dict for each measurement: for your logger, or as a pandas frame.

# %%
frame = trackers[0.2].to_frame()
frame[["step", "smallest", "smallest_lower", "largest", "largest_upper", "passes", "status"]].iloc[::4].round(
    3
)

# %% [markdown]
# ## What it costs
#
# One measurement took some tens of passes over the data. A pass costs about as much as three gradients.

# %%
figure, ax = plt.subplots()
for lr, color in rates.items():
    frame = trackers[lr].to_frame()
    ax.plot(
        frame["step"], frame["passes"], color=COLORS[color], marker="o", markersize=3, label=f"rate {lr:.3f}"
    )
    print(
        f"rate {lr:.3f}: {frame['passes'].median():.0f} passes in the median, {frame['passes'].max():.0f} at most"
    )
ax.set_ylim(0)
ax.set_xlabel("training step")
ax.set_ylabel("passes over the data")
legend = ax.legend()

# %% [markdown]
# The number depends most on the smallest eigenvalue. `tol` is relative: one per cent of a value close to zero, with
# many neighbours, takes many more passes than one per cent of a well separated value. If you only need a bound on it,
# pass a larger `tol`, or `max_matvecs`; the interval then is the bound.
#
# ## Restarts, and the Knee schedule
#
# With a `path` the tracker writes each measurement to a file of JSON lines at once. A new tracker with the same path
# continues after the last line. So training can stop at any time.
#
# Here is an example with another schedule. Knee (Iyer et al., [arXiv:2003.03977](https://arxiv.org/abs/2003.03977))
# warms up, stays at the peak rate for long, and then decays to zero. The run stops half-way.

# %%
schedule = {"warmup_steps": 100, "explore_steps": 600, "total_steps": 1200}
path = Path("knee.jsonl")


def knee_run(steps, saved=None):
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    scheduler = KneeLR(optimizer, **schedule)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    for name, state in (saved or {}).items():
        parts[name].load_state_dict(state)
    tracker = SpectrumTracker.for_module(squared_error, data, every=50, path=path)
    train(model, optimizer, tracker, steps, scheduler)
    return tracker, {name: part.state_dict() for name, part in parts.items()}


_, saved = knee_run(range(620))
torch.save(saved, "checkpoint.pt")
print(f"{len(path.read_text().splitlines())} lines in {path}")

# %% [markdown]
# The program ends here, and another one continues.

# %%
tracker, _ = knee_run(range(620, 1200), torch.load("checkpoint.pt", weights_only=True))
print(f"{len(path.read_text().splitlines())} lines in {path}")

# %%
steps = [step for step, _ in tracker.results]
limits = [2 / knee_lr(step, peak_lr=0.2, **schedule) for step in steps]

figure, ax = plt.subplots()
ax.plot(
    steps,
    [ex.largest.value for _, ex in tracker.results],
    color=COLORS["largest"],
    marker="o",
    markersize=3,
    label="largest eigenvalue",
)
ax.plot(steps, limits, color=COLORS["predicted"], linestyle=":", label="2 / rate")
ax.axvline(620, color=COLORS["predicted"], linewidth=0.8, label="restart")
ax.set_ylim(0, 25)
ax.set_ylabel("largest eigenvalue")
ax.set_xlabel("training step")
legend = ax.legend()

# %% [markdown]
# While the rate is at its peak, the largest eigenvalue stays near 2 / rate. As soon as the rate decays, the eigenvalue
# grows again, but more slowly than 2 / rate. So a high rate keeps the curvature low for as long as it lasts. This is
# the purpose of a schedule with a long peak, such as Knee.
#
# ## In other trainers
#
# There are callbacks for PyTorch Lightning and for Hugging Face's `Trainer`, and scalars for TensorBoard:
#
# ```python
# from hvpkit.train.lightning import SpectrumCallback
# trainer = Trainer(callbacks=[SpectrumCallback(tracker)])  # once an epoch
#
# from hvpkit.train.transformers import SpectrumCallback
# trainer.add_callback(SpectrumCallback(tracker, trainer, per="step"))
#
# from hvpkit.train.tensorboard import write_scalars
# write_scalars(SummaryWriter(), tracker.records[-1])
# ```
