"""``hvpkit solve``: a linear system with curvature, as for a Newton step."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import hvpkit as hk
from hvpkit.autodiff.pytree import flatten, unflatten
from hvpkit.cli import model_checkpoints
from hvpkit.cli.application import command
from hvpkit.cli.choices import Preconditioner, SolveMethod
from hvpkit.cli.options import Checkpoint, CurvatureProblem
from hvpkit.cli.output import Output, print_message, saving_to, table
from hvpkit.cli.progress_line import ProgressLine


@command(
    "hvpkit solve digits --damping 0.1",
    "hvpkit solve problem.py:make --damping 0.01 --preconditioner sample --out results",
    "hvpkit solve problem.py:make --curvature ggn --damping 0.01 --rhs b.pt --json",
)
def solve(
    problem: CurvatureProblem,
    output: Output,
    rhs: Annotated[
        Path | None,
        typer.Option(
            help="File of torch.save with the right-hand side: a vector, columns, or tensors by parameter name. "
            "By default the gradient over the data.",
            dir_okay=False,
        ),
    ] = None,
    damping: Annotated[float, typer.Option(help="Multiple of the identity to add.")] = 0.0,
    method: Annotated[
        SolveMethod,
        typer.Option(help="minres for any matrix, cg for positive definite ones: says so where one is not."),
    ] = SolveMethod.AUTO,
    preconditioner: Annotated[
        Preconditioner | None, typer.Option(help="sample: by a weighted sample of the data.")
    ] = None,
    tol: Annotated[float, typer.Option(help="Norm of the residual over that of the right-hand side.")] = 1e-6,
    max_matvecs: Annotated[float | None, typer.Option(help="The most passes over the data.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Time limit in seconds.")] = None,
    checkpoint: Checkpoint = None,
) -> bool:
    """Solve (H + damping I) x = b for the gradient b over the data, or another right-hand side.

    With the gradient, -x is the damped Newton step. --out saves x in solution.json, for hvpkit.load.
    """
    output.prepare("solve.json", "solve.png", "solution.json", checkpoint=checkpoint)
    target, H = problem.operator()
    about, watch = problem.describe(target, H), ProgressLine("Solve")
    b = _gradient(H) if rhs is None else _from_file(H, rhs)
    try:
        with saving_to(checkpoint):
            found = hk.solve(
                H,
                b,
                damping=damping,
                method=method.value,
                tol=tol,
                preconditioner=None if preconditioner is None else preconditioner.value,
                max_matvecs=max_matvecs,
                time_limit=time_limit,
                seed=problem.seed,
                monitor=watch,
                checkpoint=checkpoint,
            )
    except KeyboardInterrupt:
        output.write_partial("solve", watch.last, about)
        raise
    sizes = _sizes(H, b, found)
    header = ("right-hand side", "norm", "norm of x", "b'x", "residual norm", "status")
    rows = [
        (f"{place}", *(f"{column[place]:.6g}" for column in sizes.values()), str(status))
        for place, status in enumerate(found.statuses)
    ]
    if found.negative_curvature is not None:
        print_message(f"a direction of curvature {found.negative_curvature.curvature:.4g} was met")
    close = f"{found.status}: {found.num_matvecs:g} passes, {found.seconds:.3g} s; {found.message}."
    record = {
        **sizes,
        **found.to_dict(),
        "damping": damping,
        "rhs": "gradient" if rhs is None else str(rhs),
        "problem": about,
    }
    shown = [table(target.title, header, rows), close]
    draw = partial(_draw, found) if found.history else None
    output.write("solve", record, shown, draw, {"solution.json": found.save})
    return found.converged


def _gradient(H: hk.CurvatureOperator) -> Any:
    """Return the gradient over the data, by the parameters of the matrix."""
    origin = H.origin
    assert origin is not None
    return hk.grad(origin.loss_fn, origin.params, origin.data)


def _from_file(H: hk.LinearOperator, path: Path) -> Any:
    """Return the tensors of a file, on the device and in the dtype of the operator."""
    leaves, spec = flatten(model_checkpoints.load(path, name="--rhs"), name="--rhs")
    return unflatten([leaf.to(H.device, H.dtype) for leaf in leaves], spec)


def _sizes(H: hk.LinearOperator, b: Any, found: hk.SolveResult) -> dict[str, list[float]]:
    """Return norms of right-hand sides, solutions and residuals, and inner products, one for each column."""
    vectors = [one if isinstance(one, torch.Tensor) else H.flatten(one) for one in (b, found.x)]
    right, x = (one.detach().double().reshape(H.n, -1) for one in vectors)
    return {
        "rhs_norm": right.norm(dim=0).tolist(),
        "x_norm": x.norm(dim=0).tolist(),
        "inner_product": (right * x).sum(dim=0).tolist(),
        "residual_norm": torch.as_tensor(found.residual_norm, device="cpu").reshape(-1).tolist(),
    }


def _draw(found: hk.SolveResult) -> object:
    from hvpkit import plots

    return plots.residuals(found)
