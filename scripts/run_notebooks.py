#!/usr/bin/env python3
"""Run the notebooks from clean kernels and keep what they show.

    python scripts/run_notebooks.py                                  # all of them, some minutes each
    python scripts/run_notebooks.py notebooks/load_and_mix.ipynb

What a cell prints as a warning goes to the console, not into the notebook. Everything a notebook writes goes into a folder
that is removed. The metadata keep a hash of the cells and of what they read of the repository, by which the tests see that the
outputs are those of the cells above.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARAMETERS = "parameters"  # tag of the cell after which other values may be put, as papermill does it
BESIDE = ("docs/adapters-compared.json", "docs/images/adapters-measures.png")  # files of the repository that notebooks read
MINUTES = 30


def main(arguments: list[str] | None = None) -> None:
    """Run the notebooks named, or all, and write them with their outputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS, metavar="NOTEBOOK")
    console = Console(stderr=True)
    for path in track(parser.parse_args(arguments).notebooks, "notebooks", console=console):
        with tempfile.TemporaryDirectory() as folder:
            book = execute(path, Path(folder))
        for warning in take_warnings(book):
            console.print(f"[yellow]{path.name}[/yellow] {warning}", highlight=False)
        nbformat.write(book, path)


def execute(path: Path, folder: Path, parameters: Mapping[str, Any] | None = None) -> NotebookNode:
    """Return a notebook as a clean kernel leaves it.

    Args:
        path: of the notebook.
        folder: where it works, in a folder `notebooks` beside what it reads of the repository.
        parameters: values that replace those of the cell with the tag "parameters"; the cell that does so is not kept.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an error.
    """
    for name in BESIDE:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "notebooks").mkdir()
    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    if parameters:
        place = 1 + next(index for index, cell in enumerate(book.cells) if PARAMETERS in cell.metadata.get("tags", ()))
        lines = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        book.cells.insert(place, nbformat.v4.new_code_cell(lines))
    resources = {"metadata": {"path": str(folder / "notebooks")}}
    NotebookClient(book, timeout=60 * MINUTES, resources=resources, record_timing=False).execute()
    if parameters:
        del book.cells[place]
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "sources": sources(book),
    }
    return book


def sources(book: NotebookNode) -> str:
    """Return a hash of a notebook's code and the files that it reads, to be compared with `book.metadata.sources`."""
    code = "\0".join(cell.source for cell in book.cells if cell.cell_type == "code")
    read = [(ROOT / name).read_bytes() for name in BESIDE if Path(name).name in code]
    return hashlib.sha256(b"\0".join([code.encode(), *read])).hexdigest()


def take_warnings(book: NotebookNode) -> list[str]:
    """Take what was written to stderr out of a notebook's outputs."""
    found = []
    for cell in book.cells:
        if cell.cell_type == "code":
            found += [output.text.strip() for output in cell.outputs if output.get("name") == "stderr"]
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return found


if __name__ == "__main__":
    sys.exit(main())
