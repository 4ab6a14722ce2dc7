"""Shared by the studies of papers: settings as flags, runs that an interrupted study continues, verdicts."""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn import functional as F

import hvpkit as hk
from _harness import Record, machine, markdown, open_record, read, write
from _training import Data
from hvpkit._utils.files import atomic_write

EXTENDABLE = ("depths", "variants", "seeds", "explore", "networks")
"""Settings that list the networks of a study, not how one is made: another run may have others."""


class Asked(NamedTuple):
    """The folder of a study, its settings, the folder of its images, the device, and the file of published runs."""

    out: Path
    settings: Record
    images: Path | None
    device: torch.device
    results: Path | None = None


def read_settings(
    doc: str | None, full: Record, small: Record, argv: Sequence[str] | None, medium: Record | None = None
) -> Asked:
    """Return what the command line asks for; each of ``full`` has a flag."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of parameters, table and picture")
    parser.add_argument(
        "--results", type=Path, help="a JSON file of published runs, to go on from and add to"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="one or two minutes on one core")
    if medium:
        size.add_argument("--medium", action="store_true", help="the size of the published results")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--cifar10", type=Path, help="the folder; without, scikit-learn's digits")
    data.add_argument("--cifar100", type=Path, help="the folder")
    parser.add_argument("--device", default="cpu")
    for name, value in full.items():
        several = isinstance(value, list)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(value[0]) if several else type(value),
            nargs="+" if several else None,
            help=f"{value}; with --small {small[name]}",
        )
    given = vars(parser.parse_args(argv))
    settings = small if given["small"] else medium if medium and given["medium"] else full
    chosen = {name: settings[name] if given[name] is None else given[name] for name in settings}
    chosen["data"] = "CIFAR-10" if given["cifar10"] else "CIFAR-100" if given["cifar100"] else "digits"
    folder = given["cifar10"] or given["cifar100"]
    return Asked(given["out"], chosen, folder, torch.device(given["device"]), given["results"])


def operator(model: nn.Module, data: Data, batch_size: int) -> tuple[hk.LinearOperator, float]:
    """Return the Hessian of the mean loss over all examples, and that loss."""
    objective, params = hk.from_module(model, F.cross_entropy)
    mode = "forward-over-reverse" if data[0].is_cuda else "reverse-over-reverse"
    H = hk.hessian(objective, params, data, batch_size=batch_size, mode=mode)
    return H, float(hk.loss(objective, params, data))


def judge(values: Sequence[float], sign: int) -> str:
    """Return "held" if the mean has this sign, "opposite" if the other: one-sided Student's t tests at 5 %."""
    if len(values) < 2:
        return "undecided"
    mean, spread = statistics.mean(values), statistics.stdev(values)
    if abs(mean) <= float(student.ppf(0.95, len(values) - 1)) * spread / len(values) ** 0.5:
        return "undecided"
    return "held" if mean * sign > 0 else "opposite"


def complete(
    asked: Asked,
    wanted: dict[str, Callable[[], Record]],
    judge_claims: Callable[[Sequence[Record]], list[Record]],
) -> Record:
    """Make the runs that neither the folder nor the published results have; after each, write both.

    The folder's ``study.json`` is exact, and published numbers are rounded.

    Raises:
        SystemExit: either has a study with other settings.
    """
    here, settings, runs = machine(), asked.settings, {}
    for file in (asked.results, asked.out / "study.json"):
        if file and file.exists():
            header = {"settings": settings, "machine": here}
            runs |= open_record(file, header, extendable=(*EXTENDABLE, *here))["runs"]
            settings = extend(read(file)["settings"], settings)
    study = keep(asked, {"settings": settings, "machine": here, "runs": runs}, judge_claims)
    for name in [name for name in wanted if name not in runs]:
        study["runs"][name] = wanted[name]()
        print(f"{len(study['runs'])}: {name} {study['runs'][name]['status']}", flush=True)
        study = keep(asked, study, judge_claims)
    return study


def keep(asked: Asked, study: Record, judge_claims: Callable[[Sequence[Record]], list[Record]]) -> Record:
    """Write a study with its claims; return it."""
    study = {**study, "claims": judge_claims(list(study["runs"].values()))}
    write(asked.out / "study.json", study)
    if asked.results:
        text = json.dumps(rounded(study), indent=1)
        with atomic_write(asked.results) as draft:  # lists and dictionaries of plain values take a line each
            draft.write_text(
                re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda found: " ".join(found[0].split()), text) + "\n"
            )
    return study


def extend(earlier: Record, settings: Record) -> Record:
    """Return the settings, with networks in the lists of earlier ones too."""
    lists = {
        key: dict.fromkeys([*earlier.get(key, []), *settings[key]]) for key in EXTENDABLE if key in settings
    }
    return {**settings, **{key: [*names] for key, names in lists.items()}}


def rounded(tree: Any, digits: int = 5) -> Any:
    """Return a tree of JSON with so many digits of each float."""
    if isinstance(tree, dict):
        return {key: rounded(value, digits) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [rounded(value, digits) for value in tree]
    return float(f"{tree:.{digits}g}") if isinstance(tree, float) else tree


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.mean(values), spread / len(values) ** 0.5


def plus_minus(values: Sequence[float], digits: int = 3) -> str:
    """Return mean and standard error as text; "-" of nothing."""
    if not values:
        return "-"
    mean, stderr = mean_and_stderr(values)
    return f"{mean:.{digits}g}" if math.isnan(stderr) else f"{mean:.{digits}g} ± {stderr:.2g}"


def by_network(
    claims: Sequence[tuple[str, Callable[[Record], float | None], int]], runs: Sequence[Record]
) -> list[Record]:
    """Judge each claim for each network by one number a seed, whose sign it says; None counts for nothing."""
    rows = []
    for text, statistic, sign in claims:
        for network in dict.fromkeys(run["network"] for run in runs):
            found = [statistic(run) for run in runs if run["network"] == network]
            values = [value for value in found if value is not None]
            if values:
                rows.append(
                    {"claim": text, "network": network, "values": values, "verdict": judge(values, sign)}
                )
    return rows


def claims_table(claims: Sequence[Record], figure: str) -> str:
    """Return claims by network as a Markdown table."""
    rows = [[row["claim"], row["network"], plus_minus(row["values"]), row["verdict"]] for row in claims]
    return markdown(["claim", "network", figure, "verdict"], rows)


def without_history(ex: hk.ExtremeResult) -> Record:
    """Return both ends as JSON, with intervals and status."""
    return {key: value for key, value in ex.to_dict().items() if key not in ("history", "message")}


def share_beyond(nodes: Sequence[float], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, and the share of all that lies further from zero on the same side, by a quadrature.

    A smoothed density is as wide as its resolution, which is a share of the span: it would blur sharp spectra more.
    """
    ends, masses = (torch.as_tensor(part, dtype=torch.float64) for part in (nodes, weights))
    sizes = torch.logspace(-2, 4, 400, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    x = torch.cat([-sizes.flip(0), zero, sizes])
    x = x[(x >= ends[0]) & (x <= ends[-1])]
    up_to = torch.cat([zero, masses.cumsum(dim=0)])[torch.searchsorted(ends, x, right=True)]
    share = torch.where(x < 0, up_to, 1 - up_to)
    return x, torch.where((share > 1e-9) & (x != 0), share, torch.nan)  # a gap between both sides


def publish(out: Path, text: str, figure: Figure) -> None:
    """Write ``study.md`` and ``study.png``, and print the text."""
    with atomic_write(out / "study.md") as draft:
        draft.write_text(text)
    with atomic_write(out / "study.png") as draft:
        figure.savefig(draft, dpi=120, format="png")
    print(text)
