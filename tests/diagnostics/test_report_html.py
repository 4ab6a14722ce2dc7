import math
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

import matplotlib
import matplotlib.image
import matplotlib.pyplot as plt
import pytest
import torch

import hvpkit as hk
from hvpkit.diagnostics.report_html import report
from problems import SPECTRA, matrix, network

matplotlib.use("agg")

VOID = {"meta", "link", "img", "br", "hr", "input"}
BROWSERS = [
    path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))
]


class Page(HTMLParser):
    """Tags that have to match, attributes, texts by the tag that they are in, and rows of tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.texts, self.rows = [], [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def values(self, name):
        return [value for _, key, value in self.attributes if key == name]


@pytest.fixture(scope="module")
def found():
    problem = network("mlp")
    H = hk.hessian(problem.objective, problem.params, problem.data)
    blocks = {
        name: hk.hessian(problem.objective, problem.params, problem.data, wrt=name) for name in problem.params
    }
    ex = hk.extreme_eigenvalues(H)
    return {
        "H": H,
        "ex": ex,
        "density": hk.spectral_density(H, num_steps=10, num_probes=2),
        "layers": {name: hk.extreme_eigenvalues(block) for name, block in blocks.items()},
        "training": [(0, ex), (100, ex)],
    }


@pytest.fixture(scope="module")
def full(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "full.html"
    assert report(**found, landscape=True, title='a < b & "c"', path=path) == path
    return path


@pytest.fixture(scope="module")
def page(full):
    return Page(full.read_text(encoding="utf-8"))


def test_page_is_well_formed_and_says_its_kind(full, page):
    assert full.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert page.texts["h1"] == page.texts["title"] == ['a < b & "c"']
    ids = page.values("id")
    assert len(ids) == len(set(ids)) > 100


def test_cells_say_what_they_hold_where_rows_are_stacked(found, page):
    header = ("end", "eigenvalue", "interval", "rests on", "error bound", "residual norm")
    labels = page.values("data-label")
    assert tuple(labels[:6]) == tuple(labels[6:12]) == header
    assert labels[12:].count("largest") == len(found["layers"])


@pytest.mark.skipif(not BROWSERS, reason="no Chromium on the PATH")
@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_sticks_out_of_a_narrow_window(full, tmp_path, width):
    page = escape(full.read_text(encoding="utf-8"))
    wrapper = f"""<title></title><iframe style="width: {width}px; border: 0" srcdoc="{page}"></iframe><script>
onload = () => {{ const root = frames[0].document.documentElement;
document.title = `${{root.clientWidth}} ${{root.scrollWidth}}` }}</script>"""
    (tmp_path / "page.html").write_text(wrapper, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,900", "--dump-dom"]
    command = [BROWSERS[0], *options, f"--user-data-dir={tmp_path}", (tmp_path / "page.html").as_uri()]
    dom = subprocess.run(command, check=True, capture_output=True, timeout=60, text=True).stdout
    inner, whole = map(int, re.search("<title>(.*?) (.*?)</title>", dom).groups())
    assert width - 20 <= inner <= width  # less a scroll bar
    assert whole <= inner


def test_page_needs_nothing_from_elsewhere(full, page):
    text = full.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|file:", text)
    tags = {tag for tag, _, _ in page.attributes}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image"}
    ids = set(page.values("id"))
    references = page.values("href") + page.values("xlink:href") + re.findall(r"url\(([^)]*)\)", text)
    assert len(references) > 50
    for reference in references:
        assert reference.startswith("#")
        assert reference[1:] in ids


def test_tables_hold_the_numbers_of_the_result(found, page):
    H, ex, density = found["H"], found["ex"], found["density"]
    for name in ("smallest", "largest"):
        pair = getattr(ex, name)
        (row,) = (row for row in page.rows if row[0] == name)
        assert float(row[1]) == pytest.approx(pair.value, rel=1e-7)
        assert [float(x) for x in row[2].strip("[]").split(",")] == pytest.approx(
            [pair.interval.lower, pair.interval.upper], rel=1e-7
        )
        assert row[3] == f"{pair.interval.kind}, 99 %"
        assert float(row[4]) == pytest.approx(pair.error_bound, rel=0.01)
        assert float(row[5]) == pytest.approx(pair.residual_norm, rel=0.01)
    table = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert table["status"] == f"{density.status}: {density.message}"
    assert [f"{ex.status}: {ex.message}"] == [row[1] for row in page.rows if row[0] == "status"][:1]
    assert table["operator"] == ex.operator
    assert (table["parameters"], table["examples"]) == (f"{H.n:,}", f"{H.num_examples}")
    assert table["derivatives"] == H.mode_reason
    assert float(table["relative error asked for"]) == ex.tol
    passes = [float(row[1]) for row in page.rows if row[0] == "passes over the data"]
    assert passes == [ex.num_matvecs, density.num_matvecs]
    trace, error = (float(x) for x in table["trace"].removesuffix(" (standard error)").split(" ± "))
    mean = density.expectation(lambda x: x)
    assert trace == pytest.approx(H.n * mean.value, rel=1e-4)
    assert error == pytest.approx(H.n * mean.stderr, rel=0.06)
    for name, result in found["layers"].items():
        (row,) = (row for row in page.rows if row[0] == name)
        assert [float(x) for x in row[1:3]] == pytest.approx(
            [result.smallest.value, result.largest.value], rel=1e-5, abs=1e-30
        )
        assert row[3] == result.status


def test_pictures_are_all_there_with_their_text_in_the_colour_of_the_page(full, page):
    captions = page.texts["figcaption"]
    assert captions == [
        "The spectral density, with both ends",
        "Both ends as they were found",
        "The loss along the eigenvector of the smallest eigenvalue",
        "The loss along the eigenvector of the largest eigenvalue",
        "The loss on the plane of both",
        "Layers",
        "Both ends over training",
    ]
    assert page.values("aria-label") == captions
    for text in (
        "eigenvalue",
        "passes over the data",
        "change of the mean loss",
        "training step",
        "0.weight",
    ):
        assert text in page.texts["text"]
    text = full.read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text
    assert "#000000" not in text
    drawn = text[text.index("<svg") :]
    assert "#ffffff" not in drawn
    assert drawn.count("currentColor") > 50


def test_report_without_a_loss_has_tables_and_the_pictures_that_remain(tmp_path):
    H = hk.aslinearoperator(matrix(SPECTRA["indefinite"]))
    ex = hk.extreme_eigenvalues(H)
    page = Page(report(H, ex, path=tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.texts["figcaption"] == ["Both ends as they were found"]
    assert not [row for row in page.rows if row[0] in ("examples", "derivatives", "trace")]


def test_report_of_traces_says_their_errors(tmp_path):
    H = hk.aslinearoperator(matrix(SPECTRA["indefinite"]))
    trace = hk.trace(H, num_matvecs=30)
    path = report(H, hk.extreme_eigenvalues(H), layers={"<all>": trace}, path=tmp_path / "r.html")
    page = Page(path.read_text(encoding="utf-8"))
    (row,) = (row for row in page.rows if row[0] == "<all>")
    assert float(row[1]) == pytest.approx(trace.value, rel=1e-5)
    assert float(row[2]) == pytest.approx(trace.stderr, rel=0.06)
    assert ["layer", "trace", "standard error", "status"] in page.rows


def test_report_of_a_solve_that_found_nothing_says_so(tmp_path):
    H = hk.aslinearoperator((lambda v: v * math.nan, 5, torch.float64))
    ex = hk.extreme_eigenvalues(H)
    page = Page(report(H, ex, path=tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.texts.get("figcaption") is None
    (status,) = (row[1] for row in page.rows if row[0] == "status")
    assert status.startswith("non-finite: a matvec gave NaN")
    assert [row[1] for row in page.rows if row[0] in ("smallest", "largest")] == ["nan", "nan"]


def test_report_is_the_same_file_every_time_in_any_style_and_leaves_styles_alone(found, tmp_path):
    arguments = {name: found[name] for name in ("H", "ex", "layers")}
    before, figures = dict(matplotlib.rcParams), plt.get_fignums()
    first = report(**arguments, path=tmp_path / "a.html").read_bytes()
    with plt.style.context("dark_background"):
        assert report(**arguments, path=tmp_path / "b.html").read_bytes() == first
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == figures


def test_report_replaces_a_file_whole_or_not_at_all(found, tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            report(found["H"], found["ex"], path=path)
    assert path.read_text() == "old"
    report(found["H"], found["ex"], path=str(path))
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.html"]


def test_report_refuses_what_belongs_to_another_operator(found, tmp_path):
    other = hk.aslinearoperator(matrix(SPECTRA["n3"]))
    path = tmp_path / "r.html"
    with pytest.raises(ValueError, match=r"^ex is of an operator with n = \d+, H has n = 3"):
        report(other, found["ex"], path=path)
    with pytest.raises(ValueError, match=r"^density is of an operator with n = 3"):
        report(found["H"], found["ex"], hk.spectral_density(other), path=path)
    with pytest.raises(ValueError, match=r"^path: there is no folder"):
        report(found["H"], found["ex"], path=tmp_path / "missing" / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_interval_without_a_confidence_claims_none(found, tmp_path):
    pair = replace(found["ex"].largest, interval=hk.Interval(1.0, 2.0, "residual"))
    ex = replace(found["ex"], largest=pair)
    page = Page(report(found["H"], ex, path=tmp_path / "r.html").read_text(encoding="utf-8"))
    assert [row[i] for row in page.rows if row[0] == "largest" for i in (0, 2, 3)] == [
        "largest",
        "[1, 2]",
        "residual",
    ]


@pytest.mark.skipif(not BROWSERS, reason="no Chromium on the PATH")
def test_chromium_opens_the_page(full, tmp_path):
    shot = tmp_path / "page.png"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1200,2400",
        f"--screenshot={shot}",
    ]
    command = [BROWSERS[0], *options, f"--user-data-dir={tmp_path / 'profile'}", full.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    image = matplotlib.image.imread(shot)
    assert image.shape[:2] == (2400, 1200)
    assert image[..., :3].std() > 0.05
