"""Small float ONNX graphs made by hand, for the converters' tests; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ecqx_onnx.tensors import QuantTensor, Scale


def quantized(
    name: str,
    shape: tuple[int, ...],
    *,
    most: int = 7,
    step: float | np.ndarray = 0.125,
    seed: int = 0,
) -> QuantTensor:
    levels = np.random.default_rng(seed).integers(-most, most + 1, shape).astype(np.int8)
    return QuantTensor(name, levels, Scale(np.asarray(step, np.float32)))


def model_of(
    nodes: Sequence[NodeProto],
    weights: Mapping[str, np.ndarray],
    *,
    inputs: Mapping[str, tuple[int, Sequence[int | str]]],
    output_shape: Sequence[int | str],
    opset: int = 18,
) -> ModelProto:
    """inputs: name -> (TensorProto type, shape); the output is `y`."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [
            helper.make_tensor_value_info(name, kind, shape)
            for name, (kind, shape) in inputs.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output_shape)],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def product(
    operator: str, weight: QuantTensor, *, opset: int = 18, **attributes: int
) -> ModelProto:
    """y = operator(x, W), x: [batch, in]."""
    width = weight.shape[1] if attributes.get("transB") else weight.shape[0]
    outputs = weight.shape[0] if attributes.get("transB") else weight.shape[1]
    node = helper.make_node(operator, ["x", weight.name], ["y"], **attributes)
    weights = {weight.name: weight.dequantize()}
    return model_of(
        [node],
        weights,
        inputs={"x": (TensorProto.FLOAT, ["n", width])},
        output_shape=["n", outputs],
        opset=opset,
    )
