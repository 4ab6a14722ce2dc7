"""Shared by the studies of papers: settings as flags, runs that an interrupted study continues, verdicts."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy.stats import t as student
from torch import nn
from torch.nn import functional as F

import hvpkit as hk
from _harness import Record, machine, open_record, write
from _training import Data
from hvpkit._utils.files import atomic_write

EXTENDABLE = ("depths", "variants", "seeds", "explore")
"""Settings that list the networks of a study, not how one is made: another run may have others."""


def read_settings(
    doc: str | None, full: Record, small: Record, argv: Sequence[str] | None
) -> tuple[Path, Record, Path | None, torch.device]:
    """Return the folder of the study, its settings (a flag for each of ``full``), CIFAR-10's folder, and the device."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="one or two minutes on one core")
    parser.add_argument("--cifar10", type=Path, help="the folder; without, scikit-learn's digits")
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
    settings = small if given.pop("small") else full
    chosen = {name: settings[name] if given[name] is None else given[name] for name in settings}
    out, cifar10, device = given["out"], given["cifar10"], given["device"]
    return out, {**chosen, "data": "CIFAR-10" if cifar10 else "digits"}, cifar10, torch.device(device)


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
    out: Path,
    settings: Record,
    wanted: dict[str, Callable[[], Record]],
    judge_claims: Callable[[Sequence[Record]], list[Record]],
) -> Record:
    """Make the runs that a folder lacks, and write ``study.json`` after each.

    Raises:
        SystemExit: the folder has a study with other settings.
    """
    here = machine()
    study = open_record(
        out / "study.json", {"settings": settings, "machine": here}, extendable=(*EXTENDABLE, *here), runs={}
    )
    for name in [name for name in wanted if name not in study["runs"]]:
        study["runs"][name] = made = wanted[name]()
        study["claims"] = judge_claims(list(study["runs"].values()))
        write(out / "study.json", study)
        print(f"{len(study['runs'])}: {name} {made['status']}", flush=True)
    return study


def publish(out: Path, text: str, figure: Figure) -> None:
    """Write ``study.md`` and ``study.png``, and print the text."""
    with atomic_write(out / "study.md") as draft:
        draft.write_text(text)
    with atomic_write(out / "study.png") as draft:
        figure.savefig(draft, dpi=120, format="png")
    print(text)
