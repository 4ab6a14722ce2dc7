import base64
import runpy
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

runner = runpy.run_path(str(Path(__file__).parents[1] / "notebooks" / "execute.py"))
execute, read, SOURCES = runner["execute"], runner["read"], runner["sources"]()

each_notebook = pytest.mark.parametrize("source", SOURCES, ids=[source.stem for source in SOURCES])


def committed(source):
    copy = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(copy)
    return copy


def kinds_of_outputs(notebook):
    return [
        [(output.output_type, output.get("name"), *sorted(output.get("data", ()))) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def written(folder, text):
    source = folder / "00_small.py"
    source.write_text(text)
    return source


def test_notebooks_are_found():
    assert [source.stem[:2] for source in SOURCES] == [
        f"{number:02d}" for number in range(1, len(SOURCES) + 1)
    ]
    assert len(SOURCES) >= 6


@each_notebook
def test_copy_has_the_cells_of_its_source(source):
    cells = [
        [(cell.cell_type, cell.source) for cell in book.cells] for book in (read(source), committed(source))
    ]
    assert cells[0] == cells[1]


@each_notebook
def test_pictures_of_the_copy_are_small(source):
    outputs = [output for cell in committed(source).cells for output in cell.get("outputs", [])]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    assert max(len(base64.b64decode(picture)) for picture in pictures) < 60_000


@each_notebook
def test_notebook_runs_without_warnings_and_its_copy_has_all_outputs(source):
    assert kinds_of_outputs(execute(source)) == kinds_of_outputs(committed(source))


def test_execution_repeats_to_the_byte(tmp_path):
    source = written(
        tmp_path,
        "# %% [markdown]\n# Text\n\n# %%\n# %matplotlib inline\nimport matplotlib.pyplot as plt\n\n"
        "print(1)\nprint(2)\nlines = plt.plot([1, 2])\n",
    )
    first, second = (execute(source) for _ in range(2))
    assert [cell.cell_type for cell in first.cells] == ["markdown", "code"]
    assert [output.output_type for output in first.cells[1].outputs] == ["stream", "display_data"]
    assert first.cells[1].outputs[0].text == "1\n2\n"
    assert nbformat.writes(first) == nbformat.writes(second)


@pytest.mark.parametrize(
    ("line", "error", "match"),
    [
        ("import warnings; warnings.warn('mind')", CellExecutionError, "UserWarning"),
        ("1 / 0", CellExecutionError, "ZeroDivisionError"),
        (
            "import sys; print('mind', file=sys.stderr)",
            RuntimeError,
            "00_small.py wrote to standard error: mind",
        ),
    ],
)
def test_warnings_errors_and_standard_error_are_refused(tmp_path, line, error, match):
    with pytest.raises(error, match=match):
        execute(written(tmp_path, f"# %%\nprint('fine')\n\n# %%\n{line}\n"))


def test_each_picture_of_the_package_appears(tmp_path):
    cells = (
        "import torch\nimport hvpkit as hk\n"
        "ex = hk.extreme_eigenvalues(hk.aslinearoperator(torch.diag(torch.arange(9.0))))",
        "from hvpkit import plots\nax = plots.convergence(ex)",
        "ax = plots.convergence(ex)",
    )
    book = execute(written(tmp_path, "\n\n".join(f"# %%\n{cell}" for cell in cells)))
    assert [["image/png" in output.get("data", ()) for output in cell.outputs] for cell in book.cells] == [
        [],
        [True],
        [True],
    ]
