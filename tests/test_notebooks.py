"""The notebooks of docs/ run from their first cell to their last, as a reader would run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def read_code(path):
    """The code cells as one script; IPython's own lines (%, !) would be no Python."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["compress", "training"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    (tmp_path / "cells.py").write_text(read_code(path), encoding="utf-8")
    paths = [str(ROOT), str(ROOT / "converters")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "cells.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
