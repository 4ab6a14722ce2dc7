"""Tables and the picture of compare, from its JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from _harness import Record, markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "<!-- compare -->", "<!-- /compare -->"

TITLES = {
    "extremes": "Both ends to 1 %",
    "top5": "Five largest in magnitude, to 1 %",
    "trace": "Trace to 5 %",
    "density": "Density, 80 steps",
    "product": "One product",
    "gradient": "One full-data gradient",
    "memory": "Peak memory of a product",
}

IN_DOCUMENT = ("extremes", "product", "memory")

IN_SUMMARY = {"product": "seconds of one product", "memory": "peak memory of a product"}
IN_NOTE = ("extremes", "product")
GIVEN = "hessian-eigenthings, given the steps"
"""Not counted as the fastest: who asks does not know the steps that are enough."""
SUMMARISED = ("torch + SciPy", "PyHessian", "hessian-eigenthings", "curvlinops")


def libraries(found: Record) -> list[str]:
    """Return the libraries in the order in which they were run."""
    cells = [cells for problem in found["problems"].values() for cells in problem["tasks"].values()]
    return list(dict.fromkeys(name for cell in cells for name in cell))


def number(values: list[float]) -> str:
    return f"{statistics.median(values):.3g}"


def shown(cell: Record | None, own: bool) -> str:
    """Return a cell of the table: the median, the passes, and the ratio to hvpkit with its range over rounds."""
    if cell is None:
        return ""
    if cell["status"] == "wrong":
        return f"**wrong** by {cell['error']:.1%}" if "error" in cell else "**wrong**"
    if cell["status"] != "right":
        return str(cell["status"])
    if "megabytes" in cell:
        parts = [f"{number(cell['megabytes'])} MB"]
    elif not cell["seconds"]:
        return f"right in none of {cell['rounds']}"
    else:
        parts = [f"{number(cell['seconds'])} s"]
        if statistics.median(cell["passes"]) != 1:
            parts.append(f"{number(cell['passes'])} passes")
        if cell["right"] < cell["rounds"]:
            parts.append(f"right in {cell['right']} of {cell['rounds']}")
    ratios = cell.get("ratios", [])
    if ratios and not own:
        spread = f" ({min(ratios):.2g} to {max(ratios):.2g})" if len(ratios) > 1 else ""
        parts.insert(0, f"**{number(ratios)} x**{spread}")
    return ", ".join(parts)


def mean_ratio(cells: list[Record]) -> str:
    """Return the geometric mean of a library's ratios over the problems where it has one."""
    ratios = [statistics.median(cell["ratios"]) for cell in cells if cell.get("ratios")]
    if not ratios:
        return ""
    return f"{statistics.geometric_mean(ratios):.2f} x, on {len(ratios)} of {len(cells)}"


def fastest(found: Record, task: str) -> str:
    """Return how much the fastest other library takes on each problem where one is right: ratios to hvpkit."""
    least: dict[str, float] = {}
    for problem, entry in found["problems"].items():
        cells = entry["tasks"].get(task, {})
        others = [
            statistics.median(cell["ratios"])
            for name, cell in cells.items()
            if name not in ("hvpkit", GIVEN) and cell.get("ratios")
        ]
        if others:
            least[problem] = min(others)
    if not least:
        return ""
    each = "; ".join(f"{problem} {ratio:.2f}" for problem, ratio in least.items())
    return (
        f"{TITLES[task]}, seconds of the fastest other library that is right, times hvpkit's: {each}; "
        f"geometric mean {statistics.geometric_mean(least.values()):.2f}."
    )


def task_table(found: Record, task: str, names: list[str]) -> str:
    """Return a row for each problem, a column for each library that offers the task."""
    cells = {
        name: entry["tasks"][task] for name, entry in found["problems"].items() if task in entry["tasks"]
    }
    nothing = {None, "not offered"}
    names = [name for name in names if {row.get(name, {}).get("status") for row in cells.values()} - nothing]
    rows = [
        [problem, *(shown(row.get(name), name == "hvpkit") for name in names)]
        for problem, row in cells.items()
    ]
    means = [
        "" if name == "hvpkit" else mean_ratio([row[name] for row in cells.values() if name in row])
        for name in names
    ]
    rows += [["geometric mean", *means]] if len(cells) > 1 else []
    return markdown([TITLES[task], *names], rows)


def tasks_in(found: Record) -> list[str]:
    return [task for task in TITLES if any(task in entry["tasks"] for entry in found["problems"].values())]


def notes(found: Record) -> str:
    """Return the functions that were called, and the messages of those that failed."""
    how: dict[tuple[str, str, str], list[str]] = {}
    failed: dict[tuple[str, str], list[str]] = {}
    for problem, entry in found["problems"].items():
        for task, cells in entry["tasks"].items():
            for name, cell in cells.items():
                if "how" in cell:
                    how.setdefault((name, TITLES[task], cell["how"]), []).append(problem)
                if "message" in cell:
                    failed.setdefault((name, cell["message"]), []).append(f"{problem} ({task})")
    lines = [
        f"- {name}. {title}: {text} ({'; '.join(where)})."
        for (name, title, text), where in sorted(how.items())
    ]
    lines += [f"- {name}. On {', '.join(where)}: `{message}`" for (name, message), where in failed.items()]
    return "\n".join(lines)


def table(found: Record, tasks: Collection[str] = tuple(TITLES)) -> str:
    """Return the tables of tasks, and a note on the machine and the versions, as Markdown."""
    names = libraries(found)
    present = [task for task in tasks_in(found) if task in tasks]
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    note = (
        f"Processor seconds, passes over the data and ratios to hvpkit in the same round: medians, ranges over rounds. "
        f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}, "
        f"Python {machine['python']}, torch {machine['torch']}; {versions}."
    )
    told = (
        "hessian-eigenthings' Lanczos runs for a given number of steps and reports afterwards whether they were "
        'enough; here they are doubled until they are. The column "given the steps" starts with the number '
        "that is enough, which nobody knows who asks; it does not count as the fastest other."
    )
    least = [text for task in present if task in IN_NOTE and (text := fastest(found, task))]
    return "\n\n".join([*(task_table(found, task, names) for task in present), *least, f"{note} {told}"])


def summary(found: Record) -> str:
    """Return a row for each task of ``IN_SUMMARY``: geometric means of the ratios to hvpkit, a column a library."""
    rows = []
    for task, words in IN_SUMMARY.items():
        entries = [entry["tasks"][task] for entry in found["problems"].values() if task in entry["tasks"]]
        means = [mean_ratio([row[name] for row in entries if name in row]) for name in SUMMARISED]
        rows.append([words, *means])
    return markdown([f"over {len(found['problems'])} networks, times hvpkit's", *SUMMARISED], rows)


def write_document(file: Path, found: Record) -> None:
    """Replace the text between the markers of a file with the tables of ``IN_DOCUMENT``.

    Raises:
        ValueError: the file lacks the markers.
    """
    whole = file.read_text()
    begin, end = (whole.find(marker) for marker in MARKERS)
    if not 0 <= begin < end:
        raise ValueError(
            f"{file} lacks the lines {MARKERS[0]} and {MARKERS[1]}; put them where the tables go"
        )
    text = table(found, IN_DOCUMENT)
    file.write_text(f"{whole[: begin + len(MARKERS[0])]}\n{text}\n{whole[end:]}")


def picture(found: Record, file: Path) -> None:
    """Draw ratios to hvpkit, a panel for each task; a cross is a wrong answer or none."""
    import matplotlib.pyplot as plt

    names = [name for name in libraries(found) if name != "hvpkit"]
    problems, tasks = list(found["problems"]), tasks_in(found)
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    size = 2 + 2.6 * columns, 0.8 + rows * (1.1 + 0.45 * len(problems))
    figure, axes = plt.subplots(
        rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(tasks) :]:
        ax.set_visible(False)
    for ax, task in zip(axes.flat, tasks, strict=False):
        ax.axvline(1, color="black", linewidth=1)
        for row, problem in enumerate(problems):
            cells = found["problems"][problem]["tasks"].get(task, {})
            for place, name in enumerate(names):
                y = row + 0.18 * (place - (len(names) - 1) / 2)
                plot_cell(ax, y, f"C{place}", cells.get(name, {"status": ""}))
        ax.set(xscale="log", title=TITLES[task], xlabel="ratio to hvpkit")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.tick_params(labelbottom=True)
        ax.grid(axis="x", alpha=0.3, which="both")
    low, high = axes[0, 0].get_xlim()
    axes[0, 0].set(xlim=(min(low, 0.3), max(high, 12)), ylim=(len(problems) - 0.5, -0.5))
    axes[0, 0].set_yticks(range(len(problems)), problems)
    handles = [plt.Line2D([], [], marker="o", color=f"C{i}", label=name) for i, name in enumerate(names)]
    handles.append(plt.Line2D([], [], marker="x", linestyle="", color="grey", label="wrong, or no answer"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def plot_cell(ax: Axes, y: float, color: str, cell: Record) -> None:
    """Draw the median ratio with its range, or a cross at the right edge."""
    if cell.get("ratios"):
        ax.plot([min(cell["ratios"]), max(cell["ratios"])], [y, y], color=color, linewidth=1)
        ax.plot(statistics.median(cell["ratios"]), y, "o", color=color, markersize=4)
    elif cell["status"] in ("wrong", "failed", "not converged"):
        ax.plot(0.97, y, "x", color=color, markersize=5, transform=ax.get_yaxis_transform())
