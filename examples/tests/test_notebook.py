"""The notebook runs from its first cell to its last, and shows what it says."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
nbformat = pytest.importorskip("nbformat")
NOTEBOOK = Path(__file__).parent.parent / "notebook.ipynb"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The notebook after its run, and the directory that it ran in."""
    directory = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # outputs of a machine are not kept
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": directory}}).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"], directory


def result(cell):
    (found,) = [output for output in cell.outputs if output.output_type == "execute_result"]
    return found.data


def picture(cell):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(result(cell)["image/png"]))).convert("RGB")).astype(int)


def test_results_play_inline(ran):
    cells, directory = ran
    assert (directory / "triangle.mp4").stat().st_size > 1000
    whole, stopped, quick = (result(cells[i])["text/html"] for i in (2, 4, 5))
    assert all("<video" in html and "base64," in html for html in (whole, stopped, quick))
    assert len({whole, stopped, quick}) == 3


def test_previews_show_the_picture_from_the_second_step_on(ran):
    cells, _ = ran
    rows = np.split(picture(cells[3]), 3)  # at steps 2, 4 and 6 of 6
    distances = [np.abs(row - rows[-1]).mean() for row in rows]
    assert 12 > distances[0] > distances[1] > distances[2]  # noise is 70 away
    image = np.asarray(Image.fromarray(picture(cells[1]).astype(np.uint8)).resize((96, 96))).astype(int)
    assert np.abs(rows[0][:, :96] - image).mean() < 40


def test_an_adapter_changes_the_picture_by_its_weight(ran):
    cells, _ = ran
    without, half, whole = np.split(picture(cells[6]), 3, axis=1)
    assert 1 < np.abs(half - without).mean() < np.abs(whole - without).mean()
