"""Gives each weight a bias that can take up the mean error of its rounding.

Rounding shifts the mean output of a layer by E m (E: the error, m: the mean input). A bias of the
layer takes that back for nothing [Nagel et al. 2019, arXiv 1906.04721, section 4.2], so that only
the deviations from the mean are left to error feedback.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from ecqx_onnx_converters.graph.graph import (
    FloatGraph,
    clear_data,
    list_value_names,
    make_fresh_name,
    read_values,
)
from ecqx_onnx_converters.graph.uses import Use, find_uses
from onnx import ModelProto, TensorProto

from ecqx_onnx.compression.model.weights import Weight


def with_biases(
    graph: FloatGraph, weights: Sequence[Weight]
) -> tuple[FloatGraph, Mapping[str, str]]:
    """Give each weight a bias where its product can have one.

    Conv and Gemm without a bias get one of zeros; a MatMul has one where an Add of a constant
    follows. The biases lie in the new graph's `weights`; the graph given is not changed.

    Args:
        graph: a float graph.
        weights: of that graph.

    Returns:
        The graph, and weight -> initializer [rows] that is its bias, for weights that have one.
    """
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    arrays = dict(graph.weights)
    uses = find_uses(proto.graph)
    taken = list_value_names(proto.graph)
    biases: dict[str, str] = {}
    for weight in weights:
        found = uses.get(weight.name, ())
        if len(found) != 1 or found[0].scope is not proto.graph:
            continue
        name = _find_bias(weight, found[0], proto, arrays, uses, taken)
        if name is not None:
            biases[weight.name] = name
    return FloatGraph(proto, arrays), biases


def _find_bias(
    weight: Weight,
    use: Use,
    proto: ModelProto,
    arrays: dict[str, np.ndarray],
    uses: Mapping[str, Sequence[Use]],
    taken: set[str],
) -> str | None:
    """The weight's bias, with its values in `arrays` afterwards; None where there can't be one."""
    node, rows = use.node, _count_rows(weight)
    if node.op_type == "MatMul" and weight.kind == "matrix_transposed" and use.position == 1:
        return _find_added_constant(node.output[0], rows, proto, arrays, uses)
    plain_gemm = node.op_type == "Gemm" and use.position == 1 and _is_plain(use)
    if node.op_type != "Conv" and not plain_gemm:
        return None
    if len(node.input) > 2 and node.input[2]:
        return _find_vector(node.input[2], rows, proto, arrays, uses)
    name = make_fresh_name(f"{weight.name}.bias", taken)
    tensor = proto.graph.initializer.add(name=name, data_type=TensorProto.FLOAT)
    tensor.dims.append(rows)
    arrays[name] = np.zeros(rows, np.float32)
    del node.input[2:]
    node.input.append(name)
    return name


def _count_rows(weight: Weight) -> int:
    return weight.shape[0] if weight.kind in ("conv", "matrix") else weight.shape[-1]


def _is_plain(use: Use) -> bool:
    attributes = use.attributes
    return attributes.get("alpha", 1.0) == 1.0 and attributes.get("beta", 1.0) == 1.0


def _find_vector(
    name: str,
    rows: int,
    proto: ModelProto,
    arrays: dict[str, np.ndarray],
    uses: Mapping[str, Sequence[Use]],
) -> str | None:
    """The initializer `name`, if it is a float32 vector of this length that one node reads."""
    if len(uses.get(name, ())) != 1:
        return None
    for tensor in proto.graph.initializer:
        if tensor.name == name:
            if tensor.data_type != TensorProto.FLOAT or list(tensor.dims) != [rows]:
                return None
            if name not in arrays:
                arrays[name] = read_values(tensor)
                clear_data(tensor)
            return name
    return None


def _find_added_constant(
    output: str,
    rows: int,
    proto: ModelProto,
    arrays: dict[str, np.ndarray],
    uses: Mapping[str, Sequence[Use]],
) -> str | None:
    """The vector that the only reader of a product adds to it."""
    readers = uses.get(output, ())
    if len(readers) != 1 or readers[0].node.op_type != "Add":
        return None
    other = readers[0].node.input[1 - readers[0].position]
    return _find_vector(other, rows, proto, arrays, uses)


def corrected_bias(
    bias: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    mean_before: np.ndarray,
    mean_after: np.ndarray,
) -> np.ndarray:
    """Compute the bias that gives the layer the float network's mean output: b + W m - W' m'.

    Args:
        bias: float32 [groups · rows].
        before: float32 [groups, rows, columns], the weight as it was.
        after: the same shape, the weight as it is rounded.
        mean_before: float64 [groups or 1, columns], mean input in the float network.
        mean_after: the same shape, mean input in the rounded network.

    Returns:
        float32, the bias's shape.
    """
    old = np.einsum(
        "grc,gc->gr", before.astype(np.float64), _spread_over_groups(mean_before, before)
    )
    new = np.einsum("grc,gc->gr", after.astype(np.float64), _spread_over_groups(mean_after, after))
    return (bias + (old - new).reshape(bias.shape)).astype(np.float32)


def _spread_over_groups(mean: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    return np.broadcast_to(mean, (matrices.shape[0], matrices.shape[2]))
