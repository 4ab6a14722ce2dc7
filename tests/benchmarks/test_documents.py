"""Tables in the documents are those that the scripts make from benchmarks/results."""

from pathlib import Path

import pytest

import _compare_report
import _harness as harness
import bench_blocks
import bench_calibration
import bench_distributed
import bench_fidelity
import bench_likeness
import bench_products
import bench_sharded_parameters
import bench_solve
import bench_solvers
import bench_top
import bench_tracking
import bench_trend
import bench_warm
import interval_coverage
import profile_solve
import soak
import study_batchnorm_residual
import study_edge_of_stability
import study_negative_curvature
import study_optimizers
import study_outliers
import study_wide_minima

ROOT = Path(__file__).parents[2]


def result(name):
    return harness.read(harness.RESULTS / f"{name}.json")


@pytest.mark.parametrize(
    ("script", "name", "document"),
    [
        (bench_fidelity, "fidelity", "docs/solvers.md"),
        (bench_fidelity, "fidelity", "docs/multifidelity.md"),
        (bench_calibration, "calibration", "docs/multifidelity.md"),
        (bench_top, "top", "docs/multifidelity.md"),
        (bench_trend, "trend", "docs/multifidelity.md"),
        (bench_likeness, "likeness", "docs/multifidelity.md"),
        (bench_blocks, "blocks", "docs/performance.md"),
        (bench_distributed, "distributed", "docs/distributed.md"),
        (bench_sharded_parameters, "sharded_parameters", "docs/distributed.md"),
        (bench_solve, "solve", "docs/performance.md"),
        (bench_warm, "warm", "docs/performance.md"),
        (bench_products, "products", "docs/performance.md"),
        (profile_solve, "profile", "docs/performance.md"),
        (soak, "soak", "docs/long_work.md"),
    ],
)
def test_table_is_in_the_document(script, name, document):
    assert script.table(result(name)) in (ROOT / document).read_text()


STUDIES = {
    "negative_curvature": study_negative_curvature,
    "outliers": study_outliers,
    "wide_minima": study_wide_minima,
    "optimizers": study_optimizers,
    "batchnorm_residual": study_batchnorm_residual,
}


def tables(text):
    return [part.strip() for part in text.split("\n\n") if part.startswith("|")]


@pytest.mark.parametrize("name", STUDIES)
def test_tables_of_a_study_are_in_its_page_and_follow_from_its_runs(name):
    found, study = result(f"study_{name}"), STUDIES[name]
    page = (ROOT / f"docs/studies/{name}.md").read_text()
    assert len(tables(study.report(found))) == 2
    assert all(table in page for table in tables(study.report(found)))
    assert f"../pictures/study_{name}.png" in page
    assert (ROOT / f"docs/pictures/study_{name}.png").stat().st_size < 250_000
    again = study.judge_claims(list(found["runs"].values()))
    assert [row["verdict"] for row in found["claims"]] == [row["verdict"] for row in again]


def test_table_of_the_edge_of_stability_is_in_its_page():
    found = result("edge_of_stability/study")
    (table,) = tables(study_edge_of_stability.report(found))
    assert table in (ROOT / "docs/studies/edge_of_stability.md").read_text()


def test_negative_eigenvalues_of_the_study_are_those_that_an_independent_product_gives():
    runs = result("study_negative_curvature")["runs"].values()
    every = [one for run in runs for one in run["measured"]]
    assert max(one["sum_error"] for one in every) < 1e-3
    used = [one for run in runs for one in study_negative_curvature.negative(run)]
    assert {one["status"] for one in used} == {"converged"}
    assert {one["status"] for one in every} <= {"converged", "rounding-limited"}
    assert len(used) > 0.9 * len(every)


def test_comparison_is_in_its_document_and_beside_its_results():
    found = result("compare")
    text = _compare_report.table(found, _compare_report.IN_DOCUMENT)
    begin, end = _compare_report.MARKERS
    assert f"{begin}\n{text}\n{end}" in (ROOT / "docs/comparison.md").read_text()
    whole = f"{_compare_report.table(found)}\n\n{_compare_report.notes(found)}\n"
    assert (harness.RESULTS / "compare.md").read_text() == whole


def test_summary_of_the_comparison_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert _compare_report.summary(result("compare")) in readme
    means = bench_fidelity.table(result("fidelity")).splitlines()[-1].split(" | ")
    assert f"takes {means[7]} times the passes" in readme.replace("\n", " ")


def test_figures_of_tracking_are_in_the_document():
    for line in bench_tracking.table(result("tracking")).splitlines()[2:]:
        passes = " | ".join(line.split(" | ")[1:4])
        assert f"| {passes} |" in (ROOT / "docs/multifidelity.md").read_text()


def test_figures_of_solvers_are_in_their_document():
    record, document = result("solvers"), (ROOT / "docs/solvers.md").read_text()
    problems = ("late training", "digits CNN, trained", "dense network, 6 epochs")
    for solver in ("floor", "lanczos", "eigsh", "lobpcg", "chebyshev"):
        counts = [bench_solvers.report.medians(record, name, solver, "both")[1] for name in problems]
        assert " / ".join(f"{count:.0f}" for count in counts) in document


@pytest.mark.parametrize("document", ["docs/numbers.md", "docs/intervals.md"])
def test_figures_of_coverage_are_in_their_documents(document):
    found = result("interval_coverage")["all"]
    inside = round(found["inside"] * found["intervals"])
    text = (ROOT / document).read_text()
    assert f"{inside:,} of the {found['intervals']:,}" in text.replace("\n", " ")
    assert interval_coverage.ADVERSARIAL in result("interval_coverage")
    assert f"{found['error_above_tol']:.1%}".replace("%", " %") in text
