r"""AdaHessian: Adam with the Hessian's diagonal in place of the gradient in the second moment.

Method: with the gradient :math:`g_t`, an estimate :math:`D_t` of the diagonal and its block averages
:math:`D_t^{(s)}`,

.. math::
    m_t = \frac{(1 - \beta_1) \sum_i \beta_1^{t-i} g_i}{1 - \beta_1^t}, \quad
    \bar D_t = \sqrt{\frac{(1 - \beta_2) \sum_i \beta_2^{t-i} D_i^{(s)} D_i^{(s)}}{1 - \beta_2^t}}, \quad
    p_t = p_{t-1} - \eta \Bigl(\frac{m_t}{\bar D_t^k + \epsilon} + \lambda p_{t-1}\Bigr).

Cost: a Hessian-vector product for each probe at each step that estimates the diagonal: about two gradients.
Memory: two vectors beside parameters and gradients, and the graph of the gradient until the step is done.
Source: Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney, AAAI 2021, arXiv:2006.00719.

Departures from the paper:
1. epsilon is added to the denominator, so that a direction without curvature does not divide by zero.
2. Weight decay (lambda) is decoupled, as in AdamW: as part of the loss, the penalty would add to D, and the decay of
   a weight would depend on the curvature of the loss.
3. Blocks average |D|, as the published code does; the paper's formula averages D (``absolute=False``), whose mean is
   near zero for a block with entries of both signs, which makes steps long. Measured on ``digits_cnn``, with 40 steps
   of 128 examples at the learning rate 0.15 and the same probes: with ``absolute=True`` the parameters are those of the
   published code to 3e-16, with False they differ by 112 % of their norm; the mean loss of the last ten steps was 0.50
   with True and 0.32 with False.
4. If the diagonal is estimated at some steps only, the mean over i runs over these steps: no estimate counts twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import ParamsT

from hvpkit._utils.random import generator, resolve_seed
from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_count, check_flag, check_number, check_positive

Diagonal: TypeAlias = Callable[[list[Tensor], int], Sequence[Tensor]]
"""``diagonal(params, step)``: an estimate of the Hessian's diagonal for each of these parameters, in their shapes."""


class AdaHessian(torch.optim.Optimizer):
    r"""AdaHessian, as a ``torch.optim.Optimizer``.

    By default the diagonal is Hutchinson's estimate :math:`z \odot Hz` with random signs z, by a second backward pass
    through the graph of the gradients: call ``loss.backward(create_graph=True)``, for each loss if several are
    accumulated. (PyTorch warns that this makes a reference cycle. The step frees the graph, which breaks the cycle;
    call ``zero_grad()`` where you skip a step.) Fused attention kernels have no second
    derivative: run the forward pass in ``with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):``.

    Gradients can be clipped as for other optimisers; that does not change the diagonal.

    The variance of an entry's estimate is the sum of squares of the other entries in its row. Where these are much
    larger than the diagonal, as for correlated features of very different scales, the estimate is mostly noise, which
    makes steps too short: average over kernels, blocks or probes, or pass a better ``diagonal``.

    Args:
        params: parameters, named parameters or groups of them.
        lr: learning rate :math:`\eta`. Steps are near Newton's, so that 1 is large, and usual rates of Adam are small.
        betas: decay rates of the two means, in [0, 1).
        eps: added to the denominator, positive.
        weight_decay: decoupled, :math:`\lambda`.
        hessian_power: k in [0, 1]; 0 is gradient descent with momentum.
        average_kernels: average the diagonal over all dimensions beyond the second, which are those of a convolution
            kernel. Put other tensors of three or more dimensions into a group without it.
        block_size: average the diagonal of matrices over blocks of this many neighbours in a row; the last block of a
            row may be shorter.
        absolute: average the absolute values of the diagonal over kernels and blocks, as the published code does; if
            False, the signed values, as the paper's formula.
        update_every: number of steps of a parameter between estimates of its diagonal; the first step has one.
            :attr:`needs_graph` says whether the next step has one.
        num_probes: number of probes that an estimate is the mean of.
        seed: of the probes. Those of a parameter are a function of the seed, its place in the optimiser and its step,
            so that a run continues from a ``state_dict()`` to the same bits; they are drawn on its device.
        diagonal: an estimator to use instead: ``diagonal(params, step)`` for the parameters with a gradient whose
            estimate is due, in their order, with their step from 1 on. It needs no graph.
        maximize: ascend.
        foreach: update all tensors of a group at once, or one by one, which needs less memory. By default all at once
            unless they are on the CPU.

    Raises:
        TypeError: an argument of the wrong type, named; a complex parameter.
        ValueError: an argument out of its range, named; a ``diagonal`` of other shapes.
        RuntimeError: at a step: no gradient has a graph; an attention kernel has no second derivative; a
            sparse gradient; ``torch.amp.GradScaler``, whose scale the diagonal would contain (bfloat16 needs none).

    Cost:
        A step that estimates the diagonal takes about two gradients more for each probe.

    Source:
        Yao et al., AAAI 2021, arXiv:2006.00719.

    Example:
        >>> import warnings, torch, hvpkit as hk
        >>> warnings.filterwarnings("ignore", "Using backward")  # the step breaks that cycle
        >>> model, criterion = torch.nn.Linear(3, 1), torch.nn.MSELoss()
        >>> x = torch.eye(3) * torch.tensor([1.0, 10.0, 100.0])
        >>> y = x @ torch.tensor([[1.0], [2.0], [3.0]])
        >>> optimizer = AdaHessian(model.parameters(), lr=0.3)
        >>> for _ in range(300):
        ...     optimizer.zero_grad()
        ...     loss = criterion(model(x), y)
        ...     loss.backward(create_graph=optimizer.needs_graph)
        ...     optimizer.step()
        >>> bool(loss < 1e-2)
        True

        With your own diagonal, here the exact one of the current batch, and no graph:

        >>> objective, _ = hk.from_module(model, criterion)
        >>> def diagonal(params, step):
        ...     H = hk.hessian(objective, dict(model.named_parameters()), (x, y))
        ...     return list(H.unflatten(hk.diagonal(H, num_matvecs=H.n).value).values())
        >>> optimizer = AdaHessian(model.parameters(), lr=0.3, diagonal=diagonal)
        >>> criterion(model(x), y).backward()
        >>> optimizer.step()
    """

    _step_supports_amp_scaling = True  # lets step() recognise a GradScaler and refuse it

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: float = 1.0,
        *,
        average_kernels: bool = True,
        block_size: int = 1,
        absolute: bool = True,
        update_every: int = 1,
        num_probes: int = 1,
        seed: Seed = 0,
        diagonal: Diagonal | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        if diagonal is not None and not callable(diagonal):
            raise TypeError(f"diagonal must be a function of (params, step), got {diagonal!r}")
        if isinstance(params, nn.Module):
            raise TypeError(
                f"params must be parameters, got a {type(params).__name__}: pass its parameters()"
            )
        self.diagonal = diagonal
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
            "average_kernels": average_kernels,
            "block_size": block_size,
            "absolute": absolute,
            "update_every": update_every,
            "num_probes": num_probes,
            "seed": resolve_seed(seed),
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "diagonal": self.diagonal}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with its own options; raises as the constructor."""
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.is_complex():
                self.param_groups.pop()
                raise TypeError("params must be real: pass torch.view_as_real of complex ones")

    @property
    def needs_graph(self) -> bool:
        """True if the next step needs gradients made with ``create_graph=True``."""
        return self.diagonal is None and any(
            self._due(p, group) for group in self.param_groups for p in group["params"] if p.requires_grad
        )

    def _num_steps(self, p: Tensor) -> int:
        return int(self.state[p]["step"]) if p in self.state else 0

    def _due(self, p: Tensor, group: Mapping[str, Any]) -> bool:
        return self._num_steps(p) % int(group["update_every"]) == 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters; ``closure`` computes loss and gradients again, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if vars(self).pop("grad_scale", self) is not self:  # set by a GradScaler, also to None
            raise RuntimeError("AdaHessian cannot be stepped by a GradScaler: use bfloat16, which needs none")
        if any(p.grad is not None and p.grad.layout != torch.strided for p in self._params()):
            raise RuntimeError("AdaHessian needs dense gradients: use sparse=False in the embedding")
        diagonals = self._diagonals()
        for p in self._params():
            if p.grad is not None:
                p.grad = p.grad.detach()  # frees the graph: parameter, gradient and graph refer to each other
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                self._advance(p, group, diagonals.get(p))
            at_once = group["foreach"] if group["foreach"] is not None else _accelerated(params)
            for some in [params] if at_once else [[p] for p in params]:
                if some:
                    _update(some, [self.state[p] for p in some], group)
        return loss

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _diagonals(self) -> dict[Tensor, Tensor]:
        """Estimate the diagonal for the parameters whose estimate is due."""
        numbers = {p: number for number, p in enumerate(self._params())}
        due = {
            p: group
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and self._due(p, group)
        }
        if not due:
            return {}
        steps = {p: self._num_steps(p) + 1 for p in due}
        if self.diagonal is None:
            streams = {p: (steps[p] << 32) + numbers[p] for p in due}
            return _hutchinson(due, streams)
        with torch.enable_grad():
            found = list(self.diagonal(list(due), max(steps.values())))
        if [(d.shape, d.dtype, d.device) for d in found] != [(p.shape, p.dtype, p.device) for p in due]:
            raise ValueError(
                "diagonal must return a tensor for each of the parameters it was asked for, of its shape, dtype and "
                f"device: {[(list(p.shape), p.dtype) for p in due]}; got {[(list(d.shape), d.dtype) for d in found]}"
            )
        return {p: d.detach() for p, d in zip(due, found, strict=True)}

    def _advance(self, p: Tensor, group: Mapping[str, Any], diagonal: Tensor | None) -> None:
        """Count the step, and update the mean of squares with an estimate, if there is one."""
        state = self.state[p]
        if not state:
            state |= {"step": 0, "num_diagonals": 0}
            state |= {name: torch.zeros_like(p) for name in ("exp_avg", "exp_diagonal_sq")}
        state["step"] += 1
        if diagonal is not None:
            values = diagonal.abs() if group["absolute"] else diagonal
            average = block_average(values, group["block_size"], kernels=group["average_kernels"])
            beta = group["betas"][1]
            state["num_diagonals"] += 1
            state["exp_diagonal_sq"].mul_(beta).addcmul_(average, average, value=1 - beta)


def _check_options(options: Mapping[str, Any]) -> None:
    for name, high in (("lr", math.inf), ("weight_decay", math.inf), ("hessian_power", 1.0)):
        value = options[name]
        if not (0 <= check_number(name, value) <= high and math.isfinite(value)):
            raise ValueError(f"{name} must be finite, at least 0 and at most {high:g}, got {value}")
    check_positive("eps", options["eps"])
    betas = options["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    for name in ("average_kernels", "absolute", "maximize"):
        check_flag(name, options[name])
    if options["foreach"] is not None:
        check_flag("foreach", options["foreach"])
    for name in ("block_size", "update_every", "num_probes"):
        check_count(name, options[name], 1)
    check_count("seed", options["seed"], 0)


def _accelerated(params: Sequence[Tensor]) -> bool:
    return all(p.device.type != "cpu" for p in params)


def _hutchinson(
    due: Mapping[Tensor, Mapping[str, Any]], streams: Mapping[Tensor, int]
) -> dict[Tensor, Tensor]:
    r"""Return means of :math:`z \odot Hz` over probes; H is the Hessian by the parameters that are due.

    A gradient without a graph is constant: its rows of H are zero.
    """
    curved = {p: p.grad for p in due if p.grad is not None and p.grad.requires_grad}
    if not curved:
        raise RuntimeError(
            "no gradient has a graph, and AdaHessian differentiates gradients: call "
            "loss.backward(create_graph=True) before step(), or pass diagonal= (a loss that is linear in all "
            "parameters has no Hessian, and gradients lose their graph under DistributedDataParallel)"
        )
    sources = {p: _generator(group["seed"], streams[p], p.device) for p, group in due.items()}
    totals = {p: torch.zeros_like(p) for p in due}
    most = max(group["num_probes"] for group in due.values())
    for probe in range(most):
        signs = {p: _signs(p, sources[p]) for p in due}
        images = _second_backward(curved, list(due), signs, retain_graph=probe + 1 < most)
        for (p, group), image in zip(due.items(), images, strict=True):
            if probe < group["num_probes"]:
                totals[p].addcmul_(signs[p], image, value=1 / group["num_probes"])
    return totals


def _second_backward(
    gradients: Mapping[Tensor, Tensor],
    params: list[Tensor],
    signs: Mapping[Tensor, Tensor],
    *,
    retain_graph: bool,
) -> tuple[Tensor, ...]:
    """Return the Hessian-vector product with ``signs``, from the graphs of the gradients."""
    try:
        return torch.autograd.grad(
            list(gradients.values()),
            params,
            [signs[p] for p in gradients],
            retain_graph=retain_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    except RuntimeError as error:
        if "attention" in str(error) and "not implemented" in str(error):
            raise RuntimeError(
                "AdaHessian needs second derivatives, and the kernel that computed scaled_dot_product_attention has "
                "none: run the forward pass in `with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):`, or pass "
                f"diagonal= ({error})"
            ) from error
        raise


def _generator(seed: int, stream: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(generator(seed, stream).initial_seed())


def _signs(p: Tensor, source: torch.Generator) -> Tensor:
    return torch.randint(0, 2, p.shape, generator=source, dtype=p.dtype, device=p.device).mul_(2).sub_(1)


def block_average(diagonal: Tensor, block_size: int = 1, *, kernels: bool = True) -> Tensor:
    r"""Replace each entry of the diagonal by the mean over its block, :math:`D^{(s)}`.

    Args:
        diagonal: in the shape of its parameter.
        block_size: for matrices: number of neighbours in a row that form a block; the last one may be shorter.
        kernels: take all the dimensions beyond the second as a block.

    Example:
        >>> import torch
        >>> block_average(torch.tensor([[1.0, 3.0, 5.0, 7.0, 8.0]]), 2)
        tensor([[2., 2., 6., 6., 8.]])
    """
    if not isinstance(diagonal, Tensor):
        raise TypeError(f"diagonal must be a tensor, got {type(diagonal).__name__}")
    check_count("block_size", block_size, 1)
    if diagonal.ndim > 2 and kernels:
        return diagonal.mean(dim=tuple(range(2, diagonal.ndim)), keepdim=True).expand_as(diagonal)
    if diagonal.ndim == 2 and block_size > 1:
        means = F.avg_pool1d(diagonal, min(block_size, diagonal.shape[1]), ceil_mode=True)
        return means.repeat_interleave(block_size, dim=1)[:, : diagonal.shape[1]]
    return diagonal


def _update(params: list[Tensor], states: Sequence[Mapping[str, Any]], group: Mapping[str, Any]) -> None:
    """Update some parameters of a group, all at once."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    grads = [p.grad for p in params if p.grad is not None]
    means = [state["exp_avg"] for state in states]
    torch._foreach_lerp_(means, torch._foreach_neg(grads) if group["maximize"] else grads, 1 - beta1)
    corrections = [math.sqrt(1 - beta2 ** state["num_diagonals"]) for state in states]
    denominators = torch._foreach_sqrt([state["exp_diagonal_sq"] for state in states])
    torch._foreach_div_(denominators, corrections)
    if group["hessian_power"] != 1:
        torch._foreach_pow_(denominators, group["hessian_power"])
    torch._foreach_add_(denominators, group["eps"])
    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    sizes = [-lr / (1 - beta1 ** state["step"]) for state in states]
    torch._foreach_addcdiv_(params, means, denominators, sizes)
