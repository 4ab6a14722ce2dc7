"""Passes to both ends as the number of examples rises: the default method and Lanczos.

    python benchmarks/bench_trend.py --cache DIR [--problems NUMBER ...]

One network, the dense one, trained on 40,000 digits, and its Hessian over more and more of them: the same 5,000,
shifted and with noise. Errors are against Lanczos at a tolerance a thousand times smaller. Writes
``benchmarks/results/trend.json`` after each number of examples.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import _harness as harness
import _problems as problems
import hvpkit as hk
from _harness import Record
from bench_fidelity import TOL, solve

NETWORK, DIGITS = "dense, 40,000 digits", 5000
EXAMPLES = ("10000", "20000", "40000", "160000")
RUNS = ("lanczos", "auto", "lanczos, certified", "auto, certified")


def measure(num_examples: int, network: problems.Problem, seeds: int) -> Record:
    """Return the runs of all methods over so many examples."""
    data = problems.shifted_mnist(num_examples // DIGITS)
    H = problems.over(network.model, data, batch_size=1000, mode=problems.MODE)
    ex = hk.extreme_eigenvalues(H, method="lanczos", tol=TOL / 1000, seed=99)
    truth = [ex.smallest.value, ex.largest.value]
    return {
        "ends": truth,
        "runs": {method: [solve(method, H, seed, truth) for seed in range(seeds)] for method in RUNS},
    }


def table(record: Record) -> str:
    """Return passes with their spread over seeds, and ratios, as Markdown."""
    rows = []
    for number, entry in record["problems"].items():
        passes = {method: [run["passes"] for run in entry["runs"][method]] for method in RUNS}
        plain, fast, plain_sure, fast_sure = (statistics.median(passes[method]) for method in RUNS)
        errors = [max(run["errors_over_tol"]) for runs in entry["runs"].values() for run in runs]
        held = [all(run["in_interval"]) for runs in entry["runs"].values() for run in runs]
        rows.append(
            [
                f"{int(number):,}",
                "{:.3g} ... {:.3g}".format(*entry["ends"]),
                *(harness.median(passes[method]) for method in RUNS[:2]),
                f"{plain / fast:.2f}",
                *(harness.median(passes[method]) for method in RUNS[2:]),
                f"{fast_sure / plain_sure:.2f}",
                f"{max(errors):.2f}",
                f"{sum(held)} of {len(held)}",
            ]
        )
    head = ["examples", "ends", "Lanczos", "default", "Lanczos / default", "Lanczos, certified"]
    head += ["default, certified", "default / Lanczos", "worst error over tol", "intervals that hold"]
    return harness.markdown(head, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, out=harness.RESULTS / "trend.json")
    harness.add_trained(parser)
    harness.add_names(parser, choices=EXAMPLES)
    parser.add_argument("--seeds", type=int, default=5)
    given = harness.parse(parser, argv)
    if not given.report:
        record = harness.open_record(given.out, {"tol": TOL, "seeds": given.seeds}, problems={})
        network = problems.load(NETWORK, given.cache)
        for number in harness.pending(given, given.problems, record["problems"]):
            record["problems"][number] = measure(int(number), network, given.seeds)
            harness.write(given.out, record)
            print(f"{number} examples", flush=True)
    print(table(harness.read(given.out)))


if __name__ == "__main__":
    main()
