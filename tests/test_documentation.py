"""The README's and the site's code runs as it stands; the reference names all that is public; the pages are linked."""

import re
import runpy
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
snippets = runpy.run_path(str(DOCS / "_site" / "snippets.py"))

NEEDS = {"lightning": ["lightning"]}
ELSEWHERE = {
    "hugging_face": "test_hf.py",
    "recipes": "test_recipes.py",
    "distributed": "distributed/test_training.py",
}
"""Pages whose code other tests run, and look at what it gives."""
WITH_CODE = [page for page in PAGES if page.stem not in ELSEWHERE and snippets["blocks"](page.read_text())]
PEERS = {"PyHessian": "pyhessian", "hessian-eigenthings": "hessian_eigenthings", "curvlinops": "curvlinops"}


def name(page):
    return str(page.relative_to(ROOT))


def run(text, page, tmp_path, monkeypatch):
    """Run the blocks of a page in an empty folder, and return how many there were, and how many drew."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # pages draw networks and data as a reader would
        # of Lightning, in torch's name; and of Hugging Face's own dependencies
        warnings.filterwarnings("ignore", ".isinstance.treespec, LeafSpec.. is deprecated", FutureWarning)
        drawn = [picture for _, picture in snippets["run"](text, str(page))]
    return len(drawn), sum(picture is not None for picture in drawn)


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    for module in NEEDS.get(page.stem, ()):
        pytest.importorskip(module)
    num_blocks, _ = run(page.read_text(), page, tmp_path, monkeypatch)
    assert num_blocks == len(snippets["blocks"](page.read_text())) > 0


def test_pages_whose_code_runs_elsewhere_are_read_there():
    for page, test in ELSEWHERE.items():
        assert f"{page}.md" in (ROOT / "tests" / test).read_text()


def test_an_error_in_a_page_names_its_line(tmp_path, monkeypatch):
    text = "# Title\n\n```python\nx = 1\n```\n\n- in a list:\n\n    ```python\n    assert x == 2\n    ```\n"
    with pytest.raises(AssertionError) as caught:
        run(text, "page.md", tmp_path, monkeypatch)
    assert (str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1) == ("page.md", 10)


def test_each_plot_has_a_picture_in_the_gallery():
    """All functions of hvpkit.plots that draw, and densities, blocks and trackers, which draw themselves."""
    text = (DOCS / "gallery.md").read_text()
    draws = set(import_module("hvpkit.plots").__all__) - {"HEIGHT", "layers_height"}
    drawn = set(re.findall(r"hk\.plots\.(\w+)\(", text))
    assert draws <= drawn
    assert "tracker.plot()" in text
    assert "found.plot()" in text


@pytest.mark.parametrize(("library", "module"), PEERS.items())
def test_calls_of_other_libraries_run(library, module, tmp_path, monkeypatch):
    """Fences ``py`` are for code that needs another library; each section of the page has one."""
    pytest.importorskip(module)
    text = (DOCS / "how_to" / "migrating.md").read_text()
    first, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    section = next(section for section in sections if section.startswith(library))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        num_blocks, _ = run(first + section.replace("```py\n", "```python\n"), module, tmp_path, monkeypatch)
    assert num_blocks == 3


def test_code_that_is_not_run_is_of_other_libraries():
    assert [name(page) for page in PAGES if "```py\n" in page.read_text()] == ["docs/how_to/migrating.md"]


@pytest.mark.parametrize("namespace", ["hvpkit", "hvpkit.hf", "hvpkit.plots", "hvpkit.train", "hvpkit.zoo"])
def test_the_reference_has_each_public_name_once(namespace):
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    found = re.findall(rf"^::: {re.escape(namespace)}\.(\w+)$", text, re.MULTILINE)
    by_hand = {"hf", "plots", "train", "zoo", "HEIGHT"}
    assert sorted(found) == sorted(set(import_module(namespace).__all__) - by_hand)


def test_each_page_is_in_the_navigation():
    """MkDocs warns of others; this says so without a build."""
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} <= listed


def test_links_of_the_readme_work_on_an_index_page():
    """They are absolute, to files that exist."""
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert all(link.startswith("https://") for link in links), links
    blob, raw = (
        "https://github.com/hvpkit/hvpkit/blob/main/",
        "https://raw.githubusercontent.com/hvpkit/hvpkit/main/",
    )
    site = "https://hvpkit.github.io/hvpkit/"
    for link in links:
        for start in (blob, raw):
            if link.startswith(start):
                assert (ROOT / link.removeprefix(start)).exists(), link
        if link.startswith(site):
            page = link.removeprefix(site).partition("#")[0].strip("/")
            made = {"changelog", "contributing", "architecture", "benchmarks", ""}
            notebook = ROOT / f"{page}.py"
            assert (
                page in made or notebook.exists() or (DOCS / f"{page}.md").exists() or (DOCS / page).is_dir()
            ), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize(
    ("tag", "inside"),
    [
        ('<script src="../assets/search.js">', True),
        ('<link rel="canonical" href="https://hvpkit.github.io/hvpkit/">', True),
        ('<a href="https://arxiv.org/abs/1901.10159">', True),
        ('<script async src="https://example.org/math.js">', False),
        ('<link href="//example.org/font.css" rel="stylesheet">', False),
        ('<img alt="a badge" src="http://example.org/badge.svg">', False),
    ],
)
def test_a_page_that_loads_from_elsewhere_is_refused(tag, inside):
    pytest.importorskip("mkdocs")
    hooks = runpy.run_path(str(DOCS / "_site" / "hooks.py"))
    page = SimpleNamespace(file=SimpleNamespace(src_path="page.md"))
    if inside:
        assert hooks["on_post_page"](tag, page=page) == tag
        return
    with pytest.raises(Exception, match=r"page\.md loads from elsewhere"):
        hooks["on_post_page"](tag, page=page)


@pytest.fixture(scope="module")
def markdown():
    """The conversion of docstrings, of the package's own."""
    griffe = pytest.importorskip("griffe")
    docstrings = runpy.run_path(str(DOCS / "_site" / "docstrings.py"))
    package = griffe.load("hvpkit", search_paths=[ROOT / "src"])
    public = docstrings["public_names"](package)
    return lambda text: docstrings["markdown"](text, package, public)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("See :func:`hvpkit.trace`.", "See [`trace`][hvpkit.trace]."),
        ("See :class:`~hvpkit.train.KneeLR`.", "See [`KneeLR`][hvpkit.train.KneeLR]."),
        ("See :meth:`~hvpkit.LinearOperator.to_scipy`.", "See [`to_scipy`][hvpkit.LinearOperator.to_scipy]."),
        ("See :mod:`hvpkit.solvers.certificate`.", "See `solvers.certificate`."),
        ("Of :math:`a\nb`:", "Of `#!math a b`:"),
        ("    .. math:: a\n              b\n\nc", "    ```math\n    a\n    b\n    ```\n\nc"),
        ("Args:\n    a, b: two.", "Args:\n    a: two.\n    b: two."),
        ("Cost:\n    One pass.\n", "**Cost:**\n\nOne pass."),
        (
            "====  ====\nx     y\n====  ====\na     b\n      c\n====  ====",
            "| x | y |\n| --- | --- |\n| a | b c |",
        ),
    ],
)
def test_docstrings_become_markdown(text, shown, markdown):
    assert markdown(text).rstrip() == shown
