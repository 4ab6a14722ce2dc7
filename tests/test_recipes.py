"""The snippets of docs/recipes.md run, one after the other, and give what the text says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from oracles import relative_error

TEXT = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()


def test_recipes_run_and_give_what_they_say() -> None:
    found: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        for snippet in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
            exec(snippet, found)
    x, blocks = found["x"], found["H_x"].to_dense().view(200, 10, 200, 10)
    diagonal = torch.stack([blocks[i, :, i] for i in range(200)])
    assert torch.count_nonzero(blocks) == torch.count_nonzero(diagonal)
    assert relative_error(found["mean"].to_dense(), diagonal.mean(0)) < 1e-4
    assert relative_error(found["one"].to_dense(), diagonal[0]) < 1e-4
    example = int(found["example"])
    largest = torch.linalg.eigvalsh(diagonal)[:, -1]
    assert float(largest[example]) >= 0.98 * float(largest.max())
    others = found["sharpest"].vector.view(200, 10)[torch.arange(200) != example]
    assert float(others.norm()) < 0.3
    assert found["H_z"].shape == (20, 20)
    assert found["sensitivity"].shape == (16,)
    assert found["step"].converged or found["step"].negative_curvature is not None
    values = found["top"].values.float()
    assert relative_error(found["along"], torch.diag(values)) < 0.02
    assert x.shape == (200, 10)
