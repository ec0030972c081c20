"""The notebooks run, their assertions hold, and the outputs they keep are those of a run."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.conftest import ROOT, command_environment

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_is_small_whole_and_free_of_this_machine(path):
    text = path.read_text()
    assert len(text) <= 200_000
    book = nbformat.reads(text, as_version=4)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum("assert" in cell.source for cell in cells) >= 4
    assert "image/png" in text
    for printed in _printed(book):
        assert not re.search(r"/(home|root|tmp|usr)\b|Traceback|Warning", printed), printed


@pytest.mark.xdist_group("notebooks")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_it_kept(path, digits_dir, tmp_path, monkeypatch):
    for name, value in command_environment(digits_dir).items():
        monkeypatch.setenv(name, value)
    book = nbformat.read(path, as_version=4)
    kept = _printed(book)
    client = nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # which raises where an assertion of a cell fails
    assert kept
    for before, now in zip(kept, _printed(book), strict=True):
        assert re.sub(r"\s+", " ", _NUMBER.sub("#", before)) == re.sub(
            r"\s+", " ", _NUMBER.sub("#", now)
        )
        # Whatever changes the last digits of a step changes what is learned after hundreds of
        # them: mean ratios differ by 0.07 between two levels of XLA's optimisation.
        numbers = [[float(n) for n in _NUMBER.findall(text)] for text in (before, now)]
        np.testing.assert_allclose(*numbers, atol=0.15)


def _printed(book) -> list[str]:
    """What the code cells printed; pictures are looked at by people."""
    return [
        output.text
        for cell in book.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream"
    ]
