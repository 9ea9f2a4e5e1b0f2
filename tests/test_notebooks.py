"""The notebooks run from clean kernels, and what they show was made by the code that they have."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from PIL import Image

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
#: notebook -> parameters with which it is done in seconds
SHORT = {
    "train_and_share": {"STEPS": 2, "CLASS_PICTURES": 2, "SAMPLING": 2},
    "load_and_mix": {"STEPS": 2, "SAMPLING": 2},
    "which_adapter": {"STEPS": 2, "SAMPLING": 2},
}
#: what only the machine has on which a notebook was run
MACHINE = re.compile(r"/(tmp|root|home|work|Users|usr)/")


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import run_notebooks

    return run_notebooks


def path_of(name):
    return ROOT / "notebooks" / f"{name}.ipynb"


def code_of(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def pictures_of(book):
    data = [output["data"] for cell in code_of(book) for output in cell.outputs if "data" in output]
    return [Image.open(io.BytesIO(base64.b64decode(one["image/png"]))) for one in data if "image/png" in one]


def test_all_notebooks_are_known():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(SHORT)


@pytest.mark.parametrize("name", ["train_and_share", *(pytest.param(n, marks=pytest.mark.slow) for n in list(SHORT)[1:])])
def test_it_runs_from_a_clean_kernel(name, runner, tmp_path):
    shown = nbformat.read(path_of(name), as_version=4)
    book = runner.execute(path_of(name), tmp_path, SHORT[name])  # an error in a cell is raised
    assert [cell.source for cell in book.cells] == [cell.source for cell in shown.cells]
    assert len(pictures_of(book)) == len(pictures_of(shown)) >= 3


@pytest.mark.parametrize("name", SHORT)
def test_what_it_shows_is_what_its_code_made(name, runner):
    book = nbformat.read(path_of(name), as_version=4)
    assert book.metadata.sources == runner.sources(book), f"run scripts/run_notebooks.py notebooks/{name}.ipynb"
    assert [cell.execution_count for cell in code_of(book)] == list(range(1, len(code_of(book)) + 1)), (
        "cells were run in another order"
    )
    for cell in code_of(book):
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data", "execute_result") and output.get("name") != "stderr"
            text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            assert not MACHINE.search(text), text
    assert all(len(picture.getcolors(picture.width * picture.height)) > 100 for picture in pictures_of(book))


@pytest.mark.parametrize("name", SHORT)
def test_its_links_lead_somewhere(name):
    book = nbformat.read(path_of(name), as_version=4)
    text = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / "notebooks" / link).exists(), link


class TestRunner:
    @pytest.fixture
    def notebook(self, tmp_path):
        book = nbformat.v4.new_notebook()
        given = nbformat.v4.new_code_cell("TIMES = 3", metadata={"tags": ["parameters"]})
        lines = [
            "import sys",
            "from pathlib import Path",
            "Path('made.txt').write_text('x' * TIMES)",
            "print('warned', file=sys.stderr)",
            "TIMES",
        ]
        book.cells = [given, nbformat.v4.new_code_cell("\n".join(lines))]
        path = tmp_path / "small.ipynb"
        nbformat.write(book, path)
        return path

    def test_parameters_take_the_place_of_those_in_the_notebook(self, notebook, runner, tmp_path):
        book = runner.execute(notebook, tmp_path, {"TIMES": 7})
        assert book.cells[1].outputs[-1].data["text/plain"] == "7" and len(book.cells) == 2
        assert (tmp_path / "notebooks" / "made.txt").read_text() == "x" * 7

    def test_it_keeps_outputs_and_tells_warnings(self, notebook, runner, capsys):
        runner.main([str(notebook)])
        book = nbformat.read(notebook, as_version=4)
        assert "warned" in capsys.readouterr().err
        assert [output.output_type for output in book.cells[1].outputs] == ["execute_result"]
        assert book.metadata.sources == runner.sources(book)
        assert [path.name for path in notebook.parent.iterdir()] == ["small.ipynb"]

    def test_an_error_leaves_the_notebook_as_it_was(self, notebook, runner):
        before = notebook.read_text().replace("TIMES = 3", "TIMES = 1 / 0")
        notebook.write_text(before)
        with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
            runner.main([str(notebook)])
        assert notebook.read_text() == before
