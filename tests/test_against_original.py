"""`validate` of a packed file beside the .onnx file that it was made from: no PyTorch in sight."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from ecqx_onnx.cli import app
from ecqx_onnx.validation import validate_against_original
from ecqx_onnx.verbs.pack import pack
from tests.test_packing import CASES

SAMPLES = 100


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, ["validate", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def refused(*arguments):
    message = invoke(*arguments, code=2).stderr.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    onnx.save(CASES["int8"].model, folder / "original.onnx")
    pack(folder / "original.onnx", folder / "packed.onnx")
    x = np.random.default_rng(0).standard_normal((SAMPLES, 128)).astype(np.float32)
    np.savez(folder / "data.npz", x_test=x, y_test=np.arange(SAMPLES) % 128)
    np.savez(folder / "inputs.npz", x=x[:7])
    return folder


def checks(*arguments, code=0):
    report = json.loads(invoke(*arguments, "--json", code=code).stdout)
    assert report["ok"] == (code == 0)
    return report, {check["name"]: check for check in report["checks"]}


def test_on_random_inputs_every_check_passes(files):
    report, found = checks(files / "packed.onnx", "--against", files / "original.onnx")
    names = [
        "format",
        "as written",
        "optimised",
        "operators",
        "contents",
        "weights",
        "parameters",
        "top-1",
    ]
    assert list(found) == names
    assert all(check["passed"] for check in found.values())
    assert "bit for bit, on 2 sets of random inputs" in found["as written"]["sentence"]
    assert "PyTorch" not in json.dumps(report["checks"])
    assert report["samples"] == 4
    assert report["latency_ratio"] > 0
    assert report["latency_against"] == "the original"


def test_on_data_classes_and_accuracy_are_compared(files):
    report, found = checks(
        files / "packed.onnx", "--against", files / "original.onnx", "--data", files / "data.npz"
    )
    assert f"on {SAMPLES} samples of the data" in found["as written"]["sentence"]
    assert report["agreement"] == report["agreement"] | {"hits": SAMPLES, "total": SAMPLES}
    assert report["onnx_accuracy"]["total"] == SAMPLES
    assert found["accuracy"]["passed"]
    report, _ = checks(
        files / "packed.onnx",
        "--against",
        files / "original.onnx",
        "--data",
        files / "data.npz",
        "--samples",
        10,
        "--batch-size",
        3,
    )
    assert report["samples"] == 10


def test_on_given_inputs(files):
    report, found = checks(
        files / "packed.onnx",
        "--against",
        files / "original.onnx",
        "--inputs",
        files / "inputs.npz",
    )
    assert report["samples"] == 7
    assert "1 set of given inputs" in found["as written"]["sentence"]


def test_another_weight_exits_1_and_says_which_check(files, tmp_path):
    other = onnx.load(files / "original.onnx")
    tensor = next(t for t in other.graph.initializer if t.data_type == TensorProto.INT8 and t.dims)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[5] += 20
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(other, tmp_path / "other.onnx")
    result = invoke(
        files / "packed.onnx",
        "--against",
        tmp_path / "other.onnx",
        "--data",
        files / "data.npz",
        code=1,
    )
    assert "as written: all 1 outputs DIFFER" in result.stderr
    assert "with all optimisations they do NOT agree" in result.stderr


def test_another_class_is_a_failure_of_its_own(files, tmp_path):
    other = onnx.load(files / "original.onnx")
    other.graph.node.append(helper.make_node("Neg", ["y"], ["negative"]))
    other.graph.output[0].name = "negative"
    onnx.save(other, tmp_path / "other.onnx")
    _, found = checks(files / "packed.onnx", "--against", tmp_path / "other.onnx", code=1)
    assert found["top-1"]["passed"] is False
    assert "4 of 4 samples get another class, with a lead of up to" in found["top-1"]["sentence"]


def test_outputs_of_another_shape_or_number_are_a_failure(files, tmp_path):
    for nodes, outputs in (
        ([helper.make_node("Identity", ["y"], ["z"])], ["y", "z"]),
        ([helper.make_node("ReduceSum", ["y"], ["z"])], ["z"]),
    ):
        other = onnx.load(files / "original.onnx")
        other.graph.node.extend(nodes)
        del other.graph.output[:]
        other.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs
        )
        onnx.save(other, tmp_path / "other.onnx")
        _, found = checks(files / "packed.onnx", "--against", tmp_path / "other.onnx", code=1)
        assert "other shapes than the original's" in found["outputs"]["sentence"]


def test_an_input_that_the_original_has_not_is_a_failure(files, tmp_path):
    other = onnx.load(files / "original.onnx")
    other.graph.input[0].name = "pixels"
    for node in other.graph.node:
        node.input[:] = ["pixels" if name == "x" else name for name in node.input]
    onnx.save(other, tmp_path / "other.onnx")
    _, found = checks(files / "packed.onnx", "--against", tmp_path / "other.onnx", code=1)
    assert "takes an input 'x', which the original has not (pixels)" in found["inputs"]["sentence"]


@pytest.mark.parametrize(
    "name", ["QLinearConv", "MatMul", "quantised activations", "If", "floats of a codebook"]
)
def test_every_style_of_model_can_be_proven(name, tmp_path):
    onnx.save(CASES[name].model, tmp_path / "original.onnx")
    pack(tmp_path / "original.onnx", tmp_path / "packed.onnx")
    report = validate_against_original(
        tmp_path / "packed.onnx", tmp_path / "original.onnx", latency_runs=2
    )
    assert report.ok, report.failures
    operators = next(check for check in report.checks if check.name == "operators")
    assert ("as in the original" in operators.sentence) == (
        name in ("QLinearConv", "quantised activations")
    )


def test_a_fixed_batch_is_filled_up_and_every_sample_counted(files, tmp_path):
    fixed = onnx.load(files / "original.onnx")
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 32
    onnx.save(fixed, tmp_path / "original.onnx")
    pack(tmp_path / "original.onnx", tmp_path / "packed.onnx")
    report, _ = checks(
        tmp_path / "packed.onnx",
        "--against",
        tmp_path / "original.onnx",
        "--data",
        files / "data.npz",
    )
    assert (
        report["samples"]
        == report["agreement"]["total"]
        == report["onnx_accuracy"]["total"]
        == SAMPLES
    )


def test_a_damaged_packed_file_fails_by_its_checksum(files, tmp_path):
    proto = onnx.load(files / "packed.onnx")
    largest = max(proto.graph.initializer, key=lambda tensor: tensor.ByteSize())
    raw = bytearray(largest.raw_data)
    raw[len(raw) // 2] ^= 1
    largest.raw_data = bytes(raw)
    onnx.save(proto, tmp_path / "damaged.onnx")
    result = invoke(tmp_path / "damaged.onnx", "--against", files / "original.onnx", code=1)
    assert "checksum" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--against", "{}/missing.onnx"), "missing.onnx"),
        (
            ("--against", "{}/original.onnx", "--model", "a.py:b"),
            "--model names the network of a state dict",
        ),
        (("--against", "{}/original.onnx", "--device", "local"), "leave --device out"),
        (
            ("--against", "{}/original.onnx", "--inputs", "{}/inputs.npz", "--data", "{}/data.npz"),
            "give one of them",
        ),
        (
            ("--against", "{}/original.onnx", "--inputs", "{}/data.npz"),
            "the model's input 'x' is not among those given",
        ),
        (
            ("--against", "{}/data.npz", "--inputs", "{}/inputs.npz"),
            "--inputs are for a validation against an .onnx file",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(files, arguments, words):
    assert words in refused(
        files / "packed.onnx", *(argument.format(files) for argument in arguments)
    )


def test_convert_of_a_quantised_onnx_names_pack(files, tmp_path):
    result = CliRunner().invoke(
        app, ["convert", str(files / "original.onnx"), str(tmp_path / "out.onnx")]
    )
    assert result.exit_code == 2
    assert "if it is quantised, `ecqx-onnx pack` makes it smaller" in " ".join(
        result.stderr.split()
    )
