"""Options that commands share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn import functional as F

import hvpkit as hk
from hvpkit._utils import validation
from hvpkit.cli.builtin_problems import ARCHITECTURES, NAMES, Classification, builtin
from hvpkit.cli.choices import Arithmetic, BatchNorm, Curvature, Dtype, ExtremesMethod, Mode
from hvpkit.cli.model_checkpoints import load_into
from hvpkit.cli.user_problems import FORMS, Target, load_target

CONSTRUCTORS: dict[Curvature, Callable[..., hk.CurvatureOperator]] = {
    Curvature.HESSIAN: hk.hessian,
    Curvature.GGN: hk.ggn,
    Curvature.FISHER: hk.fisher,
}

DataDir = Annotated[Path | None, typer.Option(help="Folder that holds CIFAR-10.")]
Arch = Annotated[str, typer.Option(help=f"Network for cifar10: {ARCHITECTURES}.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="Device, as cpu, cuda or cuda:1. By default cpu for built-in problems; the tensors of a function stay."
    ),
]
DtypeOption = Annotated[
    Dtype | None, typer.Option(help="Dtype of parameters and data; by default they keep theirs.")
]
ModeOption = Annotated[Mode, typer.Option(help="Mode of automatic differentiation of matvecs.")]
NumExamples = Annotated[
    int | None, typer.Option(help="Use only the first examples of a built-in problem; by default all.")
]
BatchNormOption = Annotated[
    BatchNorm,
    typer.Option(
        help="BatchNorm of a built-in network: by its running statistics (eval) or those of each batch."
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="File to save the work to: every minute, when it is interrupted, and at a limit. The same command "
        "continues from it; deleted at the end.",
        dir_okay=False,
    ),
]
Tol = Annotated[float, typer.Option(help="Relative error of each eigenvalue.")]
Method = Annotated[ExtremesMethod, typer.Option(help="Solver.")]
Ncv = Annotated[
    int | None,
    typer.Option(
        help="The most basis vectors before a restart. By default by the number of parameters; fewer where memory is "
        "short."
    ),
]
Offload = Annotated[
    bool, typer.Option("--offload", help="Keep the basis in host memory instead of on the device.")
]
Seed = Annotated[
    int, typer.Option(help="Seed of random vectors, and of a built-in network's initial parameters.")
]


def check_device(device: str | None) -> str | None:
    """Return ``device``; raise ValueError if torch cannot use it here, or it holds no values."""
    if device is not None and validation.check_device("--device", device).type == "meta":
        raise ValueError("--device: meta holds no values; take cpu or cuda")
    return device


def torch_dtype(dtype: Dtype | None) -> torch.dtype | None:
    """Return the dtype of that name."""
    return {None: None, Dtype.FLOAT32: torch.float32, Dtype.FLOAT64: torch.float64}[dtype]


@dataclass(frozen=True)
class Model:
    """Options for a built-in problem."""

    target: Annotated[str, typer.Argument(metavar="TARGET", help=f"{' or '.join(NAMES)}.")]
    arch: Arch = "resnet20"
    data_dir: DataDir = None
    num_examples: NumExamples = None
    device: Device = None
    dtype: DtypeOption = None
    seed: Seed = 0
    batchnorm: BatchNormOption = BatchNorm.EVAL

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
            dtype=torch_dtype(self.dtype) or torch.float32,
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
    dtype: DtypeOption = None
    seed: Seed = 0
    batchnorm: BatchNormOption = BatchNorm.EVAL

    def load(self) -> Target:
        """Return loss, parameters and data.

        Raises:
            ValueError: an option that is wrong, named.
        """
        if self.target not in NAMES:
            only = {"--resume": self.resume, "--data-dir": self.data_dir, "--num-examples": self.num_examples}
            given = [name for name, value in only.items() if value is not None]
            given += ["--batchnorm"] if self.batchnorm is not BatchNorm.EVAL else []
            if given:
                raise ValueError(
                    f"{', '.join(given)}: only for {' and '.join(NAMES)}; {self.target} is a function"
                )
            return load_target(self.target, device=check_device(self.device), dtype=torch_dtype(self.dtype))
        model = Model(
            self.target, self.arch, self.data_dir, self.num_examples, self.device, self.dtype, self.seed
        )
        found = model.load()
        if self.resume is not None:
            load_into(found.model, self.resume)
        objective, params = hk.from_module(found.model, F.cross_entropy, batchnorm=self.batchnorm.value)
        title = found.title + (f", {self.resume.name}" if self.resume else ", not trained")
        return Target(title, objective, params, found.data)


@dataclass(frozen=True)
class CurvatureProblem(Problem):
    """Options for a curvature matrix and its matvecs."""

    curvature: Annotated[
        Curvature,
        typer.Option(
            help="Matrix: the Hessian, the generalised Gauss-Newton matrix, or the Fisher matrix of the model's own "
            "predictions. The last two need an hvpkit.Objective."
        ),
    ] = Curvature.HESSIAN

    wrt: Annotated[
        list[str] | None,
        typer.Option(help="Glob over parameter names: use the block of these parameters. May be repeated."),
    ] = None
    batch_size: Annotated[
        str | None, typer.Option(help="The most examples in one forward pass, or auto for the fastest.")
    ] = None
    mode: ModeOption = Mode.AUTO
    arithmetic: Annotated[Arithmetic, typer.Option(help="Arithmetic of matvecs.")] = Arithmetic.NATIVE
    memory_limit: Annotated[
        float | None,
        typer.Option(help="Bytes to keep between matvecs; by default a quarter of the free memory."),
    ] = None
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Compile matvecs: takes up to a minute at first, pays in long runs."),
    ] = False

    def operator(self) -> tuple[Target, hk.CurvatureOperator]:
        """Return the problem and its curvature matrix.

        Raises:
            ValueError: an option that is wrong, named.
        """
        if self.compile and self.curvature is not Curvature.HESSIAN:
            raise ValueError(f"--compile: only for --curvature hessian, got {self.curvature}")
        target = self.load()
        size: int | str | None = self.batch_size
        with suppress(ValueError):  # "auto", or text that the library refuses by name
            size = int(self.batch_size or "")
        H = CONSTRUCTORS[self.curvature](
            target.loss_fn,
            target.params,
            target.data,
            wrt=self.wrt or None,
            batch_size=size,
            mode=self.mode.value,
            arithmetic=self.arithmetic.value,
            memory_limit=self.memory_limit,
            **({"compile": True} if self.compile else {}),
        )
        return target, H

    def describe(self, target: Target, H: hk.CurvatureOperator) -> dict[str, Any]:
        """Return a record of the problem."""
        return {
            "target": self.target,
            "title": target.title,
            "curvature": self.curvature,
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

    tol: Tol = 1e-2
    atol: Annotated[
        float | None,
        typer.Option(
            help="Size up to which a value counts as zero, in units of the norm. By default min(1e-5, tol / 1000)."
        ),
    ] = None
    method: Method = ExtremesMethod.AUTO
    ncv: Ncv = None
    offload: Offload = False
    max_matvecs: Annotated[float | None, typer.Option(help="The most passes over the data.")] = None
    time_limit: Annotated[float | None, typer.Option(help="Time limit in seconds.")] = None
