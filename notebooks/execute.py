"""Runs notebooks from their sources and writes the executed copies beside them.

    python notebooks/execute.py                       # all
    python notebooks/execute.py notebooks/01_quickstart.py

The sources are percent-format scripts, ``NN_*.py``; they are what one edits. A warning is an error, and so is a line on
standard error. Copies hold nothing that changes from run to run by itself: no times, no random identifiers.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent

CELL_SECONDS = 1200
"""For one cell, after which it is taken to hang."""

STRICT = f"""
import sys, warnings
assert sys.executable == {sys.executable!r}, sys.executable
warnings.simplefilter("error")
warnings.filterwarnings("ignore", module="ipykernel")
warnings.filterwarnings("ignore", "`torch.jit.script` is ")
"""
"""Runs before a notebook's own cells, and is not kept."""


def sources() -> list[Path]:
    """All notebooks, in order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def read(source: Path) -> NotebookNode:
    """The notebook of a source, without outputs."""
    notebook = jupytext.read(source, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"  # they are random otherwise
        cell.metadata = {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "file_extension": ".py"},
    }
    return notebook


def execute(source: Path) -> NotebookNode:
    """The notebook of a source with its outputs, from this Python, in an empty folder.

    Raises:
        CellExecutionError: a cell raised, or warned.
        RuntimeError: a cell wrote to standard error.
    """
    notebook = read(source)
    metadata = dict(notebook.metadata)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            resources={"metadata": {"path": folder}},
            record_timing=False,
            kernel_name="python3",
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
        # one thread: a run repeats to the bit; no history of commands in the user's home
        env = {**os.environ, "OMP_NUM_THREADS": "1", "IPYTHONDIR": folder}
        client.execute(env=env)
    notebook.cells.pop(0)
    notebook.metadata = metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = _joined(cell.outputs)
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise RuntimeError(
                    f"{source.name} wrote to standard error: {output.text}\nin the cell\n{cell.source}"
                )
    return notebook


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs with what was printed in a row as one: how a kernel cuts it up is a matter of time."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == "stream" and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


if __name__ == "__main__":
    for source in [Path(name) for name in sys.argv[1:]] or sources():
        nbformat.write(execute(source), source.with_suffix(".ipynb"))
        print(source.with_suffix(".ipynb"))
