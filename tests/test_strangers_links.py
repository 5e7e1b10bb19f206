"""Hugging Face's cache: a model and its data are links into a folder of blobs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from typer.testing import CliRunner

from ecqx_onnx.cli import app
from ecqx_onnx.errors import FileError
from ecqx_onnx.inputs.onnx_file import read_onnx
from ecqx_onnx.verbs.pack import pack
from ecqx_onnx.verbs.validate import validate
from tests.strangers import FLOAT, assert_same_outputs, draw_grid, make_model

X = {"x": np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32)}


def make_cache(folder: Path, *, inner: str = "", grid: bool = True) -> Path:
    """blobs/0, blobs/1, and snapshots/c/[inner/]model.onnx with its data."""
    weight = draw_grid((128, 128))
    if not grid:
        weight = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    model = make_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"w": weight},
        inputs=[("x", FLOAT, ["n", 128])],
        outputs=[("y", FLOAT, ["n", 128])],
    )
    blobs = folder / "blobs"
    place = folder / "snapshots" / "c" / inner
    blobs.mkdir()
    place.mkdir(parents=True)
    onnx.save(
        model,
        blobs / "0",
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=0,
        format="protobuf",
    )
    (blobs / "model.onnx_data").rename(blobs / "1")
    for name, blob in (("model.onnx", "0"), ("model.onnx_data", "1")):
        (place / name).symlink_to(os.path.relpath(blobs / blob, place))
    return place / "model.onnx"


@pytest.mark.parametrize("inner", ["", "onnx"])
@pytest.mark.parametrize("grid", [True, False], ids=["packed", "copied"])
def test_a_model_in_hugging_faces_cache_is_worked_on(inner, grid, tmp_path):
    path = make_cache(tmp_path, inner=inner, grid=grid)
    report = pack(path, tmp_path / "out.onnx")
    assert (report.written is not None) == grid
    assert_same_outputs(path, tmp_path / "out.onnx", X)
    assert validate(tmp_path / "out.onnx", against=path, latency_runs=0).ok
    for command in ("inspect", "validate"):
        done = CliRunner().invoke(app, [command, str(path)])
        assert done.exit_code == 0, done.output
    assert (tmp_path / "blobs" / "0").is_file()


def test_data_that_is_linked_elsewhere_is_refused_though_the_model_is_a_link(tmp_path):
    path = make_cache(tmp_path)
    secret = tmp_path / "secret"
    (tmp_path / "blobs" / "1").rename(secret)
    data = path.parent / "model.onnx_data"
    data.unlink()
    data.symlink_to(secret)
    with pytest.raises(FileError, match="outside of the model's folder"):
        read_onnx(path)


def test_a_model_that_is_no_link_may_not_have_its_data_linked_elsewhere(tmp_path):
    path = make_cache(tmp_path)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(FileError, match="outside of the model's folder"):
        read_onnx(path)


def test_a_name_that_leaves_the_folder_is_refused_though_it_leads_to_the_blobs(tmp_path):
    path = make_cache(tmp_path)
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../../blobs/1"
    (tmp_path / "blobs" / "0").write_bytes(model.SerializeToString())
    with pytest.raises(FileError, match="outside of the model's folder"):
        read_onnx(path)
