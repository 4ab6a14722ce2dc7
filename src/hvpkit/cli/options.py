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
from hvpkit.cli.builtin_problems import ARCHITECTURES, NAMES, Classification, builtin
from hvpkit.cli.model_checkpoints import load_into
from hvpkit.cli.user_problems import FORMS, Target, load_target

DTYPES = {"float32": torch.float32, "float64": torch.float64}

DataDir = Annotated[Path | None, typer.Option(help="Folder that holds CIFAR-10.")]
Arch = Annotated[str, typer.Option(help=f"Network for cifar10: {ARCHITECTURES}.")]
Device = Annotated[
    str | None,
    typer.Option(help="Device, as cpu, cuda or cuda:1. By default the tensors stay where they are."),
]
Dtype = Annotated[
    str | None, typer.Option(help="float32 or float64. By default the tensors keep their dtype.")
]
NumExamples = Annotated[
    int | None, typer.Option(help="Use only the first examples of a built-in problem; by default all.")
]
Seed = Annotated[
    int, typer.Option(help="Seed of random vectors, and of a built-in network's initial parameters.")
]


def check_device(device: str | None) -> str | None:
    """Return ``device``; raise ValueError if torch cannot use it here."""
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device: {device} cannot be used here ({reason})") from error
    return device


def check_dtype(dtype: str | None) -> torch.dtype | None:
    """Return the dtype of that name; raise ValueError if the name is unknown."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {dtype}")
    return None if dtype is None else DTYPES[dtype]


@dataclass(frozen=True)
class Model:
    """Options for a built-in problem."""

    target: Annotated[str, typer.Argument(metavar="TARGET", help=f"{' or '.join(NAMES)}.")]
    arch: Arch = "resnet20"
    data_dir: DataDir = None
    num_examples: NumExamples = None
    device: Device = None
    dtype: Dtype = None
    seed: Seed = 0

    def load(self) -> Classification:
        """Return the network, not trained, and its data.

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
    """Options for a loss, its parameters and its data."""

    target: Annotated[
        str,
        typer.Argument(metavar="TARGET", help=f"{FORMS}; functions return (loss_fn, params, data)."),
    ]
    arch: Arch = "resnet20"
    data_dir: DataDir = None
    resume: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of a built-in network; by default the network is not trained."),
    ] = None
    num_examples: NumExamples = None
    device: Device = None
    dtype: Dtype = None
    seed: Seed = 0

    def load(self) -> Target:
        """Return loss, parameters and data.

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
    """Options for a Hessian and its matvecs."""

    wrt: Annotated[
        list[str] | None,
        typer.Option(help="Glob over parameter names: use the block of these parameters. May be repeated."),
    ] = None
    batch_size: Annotated[
        str | None, typer.Option(help="The most examples in one forward pass, or auto for the fastest.")
    ] = None
    mode: Annotated[
        str,
        typer.Option(
            help="Mode of matvecs: auto, forward-over-reverse, reverse-over-reverse or finite-difference."
        ),
    ] = "auto"
    arithmetic: Annotated[str, typer.Option(help="Arithmetic of matvecs: native, bf16 or tf32.")] = "native"
    memory_limit: Annotated[
        float | None,
        typer.Option(help="Bytes to keep between matvecs; by default a quarter of the free memory."),
    ] = None
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Compile matvecs: takes up to a minute at first, pays in long runs."),
    ] = False

    def hessian(self) -> tuple[Target, hk.CurvatureOperator]:
        """Return the problem and its Hessian.

        Raises:
            ValueError: an option that is wrong, named.
        """
        target = self.load()
        size: int | str | None = self.batch_size
        with suppress(ValueError):  # "auto", or text that the library refuses by name
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
        """Return a record of the problem."""
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
    """Options of the solver for both ends."""

    tol: Annotated[float, typer.Option(help="Relative error of each eigenvalue.")] = 1e-2
    method: Annotated[str, typer.Option(help="Solver: auto, lanczos or multifidelity.")] = "auto"
    max_matvecs: Annotated[float | None, typer.Option(help="The most passes over the data.")] = None
    time_limit: Annotated[float | None, typer.Option(help="Time limit in seconds.")] = None
