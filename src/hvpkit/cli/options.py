"""Options that commands share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer

import hvpkit as hk
from hvpkit._utils import validation
from hvpkit.cli.builtin_problems import ARCHITECTURES, CIFAR, NAMES, builtin
from hvpkit.cli.choices import Arithmetic, BatchNorm, Curvature, Dtype, ExtremesMethod, Mode
from hvpkit.cli.output import print_message
from hvpkit.cli.ranks import shared
from hvpkit.cli.targets import Network, Target
from hvpkit.cli.user_problems import FORMS, RETURNED, load_target
from hvpkit.cli.verbosity import is_verbose

CONSTRUCTORS: dict[Curvature, Callable[..., hk.CurvatureOperator]] = {
    Curvature.HESSIAN: hk.hessian,
    Curvature.GGN: hk.ggn,
    Curvature.FISHER: hk.fisher,
}

DataDir = Annotated[Path | None, typer.Option(help="Folder that holds CIFAR-10 or CIFAR-100 as published.")]
Arch = Annotated[str, typer.Option(help=f"Network for {' and '.join(CIFAR)}: {ARCHITECTURES}.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="Device, as cpu, cuda or cuda:1. By default cpu for built-in problems; those of a function stay."
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
    typer.Option(help="BatchNorm of a network: by its running statistics (eval) or those of each batch."),
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
Atol = Annotated[
    float | None,
    typer.Option(
        help="Size up to which a value counts as zero, in units of the norm. By default min(1e-5, tol / 1000)."
    ),
]
Certify = Annotated[
    bool, typer.Option("--certify", help="Continue until each interval is as narrow as the error allowed.")
]
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


def _starting_with(names: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Return a completion of names, for shells."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


@dataclass(frozen=True)
class Source:
    """Options for a problem, built-in or of a function."""

    PANEL: ClassVar = "Problem"

    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help=f"{FORMS}; functions return {RETURNED}.",
            autocompletion=_starting_with(NAMES),
        ),
    ]
    arch: Arch = "resnet20"
    data_dir: DataDir = None
    num_examples: NumExamples = None
    device: Device = None
    dtype: DtypeOption = None
    seed: Seed = 0
    batchnorm: BatchNormOption = BatchNorm.EVAL

    def find(self, *, with_test: bool = False) -> Target | Network:
        """Return a loss or a network, and its data.

        Raises:
            ValueError: an option that is wrong or missing, named.
        """
        device, dtype = check_device(self.device), torch_dtype(self.dtype)
        if self.target in NAMES:
            return builtin(
                self.target,
                arch=self.arch,
                data_dir=self.data_dir,
                num_examples=self.num_examples,
                seed=self.seed,
                device=device or "cpu",
                dtype=dtype or torch.float32,
                with_test=with_test,
            )
        only = {"--data-dir": self.data_dir, "--num-examples": self.num_examples}
        given = [name for name, value in only.items() if value is not None]
        if given:
            raise ValueError(f"{', '.join(given)}: only for {', '.join(NAMES)}; {self.target} is a function")
        found = load_target(self.target, device=device, dtype=dtype)
        if isinstance(found, Target) and self.batchnorm is not BatchNorm.EVAL:
            raise ValueError(f"--batchnorm: only for a network; {self.target} returns a loss function")
        return found


@dataclass(frozen=True)
class Model(Source):
    """Options for a built-in problem."""

    target: Annotated[
        str,
        typer.Argument(metavar="TARGET", help=f"{', '.join(NAMES)}.", autocompletion=_starting_with(NAMES)),
    ]

    def load(self) -> Network:
        """Return the network, not trained, with data for training and for testing.

        Raises:
            ValueError: an option that is wrong or missing, named.
        """
        if self.target not in NAMES:
            raise ValueError(f"TARGET must be one of {', '.join(NAMES)} here, got {self.target}")
        found = self.find(with_test=True)
        assert isinstance(found, Network)
        return found


@dataclass(frozen=True)
class Problem(Source):
    """Options for a loss, its parameters and its data."""

    PANEL: ClassVar = "Problem"

    resume: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint of the network, or of params where a function returns a loss; without it, built-in "
            "networks are not trained."
        ),
    ] = None

    def load(self) -> Target:
        """Return loss, parameters and data.

        Raises:
            ValueError: an option that is wrong, named.
        """
        found = self.find()
        if self.resume is not None:
            found = found.load(self.resume)
        target = found.target(self.batchnorm.value) if isinstance(found, Network) else found
        return replace(target, data=shared(target.data))


@dataclass(frozen=True)
class CurvatureProblem(Problem):
    """Options for a curvature matrix and its matvecs."""

    PANEL: ClassVar = "Matrix and matvecs"

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
        if is_verbose():
            size = "as they come" if H.batch_size is None else f"of {H.batch_size}"
            print_message(f"{repr(H)[1:-1]}; batches {size}; on {H.device}")
            print_message(f"mode of matvecs: {H.mode_reason or H.mode}")
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

    PANEL: ClassVar = "Solver"

    tol: Tol = 1e-2
    atol: Atol = None
    method: Method = ExtremesMethod.AUTO
    ncv: Ncv = None
    offload: Offload = False
    certify: Certify = False
    max_matvecs: Annotated[float | None, typer.Option(help="The most passes over the data.")] = None
    time_limit: Annotated[float | None, typer.Option(help="Time limit in seconds.")] = None
