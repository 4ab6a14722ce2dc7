"""Options that commands share."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn import functional as F

import hvpkit as hk
from hvpkit.cli.checkpoints import load_into
from hvpkit.cli.networks import ARCHITECTURES, NAMES, Classification, builtin
from hvpkit.cli.targets import FORMS, Target, load_target

DTYPES = {"float32": torch.float32, "float64": torch.float64}

DataDir = Annotated[Path | None, typer.Option(help="Folder of CIFAR-10.")]
Arch = Annotated[str, typer.Option(help=f"Architecture {ARCHITECTURES}.")]
Device = Annotated[
    str | None, typer.Option(help="As torch names it: cpu, cuda, cuda:1. By default where it is.")
]
Dtype = Annotated[str | None, typer.Option(help="float32 or float64. By default as it is.")]
NumExamples = Annotated[
    int | None, typer.Option(help="So many of a built-in's first examples; by default all.")
]
Seed = Annotated[int, typer.Option(help="Of random vectors, and of a built-in's initial parameters.")]


def check_device(device: str | None) -> str | None:
    """Returns ``device`` if torch can use it here; a ValueError if not."""
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device: {device} cannot be used here ({reason})") from error
    return device


def check_dtype(dtype: str | None) -> torch.dtype | None:
    """The dtype of that name; a ValueError if it is none of those."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {dtype}")
    return None if dtype is None else DTYPES[dtype]


@dataclass(frozen=True)
class Model:
    """Which built-in network, on which examples."""

    target: Annotated[str, typer.Argument(metavar="TARGET", help=f"{' or '.join(NAMES)}.")]
    arch: Arch = "resnet20"
    data_dir: DataDir = None
    num_examples: NumExamples = None
    device: Device = None
    dtype: Dtype = None
    seed: Seed = 0

    def load(self) -> Classification:
        """The network, not trained, and its data.

        Raises:
            ValueError: an option that is wrong or missing, named.
        """
        if self.target not in NAMES:
            raise ValueError(f"TARGET must be {' or '.join(NAMES)} here, got {self.target}")
        return builtin(
            self.target,
            arch=self.arch,
            data_dir=self.data_dir,
            num_examples=self.num_examples,
            seed=self.seed,
            device=check_device(self.device) or "cpu",
            dtype=check_dtype(self.dtype) or torch.float32,
        )


@dataclass(frozen=True)
class Problem:
    """Which loss at which point on which data."""

    target: Annotated[
        str,
        typer.Argument(metavar="TARGET", help=f"{FORMS}; functions return (loss_fn, params, data)."),
    ]
    arch: Arch = "resnet20"
    data_dir: DataDir = None
    resume: Annotated[
        Path | None, typer.Option(help="Checkpoint of a built-in's network; by default it is not trained.")
    ] = None
    num_examples: NumExamples = None
    device: Device = None
    dtype: Dtype = None
    seed: Seed = 0

    def load(self) -> Target:
        """Loss, parameters and data.

        Raises:
            ValueError: an option that is wrong, named.
        """
        if self.target not in NAMES:
            only = {"--resume": self.resume, "--data-dir": self.data_dir, "--num-examples": self.num_examples}
            given = [name for name, value in only.items() if value is not None]
            if given:
                raise ValueError(
                    f"{', '.join(given)}: only for {' and '.join(NAMES)}; {self.target} is a function"
                )
            return load_target(self.target, device=check_device(self.device), dtype=check_dtype(self.dtype))
        model = Model(
            self.target, self.arch, self.data_dir, self.num_examples, self.device, self.dtype, self.seed
        )
        found = model.load()
        if self.resume is not None:
            load_into(found.model, self.resume)
        objective, params = hk.from_module(found.model, F.cross_entropy)
        title = found.title + (f", {self.resume.name}" if self.resume else ", not trained")
        return Target(title, objective, params, found.data)


@dataclass(frozen=True)
class HessianProblem(Problem):
    """Which Hessian, and how its products are made."""

    wrt: Annotated[
        list[str] | None,
        typer.Option(help="Glob over parameter names: the block of these alone. May be repeated."),
    ] = None
    batch_size: Annotated[
        str | None, typer.Option(help="The most examples put through at once, or auto: the fastest.")
    ] = None
    mode: Annotated[
        str, typer.Option(help="auto, forward-over-reverse, reverse-over-reverse or finite-difference.")
    ] = "auto"
    arithmetic: Annotated[str, typer.Option(help="native, bf16 or tf32.")] = "native"
    memory_limit: Annotated[
        float | None,
        typer.Option(help="Bytes to hold between products; by default a quarter of what is free."),
    ] = None
    compile: Annotated[
        bool, typer.Option("--compile", help="Products by compiled code: a minute first, for long runs.")
    ] = False

    def hessian(self) -> tuple[Target, hk.CurvatureOperator]:
        """The problem and its Hessian.

        Raises:
            ValueError: an option that is wrong, named.
        """
        target = self.load()
        size: int | str | None = self.batch_size
        with suppress(ValueError):  # "auto", or what the library refuses by name
            size = int(self.batch_size or "")
        H = hk.hessian(
            target.loss_fn,
            target.params,
            target.data,
            wrt=self.wrt or None,
            batch_size=size,
            mode=self.mode,
            arithmetic=self.arithmetic,
            memory_limit=self.memory_limit,
            compile=self.compile,
        )
        return target, H

    def describe(self, target: Target, H: hk.CurvatureOperator) -> dict[str, Any]:
        """What was computed on, for the record."""
        return {
            "target": self.target,
            "title": target.title,
            "num_parameters": H.n,
            "num_examples": H.num_examples,
            "batch_size": H.batch_size,
            "wrt": self.wrt or None,
            "dtype": str(H.dtype).removeprefix("torch."),
            "device": str(H.device),
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Solve:
    """How both ends are found."""

    tol: Annotated[float, typer.Option(help="Relative error of each eigenvalue.")] = 1e-2
    method: Annotated[str, typer.Option(help="auto, lanczos or multifidelity.")] = "auto"
    max_matvecs: Annotated[float | None, typer.Option(help="Passes over the data, at most.")] = None
    time_limit: Annotated[float | None, typer.Option(help="Seconds, at most.")] = None
