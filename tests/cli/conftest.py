from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar")
    generator = torch.Generator().manual_seed(0)
    for name in [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]:
        rows = torch.randint(0, 256, (4, 3073), generator=generator, dtype=torch.uint8)
        rows[:, 0] %= 10
        (folder / name).write_bytes(rows.numpy().tobytes())
    return folder
