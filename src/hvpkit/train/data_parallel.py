"""Measurements in data-parallel training: all ranks share the work, at the parameters and buffers of the first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from hvpkit._utils.ranks import Ranks, watching
from hvpkit.data import Data
from hvpkit.data.rank_shares import shared


def share_among_all(data: Data, model: nn.Module) -> Data:
    """Return the data shared by all processes of the default group, each of which has all of it.

    Data of ranks already is returned as it is. Called by all processes.

    Raises:
        ValueError: they do not have the same data.
    """
    if data.ranks is not None or not torch.distributed.is_initialized():
        return data
    device = next(model.parameters()).device.type
    ranks = Ranks(init_device_mesh(device, (torch.distributed.get_world_size(),)))
    with watching(ranks):
        return shared(data, ranks, split=True)


@contextmanager
def buffers_of_first(model: nn.Module, ranks: Ranks | None) -> Iterator[None]:
    """Give the module the first rank's buffers inside ``with``, and its own again after.

    Running statistics of BatchNorm differ between ranks, as each has seen other batches.
    """
    if ranks is None:
        yield
        return
    buffers = list(model.buffers())
    own = [buffer.detach().clone() for buffer in buffers]
    try:
        with torch.no_grad():
            for buffer, first in zip(buffers, ranks.agree([one.cpu() for one in own]), strict=True):
                buffer.copy_(first)
        yield
    finally:
        with torch.no_grad():
            for buffer, before in zip(buffers, own, strict=True):
                buffer.copy_(before)
