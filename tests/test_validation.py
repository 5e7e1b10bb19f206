"""Validation of hand-made files: right ones pass, each planted error turns the check red that is
there for it."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from ecqx_onnx_converters import FloatGraph, make_plan, match, read_weights, write
from ecqx_onnx_converters.serialization.metadata import compute_levels_crc, from_text
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from ecqx_onnx.data.split import Arrays, Split
from ecqx_onnx.errors import DataError, FileError
from ecqx_onnx.inputs.onnx_file import read_onnx
from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.runtime.decoded_model import decode_model
from ecqx_onnx.validation import ValidationReport, validate
from ecqx_onnx.validation.checks import check_accuracy, check_agreement, check_operators
from ecqx_onnx.validation.outputs.bounds import Bound
from ecqx_onnx.validation.outputs.comparison import Comparison, Difference
from ecqx_onnx.validation.outputs.metrics import Agreement, Proportion
from tests.onnx_torch_pairs import Pair, edit, make_pair


def converted(
    folder: Path, *, storage: str = "dense", dequantize: str = "folded"
) -> tuple[Pair, Path]:
    """The pair's float graph through the converter."""
    pair = make_pair(decoding="float")
    graph = FloatGraph.from_model(pair.model)
    plan = make_plan(
        graph, match(graph.weights, pair.tensors), storage=storage, dequantize=dequantize
    )
    write(plan, folder / "model.onnx")
    return pair, folder / "model.onnx"


def some_data(pair: Pair, count: int = 100) -> Split:
    x = np.random.default_rng(1).standard_normal((count, 8)).astype(np.float32)
    with torch.no_grad():
        y = pair.reference(torch.from_numpy(x)).argmax(1).numpy()
    y[::10] = (y[::10] + 1) % 5  # one in ten is wrong
    return Split(Arrays("x", x), np.arange(count), y, Preprocessing("array"))


def verdicts(report: ValidationReport) -> dict[str, bool | None]:
    return {check.name: check.passed for check in report.checks}


@pytest.mark.parametrize("decoding", ["folded", "standard", "float"])
def test_a_right_file_passes_every_check(tmp_path, decoding):
    pair = make_pair(decoding=decoding)
    report = validate(
        pair.save(tmp_path),
        reference=pair.reference,
        split=some_data(pair),
        batch_size=32,
        latency_runs=3,
    )
    assert report.ok, report.failures
    assert set(verdicts(report)) == {
        "format",
        "load",
        "optimisation",
        "operators",
        "outputs",
        "top-1",
        "accuracy",
    }
    assert report.samples == 100
    assert report.onnx_accuracy == report.pytorch_accuracy
    assert report.onnx_accuracy.share == 0.9
    assert report.agreement.share == 1.0
    assert report.operators["Gemm"] + report.operators["FusedGemm"] == 2
    assert report.latency.runs == 3


def test_one_level_off_by_one_is_found_in_the_outputs(tmp_path):
    pair = make_pair()
    levels = edit(pair.model, "0.weight.levels")
    changed = np.frombuffer(levels.raw_data, np.int8).copy()
    changed[17] += 1 if changed[17] < 7 else -1
    levels.raw_data = changed.tobytes()
    report = validate(
        pair.save(tmp_path), reference=pair.reference, split=some_data(pair), latency_runs=0
    )
    assert verdicts(report)["outputs"] is False


def test_a_scale_off_by_a_thousandth_is_found_in_the_outputs(tmp_path):
    pair = make_pair()
    edit(pair.model, "2.weight.step").raw_data = np.float32(0.037 * 1.001).tobytes()
    report = validate(
        pair.save(tmp_path), reference=pair.reference, split=some_data(pair), latency_runs=0
    )
    check = next(check for check in report.checks if check.name == "outputs")
    assert check.passed is False
    assert check.measured > 100 * check.limit


def test_silently_quantised_activations_are_a_loud_failure(tmp_path):
    # ORT >= 1.25 turns DequantizeLinear + MatMul into MatMulNBits, which rounds activations to 8
    # bit.
    pair = make_pair(decoding="matmul")
    for index, tensor in enumerate(
        pair.tensors
    ):  # blocks of 4 bit along the inputs is what it fuses
        stored = edit(pair.model, f"{tensor.name}.levels")
        stored.CopyFrom(
            helper.make_tensor(
                stored.name, TensorProto.INT4, tensor.levels.T.shape, tensor.levels.T.reshape(-1)
            )
        )
        step = edit(pair.model, f"{tensor.name}.step")
        step.CopyFrom(
            numpy_helper.from_array(np.full((1, tensor.shape[0]), 0.037, np.float32), step.name)
        )
        node = next(node for node in pair.model.graph.node if node.output[0] == tensor.name)
        node.attribute.extend(
            [
                helper.make_attribute("axis", 0),
                helper.make_attribute("block_size", 16 if index else 8),
            ]
        )
    report = validate(
        pair.save(tmp_path), reference=pair.reference, split=some_data(pair), latency_runs=0
    )
    if "MatMulNBits" not in report.operators:
        pytest.skip("this onnxruntime does not fuse blocks so small")
    assert verdicts(report)["operators"] is False
    assert (
        "SILENTLY" in next(check for check in report.checks if check.name == "operators").sentence
    )


def test_a_foreign_file_is_compared_on_synthetic_inputs_without_data(tmp_path):
    pair = make_pair(decoding="float")
    report = validate(pair.save(tmp_path), reference=pair.reference, latency_runs=0)
    assert report.ok
    assert report.onnx_accuracy is None
    assert verdicts(report)["outputs"] is True


def test_without_a_reference_what_can_be_checked_is_checked(tmp_path):
    pair = make_pair()
    report = validate(pair.save(tmp_path), split=some_data(pair), latency_runs=0)
    assert report.ok
    assert report.pytorch_accuracy is None
    assert report.onnx_accuracy.hits == 90
    assert "outputs" not in verdicts(report)


def test_outputs_of_another_shape_fail_with_both_shapes(tmp_path):
    pair = make_pair()
    wider = torch.nn.Sequential(torch.nn.Linear(8, 6)).eval()
    report = validate(
        pair.save(tmp_path), reference=wider, split=some_data(pair), batch_size=100, latency_runs=0
    )
    check = next(check for check in report.checks if check.name == "outputs")
    assert check.passed is False
    assert "[100, 5]" in check.sentence
    assert "[100, 6]" in check.sentence


def test_a_fixed_batch_size_is_honoured_and_every_sample_counted(tmp_path):
    pair = make_pair(batch=32)
    report = validate(
        pair.save(tmp_path), reference=pair.reference, split=some_data(pair), latency_runs=2
    )
    assert report.ok, report.failures
    assert report.samples == report.onnx_accuracy.total == 100


def test_the_preprocessing_in_the_file_is_used_unless_another_is_given(tmp_path):
    halved = Preprocessing("array", scale=2.0)
    pair = make_pair(
        metadata=json.dumps({"format": 3, "tensors": [], "preprocessing": halved.to_json()})
    )
    path, data = pair.save(tmp_path), some_data(pair)
    stored = validate(path, split=data, latency_runs=0)
    given = validate(path, split=data, preprocessing=Preprocessing("array"), latency_runs=0)
    assert given.onnx_accuracy.hits == 90
    assert (
        stored.onnx_accuracy
        == validate(path, split=data, preprocessing=halved, latency_runs=0).onnx_accuracy
    )
    assert stored.onnx_accuracy.hits < 90


def test_a_well_formed_file_that_the_runtime_refuses_fails_with_its_reason(tmp_path):
    pair = make_pair()
    pair.model.graph.node[1].op_type = "Gemmmm"
    report = validate(pair.save(tmp_path), reference=pair.reference)
    assert not report.ok
    load = next(check for check in report.checks if check.name == "load")
    assert load.passed is False
    assert "Gemmmm" in load.sentence


def test_a_model_that_does_not_run_on_synthetic_inputs_needs_data(tmp_path):
    pair = make_pair(decoding="float")
    pair.model.graph.node[0].input[0] = "halves"
    pair.model.graph.node.insert(0, helper.make_node("Reshape", ["x", "shape"], ["halves"]))
    pair.model.graph.initializer.append(
        numpy_helper.from_array(np.array([5, -1], np.int64), "shape")
    )
    with pytest.raises(DataError, match="synthetic inputs, so give it real data"):
        validate(pair.save(tmp_path))


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_out_of_range_are_refused(tmp_path, label):
    pair = make_pair()
    data = some_data(pair)
    data.y[3] = label
    with pytest.raises(DataError, match=f"label {label} is out of range"):
        validate(pair.save(tmp_path), split=data)


def test_data_of_another_shape_are_refused(tmp_path):
    pair = make_pair()
    data = Split(
        Arrays("x", np.zeros((4, 9), np.float32)),
        np.arange(4),
        np.zeros(4, np.int64),
        Preprocessing("array"),
    )
    with pytest.raises(
        DataError, match=r"input 'x' has shape \['batch', 8\], but the data set gives \[4, 9\]"
    ):
        validate(pair.save(tmp_path), split=data)


def test_an_empty_data_set_is_refused(tmp_path):
    pair = make_pair()
    data = Split(
        Arrays("x", np.zeros((0, 8), np.float32)),
        np.arange(0),
        np.zeros(0, np.int64),
        Preprocessing("array"),
    )
    with pytest.raises(DataError, match="no sample"):
        validate(pair.save(tmp_path), split=data)


def test_a_preprocessing_that_cannot_be_used_is_refused(tmp_path):
    pair = make_pair(metadata=json.dumps({"format": 3, "tensors": [], "preprocessing": "{}"}))
    with pytest.raises(FileError, match="preprocessing"):
        validate(pair.save(tmp_path), split=some_data(pair))


def test_progress_ends_at_the_number_of_samples(tmp_path):
    pair, calls = make_pair(), []
    validate(
        pair.save(tmp_path),
        split=some_data(pair),
        batch_size=40,
        progress=lambda *done: calls.append(done),
        latency_runs=0,
    )
    assert calls == [(40, 100), (80, 100), (100, 100)]


def test_the_report_is_json_and_a_table(tmp_path):
    pair = make_pair()
    edit(pair.model, "2.weight.step").raw_data = np.float32(0.04).tobytes()
    report = validate(
        pair.save(tmp_path), reference=pair.reference, split=some_data(pair), latency_runs=2
    )
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["ok"] is False
    assert document["onnx_accuracy"]["total"] == 100
    console = Console(file=io.StringIO(), width=160)
    console.print(report.render())
    text = console.file.getvalue()
    assert "FAILED" in text
    assert "outputs" in text.splitlines()[-1]


def test_the_float_twin_holds_what_the_runtime_decoded_and_no_decoding_node():
    pair = make_pair()
    decoded = decode_model(pair.model)
    assert [node.op_type for node in decoded.proto.graph.node] == ["Gemm", "Relu", "Gemm"]
    for tensor in pair.tensors:
        assert np.array_equal(decoded.weights[tensor.name], tensor.dequantize())


def test_the_float_twin_decodes_inside_branches_too():
    weight = np.arange(-4, 5, dtype=np.int8).reshape(3, 3)
    levels = helper.make_tensor("levels", TensorProto.INT8, (3, 3), weight.tobytes(), raw=True)
    cast = helper.make_node("Cast", ["levels"], ["w"], to=TensorProto.FLOAT)
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    branches = {
        "then_branch": helper.make_graph(
            [cast, helper.make_node("MatMul", ["x", "w"], ["z"])], "then", [], [output]
        ),
        "else_branch": helper.make_graph(
            [helper.make_node("Identity", ["x"], ["z"])], "else", [], [output]
        ),
    }
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], **branches)],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [levels],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    decoded = decode_model(model)
    assert np.array_equal(decoded.weights["w"], weight.astype(np.float32))
    branch = next(
        attribute.g
        for attribute in decoded.proto.graph.node[0].attribute
        if attribute.name == "then_branch"
    )
    assert [node.op_type for node in branch.node] == ["MatMul"]


@pytest.mark.parametrize("dequantize", ["folded", "standard"])
@pytest.mark.parametrize("storage", ["dense", "sparse"])
def test_stored_and_decoded_weights_of_a_converted_file_are_pytorchs(tmp_path, storage, dequantize):
    pair, path = converted(tmp_path, storage=storage, dequantize=dequantize)
    report = validate(
        path, reference=pair.reference, tensors=pair.tensors, split=some_data(pair), latency_runs=0
    )
    assert report.ok, report.failures
    check = next(check for check in report.checks if check.name == "weights")
    assert (check.measured, check.limit) == (2, 2)


def one_level_changed(path: Path, *, checksum_too: bool) -> None:
    """The first level of the first weight, moved by one; as a clever forger also with the right
    checksum."""
    model = onnx.load(path)
    stored = next(
        tensor
        for tensor in model.graph.initializer
        if tensor.name == read_weights(path)[0].levels_name
    )
    content = bytearray(stored.raw_data)
    content[0] ^= 1
    stored.raw_data = bytes(content)
    if checksum_too:
        entry = next(entry for entry in model.metadata_props if entry.key == "ecqx_onnx")
        metadata = from_text(entry.value)
        onnx.save(model, path)
        metadata["tensors"][0][1] = compute_levels_crc(read_weights(path)[0].weight.tensor.levels)
        entry.value = json.dumps(metadata)
    onnx.save(model, path)


def test_a_changed_level_breaks_the_checksum_and_the_weights_check(tmp_path):
    pair, path = converted(tmp_path)
    one_level_changed(path, checksum_too=False)
    report = validate(path, tensors=pair.tensors, latency_runs=0)
    assert [check.name for check in report.failures] == ["contents", "weights"]
    assert all("checksum" in check.sentence for check in report.failures)


def test_a_changed_level_with_a_forged_checksum_differs_from_pytorch(tmp_path):
    pair, path = converted(tmp_path)
    one_level_changed(path, checksum_too=True)
    report = validate(
        path, reference=pair.reference, tensors=pair.tensors, split=some_data(pair), latency_runs=0
    )
    assert {"weights", "outputs"} <= {check.name for check in report.failures}
    sentence = next(check.sentence for check in report.failures if check.name == "weights")
    assert "'0.weight' differs from PyTorch's in 1 of 128 values" in sentence


def test_a_float_file_is_compared_weight_by_weight_too(tmp_path):
    pair = make_pair(decoding="float")
    assert validate(pair.save(tmp_path), tensors=pair.tensors, latency_runs=0).ok
    values = numpy_helper.to_array(edit(pair.model, "2.weight")).copy()
    values[0, 0] += np.float32(0.037)
    edit(pair.model, "2.weight").raw_data = values.tobytes()
    report = validate(pair.save(tmp_path), tensors=pair.tensors, latency_runs=0)
    assert "'2.weight' differs from PyTorch's in 1 of 80 values" in report.failures[0].sentence


def test_a_file_whose_weights_some_tool_has_folded_fails_with_advice(tmp_path):
    pair, path = converted(tmp_path)
    metadata = onnx.load(path).metadata_props[0].value
    inflated = make_pair(decoding="float", metadata=metadata).save(tmp_path, "inflated.onnx")
    report = validate(inflated, tensors=pair.tensors, latency_runs=0)
    assert "some tool has folded" in report.failures[0].sentence


def late_outlier(pair: Pair, *, factor: float) -> Split:
    """600 samples, number 500 of which is far larger than all that the bound was derived from."""
    data = some_data(pair, 600)
    data.source.x[500] *= factor
    return data


def test_a_late_batch_with_larger_rounding_is_judged_by_its_own_float64_result(tmp_path):
    pair = make_pair()
    data = late_outlier(pair, factor=3e4)
    report = validate(
        pair.save(tmp_path), reference=pair.reference, split=data, batch_size=64, latency_runs=0
    )
    assert report.ok, report.failures


def test_a_fault_that_only_a_late_batch_shows_is_found(tmp_path):
    pair = make_pair()
    relu = next(node for node in pair.model.graph.node if node.op_type == "Relu")
    relu.op_type = "Clip"
    relu.input.extend(["zero", "fifty"])
    for value, name in ((0, "zero"), (50, "fifty")):
        pair.model.graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
    data = late_outlier(pair, factor=1e3)
    report = validate(
        pair.save(tmp_path), reference=pair.reference, split=data, batch_size=64, latency_runs=0
    )
    assert verdicts(report)["outputs"] is False


def compared(*, margin: float, limit: float) -> Comparison:
    """One of ten samples gets another class; PyTorch's lead there is `margin`."""
    difference = Difference("y", 0.0, 0.0, Bound(limit / 8, 0.0))
    return Comparison(10, (), (difference,), Agreement(Proportion(9, 10), margin))


def test_another_class_is_forgiven_only_where_pytorchs_lead_is_rounding():
    assert check_agreement(compared(margin=1.9e-6, limit=1e-6), inexact=None).passed is True
    assert check_agreement(compared(margin=2.1e-6, limit=1e-6), inexact=None).passed is False
    assert (
        check_agreement(
            compared(margin=2.1e-6, limit=1e-6), inexact="activations are quantised"
        ).passed
        is None
    )


def test_an_accuracy_below_pytorchs_interval_is_a_failure():
    for hits, passed in ((85, True), (70, False)):
        comparison = Comparison(
            100, (), pytorch_accuracy=Proportion(90, 100), onnx_accuracy=Proportion(hits, 100)
        )
        assert check_accuracy(comparison).passed is passed


def test_quantised_activations_that_the_file_states_are_no_failure(tmp_path):
    metadata = {"format": 3, "tensors": []}
    stated = read_onnx(
        make_pair(metadata=json.dumps({**metadata, "activations": "int8"})).save(tmp_path, "a.onnx")
    )
    silent = read_onnx(make_pair(metadata=json.dumps(metadata)).save(tmp_path, "b.onnx"))
    assert check_operators(stated, Counter({"QLinearConv": 2})).passed is True
    assert check_operators(silent, Counter({"QLinearConv": 2})).passed is False
    assert check_operators(silent, Counter({"Conv": 2, "DequantizeLinear": 2})).passed is True


def test_the_float_twin_is_decoded_in_pieces_with_the_same_result(monkeypatch):
    pair = make_pair()
    whole = decode_model(pair.model)
    monkeypatch.setattr("ecqx_onnx.runtime.decoded_model.PIECE", 1)
    pieces = decode_model(pair.model)
    assert pieces.proto == whole.proto
