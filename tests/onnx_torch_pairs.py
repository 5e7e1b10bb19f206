"""Hand-made pairs of a PyTorch model and the ONNX file that says the same, for the tests of
validation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ecqx_onnx.tensors import QuantTensor, Scale

SEED = 7


@dataclass(frozen=True, eq=False)
class Pair:
    """A net [N, 8] -> Gemm 16 -> Relu -> Gemm 5, both weights quantised to 4 bit."""

    reference: torch.nn.Module
    model: ModelProto
    tensors: tuple[QuantTensor, ...]

    def save(self, folder: Path, name: str = "model.onnx") -> Path:
        path = folder / name
        onnx.save(self.model, path)
        return path


def make_pair(
    *, decoding: str = "folded", metadata: str | None = None, batch: str | int = "batch"
) -> Pair:
    """decoding: "folded" (a function of Cast and Mul), "standard" (DequantizeLinear), "float", or
    "matmul" (DQ before MatMul)."""
    generator = np.random.default_rng(SEED)
    torch.manual_seed(SEED)
    reference = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5)
    ).eval()
    tensors = []
    for name in ("0", "2"):
        weight = reference.get_parameter(f"{name}.weight")
        levels = generator.integers(-7, 8, tuple(weight.shape)).astype(np.int8)
        tensor = QuantTensor(f"{name}.weight", levels, Scale(np.float32(0.037)))
        tensors.append(tensor)
        with torch.no_grad():
            weight.copy_(torch.from_numpy(tensor.dequantize()))
    return Pair(reference, _model(reference, tensors, decoding, metadata, batch), tuple(tensors))


def _model(
    reference: torch.nn.Module,
    tensors: list[QuantTensor],
    decoding: str,
    metadata: str | None,
    batch: str | int,
) -> ModelProto:
    nodes, initializers = [], []
    value = "x"
    for index, tensor in enumerate(tensors):
        layer = tensor.name.split(".")[0]
        bias = reference.get_parameter(f"{layer}.bias").detach().numpy()
        initializers.append(numpy_helper.from_array(bias, f"{layer}.bias"))
        transposed = decoding == "matmul"
        levels = np.ascontiguousarray(tensor.levels.T) if transposed else tensor.levels
        if decoding == "float":
            initializers.append(numpy_helper.from_array(tensor.dequantize(), tensor.name))
        else:
            assert isinstance(tensor.meaning, Scale)
            stored = [f"{tensor.name}.levels", f"{tensor.name}.step"]
            initializers.append(
                helper.make_tensor(
                    stored[0], TensorProto.INT8, levels.shape, levels.tobytes(), raw=True
                )
            )
            initializers.append(numpy_helper.from_array(np.array(tensor.meaning.step), stored[1]))
            operator, domain = (
                ("Decode", "test") if decoding == "folded" else ("DequantizeLinear", "")
            )
            nodes.append(helper.make_node(operator, stored, [tensor.name], domain=domain))
        output = "y" if index == len(tensors) - 1 else f"h{index}"
        if transposed:
            nodes.append(helper.make_node("MatMul", [value, tensor.name], [f"m{index}"]))
            nodes.append(helper.make_node("Add", [f"m{index}", f"{layer}.bias"], [output]))
        else:
            nodes.append(
                helper.make_node("Gemm", [value, tensor.name, f"{layer}.bias"], [output], transB=1)
            )
        if output != "y":
            nodes.append(helper.make_node("Relu", [output], [f"r{index}"]))
            value = f"r{index}"
    body = [
        helper.make_node("Cast", ["levels"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["values", "step"], ["weight"]),
    ]
    decode = helper.make_function(
        "test", "Decode", ["levels", "step"], ["weight"], body, [helper.make_opsetid("", 21)]
    )
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 5])],
        initializers,
    )
    functions = [decode] if decoding == "folded" else []
    opsets = [helper.make_opsetid("", 21)] + [helper.make_opsetid("test", 1)] * len(functions)
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
    if metadata is not None:
        model.metadata_props.add(key="ecqx_onnx", value=metadata)
    return model


def edit(model: ModelProto, name: str) -> TensorProto:
    """The initializer of that name, to plant an error in."""
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)
