"""convert --floats float16: half the bytes of what stays float, the same check of everything
else."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from ecqx_onnx_converters import FloatGraph, Matching
from ecqx_onnx_converters.graph.graph import NARROW
from ecqx_onnx_converters.passes.float16 import (
    FEWEST,
    Halved,
    round_parameters,
    round_to_float16,
    store_float16,
)
from ecqx_onnx_converters.passes.work import Work
from onnx import TensorProto, numpy_helper
from typer.testing import CliRunner

from ecqx_onnx import api
from ecqx_onnx.cli import app
from ecqx_onnx.errors import OptionError
from tests.conversions import quantize_model, session


class Net(torch.nn.Module):
    """Two quantised layers; the last one and every bias stay float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 32, 3)
        self.norm = torch.nn.BatchNorm2d(32)
        self.hidden = torch.nn.Linear(32, 64)
        self.last = torch.nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.last(torch.relu(self.hidden(features)))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.weight.uniform_(0.5, 2)
        net.norm.bias.normal_()
    last = net.last.weight.detach().clone()
    quantize_model(net)
    with torch.no_grad():
        net.last.weight.copy_(last)
    return net


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("floats")
    example = torch.zeros(2, 3, 8, 8)
    reports = {
        floats: api.convert(model, folder / f"{floats}.onnx", example=example, floats=floats)
        for floats in ("float32", "float16")
    }
    return folder, reports


def test_what_stays_float_takes_half_the_bytes(files):
    folder, reports = files
    proto = onnx.load(folder / "float16.onnx")
    halves = [
        tensor for tensor in proto.graph.initializer if tensor.data_type == TensorProto.FLOAT16
    ]
    assert sorted(int(np.prod(tensor.dims)) for tensor in halves) == [
        32,
        96,
        640,
    ]  # a convolution's steps, two biases in one, and the last weight; not its 10 biases
    assert [node.op_type for node in proto.graph.node].count("Cast") == 2
    saved = reports["float32"].nbytes - reports["float16"].nbytes
    assert (
        2 * (32 + 96 + 640) - 250 < saved < 2 * (32 + 96 + 640)
    )  # less casts, a Split, and DequantizeHalf beside Dequantize
    assert any(
        "3 float parameters (736 numbers) and 32 steps" in note for note in reports["float16"].notes
    )


def test_float32_is_the_default_and_leaves_no_trace(model, files, tmp_path):
    folder, _ = files
    api.convert(model, tmp_path / "default.onnx", example=torch.zeros(2, 3, 8, 8))
    assert (tmp_path / "default.onnx").read_bytes() == (folder / "float32.onnx").read_bytes()


def test_the_cast_folds_while_loading(files, tmp_path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        str(files[0] / "float16.onnx"), options, providers=["CPUExecutionProvider"]
    )
    assert not {"Cast", "Dequantize"} & {
        node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node
    }


def test_validate_takes_the_rounding_out_and_keeps_its_bound(model, files):
    folder, _ = files
    reports = {
        floats: api.validate(
            folder / f"{floats}.onnx", against=model, input_shape=(3, 8, 8), latency_runs=0
        )
        for floats in ("float32", "float16")
    }
    assert all(report.ok for report in reports.values())
    checks = {
        floats: {check.name: check for check in report.checks} for floats, report in reports.items()
    }
    assert checks["float16"]["outputs"].limit == pytest.approx(
        3 * checks["float32"]["outputs"].limit
    )
    assert "float16 parameters move outputs by" in checks["float16"]["outputs"].sentence
    assert (
        reports["float16"].largest_difference > 3 * checks["float32"]["outputs"].limit
    )  # what it would have failed by


def test_steps_are_rounded_before_activations_are_quantised(model, tmp_path):
    """Biases are multiples of weight step times activation scale: with other steps they would be
    off by the rounding."""
    from ecqx_onnx.data import Dataset
    from ecqx_onnx.preprocessing import Preprocessing

    x = np.random.default_rng(0).standard_normal((32, 3, 8, 8)).astype(np.float32)
    data = Dataset.from_arrays(
        "x", {"x": x, "y": np.arange(32) % 10}, preprocessing=Preprocessing("array")
    )
    example = torch.zeros(2, 3, 8, 8)
    api.convert(
        model,
        tmp_path / "q.onnx",
        example=example,
        activations="int8",
        calibration=data,
        floats="float16",
    )
    assert api.validate(
        tmp_path / "q.onnx", against=model, input_shape=(3, 8, 8), latency_runs=0
    ).ok
    proto = onnx.load(tmp_path / "q.onnx")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    scales = [
        constants[node.input[1]] for node in proto.graph.node if node.op_type == "DequantizeLinear"
    ]
    vectors = [scale for scale in scales if scale.ndim and scale.size == 32]
    steps = [scale for scale in vectors if np.array_equal(scale, scale.astype(np.float16))]
    assert len(steps) == 1
    ratios = [
        scale / steps[0] for scale in vectors if scale is not steps[0]
    ]  # a bias has the step times the input's scale
    assert all(np.ptp(ratio) <= 2e-7 * ratio.max() for ratio in ratios)


@pytest.mark.parametrize("kind", ["bias", "weight"])
def test_validate_still_sees_a_fault_smaller_than_the_rounding(model, files, kind, tmp_path):
    """One parameter off by a single unit in the last place of float16, or by a level."""
    proto = onnx.load(files[0] / "float16.onnx")
    kinds = {TensorProto.FLOAT16} if kind == "bias" else NARROW
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.data_type in kinds)
    tensor.raw_data = bytes(
        [tensor.raw_data[0] ^ (2 if kind == "bias" else 1), *tensor.raw_data[1:]]
    )
    onnx.save(proto, tmp_path / "wrong.onnx")
    report = api.validate(
        tmp_path / "wrong.onnx", against=model, input_shape=(3, 8, 8), latency_runs=0
    )
    assert "outputs" in {check.name for check in report.failures}


def test_a_parameter_that_float16_would_spoil_stays_float32():
    ordinary = np.linspace(-2, 2, FEWEST, dtype=np.float32)
    for linear in (False, True):
        assert round_to_float16(ordinary, linear=linear) is not None
        assert (
            round_to_float16(ordinary[:-1], linear=linear) is None
        )  # the Cast would take more than it saves
        for spoiler in (1e5, np.inf):  # past float16's largest
            assert round_to_float16(np.append(ordinary, np.float32(spoiler)), linear=linear) is None
        assert (
            round_to_float16(np.full(FEWEST, 1e-6, np.float32), linear=linear) is None
        )  # below the normal range, 3 % off
    assert (
        round_to_float16(np.append(ordinary, np.float32(1e-6)), linear=True) is not None
    )  # beside 2 it is nothing in a sum,
    assert (
        round_to_float16(np.append(ordinary, np.float32(1e-6)), linear=False) is None
    )  # but not under a root


def test_rounding_is_no_further_than_it_says():
    values = np.random.default_rng(0).standard_normal(10000).astype(np.float32)
    graph = FloatGraph.from_model(_one(values))
    work = Work(graph, Matching((), ()))
    stored = store_float16(work)
    halved = stored.graph
    (report,) = stored.find_notes(Halved)
    back = numpy_helper.to_array(halved.to_model().graph.initializer[0]).astype(np.float32)
    np.testing.assert_array_equal(back, _values(round_parameters(work).graph))
    assert np.abs(back - values).max() / np.abs(values).max() == pytest.approx(report.rounding)
    assert report.rounding <= 2.0**-11
    assert np.array_equal(
        session(halved.to_model().SerializeToString(), 0).run(
            None, {"x": np.zeros(10000, np.float32)}
        )[0],
        back,
    )


def _values(graph: FloatGraph) -> np.ndarray:
    return numpy_helper.to_array(graph.to_model().graph.initializer[0])


def _one(values: np.ndarray) -> onnx.ModelProto:
    """y = x + values"""
    node = onnx.helper.make_node("Add", ["x", "p"], ["y"])
    infos = [
        onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, values.shape) for name in "xy"
    ]
    graph = onnx.helper.make_graph(
        [node], "graph", infos[:1], infos[1:], [numpy_helper.from_array(values, "p")]
    )
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8
    )


def test_another_type_is_refused_in_one_sentence(model, tmp_path):
    with pytest.raises(OptionError, match="choose float32 or float16"):
        api.convert(model, tmp_path / "out.onnx", example=torch.zeros(2, 3, 8, 8), floats="float8")
    result = CliRunner().invoke(
        app, ["convert", "absent.pt", str(tmp_path / "out.onnx"), "--floats", "bfloat16"]
    )
    assert result.exit_code == 2
