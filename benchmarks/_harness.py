"""Shared by the benchmark scripts: arguments, the machine, files of results, tables, seconds.

A script measures one thing by name (a problem, a network) after the other and writes ``--out``, a JSON file of one
machine and one setting, whole after each. Its tables are made from that file alone: ``--report`` prints them without
measuring, ``--resume`` measures only the names that the file lacks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hvpkit as hk
from hvpkit._utils.files import atomic_write

RESULTS = Path(__file__).parent / "results"
Record = dict[str, Any]


def parser(doc: str | None, *, out: Path | None = None) -> argparse.ArgumentParser:
    """Return a parser that shows `doc` and knows ``--out``."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=out, help="the JSON file of results; default %(default)s")
    made.add_argument("--report", action="store_true", help="print the tables of --out, measure nothing")
    return made


def add_names(parser: argparse.ArgumentParser, flag: str = "--problems", choices: Iterable[str] = ()) -> None:
    """Add the arguments of a script that measures several problems by name."""
    known = [*choices]
    parser.add_argument(flag, nargs="+", choices=known or None, default=known or None, metavar="NAME")
    parser.add_argument("--resume", action="store_true", help="skip the names that --out has")


def add_trained(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a script that measures trained networks."""
    parser.add_argument("--cache", type=Path, default=Path("benchmark-cache"), help="trained parameters")
    parser.add_argument("--cifar10", type=Path, help="the folder that holds cifar-10-batches-py")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments; ``--cifar10`` goes into the environment, where child processes find it."""
    given = parser.parse_args(argv)
    if getattr(given, "cifar10", None):
        os.environ["CIFAR10"] = str(given.cifar10)
    return given


def pending(given: argparse.Namespace, names: Iterable[str], done: Container[str]) -> list[str]:
    """Return the names to measure: all, or with ``--resume`` those that are not done."""
    return [name for name in names if not (given.resume and name in done)]


def machine(**more: Any) -> Record:
    """Return the facts that seconds depend on: processor, threads, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hvpkit": hk.__version__,
        **more,
    }


def read(file: Path) -> Record:
    """Return the record in a file.

    Raises:
        SystemExit: there is no such file.
    """
    if not file.exists():
        raise SystemExit(f"--out: there is no file {file}; measure first, without --report")
    found: Record = json.loads(file.read_text())
    return found


def write(file: Path, record: Record) -> None:
    """Write a record whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as draft:
        draft.write_text(json.dumps(record, indent=1) + "\n")


def save(file: Path, state: object) -> None:
    """Save tensors whole or not at all."""
    with atomic_write(file) as draft:
        torch.save(state, draft)


def open_record(file: Path, header: Record, *, extendable: Container[str] = (), **empty: Any) -> Record:
    """Return the record in `file`, to add results to, or a new one.

    Args:
        file: the JSON file.
        header: settings that all results in a file share, such as ``{"machine": {...}, "tol": 0.01}``.
        extendable: keys of the header that may differ from those in the file.
        empty: the results of a new record, such as ``problems={}``.

    Raises:
        SystemExit: the file was made with another header. Keys that the file lacks are not compared.
    """
    if not file.exists():
        return {**header, **empty}
    found = read(file)
    old, new = _flat(found), _flat(header)
    others = [key for key in new if key in old and old[key] != new[key] and key not in extendable]
    if others:
        raise SystemExit(f"--out: {file} was made with another {', '.join(others)}; choose another place")
    return {**empty, **found, **header}


def _flat(header: Record) -> Record:
    """Return a header without its nesting: the entries of its dictionaries and its numbers, as JSON has them."""
    flat: Record = {}
    for key, value in header.items():
        flat |= value if isinstance(value, dict) else {key: value}
    found: Record = json.loads(json.dumps(flat))
    return found


def digest(model: nn.Module) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a model's parameters."""
    numbers = b"".join(p.detach().contiguous().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(numbers).hexdigest()[:16]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


def median(values: Sequence[float], *, spread: bool = True) -> str:
    """Return the median to three digits, with the range in parentheses; "-" of nothing."""
    if not values:
        return "-"
    middle = f"{statistics.median(values):.3g}"
    return f"{middle} ({min(values):.3g} to {max(values):.3g})" if spread and len(values) > 1 else middle


def timed(work: Callable[[], Any], device: torch.device | None = None) -> tuple[Any, float]:
    """Return the result of `work` and its seconds, including what it started on the device."""
    cuda = device is not None and device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - begin


def with_timed_matvecs(op: hk.LinearOperator, note: Callable[[float], object]) -> hk.LinearOperator:
    """Return the operator; `note` is called with the seconds of each matvec."""

    def product(vectors: Tensor) -> Tensor:
        image, seconds = timed(lambda: op.product(vectors))
        note(seconds)
        return image

    return replace(op, product=product)
