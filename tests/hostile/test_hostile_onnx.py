"""Damaged and lying .onnx files: each one clear sentence in an InputError, never a crash, never a
runtime fed with it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ecqx_onnx.errors import InputError
from ecqx_onnx.inputs.onnx_file import read_onnx
from ecqx_onnx.validation import validate
from tests.onnx_torch_pairs import edit, make_pair

LEVELS, STEP, BIAS = "0.weight.levels", "0.weight.step", "0.bias"


def content() -> bytes:
    return make_pair().model.SerializeToString()


def assert_refused(path: Path, words: str) -> None:
    """One sentence that names the file and says these words."""
    with pytest.raises(InputError, match=words) as caught:
        validate(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.98])
def test_a_truncated_file(tmp_path, share):
    path = tmp_path / "short.onnx"
    path.write_bytes(content()[: int(share * len(content()))])
    assert_refused(path, "damaged|not an ONNX")


def test_an_empty_file(tmp_path):
    path = tmp_path / "empty.onnx"
    path.write_bytes(b"")
    assert_refused(path, "empty|no graph")


def test_random_bytes(tmp_path):
    path = tmp_path / "noise.onnx"
    for seed in range(50):
        path.write_bytes(np.random.default_rng(seed).bytes(400))
        assert_refused(path, "not an ONNX")


@pytest.mark.parametrize(
    "start", [b"PK\x03\x04", b"\x80\x04\x95", b"\x89PNG\r\n", b"#!/bin/sh\n", b"\x08\x0a"]
)
def test_a_file_of_another_kind(tmp_path, start):
    path = tmp_path / "other.onnx"
    path.write_bytes(start + bytes(64))
    assert_refused(path, "not an ONNX")


def test_flipped_bytes_never_end_in_anything_but_a_sentence_or_a_report(tmp_path):
    path, original = tmp_path / "flipped.onnx", content()
    for seed in range(60):
        generator = np.random.default_rng(seed)
        changed = bytearray(original)
        for position in generator.integers(0, len(changed), 3):
            changed[position] = generator.integers(0, 256)
        path.write_bytes(changed)
        try:
            report = validate(path, latency_runs=0)
        except InputError as error:
            assert path.name in str(error) or "input" in str(error) or "output" in str(error)  # noqa: PT017 (both ends are right)
        else:
            assert report.checks


def test_a_missing_file(tmp_path):
    assert_refused(tmp_path / "nowhere.onnx", "No such file|does not exist")


def test_a_folder(tmp_path):
    folder = tmp_path / "folder.onnx"
    folder.mkdir()
    assert_refused(folder, "folder|directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(tmp_path):
    path = tmp_path / "locked.onnx"
    path.write_bytes(content())
    path.chmod(0)
    assert_refused(path, "Permission denied")


def drop_graph(model):
    model.ClearField("graph")


def drop_opset(model):
    model.ClearField("opset_import")


def drop_outputs(model):
    del model.graph.output[:]


def longer_dims(model):
    edit(model, LEVELS).dims[0] = 17


def huge_dims(model):
    edit(model, LEVELS).dims[:] = [2**40, 2**40]


def negative_dims(model):
    edit(model, LEVELS).dims[:] = [-16, -8]


def other_type(model):
    edit(model, LEVELS).data_type = TensorProto.FLOAT


def unknown_type(model):
    edit(model, LEVELS).data_type = 99


def nan_bias(model):
    edit(model, BIAS).raw_data = np.full(16, np.nan, np.float32).tobytes()


def nan_step(model):
    edit(model, STEP).raw_data = np.float32(np.nan).tobytes()


def short_typed_data(model):
    edit(model, BIAS).CopyFrom(
        TensorProto(name=BIAS, data_type=TensorProto.FLOAT, dims=[16], float_data=[1.0] * 15)
    )


def sparse_index_outside(model):
    model.graph.initializer.remove(edit(model, LEVELS))
    values = helper.make_tensor(LEVELS, TensorProto.INT8, [2], b"\1\2", raw=True)
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            values, numpy_helper.from_array(np.array([3, 128], np.int64)), [16, 8]
        )
    )


def sparse_counts_differ(model):
    model.graph.initializer.remove(edit(model, LEVELS))
    values = helper.make_tensor(LEVELS, TensorProto.INT8, [2], b"\1\2", raw=True)
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.arange(3)), [16, 8])
    )


def metadata_no_json(model):
    model.metadata_props.add(key="ecqx_onnx", value="{'version': 1")


def metadata_no_object(model):
    model.metadata_props.add(key="ecqx_onnx", value="[1, 2]")


def metadata_deep(model):
    model.metadata_props.add(key="ecqx_onnx", value="[" * 100_000)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_graph, "not an ONNX model"),
        (drop_opset, "not an ONNX model"),
        (drop_outputs, "without outputs"),
        (longer_dims, "0.weight.levels"),
        (huge_dims, "0.weight.levels"),
        (negative_dims, "negative"),
        (other_type, "0.weight.levels"),
        (unknown_type, "99"),
        (nan_bias, r"'0\.bias' holds 16 values that are no numbers"),
        (nan_step, r"'0\.weight\.step' holds 1 value"),
        (short_typed_data, r"'0\.bias'"),
        (sparse_index_outside, "128"),
        (sparse_counts_differ, "indices"),
        (metadata_no_json, "metadata"),
        (metadata_no_object, "metadata"),
        (metadata_deep, "metadata"),
    ],
)
def test_a_lying_file(tmp_path, damage: Callable, words: str):
    pair = make_pair()
    damage(pair.model)
    path = tmp_path / "lying.onnx"
    path.write_bytes(pair.model.SerializeToString())
    assert_refused(path, words)


def external(folder: Path, **entries: str) -> Path:
    """A model whose first weight lies in weights.bin, except for what `entries` say."""
    pair = make_pair()
    tensor = edit(pair.model, LEVELS)
    (folder / "weights.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {
        "location": "weights.bin",
        "offset": "0",
        "length": "128",
        **entries,
    }.items():
        tensor.external_data.add(key=key, value=value)
    path = folder / "external.onnx"
    path.write_bytes(pair.model.SerializeToString())
    return path


def test_external_data_in_its_place_are_read(tmp_path):
    file = read_onnx(external(tmp_path))
    assert file.size == file.path.stat().st_size + 128
    assert validate(file.path, latency_runs=0).ok


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"location": "gone.bin"}, "gone.bin"),
        ({"location": "../weights.bin"}, "outside"),
        ({"location": "/etc/passwd"}, "outside"),
        ({"location": "a/../../weights.bin"}, "outside"),
        ({"location": ""}, "outside"),
        ({"location": "."}, "outside|missing"),
        ({"offset": "64"}, "64"),
        ({"offset": "-1"}, "-1"),
        ({"length": "127"}, "127"),
        ({"length": "many"}, "not a number"),
        ({"offset": "9" * 30}, "9999"),
    ],
)
def test_external_data_that_cannot_be_used(tmp_path, entries, words):
    assert_refused(external(tmp_path, **entries), words)


def test_external_data_behind_a_link_that_leaves_the_folder(tmp_path):
    inside = tmp_path / "model"
    inside.mkdir()
    path = external(inside)
    (inside / "weights.bin").rename(tmp_path / "weights.bin")
    (inside / "weights.bin").symlink_to(tmp_path / "weights.bin")
    assert_refused(path, "outside")


def test_a_foreign_file_without_metadata_is_no_error(tmp_path):
    file = read_onnx(make_pair().save(tmp_path))
    assert file.metadata == {}


def test_unknown_keys_in_the_metadata_are_no_error(tmp_path):
    metadata = {"format": 3, "tensors": [], "news": [1]}
    assert read_onnx(make_pair(metadata=json.dumps(metadata)).save(tmp_path)).metadata == metadata


def test_real_files_from_the_field_are_read_or_refused(tmp_path):
    folder = Path(__file__).parents[2].parent / "shared" / "data" / "onnx"
    if not folder.is_dir():
        pytest.skip(f"the real ONNX files are not at {folder}")
    for path in sorted(folder.glob("*.onnx")):
        file = read_onnx(path)
        assert isinstance(file.proto, onnx.ModelProto)
