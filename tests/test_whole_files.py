"""Is a written file whole? One changed bit anywhere is found: in packed levels, in biases, in
attributes, in the metadata."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from ecqx_onnx_converters import FloatGraph, build, make_plan, match, write
from ecqx_onnx_converters.graph.files import write_proto
from ecqx_onnx_converters.serialization.metadata import (
    METADATA_KEY,
    from_text,
    read_checksum,
    to_text,
)
from ecqx_onnx_converters.serialization.reading import is_as_written
from onnx import ModelProto, TensorProto
from typer.testing import CliRunner

from ecqx_onnx import api
from ecqx_onnx.checkpoint import checkpoint as checkpoint_module
from ecqx_onnx.cli import app
from ecqx_onnx.errors import EcqxError, FileError
from ecqx_onnx.validation import check_file
from ecqx_onnx.verbs import pack
from tests.conversions import quantize_model
from tests.onnx_torch_pairs import make_pair
from tests.test_packing import CASES


class Network(torch.nn.Module):
    """BatchNorm that folds, BatchNorm that stays, biases, and enough weights that packing them
    pays."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(1, 8, 3, bias=False)
        self.norm = torch.nn.BatchNorm2d(8)
        self.last = torch.nn.Linear(8 * 6 * 6, 20)
        self.after = torch.nn.BatchNorm1d(20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x))).flatten(1)
        return self.after(torch.relu(self.last(x)))


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(3)
    module = Network()
    with torch.no_grad():
        for norm in (module.norm, module.after):
            for values in (norm.weight, norm.bias, norm.running_mean):
                values.uniform_(0.5, 1.5)
    quantize_model(module.eval(), bits=3)
    return module


@pytest.fixture(scope="module")
def files(network, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    example = torch.zeros(2, 1, 8, 8)
    checkpoint = api.as_checkpoint(
        network, example=example, labels=[f"c{index}" for index in range(20)]
    )
    checkpoint_module.save(checkpoint, folder / "model.pt")
    for floats in ("float32", "float16"):
        api.convert(folder / "model.pt", folder / f"{floats}.onnx", floats=floats)
    return folder


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (
        result.exit_code,
        result.output,
        result.stderr,
        result.exception,
    )
    return result


def verdicts(path: Path, *arguments, code=0) -> dict[str, dict]:
    report = json.loads(run("validate", path, *arguments, "--json", code=code).stdout)
    return {check["name"]: check for check in report["checks"]}


def without_checksum(model: ModelProto) -> None:
    """As an earlier version would have written it."""
    entry = next(entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    entry.value = to_text(from_text(entry.value))


def with_right_checksum(model: ModelProto) -> None:
    """As a forger would write it, or a fault of the runtime's could look like."""
    from ecqx_onnx_converters.serialization.checksum import compute_checksum

    entry = next(entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    content = from_text(entry.value)
    entry.value = to_text(
        content, lambda start: compute_checksum(model, lambda tensor: None, start=start)
    )


def flipped(tensor: TensorProto, position: int, bit: int = 0) -> None:
    raw = bytearray(tensor.raw_data)
    raw[position] ^= 1 << bit
    tensor.raw_data = bytes(raw)


def floats_of(model: ModelProto) -> list[TensorProto]:
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16)
    return [tensor for tensor in model.graph.initializer if tensor.data_type in kinds]


@pytest.mark.parametrize("floats", ["float32", "float16"])
def test_a_whole_file_passes_alone_and_beside_its_checkpoint(files, floats):
    alone = verdicts(files / f"{floats}.onnx")
    assert [(name, check["passed"]) for name, check in alone.items()] == [
        ("format", True), ("load", True), ("contents", True), ("weights", True),
    ]  # fmt: skip
    beside = verdicts(files / f"{floats}.onnx", "--against", files / "model.pt")
    assert beside["contents"]["passed"]
    assert beside["parameters"]["passed"]
    assert beside["parameters"]["measured"] == beside["parameters"]["limit"] > 6


@pytest.mark.parametrize("floats", ["float32", "float16"])
def test_a_bit_of_any_float_tensor_is_found_beside_the_checkpoint_without_checksum_or_data(
    files, tmp_path, floats
):
    """Of a file of an earlier version, too, whatever the outputs say: a low bit moves them less
    than rounding does."""
    original = onnx.load(files / f"{floats}.onnx")
    without_checksum(original)
    count = len(floats_of(original))
    assert count > 2
    for index in range(count):
        model = copy.deepcopy(original)
        tensor = floats_of(model)[index]
        flipped(tensor, tensor.ByteSize() % max(1, len(tensor.raw_data) - 4) // 4 * 4)
        onnx.save(model, tmp_path / "flipped.onnx")
        found = verdicts(tmp_path / "flipped.onnx", "--against", files / "model.pt", code=1)
        assert found["contents"]["passed"] is None
        assert found["parameters"]["passed"] is False, tensor.name


def test_the_failed_check_names_the_parameter_and_how_many_values_differ(files, tmp_path):
    model = onnx.load(files / "float32.onnx")
    bias = next(tensor for tensor in floats_of(model) if list(tensor.dims) == [20])
    flipped(bias, 4)
    onnx.save(model, tmp_path / "flipped.onnx")
    found = verdicts(tmp_path / "flipped.onnx", "--against", files / "model.pt", code=1)
    assert " [20] differs in 1 of 20 values" in found["parameters"]["sentence"]
    assert "checksum" in found["contents"]["sentence"]


def test_one_flipped_bit_anywhere_that_the_runtime_reads_is_found_by_the_file_alone(
    files, tmp_path
):
    """Bits all over the file; those in what no runtime reads (the name of the tool) may pass."""
    content = (files / "float32.onnx").read_bytes()
    path, missed = tmp_path / "flipped.onnx", []
    model = onnx.load_model_from_string(content)
    for position in np.random.default_rng(0).choice(len(content), 80, replace=False):
        changed = bytearray(content)
        changed[position] ^= 1 << (int(position) % 8)
        path.write_bytes(changed)
        try:
            ok = check_file(path).ok
        except EcqxError:
            continue
        if ok:
            missed.append(onnx.load(path))
    for other in missed:
        other.producer_name, other.graph.name = model.producer_name, model.graph.name
        assert other.SerializeToString(deterministic=True) == model.SerializeToString(
            deterministic=True
        )


@pytest.mark.parametrize("damage", ["attribute", "label", "name", "function"])
def test_what_is_no_tensor_is_covered_by_the_checksum_as_well(files, tmp_path, damage):
    model = onnx.load(files / "float32.onnx")
    entry = next(entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    if damage == "attribute":
        next(node for node in model.graph.node if node.op_type == "Conv").attribute.add(
            name="group", i=1, type=2
        )
    elif damage == "label":
        stored, content = read_checksum(entry.value), from_text(entry.value)
        assert stored is not None
        content["labels"][3] = "dog"
        entry.value = to_text(content, lambda start: stored[1])
    elif damage == "name":
        model.graph.input[0].name = "other"
        for node in model.graph.node:
            node.input[:] = ["other" if name == "x" else name for name in node.input]
    else:
        model.functions[0].node[-1].doc_string = "new"
    onnx.save(model, tmp_path / "changed.onnx")
    assert is_as_written(tmp_path / "changed.onnx") is False
    assert not check_file(tmp_path / "changed.onnx").ok


def test_documentation_and_inferred_shapes_may_be_added(files, tmp_path):
    model = onnx.shape_inference.infer_shapes(onnx.load(files / "float32.onnx"))
    model.doc_string, model.graph.doc_string = "mine", "mine"
    model.metadata_props.add(key="author", value="me")
    onnx.save(model, tmp_path / "more.onnx")
    assert check_file(tmp_path / "more.onnx").ok


def test_a_file_that_the_runtime_decodes_otherwise_than_we_do_fails(files, tmp_path):
    """All checksums right, and the levels as we read them: only the decoder in the graph is
    another."""
    model = onnx.load(files / "float32.onnx")
    nodes = [node for function in model.functions for node in function.node]
    scaling = [node for node in nodes if node.op_type == "Mul"]
    scaling[-1].op_type = "Add"
    with_right_checksum(model)
    onnx.save(model, tmp_path / "other.onnx")
    assert is_as_written(tmp_path / "other.onnx")
    failures = {
        check.name: check.sentence for check in check_file(tmp_path / "other.onnx").failures
    }
    assert "decoded to other values by the runtime" in failures["weights"]


def test_a_file_of_an_earlier_version_says_that_it_has_no_checksum(files, tmp_path):
    model = onnx.load(files / "float32.onnx")
    without_checksum(model)
    onnx.save(model, tmp_path / "old.onnx")
    found = verdicts(tmp_path / "old.onnx")
    assert found["contents"]["passed"] is None
    assert "earlier versions" in found["contents"]["sentence"]
    assert found["weights"]["passed"]


def test_a_foreign_file_says_that_it_has_no_checksum(tmp_path):
    path = make_pair(decoding="float").save(tmp_path)
    found = verdicts(path)
    assert list(found) == ["format", "load", "contents"]
    assert found["contents"]["passed"] is None
    assert "not written by ecqx-onnx" in found["contents"]["sentence"]


def test_a_file_that_lost_its_metadata_is_not_whole(files, tmp_path):
    model = onnx.load(files / "float32.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    assert "lost its metadata" in verdicts(tmp_path / "bare.onnx", code=1)["contents"]["sentence"]


@pytest.mark.parametrize("option", [("--inputs", "x.npz"), ("--model", "a.py:b")])
def test_options_about_the_other_side_need_one(files, option):
    assert "--against" in run("validate", files / "float32.onnx", *option, code=2).stderr


def test_the_checksum_is_the_same_for_data_beside_the_model(tmp_path):
    pair = make_pair(decoding="float")
    graph = FloatGraph.from_model(pair.model)
    plan = make_plan(graph, match(graph.weights, pair.tensors[:1]))
    write(plan, tmp_path / "inside.onnx")
    write(plan, tmp_path / "outside.onnx", external_data=True)
    assert is_as_written(tmp_path / "inside.onnx")
    assert is_as_written(tmp_path / "outside.onnx")
    assert is_as_written(build(plan).to_model())


def test_changed_external_data_are_found(tmp_path):
    generator = np.random.default_rng(0)
    weight = torch.nn.Parameter(
        torch.from_numpy(generator.standard_normal((40, 40)).astype(np.float32))
    )
    module = torch.nn.Linear(40, 40)
    module.weight = weight
    built = build(
        make_plan(
            api.as_checkpoint(module, example=torch.zeros(1, 40), allow_float=True).graph,
            match({}, ()),
        )
    )
    path = tmp_path / "model.onnx"
    write_proto(built.model, built.payloads, path, external=True)
    data = tmp_path / "model.onnx.data"
    assert is_as_written(path)
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    assert is_as_written(path) is False
    assert not check_file(path).ok


def test_the_checksum_takes_five_bytes():
    content = {"format": 5, "tensors": []}
    assert len(to_text(content, lambda start: start)) - len(to_text(content)) == 5


def test_inspect_warns_of_a_file_whose_parameters_were_changed(files, tmp_path):
    model = onnx.load(files / "float32.onnx")
    flipped(floats_of(model)[0], 0)
    onnx.save(model, tmp_path / "flipped.onnx")
    (warning,) = json.loads(run("inspect", tmp_path / "flipped.onnx", "--json").stdout)["warnings"]
    assert "checksum" in warning
    assert json.loads(run("inspect", files / "float32.onnx", "--json").stdout)["warnings"] == []


def test_unpack_refuses_a_file_whose_parameters_were_changed(files, tmp_path):
    model = onnx.load(files / "float32.onnx")
    flipped(floats_of(model)[0], 0)
    onnx.save(model, tmp_path / "flipped.onnx")
    with pytest.raises(FileError, match="checksum"):
        pack.unpack(tmp_path / "flipped.onnx", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_changed_bias_of_a_packed_file_is_found_beside_its_original(tmp_path):
    onnx.save(CASES["int8"].model, tmp_path / "original.onnx")
    pack.pack(tmp_path / "original.onnx", tmp_path / "packed.onnx")
    model = onnx.load(tmp_path / "packed.onnx")
    without_checksum(model)
    changed = floats_of(model)[-1]
    flipped(changed, 0)
    onnx.save(model, tmp_path / "flipped.onnx")
    found = verdicts(tmp_path / "flipped.onnx", "--against", tmp_path / "original.onnx", code=1)
    assert found["parameters"]["passed"] is False


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_style_that_pack_takes_has_its_parameters_in_the_packed_file(name, tmp_path):
    onnx.save(CASES[name].model, tmp_path / "original.onnx")
    if pack.pack(tmp_path / "original.onnx", tmp_path / "packed.onnx").written is None:
        pytest.skip("it is copied")
    result = CliRunner().invoke(
        app,
        [
            "validate",
            str(tmp_path / "packed.onnx"),
            "--against",
            str(tmp_path / "original.onnx"),
            "--json",
        ],
    )
    if result.exit_code == 2:
        pytest.skip("the original can't be run")
    found = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert found["parameters"]["passed"], found["parameters"]["sentence"]
