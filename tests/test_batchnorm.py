"""BatchNormalization behind a quantised product goes into its scales: the integers stay,
onnxruntime says the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import pytest
import torch
from ecqx_onnx_converters import FloatGraph, make_plan, match, read_weights, write
from ecqx_onnx_converters.passes.batchnorm import BatchNorm, fold_batchnorms
from ecqx_onnx_converters.passes.work import Work
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ecqx_onnx import api
from ecqx_onnx.tensors import Codebook, QuantTensor, Scale
from ecqx_onnx.validation import equivalence
from ecqx_onnx.verbs import pack
from tests.conversions import FLOAT32_SUMS, quantize_model, session

FLOAT = TensorProto.FLOAT


@dataclass(frozen=True)
class Product:
    """A layer in front of BatchNormalization. weight: its shape; x: the input's; channels: of the
    output."""

    operator: str
    weight: tuple[int, ...]
    x: tuple[int | str, ...]
    channels: int
    attributes: dict
    per_channel: tuple[int, ...] | None = None  # shape of the step


PRODUCTS = {
    "Conv": Product("Conv", (8, 4, 3, 3), ("n", 4, 6, 6), 8, {}),
    "Conv1d with groups, a step per channel": Product(
        "Conv", (8, 2, 3), ("n", 4, 6), 8, {"group": 2}, (8, 1, 1)
    ),
    "ConvTranspose": Product("ConvTranspose", (4, 8, 3, 3), ("n", 4, 6, 6), 8, {}),
    "ConvTranspose with groups": Product("ConvTranspose", (4, 3, 3), ("n", 4, 6), 6, {"group": 2}),
    "Gemm": Product("Gemm", (8, 12), ("n", 12), 8, {"transB": 1}),
    "Gemm, weight as [in, out]": Product("Gemm", (12, 8), ("n", 12), 8, {}, (1, 8)),
    "MatMul": Product("MatMul", (12, 8), ("n", 12), 8, {}),
}


def levels(shape: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(1).integers(-3, 4, shape).astype(np.int8)


def network(
    product: Product, *, bias: bool, gamma: np.ndarray | None = None, codebook: bool = False
) -> tuple[ModelProto, QuantTensor]:
    generator = np.random.default_rng(2)
    values = np.array([0.0, 0.3, 0.9, 1.1, -0.7, -0.2, -0.1], np.float32)
    step = generator.random(product.per_channel or (), dtype=np.float32) + np.float32(0.1)
    tensor = QuantTensor("w", levels(product.weight), Codebook(values) if codebook else Scale(step))
    channels = product.channels
    constants = {
        "w": tensor.dequantize(),
        "gamma": generator.random(channels, dtype=np.float32) + np.float32(0.5)
        if gamma is None
        else gamma,
        "beta": generator.standard_normal(channels).astype(np.float32),
        "mean": generator.standard_normal(channels).astype(np.float32),
        "variance": generator.random(channels, dtype=np.float32) + np.float32(0.1),
    }
    inputs = ["x", "w"]
    if bias:
        constants["b"] = generator.standard_normal(channels).astype(np.float32)
        inputs.append("b")
    nodes = [
        helper.make_node(product.operator, inputs, ["h"], **product.attributes),
        helper.make_node(
            "BatchNormalization", ["h", "gamma", "beta", "mean", "variance"], ["y"], epsilon=1e-3
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", FLOAT, product.x)],
        [helper.make_tensor_value_info("y", FLOAT, ["n", "c", "k", "l"][: len(product.x)])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8
    ), tensor


def operators(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def assert_same(original: ModelProto, path, shape: Sequence[int | str]) -> None:
    x = (
        np.random.default_rng(3)
        .standard_normal([5 if isinstance(n, str) else n for n in shape])
        .astype(np.float32)
    )
    for level in (0, 99):
        expected = session(original.SerializeToString(), level).run(None, {"x": x})[0]
        found = session(path, level).run(None, {"x": x})[0]
        assert np.abs(found - expected).max() <= FLOAT32_SUMS * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("codebook", [False, True])
@pytest.mark.parametrize(
    ("name", "bias"),
    [*((name, False) for name in PRODUCTS), *((n, True) for n in PRODUCTS if n != "MatMul")],
)
def test_the_factor_goes_into_the_scales_and_the_integers_stay(name, bias, codebook, tmp_path):
    product = PRODUCTS[name]
    model, tensor = network(product, bias=bias, codebook=codebook)
    graph = FloatGraph.from_model(model)
    work = fold_batchnorms(Work(graph, match(graph.weights, [tensor])))
    assert [note.weight for note in work.find_notes(BatchNorm)] == ["w"]
    assert "BatchNormalization" not in operators(work.graph.proto)
    np.testing.assert_array_equal(work.matching.found[0].tensor.levels, tensor.levels)
    assert work.matching.found[0].sources == ("w",)
    write(make_plan(work.graph, work.matching), tmp_path / "out.onnx")
    (stored,) = read_weights(tmp_path / "out.onnx")
    np.testing.assert_array_equal(stored.weight.tensor.levels, tensor.levels)
    assert_same(model, tmp_path / "out.onnx", product.x)


def test_a_negative_factor_turns_the_signs_of_its_channel_and_a_zero_clears_it(tmp_path):
    product = PRODUCTS["Conv"]
    gamma = np.array([1, -1, 0, 2, 1, -0.5, 1, 1], np.float32)
    model, tensor = network(product, bias=True, gamma=gamma)
    graph = FloatGraph.from_model(model)
    work = fold_batchnorms(Work(graph, match(graph.weights, [tensor])))
    (folded,) = work.matching.found
    signs = np.sign(gamma).astype(np.int8).reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(folded.tensor.levels, tensor.levels * signs)
    assert (folded.tensor.meaning.step > 0).all()
    write(make_plan(work.graph, work.matching), tmp_path / "out.onnx")
    assert_same(model, tmp_path / "out.onnx", product.x)


def change(model: ModelProto, what: str) -> None:
    """Something that forbids folding."""
    graph = model.graph
    if what == "training":
        graph.node[1].attribute.append(helper.make_attribute("training_mode", 1))
        graph.node[1].output.extend(["running_mean", "running_variance"])
    elif what == "read elsewhere":
        graph.output.append(helper.make_tensor_value_info("h", FLOAT, ["n", 8, "k", "l"]))
    elif what == "shared":
        graph.node.append(helper.make_node("Identity", ["w"], ["v"]))
        graph.output.append(helper.make_tensor_value_info("v", FLOAT, [8, 4, 3, 3]))
    elif what == "rounded":
        graph.node[1].output[0] = "z"
        graph.node.append(helper.make_node("Round", ["z"], ["y"]))
    elif what == "no product":
        graph.node[0].CopyFrom(helper.make_node("Concat", ["x", "x"], ["h"], axis=1))
    elif what == "varying":
        graph.node.insert(0, helper.make_node("ReduceMean", ["x", "axes"], ["flat"], keepdims=0))
        graph.node.insert(1, helper.make_node("Concat", ["flat", "flat"], ["gamma"], axis=0))
        graph.initializer.append(numpy_helper.from_array(np.array([0, 2, 3]), "axes"))
        del graph.initializer[[tensor.name for tensor in graph.initializer].index("gamma")]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("training", "training mode"),
        ("read elsewhere", "something else reads"),
        ("shared", "feeds other nodes"),
        ("rounded", "a whole level"),
        ("no product", "no product"),
        ("varying", "no float32 constants"),
    ],
)
def test_what_cannot_be_folded_stays_and_says_why(what, reason):
    model, tensor = network(PRODUCTS["Conv"], bias=True)
    change(model, what)
    graph = FloatGraph.from_model(model)
    matching = match(graph.weights, [tensor])
    work = fold_batchnorms(Work(graph, matching))
    (note,) = work.find_notes(BatchNorm)
    assert note.weight is None
    assert reason in note.reason
    assert note.sentence == f"BatchNormalization '{note.name}' stays: {note.reason}"
    assert work.graph is graph
    assert work.matching is matching


def test_a_level_of_minus_128_under_a_negative_factor_stays():
    model, tensor = network(PRODUCTS["Gemm"], bias=True, gamma=np.full(8, -1, np.float32))
    lowest = tensor.levels.copy()
    lowest[0, 0] = -128
    tensor = replace(tensor, levels=lowest)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(tensor.dequantize(), "w"))
    graph = FloatGraph.from_model(model)
    work = fold_batchnorms(Work(graph, match(graph.weights, [tensor])))
    assert "-128" in work.notes[0].reason


def test_a_product_of_three_dimensions_keeps_its_batchnorm():
    """Its channels are the second of three dimensions, not the product's columns."""
    product = Product("MatMul", (12, 8), ("n", 8, 12), 8, {})
    model, tensor = network(product, bias=False)
    graph = FloatGraph.from_model(model)
    work = fold_batchnorms(Work(graph, match(graph.weights, [tensor])))
    assert "another axis" in work.notes[0].reason


def test_the_rest_of_a_model_survives_the_edit():
    """Subgraphs, sub-byte tensors, functions, metadata and imports are what they were."""
    model, tensor = network(PRODUCTS["Conv"], bias=True)
    model.graph.initializer.append(
        TensorProto(name="q", data_type=TensorProto.INT4, dims=[3], raw_data=b"\x21\x03")
    )
    branch = helper.make_graph(
        [helper.make_node("Cast", ["q"], ["c"], to=TensorProto.INT32)],
        "b",
        [],
        [helper.make_tensor_value_info("c", 6, [3])],
    )
    condition = numpy_helper.from_array(np.array(True), "condition")
    model.graph.initializer.append(condition)
    model.graph.node.append(
        helper.make_node("If", ["condition"], ["z"], then_branch=branch, else_branch=branch)
    )
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.INT32, [3]))
    model.metadata_props.add(key="author", value="somebody")
    model.functions.append(
        helper.make_function(
            "mine",
            "F",
            ["a"],
            ["b"],
            [helper.make_node("Relu", ["a"], ["b"])],
            [helper.make_opsetid("", 21)],
        )
    )
    model.opset_import[0].version = 21
    model.opset_import.append(helper.make_opsetid("mine", 1))
    model.ir_version = 10
    graph = FloatGraph.from_model(model)
    work = fold_batchnorms(Work(graph, match(graph.weights, [tensor])))
    assert work.notes[0].weight == "w"
    after = work.graph.proto
    assert [entry.value for entry in after.metadata_props] == ["somebody"]
    assert [function.name for function in after.functions] == ["F"]
    assert list(after.opset_import) == list(model.opset_import)
    assert next(t for t in after.graph.initializer if t.name == "q").raw_data == b"\x21\x03"
    inner = next(node for node in after.graph.node if node.op_type == "If").attribute[0].g
    assert [node.op_type for node in inner.node] == ["Cast"]
    assert [value.name for value in after.graph.output] == ["y", "z"]
    onnx.checker.check_model(work.graph.to_model())


class Net(torch.nn.Module):
    """The exporter leaves BatchNormalization behind a product that is no layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(64, 32))
        self.norm = torch.nn.BatchNorm1d(32)
        self.last = torch.nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(x @ self.weight)))


def test_convert_folds_what_the_exporter_left_and_validate_agrees(tmp_path):
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
        model.norm.weight.uniform_(-1, 2)
        model.norm.bias.normal_()
    quantize_model(model)
    report = api.convert(model, tmp_path / "out.onnx", example=torch.zeros(2, 64))
    assert "BatchNormalization" not in operators(onnx.load(tmp_path / "out.onnx"))
    assert [row.rescaled for row in report.tensors] == [True, False]
    checked = api.validate(tmp_path / "out.onnx", against=model, input_shape=(64,), latency_runs=0)
    assert checked.ok, checked.failures


def dequantized_convolution() -> ModelProto:
    """Conv on int8 behind DequantizeLinear, then BatchNormalization."""
    model, tensor = network(Product("Conv", (64, 32, 3, 3), ("n", 32, 6, 6), 64, {}), bias=True)
    graph = model.graph
    graph.initializer[0].CopyFrom(numpy_helper.from_array(np.sign(tensor.levels), "q"))
    graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "step"))
    graph.node.insert(0, helper.make_node("DequantizeLinear", ["q", "step"], ["w"]))
    return model


def test_pack_folds_it_in_a_foreign_graph_within_rounding(tmp_path):
    original = dequantized_convolution()
    onnx.save(original, tmp_path / "original.onnx")
    report = pack.pack(tmp_path / "original.onnx", tmp_path / "packed.onnx")
    assert "BatchNormalization" not in operators(onnx.load(tmp_path / "packed.onnx"))
    assert any("1 BatchNormalization" in note for note in report.notes)
    assert report.equivalence.ok
    assert_same(original, tmp_path / "packed.onnx", ("n", 32, 6, 6))


def test_pack_leaves_it_where_rounding_would_be_too_much(tmp_path, monkeypatch):
    compared = []

    def strict(first, second, **options):
        result = real(first, second, **options)
        compared.append(result.checks[0].measured)
        return replace(result, checks=(replace(result.checks[0], passed=compared[-1] == 0),))

    real = equivalence.compare_models
    monkeypatch.setattr(pack, "compare_models", strict)
    onnx.save(dequantized_convolution(), tmp_path / "original.onnx")
    report = pack.pack(tmp_path / "original.onnx", tmp_path / "packed.onnx")
    assert "BatchNormalization" in operators(onnx.load(tmp_path / "packed.onnx"))
    assert compared[0] > 0 == compared[1]
    assert report.written is not None
