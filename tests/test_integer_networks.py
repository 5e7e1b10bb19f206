"""Whole networks on integer kernels: what runs on floats says why, in every target that takes them;
and what `validate` says."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from ecqx_onnx_converters.targets import TARGETS
from rich.console import Console
from torch import nn

from ecqx_onnx import api
from ecqx_onnx.data import Dataset
from ecqx_onnx.inputs.onnx_file import read_onnx
from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.runtime.float_activations import remove_quantization
from ecqx_onnx.runtime.latency import Latency
from ecqx_onnx.runtime.sessions import count_executed_operators, open_session, run
from ecqx_onnx.sources.loading import load_factory
from ecqx_onnx.validation.checks import check_latency
from ecqx_onnx.validation.devices import DeviceTable
from ecqx_onnx.validation.report import ValidationReport

ROOT = Path(__file__).parents[1]
FLOAT_KERNELS = {
    "Conv",
    "FusedConv",
    "Gemm",
    "FusedGemm",
    "MatMul",
    "Add",
    "Sum",
    "Mul",
    "Relu",
    "Clip",
    "DequantizeLinear",
}
FLOAT_KERNELS |= {
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "ReduceMean",
    "BatchNormalization",
    "FusedMatMul",
}


def mobilenet() -> nn.Module:
    from ecqx_onnx.quantization.relevance.zennit_import import import_zennit

    import_zennit()  # helps torchvision beside a CPU-only torch
    from torchvision.models import mobilenet_v2

    return mobilenet_v2(weights=None)


NETWORKS = {
    "lenet5": (lambda: load_factory(f"{ROOT}/models/lenet5.py:lenet5").model, (1, 28, 28)),
    "resnet20": (lambda: load_factory(f"{ROOT}/models/resnet20.py:resnet20").model, (3, 32, 32)),
    "kws_dscnn": (lambda: load_factory(f"{ROOT}/models/kws_dscnn.py:kws_dscnn").model, (1, 49, 40)),
    "mobilenet_v2": (mobilenet, (3, 32, 32)),
}
WANTED = {
    "lenet5": {"QLinearConv": 2, "QGemm": 3},
    "resnet20": {"QLinearConv": 19, "QLinearAdd": 9, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "kws_dscnn": {"QLinearConv": 9, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "mobilenet_v2": {
        "QLinearConv": 52,
        "QLinearAdd": 10,
        "QLinearGlobalAveragePool": 1,
        "QGemm": 1,
    },
}


def prepared(name: str) -> tuple[nn.Module, Dataset]:
    """Random weights with BatchNorm statistics that fit them, and the data that they come from."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make()
    x = torch.randn(16, *shape)
    with torch.no_grad():
        model.train()(x)
    arrays = {
        "x_train": x.numpy(),
        "y_train": np.arange(16) % 10,
        "x_test": x.numpy(),
        "y_test": np.arange(16) % 10,
    }
    return model.eval(), Dataset.from_arrays("random", arrays, preprocessing=Preprocessing("array"))


@pytest.mark.parametrize("name", NETWORKS)
def test_no_operator_of_the_reference_networks_runs_on_floats_without_a_reason(name, tmp_path):
    model, dataset = prepared(name)
    checkpoint = api.as_checkpoint(model, example=torch.zeros(2, *NETWORKS[name][1]), bits=4)
    report = api.convert(checkpoint, tmp_path / "out.onnx", activations="int8", calibration=dataset)
    x, _ = next(dataset.test.batches(1))
    executed = count_executed_operators(tmp_path / "out.onnx", (x,))
    assert {operator: executed[operator] for operator in WANTED[name]} == WANTED[name]
    stated = {node.operator for node in report.stays if node.reason}
    assert FLOAT_KERNELS & set(executed) <= stated
    assert stated == (
        {"BatchNormalization"} if name == "kws_dscnn" else set()
    )  # it stands before the first convolution


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A network with BatchNorm, a residual sum and a pooling, as a checkpoint; and its data."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.linear = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.norm(self.conv1(x)))
            return self.linear(torch.relu(self.conv2(x) + x).mean((2, 3)))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(32, 1, 8, 8)
    with torch.no_grad():
        model.train()(x)
    path = tmp_path_factory.mktemp("small") / "model.pt"
    from ecqx_onnx.checkpoint import save

    save(api.as_checkpoint(model.eval(), example=x, bits=4), path)
    return path, Dataset.from_arrays(
        "x", {"x": x.numpy(), "y": np.arange(32) % 3}, preprocessing=Preprocessing("array")
    )


@pytest.mark.parametrize(
    "target", [name for name, target in TARGETS.items() if not target.no_integers]
)
def test_every_target_that_takes_integers_gets_the_same_ones(small, target, tmp_path):
    path, dataset = small
    out = tmp_path / f"out{TARGETS[target].suffix}"
    api.convert(path, out, activations="int8", calibration=dataset, target=target)
    api.convert(path, tmp_path / "reference.onnx", activations="int8", calibration=dataset)
    x, _ = next(dataset.test.batches(4))
    # The same integers in another order of addition are the same integers; only the float ends may
    # round differently.
    expected = run(open_session(tmp_path / "reference.onnx"), (x,))[0]
    np.testing.assert_allclose(run(open_session(out), (x,))[0], expected, rtol=1e-5, atol=1e-5)
    if out.suffix == ".onnx":
        executed = count_executed_operators(out, (x,))
        assert executed["QLinearConv"] == 2
        assert executed["QLinearAdd"] == executed["QGemm"] == 1
        assert (
            max(entry.version for entry in onnx.load(out).opset_import if not entry.domain)
            <= TARGETS[target].max_opset
        )


def test_validation_knows_that_activations_are_quantised_on_purpose(small, tmp_path):
    path, dataset = small
    api.convert(path, tmp_path / "out.onnx", activations="int8", calibration=dataset)
    report = api.validate(tmp_path / "out.onnx", against=path, data=dataset, latency_runs=2)
    checks = {check.name: check for check in report.checks}
    assert checks["operators"].passed
    assert "activations are quantised, as the file says" in checks["operators"].sentence
    assert checks["weights"].passed
    assert checks["weights"].measured == 3
    assert checks["optimisation"].passed is None
    assert report.latency is not None


@pytest.mark.parametrize(("ratio", "told"), [(0.99, False), (1.0, True), (2.1, True)])
def test_integer_kernels_that_are_no_faster_are_told_and_fail_nothing(
    small, tmp_path, ratio, told, monkeypatch
):
    from ecqx_onnx.validation import validator

    monkeypatch.setattr(
        validator, "measure_latency", lambda *_, **__: Latency(1e-3 * ratio, 1e-3, ratio, 50)
    )
    path, dataset = small
    api.convert(path, tmp_path / "int8.onnx", activations="int8", calibration=dataset)
    report = api.validate(tmp_path / "int8.onnx", against=path, data=dataset)
    checks = {check.name: check for check in report.checks}
    assert report.ok
    assert ("latency" in checks) == told
    if told:
        assert checks["latency"].passed is None
        assert checks["latency"].measured == ratio
        assert "float activations: convert without --activations int8" in checks["latency"].sentence
    api.convert(path, tmp_path / "float.onnx")
    assert "latency" not in {
        check.name
        for check in api.validate(tmp_path / "float.onnx", against=path, data=dataset).checks
    }


def test_the_table_of_devices_says_where_integer_kernels_are_no_faster_but_an_emulator_says_nothing(
    small, tmp_path
):
    path, dataset = small
    api.convert(path, tmp_path / "int8.onnx", activations="int8", calibration=dataset)
    file, slow = read_onnx(tmp_path / "int8.onnx"), Latency(2e-3, 1e-3, 2.0, 50)
    assert check_latency(file, slow, runtime="onnxruntime 1.23.2, aarch64, emulated") is None
    check = check_latency(file, slow, runtime="onnxruntime-web 1.24.3")
    report = ValidationReport(
        "int8.onnx", "onnxruntime-web 1.24.3", 1, 1, (check,), latency=slow, device="web"
    )
    console = Console(width=300, file=io.StringIO())
    console.print(DeviceTable((report,), ()).render())
    assert (
        "web: latency: integer kernels took 2.00 x the float model's time for one sample here"
        in console.file.getvalue()
    )


def test_latency_is_held_against_a_float_model(small, tmp_path):
    path, dataset = small
    api.convert(path, tmp_path / "out.onnx", activations="int8", calibration=dataset)
    api.convert(path, tmp_path / "float.onnx")
    from ecqx_onnx.runtime.decoded_model import decode_model

    x, _ = next(dataset.test.batches(4))
    decoded = decode_model(onnx.load(tmp_path / "out.onnx")).serialize()
    assert decoded is not None
    kernels, wanted = (
        count_executed_operators(decoded, (x,)),
        count_executed_operators(tmp_path / "float.onnx", (x,)),
    )
    assert not any(kernel.startswith("Q") or kernel == "DequantizeLinear" for kernel in kernels)
    assert kernels["Conv"] == wanted["Conv"]


def test_a_float_model_is_its_own_float_twin():
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[N] x) => (float[N] y) { y = Relu(x) }'
    )
    assert remove_quantization(model) is model


def test_int8_with_a_weight_that_lost_its_integers_is_told(small, tmp_path):
    """The planted error: one integer of one weight."""
    path, dataset = small
    api.convert(path, tmp_path / "out.onnx", activations="int8", calibration=dataset)
    model = onnx.load(tmp_path / "out.onnx")
    largest = max(
        (t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT4),
        key=lambda t: len(t.raw_data),
    )
    largest.raw_data = bytes([largest.raw_data[0] ^ 1]) + largest.raw_data[1:]
    onnx.save(model, tmp_path / "out.onnx")
    report = api.validate(tmp_path / "out.onnx", against=path, data=dataset, latency_runs=0)
    assert not report.ok


def test_eight_bits_without_training_have_a_step_for_each_channel():
    """A small channel beside a large one would have few levels left otherwise."""
    torch.manual_seed(0)
    model = nn.Linear(64, 4)
    with torch.no_grad():
        model.weight[0] *= 100
    before = model.weight.detach().numpy().copy()
    (tensor,) = api.as_checkpoint(model.eval(), example=torch.zeros(2, 64), bits=8).tensors
    assert tensor.meaning.axis == 0
    error = np.abs(tensor.dequantize() - before).max(axis=1)
    assert (error <= 0.01 * np.abs(before).max(axis=1)).all()
