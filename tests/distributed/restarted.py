"""A solve under torchrun, with a checkpoint, amid which rank 1 is killed once: ``restarted.py FOLDER``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import hvpkit as hk
from hvpkit.solvers import checkpoint

X = torch.randn(64, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
P = torch.linspace(-1, 1, 50, dtype=torch.float64)
NUM_BATCHES, NUM_BEFORE = 4, 15
"""Batches of each of two ranks, and the matvecs before the one that rank 1 is killed amid."""


class Loss:
    """A loss that counts its calls, and kills the process in one of them."""

    num_calls = 0
    killed_at = -1

    def __call__(self, p: Tensor, x: Tensor) -> Tensor:
        self.num_calls += 1
        if self.num_calls == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tanh(x @ p).square() + 0.1 * (x * p).cos().sum(-1)


def hessian(mesh: DeviceMesh | None, loss_fn: Loss) -> hk.CurvatureOperator:
    data = hk.as_data(X, mesh=mesh, batch_size=8)
    return hk.hessian(loss_fn, P, data, mode="reverse-over-reverse", memory_limit=0)


def solve(H: hk.CurvatureOperator, **options: Any) -> hk.EigenResult:
    return hk.lanczos(H, 2, which="BE", tol=1e-8, **options)


def main(folder: Path) -> None:
    """Solve, and write what this rank has found."""
    dist.init_process_group("gloo")
    rank, life, loss_fn = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"]), Loss()
    checkpoint.SAVE_INTERVAL = checkpoint.SAVE_COST_FACTOR = 0.0  # a save at each assessment
    H = hessian(init_device_mesh("cpu", (2,)), loss_fn)
    loss_fn.num_calls = 0
    if life == 0 and rank == 1:
        loss_fn.killed_at = NUM_BATCHES * NUM_BEFORE + 2
    found = solve(H, checkpoint=folder / "solve.ckpt").full_tensor()
    record = {"life": life, "values": found.values.tolist(), "vectors": found.vectors.tolist()}
    record |= {"num_matvecs": found.num_matvecs, "here": loss_fn.num_calls / NUM_BATCHES}
    (folder / f"rank{rank}.json").write_text(json.dumps(record))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
