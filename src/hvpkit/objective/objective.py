"""A loss in two parts: the outputs, and the loss of outputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hvpkit._utils.typing import Batch, LossFn, Tree
from hvpkit._utils.validation import check_choice, check_function
from hvpkit.data import Data


@dataclass(frozen=True)
class Objective:
    """A loss function of two pure functions, callable as ``loss_fn(params, batch)``.

    Attributes:
        forward: ``forward(params, batch)``: the outputs.
        output_loss: ``output_loss(outputs, batch)``: losses ``[B]``, or their mean as a 0-d tensor; with
            ``example_weight`` the weighted sum of each example's terms, ``[B]``.
        example_weight: ``example_weight(batch)``: the weight of each example ``[B]``, where the loss is a weighted
            mean, the sum of all losses over the sum of all weights **of the data**: of tokens, the number that is not
            ignored. By default the loss is the mean over examples.
        batchnorm: ``"eval"``, or ``"batch"`` where losses depend on the batch that an example is in.
        network: the copy of the module that ``forward`` calls, without values, as :func:`hvpkit.from_module` makes it.

    Example:
        >>> import torch
        >>> objective = Objective(lambda p, batch: batch[0] @ p, lambda z, batch: (z - batch[1]) ** 2)
        >>> objective(torch.ones(2), (torch.ones(3, 2), torch.zeros(3)))
        tensor([4., 4., 4.])

        A mean over the entries of y that a mask keeps, however they lie in batches:

        >>> def output_loss(z, batch):
        ...     return (batch["mask"] * (z - batch["y"]) ** 2).sum(1)
        >>> masked = Objective(lambda p, batch: batch["x"] @ p, output_loss, lambda batch: batch["mask"].sum(1))
        >>> mask = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
        >>> data = {"x": torch.ones(3, 4), "y": torch.zeros(3, 2), "mask": mask}
        >>> import hvpkit as hk
        >>> hk.loss(masked, torch.ones(4, 2), hk.as_data(data, batch_size=2))
        tensor(16.)
    """

    forward: Callable[[Tree, Batch], Any]
    output_loss: Callable[[Any, Batch], Tensor]
    example_weight: Callable[[Batch], Tensor] | None = None
    batchnorm: str = "eval"
    network: nn.Module | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.forward, nn.Module):
            raise TypeError(
                f"forward must be a function forward(params, batch), got the module {type(self.forward).__name__}; of "
                "a module make objective, params = hvpkit.from_module(model, criterion)"
            )
        check_function("forward", self.forward, "forward(params, batch)", 2)
        check_function("output_loss", self.output_loss, "output_loss(outputs, batch)", 2)
        if self.example_weight is not None and not callable(self.example_weight):
            raise TypeError(
                f"example_weight must be a function of a batch, got {self.example_weight!r}; pass batchnorm by name"
            )
        check_choice("batchnorm", self.batchnorm, ("eval", "batch"))

    def __call__(self, params: Tree, batch: Batch) -> Tensor:
        """Return the losses of the batch."""
        return self.output_loss(self.forward(params, batch), batch)


def check_loss_fn(loss_fn: object, params: object) -> None:
    """Raise TypeError unless ``loss_fn`` takes params and a batch; name the remedy for modules and criteria."""
    if isinstance(loss_fn, nn.modules.loss._Loss) or (
        isinstance(loss_fn, tuple) and Objective in map(type, loss_fn)
    ):
        raise TypeError(
            f"loss_fn must be a function loss_fn(params, batch), got {type(loss_fn).__name__}; of a model and its "
            "criterion make objective, params = hvpkit.from_module(model, criterion), and pass both"
        )
    if isinstance(loss_fn, nn.Module) and not callable(params):
        with suppress(TypeError):
            check_function("loss_fn", loss_fn, "loss_fn(params, batch)", 2)
            return
        raise TypeError(
            f"loss_fn must be a function loss_fn(params, batch), got the module {type(loss_fn).__name__}; of a module "
            "and its criterion make objective, params = hvpkit.from_module(model, criterion)"
        )
    if not callable(loss_fn):
        order = "; the order of arguments is (loss_fn, params, data)" if callable(params) else ""
        raise TypeError(
            f"loss_fn must be a function loss_fn(params, batch), got {type(loss_fn).__name__}{order}"
        )
    if callable(params):
        raise TypeError(
            f"params must be a tree of tensors, got {type(params).__name__}; of a module and its criterion make "
            "objective, params = hvpkit.from_module(model, criterion)"
        )
    check_function("loss_fn", loss_fn, "loss_fn(params, batch)", 2)


def goes_by_batches(loss_fn: LossFn) -> bool:
    """Return True if the loss of an example depends on its batch, so that batches must not be cut otherwise."""
    return isinstance(loss_fn, Objective) and loss_fn.batchnorm == "batch"


def check_batches(loss_fn: LossFn, data: Data) -> None:
    """Raise ValueError if ``data`` does not fit a ``loss_fn`` that uses the statistics of batches."""
    if goes_by_batches(loss_fn):
        check_statistics(data.smallest_batch)
        if data.weights is not None:
            raise ValueError(
                'batchnorm="batch" makes the loss of an example depend on its batch, so that examples cannot be '
                'weighted; leave weights out, or take batchnorm="eval"'
            )


def check_statistics(smallest_batch: int | None) -> None:
    """Raise ValueError for a batch of one example, which has no batch statistics."""
    if smallest_batch == 1:
        raise ValueError(
            'batchnorm="batch" needs at least two examples in each batch, and data has a batch of one; '
            'choose another batch_size, leave the example out, or take batchnorm="eval"'
        )
