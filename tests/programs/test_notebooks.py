"""The notebooks run from their first cell to their last, and show what they speak of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SECONDS = 500  # of a cell, on a machine that does much else


@pytest.fixture(scope="module")
def first_steps(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the cells of the first notebook gave, of all kinds that a notebook can show."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(ROOT / "docs" / "notebooks" / "first_steps.ipynb", as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTIONCLIP_CACHE", str(folder / "cache"))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
        client = nbclient.NotebookClient(
            notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}}
        )
        client.execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_the_first_steps_show_a_table_a_picture_and_the_right_label(
    first_steps: list[dict[str, Any]],
) -> None:
    shown = [output["data"] for output in first_steps if "data" in output]
    pictures = [data["image/png"] for data in shown if "image/png" in data]
    assert len(pictures) == 1
    tables = [data["text/html"] for data in shown if "<table" in data.get("text/html", "")]
    assert len(tables) == 3  # of a prediction, of several, and of pandas
    (labels,) = (data["text/plain"] for data in shown if data["text/plain"].startswith("['"))
    fourth = labels.split(",")[3].strip(" \n'")
    assert f'<td style="text-align:left">{fourth}</td><td>' in tables[0].split("</tr>")[1]
    assert "failed: There is no file missing.mp4" in tables[1]


def test_the_first_steps_print_no_warning(first_steps: list[dict[str, Any]]) -> None:
    told = "".join(output["text"] for output in first_steps if output.get("name") == "stderr")
    assert "Warning" not in told
    assert "Traceback" not in told


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
