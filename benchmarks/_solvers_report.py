"""Tables and the picture of bench_solvers, from its JSON alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from _harness import Record


def names(record: Record, key: str) -> list[str]:
    """Return problems or solvers in the order in which they were run."""
    return list(dict.fromkeys(row[key] for row in record["solvers"]))


def median(values: Iterable[float | None]) -> float:
    """Return the median, with infinity for accuracies that were not reached."""
    return statistics.median(math.inf if value is None else value for value in values)


def medians(record: Record, problem: str, solver: str, end: str) -> list[float]:
    """Return the median over seeds of the matvecs to each accuracy; empty if the solver was not run."""
    rows = [row[end] for row in record["solvers"] if (row["problem"], row["solver"]) == (problem, solver)]
    return [median(counts) for counts in zip(*rows, strict=True)]


def table(record: Record) -> str:
    """Return both tables as text: all solvers, and ``hk.extreme_eigenvalues`` beside the floor."""
    accuracies = " / ".join(f"{100 * accuracy:g}" for accuracy in record["accuracies"])
    lines = [
        f"Matvecs to {accuracies} % of the low end and of the high end (median over seeds; - : over budget)",
        "",
    ]
    for problem in names(record, "problem"):
        lines.append(problem)
        for solver in names(record, "solver"):
            cells = [
                " / ".join(f"{count:.0f}" if math.isfinite(count) else "-" for count in counts)
                for end in ("low", "high", "both")
                if (counts := medians(record, problem, solver, end))
            ]
            if cells:
                lines.append(f"    {solver:<36}low {cells[0]:<18}high {cells[1]:<18}both {cells[2]}")
    return "\n".join([*lines, "", *front_door_table(record)])


def front_door_table(record: Record) -> list[str]:
    """Return the lines of the second table."""
    lines, ratios = ["hk.extreme_eigenvalues(tol=1e-2), its last matvecs included"], []
    place = record["accuracies"].index(1e-2)
    for problem in names(record, "problem"):
        own = [door for door in record["extreme_eigenvalues"] if door["problem"] == problem]
        fewest = medians(record, problem, "floor", "both")[place]
        ratio = median(door["ratio"] for door in own)
        if 10 <= fewest < math.inf:
            ratios.append(ratio)
        lines.append(
            f"    {problem:<28}floor {fewest:>4.0f}  took {statistics.median(d['num_matvecs'] for d in own):>4.0f}  "
            f"ratio {ratio:.2f}  worst error {max(door['worst_error'] for door in own):.2f} tol  "
            f"inside {sum(door['inside'] for door in own)}/{len(own)}"
        )
    if ratios:
        lines.append(
            f"    ratio over problems with a floor of at least 10: median {statistics.median(ratios):.2f}, "
            f"worst {max(ratios):.2f}"
        )
    return lines


def draw(record: Record, file: Path) -> None:
    """Draw the matvecs to 1 % of both ends, a row for each problem."""
    import matplotlib.pyplot as plt

    problems, place = names(record, "problem"), record["accuracies"].index(1e-2)
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(problems) + 1.6), layout="constrained")
    for number, solver in enumerate(names(record, "solver")):
        points = []
        for row, problem in enumerate(problems):
            counts = medians(record, problem, solver, "both")
            if counts and math.isfinite(counts[place]):
                points.append((counts[place], row + (0.07 * (number - 5) if number else 0.0)))
        if points:
            x, y = zip(*points, strict=True)
            style = {"marker": "|", "s": 220, "color": "black"} if solver == "floor" else {"s": 36}
            axes.scatter(x, y, label=solver, zorder=3 if number else 4, **style)
    axes.set(xscale="log", xlabel="matvecs to 1 % of both ends (median over seeds)")
    axes.set_yticks(range(len(problems)), problems)
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)
