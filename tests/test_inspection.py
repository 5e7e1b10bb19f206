"""What `inspect` says of files: the rows of the weights, and an account of the bytes that leaves
none out."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from ecqx_onnx_converters import FloatGraph, make_plan, match, write
from onnx import numpy_helper
from rich.console import Console

from ecqx_onnx.errors import FileError
from ecqx_onnx.inspection import Inspection, inspect
from tests.onnx_torch_pairs import Pair, make_pair

METADATA = {
    "recipe": {"bits": 4, "entropy_weight": 0.1},
    "preprocessing": json.dumps({"version": 1, "kind": "array", "scale": 2.0}),
    "labels": ["a", "b", "c", "d", "e"],
    "tool_version": "0.1.0",
}


def converted(folder: Path, **options: str) -> tuple[Pair, Path]:
    pair = make_pair(decoding="float")
    graph = FloatGraph.from_model(pair.model)
    write(
        make_plan(graph, match(graph.weights, pair.tensors), **options),
        folder / "model.onnx",
        metadata=METADATA,
    )
    return pair, folder / "model.onnx"


def text_of(inspection: Inspection) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(inspection.render())
    return console.file.getvalue()


@pytest.mark.parametrize("dequantize", ["folded", "standard"])
@pytest.mark.parametrize("storage", ["dense", "sparse"])
def test_the_rows_are_the_quantised_weights_and_the_bytes_add_up(tmp_path, storage, dequantize):
    pair, path = converted(tmp_path, storage=storage, dequantize=dequantize)
    found = inspect(path)
    assert [row.name for row in found.tensors] == [tensor.name for tensor in pair.tensors]
    for row, tensor in zip(found.tensors, pair.tensors, strict=True):
        assert (row.bits, row.zeros, row.entropy) == (tensor.bits, tensor.zeros, tensor.entropy)
        assert row.storage.startswith(storage)
        assert row.dequantization == dequantize
    assert found.nbytes == path.stat().st_size == sum(found.parts.values())
    assert min(found.parts.values()) >= 0
    assert found.parts["float parameters"] == 4 * (16 + 5)
    assert found.parts["steps and codebooks"] == 4 * 2
    assert found.floats == ()
    assert not found.inflated
    assert not found.warnings


def test_dense_four_bit_integers_take_half_a_byte_each(tmp_path):
    _, path = converted(tmp_path, storage="dense")
    assert inspect(path).parts["quantised integers"] == (16 * 8 + 5 * 16) // 2


def test_recipe_preprocessing_and_labels_are_shown(tmp_path):
    _, path = converted(tmp_path)
    found = inspect(path)
    assert found.recipe == METADATA["recipe"]
    assert found.preprocessing["scale"] == 2.0
    assert found.labels == ("a", "b", "c", "d", "e")
    text = text_of(found)
    assert "entropy_weight 0.1" in text
    assert "x float[batch, 8]" in text


def test_the_json_holds_all_of_it(tmp_path):
    _, path = converted(tmp_path)
    document = json.loads(json.dumps(inspect(path).to_json(), allow_nan=False))
    assert document["bytes"] == path.stat().st_size
    assert [row["bits"] for row in document["tensors"]] == [4, 4]


def test_a_file_whose_weights_some_tool_has_folded_is_recognised(tmp_path):
    pair, path = converted(tmp_path)
    metadata = onnx.load(path).metadata_props[0].value
    inflated = inspect(
        make_pair(decoding="float", metadata=metadata).save(tmp_path, "inflated.onnx")
    )
    assert inflated.inflated
    assert "INFLATED" in text_of(inflated)
    assert [row.name for row in inflated.floats] == [tensor.name for tensor in pair.tensors]


def test_a_plain_float_file_is_not_taken_for_an_inflated_one(tmp_path):
    found = inspect(make_pair(decoding="float").save(tmp_path))
    assert not found.inflated
    assert len(found.floats) == 2
    assert found.tensors == ()


def test_a_changed_level_is_told_by_its_checksum(tmp_path):
    _, path = converted(tmp_path, storage="dense")
    model = onnx.load(path)
    stored = next(
        tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT4
    )
    stored.raw_data = bytes([stored.raw_data[0] ^ 1]) + stored.raw_data[1:]
    onnx.save(model, path)
    assert any("checksum" in warning for warning in inspect(path).warnings)


def test_float_values_outside_raw_data_are_counted_too(tmp_path):
    pair = make_pair(decoding="float")
    for tensor in pair.model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(
            onnx.helper.make_tensor(
                tensor.name, onnx.TensorProto.FLOAT, values.shape, values.reshape(-1)
            )
        )
    found = inspect(pair.save(tmp_path))
    assert sum(found.parts.values()) == found.nbytes
    assert found.parts["float parameters"] >= 4 * (16 * 8 + 16 + 5 * 16 + 5)


def test_a_checkpoint_has_the_same_rows(tmp_path):
    api = pytest.importorskip("ecqx_onnx.api")
    pair = make_pair(decoding="float")
    path = tmp_path / "model.pt"
    api.save(pair.reference, path, example=torch.zeros(2, 8), recipe={"bits": 4})
    found = inspect(path)
    rows = {row.name: row for row in found.tensors}
    assert set(rows) == {"0.weight", "2.weight"}
    for tensor in pair.tensors:
        assert rows[tensor.name].bits == tensor.bits
        assert rows[tensor.name].entropy == pytest.approx(tensor.entropy)
    assert sum(found.parts.values()) == found.nbytes == path.stat().st_size
    assert "checkpoint" in text_of(found)


def test_a_checkpoint_is_never_unpickled(tmp_path):
    class Harm:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'harmed')!r}, 'w')",)

    path = tmp_path / "evil.pt"
    torch.save({"format": "ecqx-onnx checkpoint", "version": 1, "x": Harm()}, path)
    with pytest.raises(FileError):
        inspect(path)
    assert not (tmp_path / "harmed").exists()


def test_files_of_other_kinds_are_refused(tmp_path):
    archive, noise = tmp_path / "some.zip", tmp_path / "noise.bin"
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("a", "b")
    noise.write_bytes(np.random.default_rng(0).bytes(100))
    for path in (archive, noise, tmp_path / "absent.pt", tmp_path / "absent.onnx"):
        with pytest.raises(FileError, match=path.name):
            inspect(path)


def test_inspecting_an_onnx_file_loads_neither_torch_nor_a_runtime(tmp_path):
    path = make_pair().save(tmp_path)
    code = (
        "import sys; from ecqx_onnx.inspection import inspect; inspect(sys.argv[1]);"
        "print({'torch', 'onnxruntime'} & set(sys.modules))"
    )
    environment = {"PYTHONPATH": ":".join(entry for entry in sys.path if entry)}
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert done.stdout.strip() == "set()"


def test_integers_of_others_have_rows_and_the_gain_is_said(tmp_path):
    """Ternary levels as INT8 behind DequantizeLinear, and two readers of one tensor."""
    levels = np.resize(np.array([0, 0, 0, 1, -1, 0, 0, 0], np.int8), (64, 96))
    nodes = [
        onnx.helper.make_node("DequantizeLinear", ["q", "s"], ["w"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s"], ["v"]),
        onnx.helper.make_node("Gemm", ["x", "w"], ["h"], transB=1),
        onnx.helper.make_node("MatMul", ["h", "v"], ["y"]),
    ]
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", floats, ["n", 96])],
        [onnx.helper.make_tensor_value_info("y", floats, ["n", 96])],
        [
            onnx.numpy_helper.from_array(levels, "q"),
            onnx.numpy_helper.from_array(np.float32(0.5), "s"),
        ],
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "foreign.onnx")
    found = inspect(tmp_path / "foreign.onnx")
    (row,) = found.tensors
    assert (row.storage, row.shape, row.bits, row.zeros) == ("INT8", (64, 96), 2, 0.75)
    assert row.nbytes == levels.size
    entropy = row.entropy * levels.size / 8
    (gain,) = (value for name, value in found.facts if name == "possible gain")
    assert f"have an entropy of {entropy:,.0f} bytes" in gain
    assert not found.warnings
