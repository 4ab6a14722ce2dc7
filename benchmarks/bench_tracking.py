"""Passes to track both ends over 20 checkpoints of a training run, by Lanczos and by several fidelities.

    python benchmarks/bench_tracking.py --cache DIR

Trains each network for 20 epochs, keeps the parameters of each, and solves at all of them. Errors are against Lanczos
at a tolerance a hundred times smaller. Writes ``benchmarks/results/tracking.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import hvpkit as hk
from fidelity_problems import RECIPES, Recipe

RESULTS = Path(__file__).parent / "results"
TOL = 1e-2
EPOCHS = 20
NAMES = ("digits CNN, late", "dense, 40,000 digits")


def checkpoints(name: str, recipe: Recipe, cache: Path) -> list[dict[str, Tensor]]:
    """The parameters and buffers after each epoch of Adam at 1e-3."""
    file = cache / ("epochs_" + name.replace(" ", "_").replace(",", "") + ".pt")
    if file.exists():
        kept: list[dict[str, Tensor]] = torch.load(file, weights_only=True)
        return kept
    x, y = recipe.data()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = recipe.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    g = torch.Generator().manual_seed(0)
    kept = []
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(x), generator=g).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
        kept.append({key: value.clone() for key, value in model.state_dict().items()})
    torch.save(kept, file)
    return kept


def operators(name: str, cache: Path) -> list[hk.LinearOperator]:
    recipe = RECIPES[name]
    model, data = recipe.model(), recipe.data()
    found = []
    for state in checkpoints(name, recipe, cache):
        model.load_state_dict(state)
        found.append(
            hk.hessian(
                *hk.from_module(model, F.cross_entropy), data, batch_size=1000, mode="reverse-over-reverse"
            )
        )
    return found


def overlaps(solved: list[hk.ExtremeResult]) -> list[float]:
    """How much of the low end's vector is the one of the checkpoint before: the cosine."""
    pairs = itertools.pairwise(solved)
    return [abs(float(one.smallest.vector @ other.smallest.vector)) for one, other in pairs]


def measure(name: str, cache: Path) -> dict[str, Any]:
    H = operators(name, cache)
    exact = [hk.extreme_eigenvalues(op, method="lanczos", tol=TOL / 100, seed=99) for op in H]
    entry: dict[str, Any] = {
        "n": H[0].n,
        "num_examples": H[0].num_examples,
        "ends": [[ex.smallest.value, ex.largest.value] for ex in exact],
        "overlap_of_low_vectors": overlaps(exact),
        "runs": {},
    }
    for method in ("lanczos", "multifidelity"):
        passes, errors = [], []
        for step, (op, truth) in enumerate(zip(H, exact, strict=True)):
            ex = hk.extreme_eigenvalues(op, method=method, tol=TOL, seed=step)
            passes.append(ex.num_matvecs)
            pairs = ((ex.smallest, truth.smallest), (ex.largest, truth.largest))
            errors.append(max(abs(pair.value / other.value - 1) / TOL for pair, other in pairs))
        entry["runs"][method] = {"passes": passes, "errors_over_tol": errors}
        off = sum(error > 1 for error in errors)
        print(
            f"{name}: {method}: {sum(passes):.0f} passes, {off} of {len(errors)} off, worst {max(errors):.2f} tol"
        )
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, required=True)
    cache = parser.parse_args().cache
    found = {}
    for name in NAMES:
        found[name] = measure(name, cache)
        (RESULTS / "tracking.json").write_text(json.dumps({"tol": TOL, "problems": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
