"""Packed weights in whole files: chosen where the file gets smaller, gone once loaded, and damage
is told."""

import contextlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from ecqx_onnx_converters import make_plan, match, read_weights, write
from ecqx_onnx_converters.storage.packed import stages

from ecqx_onnx import api
from ecqx_onnx.errors import FileError
from ecqx_onnx.inspection import inspect
from ecqx_onnx.verbs import pack
from tests.conversions import assert_says_the_same, convert, float_graph, quantize_model, session

INPUT = (torch.zeros(2, 3, 12, 12),)


class Net(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = torch.nn.Conv2d(3, channels, 3)
        self.second = torch.nn.Conv2d(channels, channels, 3)
        self.last = torch.nn.Linear(channels * 8 * 8, 10)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.last(x.flatten(1))


def made(channels, **options):
    torch.manual_seed(0)
    net = Net(channels).eval()
    tensors = quantize_model(net, bits=3, **options)
    return net, tensors, float_graph(net, INPUT)


@pytest.fixture(scope="module")
def large():
    return made(24)


@pytest.mark.parametrize("dequantize", ["folded", "standard"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_packed_file_says_what_the_network_says(dequantize, per_channel, tmp_path):
    net, tensors, graph = made(8, per_channel=per_channel)
    conversion = convert(graph, tensors, tmp_path, storage="packed", dequantize=dequantize)
    assert {stored.storage for stored in conversion.stored} == {"packed"}
    assert_says_the_same(conversion, net, (torch.randn(2, 3, 12, 12),))


def test_codebooks_are_packed_as_well(tmp_path):
    net, tensors, graph = made(8, codebook=True)
    assert_says_the_same(
        convert(graph, tensors, tmp_path, storage="packed"), net, (torch.randn(2, 3, 12, 12),)
    )


def test_external_data_holds_packed_weights(large, tmp_path):
    _, tensors, graph = large
    plan = make_plan(graph, match(graph.weights, tensors), storage="packed")
    write(plan, tmp_path / "x.onnx", external_data=True)
    assert all(stored.crc_ok for stored in read_weights(tmp_path / "x.onnx"))
    session(tmp_path / "x.onnx", 99)


def test_the_file_as_a_whole_decides(large, tmp_path):
    """Where packing saves more than its decoder takes, auto packs; where it doesn't, auto leaves
    the weights dense."""
    sizes = {}
    for name, (_, tensors, graph) in (("large", large), ("small", made(2))):
        for storage in ("auto", "packed", "dense"):
            (tmp_path / name / storage).mkdir(parents=True)
            conversion = convert(graph, tensors, tmp_path / name / storage, storage=storage)
            sizes[name, storage] = conversion.report.nbytes
            if storage == "auto":
                kinds = {stored.storage for stored in conversion.stored}
                assert kinds == ({"packed"} if name == "large" else {"dense"})
        assert sizes[name, "auto"] <= min(sizes[name, "packed"], sizes[name, "dense"])


def test_auto_packs_a_weight_that_would_be_smaller_dense_where_that_saves_a_function(tmp_path):
    """The keyword spotter's smallest weights, 4 bit with few zeros, are such."""
    checkpoint = Path(__file__).parents[1] / "models" / "kws_dscnn_fsdd_4bit.pt"
    auto, packed = (
        api.convert(checkpoint, tmp_path / f"{way}.onnx", storage=way).nbytes
        for way in ("auto", "packed")
    )
    assert auto <= packed


def test_nothing_of_the_decoder_is_left_after_loading(large, tmp_path):
    _, tensors, graph = large
    conversion = convert(graph, tensors, tmp_path, storage="packed")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(str(conversion.path), settings, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node}
    assert left <= {
        "Conv",
        "FusedConv",
        "Gemm",
        "FusedGemm",
        "Reshape",
        "Flatten",
        "Relu",
        "ReorderInput",
        "ReorderOutput",
    }


def test_a_file_of_stages_passes_validate_and_unpacks(large, tmp_path, monkeypatch):
    net, tensors, graph = large
    monkeypatch.setattr(stages, "STAGED_FROM", 1)
    monkeypatch.setattr(stages, "SLICED_FROM", 1 << 10)
    monkeypatch.setattr(stages, "MOST_AT_ONCE", 1 << 10)
    conversion = convert(graph, tensors, tmp_path, storage="packed")
    operators = {node.op_type for node in onnx.load(conversion.path).graph.node}
    assert operators >= {"Scan", "Concat"}
    assert_says_the_same(conversion, net, (torch.randn(2, 3, 12, 12),))
    report = api.validate(conversion.path, latency_runs=0)
    assert report.ok
    assert {check.name for check in report.checks} >= {"weights"}
    pack.unpack(conversion.path, tmp_path / "dense.onnx")
    left = {node.op_type for node in onnx.load(tmp_path / "dense.onnx").graph.node}
    assert not left & {
        "Scan",
        "ConstantOfShape",
        "Shape",
        "Mul",
        "Levels",
        "D",
        "V",
        "Split",
        "Concat",
    }


def test_a_flipped_bit_is_told(large, tmp_path):
    _, tensors, graph = large
    path = convert(graph, tensors, tmp_path, storage="packed").path
    generator = np.random.default_rng(0)
    for _ in range(8):
        model = onnx.load(path)
        payload = max(
            model.graph.initializer,
            key=lambda tensor: len(tensor.raw_data) * (tensor.data_type == 2),
        )
        data = bytearray(payload.raw_data)
        data[generator.integers(len(data) // 2)] ^= 1 << int(generator.integers(8))
        payload.raw_data = bytes(data)
        onnx.save(model, tmp_path / "flipped.onnx")
        with contextlib.suppress(FileError):
            assert not all(stored.crc_ok for stored in read_weights(tmp_path / "flipped.onnx"))
        assert inspect(tmp_path / "flipped.onnx").warnings


def test_inspect_counts_a_tensor_s_own_stretch_of_the_stream(large, tmp_path):
    _, tensors, graph = large
    conversion = convert(graph, tensors, tmp_path, storage="packed")
    seen = inspect(conversion.path)
    assert sum(seen.parts.values()) == seen.nbytes
    for row, written in zip(seen.tensors, conversion.report.tensors, strict=True):
        assert row.storage == "packed"
        assert row.nbytes == pytest.approx(row.entropy * np.prod(row.shape) / 8, rel=0.15, abs=40)
        assert row.nbytes <= written.nbytes


def test_a_simplifier_that_folds_the_decoder_is_recognised(large, tmp_path):
    _, tensors, graph = large
    conversion = convert(graph, tensors, tmp_path, storage="packed")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.optimized_model_filepath = str(tmp_path / "inflated.onnx")
    onnxruntime.InferenceSession(str(conversion.path), settings, providers=["CPUExecutionProvider"])
    inflated = onnx.load(tmp_path / "inflated.onnx")
    whole = onnx.load(conversion.path)
    inflated.metadata_props.extend(whole.metadata_props)
    onnx.save(inflated, tmp_path / "inflated.onnx")
    seen = inspect(tmp_path / "inflated.onnx")
    assert seen.inflated
    assert "INFLATED" in seen.warnings[0]
