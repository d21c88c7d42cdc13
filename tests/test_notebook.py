"""examples/quickstart.ipynb runs from top to bottom and shows what it says."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FILE = Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"


def test_it_is_kept_without_outputs():
    """They would be of one machine, and of a version long ago; and each run would change the file."""
    cells = nbformat.read(FILE, as_version=4).cells
    assert [cell.id for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []


def test_it_runs(tmp_path: Path):
    notebook = nbformat.read(FILE, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    text = {name: "".join(output.get("text", "") for output in those) for name, those in outputs.items()}

    assert [name for name, those in outputs.items() if any("image/png" in o.get("data", ()) for o in those)] == [
        "plot",
        "predict",
    ]
    plain, decorrelated = map(float, re.findall(r"[\d.]+(?= %)", text["plot"]))
    assert min(plain, decorrelated) > 85
    assert f"accuracy of the plain model: {decorrelated}" in text["plain"], "the checkpoint is the whole model"
    assert "correlation before" in text["report"] and "after 120 steps" in text["report"]
