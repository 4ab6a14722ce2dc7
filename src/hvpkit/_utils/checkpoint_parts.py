"""Vectors of a checkpoint in a folder of torch.distributed.checkpoint: each rank writes its part, any number read.

The parts are files of safetensors, in which nothing can be run. The digests of all bytes of them are kept elsewhere, so
that a part that is damaged, missing, or of another save is found before it is read.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvpkit._utils.checkpoints import DIGITS
from hvpkit._utils.files import flush, reason
from hvpkit._utils.ranks import Ranks

Shapes = Mapping[str, tuple[list[int], str]]
"""Of each vector or block of rows its whole shape, the operator's size last, and the name of its dtype."""


def shapes_of(parts: Mapping[str, Tensor], n: int) -> Shapes:
    """Return the whole shapes of tensors of which ranks hold parts along the last dimension."""
    return {
        name: ([*part.shape[:-1], n], str(part.dtype).removeprefix("torch.")) for name, part in parts.items()
    }


def write(folder: Path, parts: Mapping[str, Tensor], n: int, ranks: Ranks) -> dict[str, str]:
    """Write what each rank holds into an empty folder that all ranks see, and return the digests of the files.

    Raises:
        OSError: on all ranks, if one cannot write.
        RemoteError: a rank does not answer.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors, seen = {}, set()
    for name, part in parts.items():
        if 0 not in part.shape[:-1]:
            place = part.untyped_storage().data_ptr()
            own = part.clone() if place in seen else part  # safetensors takes no two that share memory
            tensors[name] = ranks.control_shards(own, n)
            seen.add(place)
    if not tensors:
        return {}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    ranks.call(lambda group: save(tensors, storage_writer=writer, process_group=group))
    ranks.on_first(lambda: flush(folder))
    found = digests(folder, ranks)
    if len(found) != ranks.size:
        raise OSError("ranks do not see one folder; name a place that all share")
    return found


def read(folder: Path, shapes: Shapes, ranks: Ranks | None) -> dict[str, Tensor]:
    """Return this rank's part of each tensor, or all of it where a process is alone; the digests have been compared."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    found = {}
    for name, ((*rows, n), dtype) in shapes.items():
        size = n if ranks is None else len(range(n)[ranks.part(n)])
        found[name] = torch.empty(*rows, size, dtype=getattr(torch, dtype), device="cpu")
    tensors: dict[str, Any] = {name: part for name, part in found.items() if 0 not in shapes[name][0]}
    reader = HuggingFaceStorageReader(str(folder))
    if ranks is None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is asked for
            load(tensors, storage_reader=reader, no_dist=True)
    else:
        tensors = {name: ranks.control_shards(part, shapes[name][0][-1]) for name, part in tensors.items()}
        ranks.call(lambda group: load(tensors, storage_reader=reader, process_group=group))
    return found


def digests(folder: Path, ranks: Ranks | None) -> dict[str, str]:
    """Return a digest of each file in a folder, by name; ranks share the work.

    Raises:
        OSError: a file cannot be read, on all ranks.
    """
    share = slice(None) if ranks is None else slice(ranks.rank, None, ranks.size)
    mine, failure = {}, ""
    try:
        for path in sorted(folder.iterdir())[share]:
            with open(path, "rb") as file:
                mine[path.name] = hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]
    except OSError as error:
        failure = reason(error)
    shares = [(mine, failure)] if ranks is None else ranks.gather((mine, failure))
    for _, failure in shares:
        if failure:
            raise OSError(failure)
    return {name: found for share_found, _ in shares for name, found in share_found.items()}
