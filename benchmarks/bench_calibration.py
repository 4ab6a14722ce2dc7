"""True errors over predicted ones, for every direction that the default method finds.

    python benchmarks/bench_calibration.py --cache DIR [--cifar10 DIR] [--problems NAME ...] [--seeds N]

Davidson's method predicts the error of a Ritz value by a sample, and its error bound is a multiple of that. This
measures the ratio of the true error to the prediction (times what the last directions gained of theirs, if more than
predicted), over trained networks, one of them along its training and for several values of an end, over prescribed
spectra with likenesses of several qualities, and over finite sums with samples of them. Predictions of values that a
solve returned are apart: the others may be of values that a certificate refutes. Errors are against the references,
float64 eigenvalues, or Lanczos at a tolerance a hundred or more times smaller. Writes
``benchmarks/results/calibration.json`` after each problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import _harness as harness
import _problems as problems
import hvpkit as hk
from _harness import Record
from _references import reference
from hvpkit.solvers.certified_davidson import CertifiedDavidson, CertifiedDavidsonState
from hvpkit.solvers.common.rayleigh_ritz import select
from hvpkit.solvers.ends import ascending

TOL = 1e-2
QUANTILES = (0.5, 0.9, 0.99, 0.995, 1.0)
GROUPS = ("low end", "high end", "further in")
MOSTLY = 0.1
"""Share of a prediction that comes from eigenvalues nearer than the clamp, above which the prediction counts as
clamped."""

NETWORK, NUM_EPOCHS = "dense, 40,000 digits", 20
POWERS, NEGATIVE = (0.3, 0.6, 1.0), (0.1, 0.3, 0.45)
"""Of finite sums: decay of the vectors' entries, and share of negative terms."""

NOISE = (0.1, 0.5, 2.0)
"""Norm of what a likeness adds, in units of the smaller end."""

Solve = Callable[[int], hk.EigenResult | hk.ExtremeResult]
Question = tuple[Solve, Mapping[int, float]]
"""A solve by seed, and the true eigenvalue of each place of the spectrum that is asked for."""


@contextmanager
def recorded() -> Iterator[list[tuple[int, float, float, float]]]:
    """Record each direction found inside: place, Ritz value, predicted error, and the share of it that is clamped."""
    found: list[tuple[int, float, float, float]] = []
    original = CertifiedDavidson._find_direction

    def find(self: CertifiedDavidson, state: CertifiedDavidsonState, place: int) -> CertifiedDavidsonState:
        state = original(self, state, place)
        end, unit = state.ends[place], float(state.scale)
        if end.direction is not None and end.direction.gain > 0:
            gain, clamped = end.direction.gain, end.direction.clamped
            found.append((place, end.value * unit, max([1.0, *state.gains]) * gain * unit, clamped / gain))
        return state

    with mock.patch.object(CertifiedDavidson, "_find_direction", find):
        yield found


def group(place: int) -> str:
    """Return where in the spectrum a place is."""
    return {0: GROUPS[0], -1: GROUPS[1]}.get(place, GROUPS[2])


def ask(question: Question, seed: int) -> tuple[Record, list[Record]]:
    """Return a solve, and its directions; errors in units of the tolerance."""
    solve, truth = question
    with recorded() as directions:
        found = solve(seed)
    if isinstance(found, hk.ExtremeResult):
        pairs = [found.smallest, found.largest]
    else:
        pairs = [found.pair(place) for place in range(len(found.values))]
    ordered = ascending([*truth])
    exact = [truth[place] for place in ordered]
    run = {
        "passes": found.num_matvecs,
        "converged": found.converged,
        "errors_over_tol": [abs(p.value / t - 1) / TOL for p, t in zip(pairs, exact, strict=True)],
        "in_interval": [t in p.interval for p, t in zip(pairs, exact, strict=True)],
    }
    final = {place: pair.value for place, pair in zip(ordered, pairs, strict=True)}
    rows = [
        {
            "group": group(place),
            "predicted": predicted / abs(value) / TOL,
            "true": abs(value - truth[place]) / abs(value) / TOL,
            "clamped": clamped,
            "final": abs(value - final[place]) <= TOL / 100 * abs(value),
        }
        for place, value, predicted, clamped in directions
        if place in truth
    ]
    return run, rows


def ends(H: hk.LinearOperator, truth: Sequence[float]) -> Question:
    """Return the question of both ends."""
    return lambda seed: hk.extreme_eigenvalues(H, tol=TOL, seed=seed), {0: truth[0], -1: truth[-1]}


def top(H: hk.LinearOperator, k: int, which: str) -> Question:
    """Return the question of k eigenvalues of one end."""
    exact = hk.lanczos(H, k, which=which, tol=TOL / 1000, seed=99).values.tolist()
    places = range(-k, 0) if which == "LA" else range(k)
    return (
        lambda seed: hk.top_eigenvalues(H, k, which=which, tol=TOL, seed=seed),
        dict(zip(places, exact, strict=True)),
    )


def network(name: str, cache: Path) -> Iterator[Question]:
    """Yield both ends of a trained network."""
    H = problems.hessian(problems.load(name, cache), batch_size=1000)
    yield ends(H, reference(name, "extremes", cache)["value"])


def along_training(cache: Path) -> Iterator[Question]:
    """Yield both ends of a network after each epoch of its training."""
    recipe = problems.RECIPES[NETWORK]
    model, data = recipe.model(), recipe.data()
    for state in problems.checkpoints(NETWORK, cache, NUM_EPOCHS):
        model.load_state_dict(state)
        H = problems.over(model, data, batch_size=1000, mode=problems.MODE)
        exact = hk.extreme_eigenvalues(H, method="lanczos", tol=TOL / 100, seed=99)
        yield ends(H, [exact.smallest.value, exact.largest.value])


def several(cache: Path) -> Iterator[Question]:
    """Yield several values of either end of a network."""
    H = problems.hessian(problems.load(NETWORK, cache), batch_size=1000)
    yield from (top(H, 5, "LA"), top(H, 3, "SA"))


def symmetric_noise(n: int, norm: float, seed: int) -> Tensor:
    """Return a Gaussian symmetric matrix ``[n, n]`` of about this norm."""
    G = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (G + G.mT) * (norm / np.sqrt(8 * n))


def alike(matrix: Tensor) -> hk.LinearOperator:
    """Return a likeness at the cost of a sample of a twentieth."""
    return replace(hk.aslinearoperator(matrix), cost=0.05)


def questions_of(
    op: hk.LinearOperator, cheap: Callable[[int], hk.LinearOperator], values: Tensor
) -> Iterator[Question]:
    """Yield both ends, and three values of either end, of an operator with these eigenvalues, ascending."""
    for k, which in ((2, "BE"), (3, "LA"), (3, "SA")):
        places = [
            place - len(values) if place >= len(values) / 2 else place for place in select(values, k, which)
        ]
        yield (
            lambda seed, k=k, which=which: hk.multifidelity(
                [cheap(seed), op], k, which=which, tol=TOL, atol=0.0, seed=seed
            ),
            {place: float(values[place]) for place in places},
        )


def prescribed(_: Path) -> Iterator[Question]:
    """Yield spectra with likenesses of several qualities; each seed has another one."""
    for spectrum in problems.spectra().values():
        whole = np.sort(spectrum)  # thinned inside, where the matrix of a likeness would take long
        values = torch.from_numpy(np.r_[whole[:5], whole[5:-12][:: 1 + len(whole) // 700], whole[-12:]])
        op, small = problems.diagonal(values), float(min(abs(values[0]), abs(values[-1])))
        for noise in NOISE:
            for lacks_end in (False, True):
                base = values.clone()
                base[0] = 0.0 if lacks_end else values[0]

                def cheap(seed: int, base: Tensor = base, noise: float = noise * small) -> hk.LinearOperator:
                    return alike(torch.diag(base) + symmetric_noise(len(base), noise, seed))

                yield from questions_of(op, cheap, values)


def finite_sums(_: Path) -> Iterator[Question]:
    r"""Yield matrices :math:`\sum_i w_i a_i a_i^\top / N` of 20,000 terms, with a sample of 1,000 of these."""
    n, num_terms, num_sampled = 300, 20_000, 1000
    for power in POWERS:
        for negative in NEGATIVE:
            g = torch.Generator().manual_seed(0)
            sizes = torch.arange(1, n + 1, dtype=torch.float64) ** -power
            A = torch.randn(num_terms, n, generator=g, dtype=torch.float64) * sizes
            weights = torch.randn(num_terms, generator=g, dtype=torch.float64).exp()
            weights *= torch.where(torch.rand(num_terms, generator=g) < negative, -1.0, 1.0)

            def share(rows: Tensor, A: Tensor = A, weights: Tensor = weights) -> Tensor:
                return A[rows].mT @ (weights[rows, None] * A[rows]) / len(rows)

            def cheap(seed: int, share: Callable[[Tensor], Tensor] = share) -> hk.LinearOperator:
                order = torch.randperm(num_terms, generator=torch.Generator().manual_seed(seed))
                return alike(share(order[:num_sampled]))

            H = share(torch.arange(num_terms))
            yield from questions_of(hk.aslinearoperator(H), cheap, torch.linalg.eigvalsh(H))


NETWORKS = (NETWORK, "transformer, characters", "CIFAR-10 ResNet")
PROBLEMS: dict[str, Callable[[Path], Iterator[Question]]] = {
    **{name: lambda cache, name=name: network(name, cache) for name in NETWORKS},
    "dense, along training": along_training,
    "dense, five largest and three smallest": several,
    "prescribed spectra": prescribed,
    "finite sums": finite_sums,
}


def measure(name: str, cache: Path, seeds: int) -> Record:
    """Return the solves of a problem, and their directions; numbers with four digits."""
    asked = [ask(question, seed) for question in PROBLEMS[name](cache) for seed in range(seeds)]
    return {
        "runs": [short(run) for run, _ in asked],
        "directions": [list(short(row).values()) for _, rows in asked for row in rows],
    }


def short(record: Record) -> Record:
    """Return a record with four digits of each float."""

    def rounded(value: object) -> object:
        if isinstance(value, list):
            return [rounded(one) for one in value]
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return {key: rounded(value) for key, value in record.items()}


def ratios(directions: Sequence[Sequence[Any]]) -> dict[str, list[float]]:
    """Return true over predicted errors of the kinds of directions, those of returned values first."""
    found: dict[str, list[float]] = {}
    for returned in (True, False):
        for name in GROUPS:
            for clamped in (False, True):
                label = f"{name}, {'clamped' if clamped else 'not clamped'}{', returned' if returned else ''}"
                found[label] = [
                    true / predicted
                    for where, predicted, true, share, final in directions
                    if where == name and (share > MOSTLY) == clamped and final >= returned
                ]
    return {label: values for label, values in found.items() if values}


def table(record: Record) -> str:
    """Return quantiles of true over predicted errors, as Markdown."""
    directions = [row for entry in record["problems"].values() for row in entry["directions"]]
    rows = [
        [label, f"{len(values):,}", *(f"{value:.2f}" for value in np.quantile(values, QUANTILES))]
        for label, values in ratios(directions).items()
    ]
    return harness.markdown(["predictions", "number", "median", "90 %", "99 %", "99.5 %", "largest"], rows)


def promises(record: Record) -> str:
    """Return how far off the values of converged solves are, and whether their intervals hold, as Markdown."""
    rows = []
    for name, entry in record["problems"].items():
        runs = [run for run in entry["runs"] if run["converged"]]
        errors = [error for run in runs for error in run["errors_over_tol"]]
        held = [one for run in runs for one in run["in_interval"]]
        off = [str(sum(error > multiple for error in errors)) for multiple in (1, 2, 5)]
        rows.append(
            [
                name,
                f"{len(runs)} of {len(entry['runs'])}",
                f"{sum(run['passes'] for run in runs) / len(runs):.1f}",
                str(len(errors)),
                ", ".join(off),
                f"{max(errors):.2f}",
                f"{sum(held)} of {len(held)}",
            ]
        )
    head = ["problem", "converged", "passes, mean", "values", "off by over 1, 2, 5 tol", "worst error / tol"]
    return harness.markdown([*head, "intervals that hold"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, out=harness.RESULTS / "calibration.json")
    harness.add_trained(parser)
    harness.add_names(parser, choices=PROBLEMS)
    parser.add_argument("--seeds", type=int, default=5)
    given = harness.parse(parser, argv)
    if not given.report:
        record = harness.open_record(given.out, {"tol": TOL}, problems={})
        for name in harness.pending(given, given.problems, record["problems"]):
            record["problems"][name] = measure(name, given.cache, given.seeds)
            harness.write(given.out, record)
            print(f"{name}: {len(record['problems'][name]['runs'])} solves", flush=True)
    found = harness.read(given.out)
    print(table(found), promises(found), sep="\n\n")


if __name__ == "__main__":
    main()
