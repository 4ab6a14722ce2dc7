"""Cost of a Lanczos step beside its matvec: over plain memory traffic, and as a share of a solve of a network.

    python benchmarks/bench_step.py [--n 1000000] [--vectors 60] [--repeats 5] [--networks NAME ...]

Solves without restart of 60 matvecs and one that verifies them, float32, whose matvecs are timed and taken off:

1. n = 10^6, a diagonal matrix, against the inner products and updates of two passes of Gram-Schmidt with the same rows,
   written down plainly. Both in turn, several times, medians.
2. Hessians of networks with 1.0 * 10^6 parameters: the share of the seconds that is not matvecs. A perceptron's
   matvecs, 784-800-450-10 with GELU, are the cheapest that a network of this size has, as each parameter is used once
   an example; a convolution uses each at every place, as in a ResNet-20 of width 31.

The result on the diagonal matrix is checked by its residuals and the angles of its vectors. Writes
``benchmarks/results/step.json``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import _harness as harness
import hvpkit as hk
from _harness import Record, timed
from _problems import MODE, Data, diagonal, over
from hvpkit.zoo import cifar_resnet, mlp

ALLOWED = 1e-4
"""Error of residual norms and inner products in float32, of a matrix of norm 1."""


def random_classes(num_examples: int, *shape: int) -> Data:
    """Return random inputs in ten random classes."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(num_examples, *shape, generator=g), torch.randint(10, (num_examples,), generator=g)


def perceptron(num_examples: int) -> hk.LinearOperator:
    model = mlp(in_features=784, hidden=(800, 450))
    return over(model, random_classes(num_examples, 784), batch_size=1000, mode=MODE)


def residual_network(num_examples: int) -> hk.LinearOperator:
    model = cifar_resnet(20, width=31).eval()
    return over(model, random_classes(num_examples, 3, 32, 32), batch_size=50, mode=MODE)


NETWORKS: dict[str, Callable[[], hk.LinearOperator]] = {
    "perceptron, 2,000 examples": lambda: perceptron(2000),
    "perceptron, 5,000 examples": lambda: perceptron(5000),
    "ResNet-20, 100 images": lambda: residual_network(100),
}


def solve(op: hk.LinearOperator, num_vectors: int) -> tuple[hk.EigenResult, float, float]:
    """Return a result, the seconds of the solve beside its matvecs, and those in its matvecs."""
    spent: list[float] = []
    found, seconds = timed(
        lambda: hk.lanczos(
            harness.with_timed_matvecs(op, spent.append),
            10,  # so many that they are not all found before
            which="BE",
            tol=1e-7,
            ncv=num_vectors + 2,
            max_matvecs=num_vectors + 1,
        )
    )
    if found.num_matvecs != num_vectors + 1:
        raise SystemExit(f"{op!r}: {found.num_matvecs:g} matvecs instead of {num_vectors + 1}; not timed")
    return found, seconds - sum(spent), sum(spent)


def check(op: hk.LinearOperator, found: hk.EigenResult) -> None:
    """Compare residual norms with their definition, and the basis with an orthonormal one.

    Raises:
        SystemExit: the result is wrong.
    """
    values, vectors = found.values.to(op.dtype), found.vectors
    residuals = torch.linalg.vector_norm(op @ vectors - vectors * values, dim=0)
    gram = vectors.mT @ vectors - torch.eye(len(values), dtype=op.dtype)
    off = max(float((residuals - found.residual_norms).abs().max()), float(gram.abs().max()))
    if not off < ALLOWED:
        raise SystemExit(f"{op!r}: residuals or vectors are off by {off:.2g}; not timed")


def gram_schmidt(basis: Tensor, vector: Tensor) -> None:
    """Make two passes of Gram-Schmidt by plain matrix-vector calls, one row after the other."""
    for row in range(1, len(basis)):
        for _ in range(2):
            coefficients = basis[:row] @ vector
            vector = torch.addmv(vector, basis[:row].mT, coefficients, alpha=-1e-3)
        basis[row] = vector


def compare_with_traffic(n: int, num_vectors: int) -> Record:
    """Return the seconds of a solve of a diagonal matrix beside its matvecs, of plain traffic, and their ratio."""
    op = diagonal(torch.rand(n, generator=torch.Generator().manual_seed(0)) ** 4)
    found, ours, _ = solve(op, num_vectors)
    check(op, found)
    g = torch.Generator().manual_seed(1)
    basis, vector = torch.randn(num_vectors + 1, n, generator=g), torch.randn(n, generator=g)
    plain = timed(lambda: gram_schmidt(basis, vector))[1]
    return {"solve": ours, "traffic": plain, "ratio": ours / plain}


def share_of_a_solve(name: str, num_vectors: int) -> Record:
    """Return the seconds of a solve of a network in its matvecs and beside them."""
    H = NETWORKS[name]()
    solve(H, num_vectors)  # imports and first calls, and pages of memory
    _, beside, matvecs = solve(H, num_vectors)
    return {"n": H.n, "beside": beside, "products": matvecs, "share": beside / (beside + matvecs)}


def table(record: Record) -> str:
    """Return seconds and shares, as Markdown."""
    runs = [
        (f"{run['solve']:.2f} s", f"{run['traffic']:.2f} s", f"{run['ratio']:.2f}") for run in record["runs"]
    ]
    rows = [
        (name, f"{row['n']:,}", f"{row['beside']:.2f} s", f"{row['products']:.2f} s", f"{row['share']:.1%}")
        for name, row in record["networks"].items()
    ]
    return "\n\n".join(
        [
            harness.markdown(["a solve beside its matvecs", "plain traffic", "ratio"], runs),
            f"median ratio {record['median']:.2f}",
            harness.markdown(["network", "n", "beside matvecs", "matvecs", "share"], rows),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, out=harness.RESULTS / "step.json")
    harness.add_names(parser, "--networks", NETWORKS)
    parser.add_argument("--n", type=int, default=10**6)
    parser.add_argument("--vectors", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    given = harness.parse(parser, argv)
    if not given.report:
        header = {"n": given.n, "vectors": given.vectors, "machine": harness.machine()}
        record = harness.open_record(given.out, header, median=0.0, runs=[], networks={})
        if not (given.resume and record["runs"]):
            record["runs"] = [compare_with_traffic(given.n, given.vectors) for _ in range(given.repeats)]
            record["median"] = statistics.median(run["ratio"] for run in record["runs"])
            harness.write(given.out, record)
        for name in harness.pending(given, given.networks, record["networks"]):
            record["networks"][name] = share_of_a_solve(name, given.vectors)
            harness.write(given.out, record)
            print(f"{name}: {record['networks'][name]}", flush=True)
    print(table(harness.read(given.out)))


if __name__ == "__main__":
    main()
