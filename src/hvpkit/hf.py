"""Losses of Hugging Face's models, for :func:`hvpkit.from_module`: models as they are, batches as collators make them.

Each is a criterion ``(outputs, labels)``: it takes the outputs of the model, or their logits, and the labels of the
batch. The mean is that over all labels **of the data** that are not ignored (:data:`IGNORED`), as the loss of the model
is that over those of one batch: batches may be padded to any lengths. Nothing of transformers is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hvpkit.objective.outputs import main_tensor

__all__ = ["causal_lm_loss", "classification_loss", "seq2seq_loss"]

IGNORED = -100
"""The label of what does not count, as of padding: the one that transformers' models and collators use."""

Loss = Callable[[Any, Tensor], Tensor]


def _weighted_by(
    example_weight: Callable[[Tensor], Tensor], *, keeps_targets: bool = False
) -> Callable[[Loss], Loss]:
    """Give a criterion the attributes that :func:`hvpkit.from_module` reads."""

    def give(criterion: Loss) -> Loss:
        vars(criterion).update(example_weight=example_weight, keeps_targets=keeps_targets)
        return criterion

    return give


def _num_kept(labels: Tensor) -> Tensor:
    """Return how many labels of each example count ``[B]``; one of an example with labels that are not classes."""
    if labels.is_floating_point():
        return labels.new_ones(len(labels))
    return (labels != IGNORED).reshape(len(labels), -1).sum(1)


@_weighted_by(lambda labels: _num_kept(labels[:, 1:]))
def causal_lm_loss(outputs: Any, labels: Tensor) -> Tensor:
    r"""Return the cross entropy of each next token, summed over those of each example: of models like GPT.

    .. math:: \ell_i = -\sum_{t \ge 1,\ y_{it} \ne -100} \log p_\theta(y_{it} \mid x_{i, <t})

    Labels are the tokens themselves, and shifted here, as the models do: the logits at one place are for the label at
    the next. Padding has to be labelled -100, as ``DataCollatorForLanguageModeling`` does. With
    :func:`hvpkit.from_module` the loss is the mean over all tokens of the data that count.

    Args:
        outputs: of the model, with ``logits [B, T, V]``; or the logits.
        labels: ``[B, T]``, integers.

    Returns:
        Sums ``[B]``, in float32 or more.

    Raises:
        TypeError, ValueError: ``labels`` are not of that kind or shape.

    Example:
        >>> import torch, hvpkit as hk
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=4, n_layer=1, n_head=1, n_positions=8))
        >>> tokens = torch.arange(24).reshape(4, 6) % 11
        >>> objective, params = hk.from_module(model, hk.hf.causal_lm_loss)
        >>> data = {"input_ids": tokens, "labels": tokens}
        >>> bool((hk.loss(objective, params, data) - model.eval()(**data).loss).abs() < 1e-5)
        True
    """
    logits = _logits(outputs, labels, 2)
    return _sums(logits[:, :-1], labels[:, 1:])


@_weighted_by(_num_kept, keeps_targets=True)
def seq2seq_loss(outputs: Any, labels: Tensor) -> Tensor:
    r"""Return the cross entropy of each target token, summed over those of each example: of models like T5.

    .. math:: \ell_i = -\sum_{t,\ y_{it} \ne -100} \log p_\theta(y_{it} \mid x_i, y_{i, <t})

    There is no shift: the model gets the labels too, and makes of them what its decoder reads, unless the batch holds
    ``decoder_input_ids``. Also for masked language models, as BERT's. With :func:`hvpkit.from_module` the loss is the
    mean over all tokens of the data that count.

    Args:
        outputs: of the model, with ``logits [B, T, V]``; or the logits.
        labels: ``[B, T]``, integers; -100 does not count.

    Returns:
        Sums ``[B]``, in float32 or more.

    Raises:
        TypeError, ValueError: ``labels`` are not of that kind or shape.

    Example:
        >>> import torch, hvpkit as hk
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> small = {"vocab_size": 11, "d_model": 4, "d_kv": 2, "d_ff": 6, "num_layers": 1, "num_heads": 2}
        >>> model = T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0))
        >>> data = {"input_ids": torch.arange(12).reshape(3, 4) % 11, "labels": torch.ones(3, 5, dtype=torch.int64)}
        >>> objective, params = hk.from_module(model, hk.hf.seq2seq_loss)
        >>> bool((hk.loss(objective, params, data) - model.eval()(**data).loss).abs() < 1e-5)
        True
    """
    return _sums(_logits(outputs, labels, 2), labels)


@_weighted_by(_num_kept)
def classification_loss(outputs: Any, labels: Tensor) -> Tensor:
    """Return the loss of a classifier of sequences, images or tokens, for each example.

    ==================  ================  =======================================================
    ``logits``          ``labels``        loss
    ==================  ================  =======================================================
    ``[B, C]``          ``[B]`` integers  cross entropy
    ``[B, T, C]``       ``[B, T]``        cross entropy, summed over the tokens that count
    ``[B, C]``          ``[B, C]`` reals  binary cross entropy of C labels, their mean
    ``[B, 1]``          ``[B]`` reals     squared error: regression
    ==================  ================  =======================================================

    With :func:`hvpkit.from_module` the loss is the mean over all labels of the data that count.

    Args:
        outputs: of the model, with ``logits``; or the logits.
        labels: as above; -100 does not count.

    Returns:
        Losses ``[B]``, in float32 or more.

    Raises:
        TypeError, ValueError: ``labels`` are not of one of these kinds.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[0, 1, -100], [2, -100, -100]])
        >>> classification_loss(torch.zeros(2, 3, 4), labels) / torch.tensor(4.0).log()
        tensor([2., 1.])
    """
    if not (isinstance(labels, Tensor) and labels.is_floating_point()):
        logits = _logits(outputs, labels, None)
        return _sums(logits, labels)
    logits = _as_floats(main_tensor(outputs))
    if logits.shape == (*labels.shape, 1):
        logits = logits.squeeze(-1)
    if logits.shape != labels.shape:
        raise ValueError(
            f"labels must have the shape of the logits, {list(logits.shape)}, got {list(labels.shape)}"
        )
    values = labels.to(logits.dtype)
    if logits.ndim == 1 or logits.shape[-1] == 1:
        losses = F.mse_loss(logits, values, reduction="none")
    else:
        losses = F.binary_cross_entropy_with_logits(logits, values, reduction="none")
    return losses.reshape(len(losses), -1).mean(1)


def _logits(outputs: Any, labels: Any, ndim: int | None) -> Tensor:
    """Return the logits of a model's outputs, with labels that fit them; raise TypeError or ValueError otherwise."""
    logits = _as_floats(main_tensor(outputs))
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a tensor of integers, got {kind}")
    if labels.shape != logits.shape[:-1] or ndim not in (None, labels.ndim):
        raise ValueError(
            f"labels must have the shape of the logits without their last dimension, {list(logits.shape[:-1])}"
            f"{' ([B, T])' if ndim else ''}; got {list(labels.shape)}"
        )
    return logits


def _as_floats(logits: Any) -> Tensor:
    """Return logits in float32 or more, as transformers' losses take them."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"outputs must have logits, or be a tensor of them; got {type(logits).__name__}")
    return logits.float() if logits.dtype.itemsize < 4 else logits


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Return cross entropies, summed over the labels of each example that count, ``[B]``."""
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.reshape(len(labels), -1).sum(1)
