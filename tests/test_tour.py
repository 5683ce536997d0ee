"""docs/tour.ipynb runs from top to bottom, and is kept without outputs."""

from __future__ import annotations

import copy
import os

import nbformat
import pytest
from nbclient import NotebookClient
from support.paths import ROOT

FILE = ROOT / "docs" / "tour.ipynb"


@pytest.fixture(scope="module")
def tour() -> nbformat.NotebookNode:
    """The notebook as it is in the repository."""
    return nbformat.read(FILE, as_version=4)


def test_it_is_kept_without_outputs(tour):
    """Other weights, or another machine, would make them wrong."""
    nbformat.validate(tour)
    cells = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert cells and all(not cell.outputs and cell.execution_count is None for cell in cells)


def test_every_cell_runs_and_says_what_its_text_promises(tour, monkeypatch, tmp_path):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # nothing of the user's profile
    ran = copy.deepcopy(tour)
    NotebookClient(ran, timeout=None, resources={"metadata": {"path": str(FILE.parent)}}).execute()
    steps = [text_of(cell) for cell in ran.cells if cell.cell_type == "code"]
    assert len(steps) == 8
    assert all(text.strip() for text in steps)
    assert steps[2].startswith("0 of ")
    digest = steps[6].strip()
    assert f"float32  {digest}\n" in (ROOT / "README.md").read_text()
    assert "rope-interleaved" in steps[7]


def text_of(cell: nbformat.NotebookNode) -> str:
    """What a cell prints on stdout."""
    return "".join(o.text for o in cell.outputs if o.get("name") == "stdout")
