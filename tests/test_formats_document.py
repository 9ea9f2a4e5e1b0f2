"""docs/compatibility.md says what is measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import make_compatibility as compatibility


def _cells(title: str) -> list[list[str]]:
    """Cells of an algorithm's rows in the document, one list for each table it is in."""
    lines = compatibility.DOCUMENT.read_text().splitlines()
    return [[c.strip() for c in line.split("|")[2:-1]] for line in lines if line.startswith(f"| {title} |")]


def test_nothing_is_wrong_in_the_document():
    text = compatibility.DOCUMENT.read_text()
    assert "WRONG" not in text
    titles = {compatibility.title(a) for a in compatibility.ALGORITHMS} - {"T-LoRA, random", "kohya's OFT"}
    assert all(_cells(title) for title in titles)


@pytest.mark.parametrize("algorithm", ["lora", "lora-dora-columns", "lokr-w2", "boft", "tlora-data", "full-bias", "miss"])
def test_some_rows_are_current(algorithm, tmp_path):
    """Flux.1 has fused weights and exchanged halves; all rows are compared with the slow tests."""
    schemes, families = _cells(compatibility.title(algorithm))
    assert schemes == [compatibility.scheme_cell(algorithm, s, tmp_path) for s in compatibility.SCHEMES]
    column = list(compatibility.FAMILIES).index("flux")
    assert families[column] == compatibility.family_cell(algorithm, "flux", tmp_path)


@pytest.mark.slow
def test_the_document_is_current():
    assert compatibility.DOCUMENT.read_text() == compatibility.document()
