"""The walk-through: it runs from top to bottom, and says what its saved outputs say."""

import base64
import os
import re

import nbformat
from conftest import ROOT
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

PATH = ROOT / "examples" / "walkthrough.ipynb"
CELLS = nbformat.read(PATH, as_version=4).cells


def text(cell):
    """What a cell wrote: no pictures, no warnings, no addresses of objects in memory."""
    shown = [output.data for output in cell.outputs if "data" in output]
    written = [output.text for output in cell.outputs if output.get("name") == "stdout"]
    written += [data.get("text/plain", "") for data in shown if "image/png" not in data]
    return re.sub(r" at 0x[0-9a-f]+", "", "".join(written))


def test_it_runs_from_top_to_bottom_and_says_what_it_said(tmp_path, monkeypatch):
    # A kernel that is this Python, with no settings, and at the end the pictures of another model.
    write_kernel_spec(str(tmp_path / "jupyter" / "kernels" / "python3"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    other = nbformat.v4.new_code_cell(CELLS[-1].source.replace('"124M"', '"1M"'))
    notebook = nbformat.v4.new_notebook(cells=[*(cell.copy() for cell in CELLS), other])
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", coalesce_streams=True)
    *cells, last = client.execute(cwd=str(PATH.parent)).cells
    for saved, now in zip(CELLS, cells, strict=True):
        if saved.cell_type == "code":
            assert text(now) == text(saved), saved.source
    assert sum("image/png" in output.get("data", {}) for output in last.outputs) == 3


def test_it_was_saved_complete_and_small_enough_to_read_on_github():
    code = [cell for cell in CELLS if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    drawn = [i for i, cell in enumerate(CELLS) if "image/png" in repr(cell.get("outputs"))]
    assert drawn == [i for i, cell in enumerate(CELLS) if "plt.subplots" in cell.source]
    pictures = [o for cell in code for o in cell.outputs if "image/png" in o.get("data", {})]
    assert all(len(picture.metadata["image/png"]["alt"]) > 50 for picture in pictures)
    assert os.path.getsize(PATH) < 1_500_000
    saved = PATH.read_text("utf-8")
    words = re.sub(r'"image/png": ".*?"', "", saved)
    assert not re.search(r"/(home|root|tmp|work|Users)/", words)
    assert base64.b64encode(PATH.with_suffix(".png").read_bytes()).decode() in saved
