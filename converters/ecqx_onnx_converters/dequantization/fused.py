"""Join the decoder of a packed tensor and its dequantization in one call, 33 bytes a weight less.

Where every packed weight of a file can have it. One that is coded in another order of its axes has
its Transpose behind the call, unless all that read it are Gemm, which can transpose it themselves.
Files that are decoded in two stages have their integers and floats apart, since that is what the
stages are for.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from itertools import islice

import numpy as np
from onnx import FunctionProto, GraphProto, NodeProto, helper

from ecqx_onnx_converters.dequantization.dequantization import BODIES
from ecqx_onnx_converters.graph.graph import list_graphs
from ecqx_onnx_converters.graph.uses import find_makers, find_uses, set_attribute
from ecqx_onnx_converters.storage import DOMAIN, Stored
from ecqx_onnx_converters.storage.packed.onnx_decoder import TENSOR

# Function -> the dequantisation that it ends with. V is for one step a tensor, by which it
# multiplies the table of values.
FUSED = {"V": "Dequantize", "W": "DequantizeHalf", "B": "LookUp", "F": "LookUpScaled"}


def find_permutation(stored: Stored) -> tuple[int, ...] | None:
    """Find the order of a weight's axes in which it is coded.

    Args:
        stored: a packed weight.

    Returns:
        The permutation; None where it is coded in its own order.
    """
    turn = stored.nodes[-1]
    if turn.op_type == "Transpose":
        return tuple(np.argsort(turn.attribute[0].ints).tolist())
    return None


def fuse(stored: Stored, name: str, dequantize: NodeProto) -> list[NodeProto]:
    """Put one call in place of a weight's decoder and its dequantization.

    Args:
        stored: the packed weight.
        name: of the fused function.
        dequantize: the call that it takes in, of the levels in the order in which they are coded.

    Returns:
        The nodes that make the weight.
    """
    nodes = list(stored.nodes)
    turn = nodes.pop() if nodes[-1].op_type == "Transpose" else None
    decode = nodes.pop()
    output = dequantize.output[0] if turn is None else decode.output[0]
    nodes.append(
        helper.make_node(name, [*decode.input, *dequantize.input[1:]], [output], domain=DOMAIN)
    )
    if turn is not None:
        nodes.append(helper.make_node("Transpose", [output], dequantize.output))
        nodes[-1].attribute.extend(turn.attribute)
    return nodes


def fold_transpose_into_gemm(graph: GraphProto) -> set[str]:
    """Replace Gemm(x, Transpose(W)) by Gemm with transB flipped.

    Args:
        graph: is changed in place, where Gemm alone reads the Transpose behind a fused call.

    Returns:
        The names of these weights.
    """
    calls = {
        node.output[0]: node
        for node in graph.node
        if node.domain == DOMAIN and node.op_type in FUSED
    }
    uses = find_uses(graph)
    outputs: set[str] = set()
    for scope in list_graphs(graph):
        outputs.update(value.name for value in scope.output)
    turned = set()
    for node in list(graph.node):
        if node.op_type != "Transpose" or node.input[0] not in calls:
            continue
        readers = uses.get(node.output[0], [])
        gemm = all(use.node.op_type == "Gemm" and use.position == 1 for use in readers)
        if list(node.attribute[0].ints) != [1, 0] or not gemm or node.output[0] in outputs:
            continue
        for use in readers:
            set_attribute(use.node, "transB", 1 - use.attributes.get("transB", 0))
        calls[node.input[0]].output[0] = node.output[0]
        graph.node.remove(node)
        turned.add(node.output[0])
    return turned


def expand_call(node: NodeProto) -> list[NodeProto]:
    """Write out the two calls that a fused one stands for.

    Args:
        node: of any file.

    Returns:
        The two nodes; the node itself if it is no fused call.
    """
    if node.domain != DOMAIN or node.op_type not in FUSED or not node.output:
        return [node]
    last = FUSED[node.op_type]
    constants, levels = len(BODIES[last][0]) - 1, node.output[0] + ".levels"
    return [
        helper.make_node(TENSOR, node.input[:-constants], [levels], domain=DOMAIN),
        helper.make_node(last, [levels, *node.input[-constants:]], node.output, domain=DOMAIN),
    ]


def make_scaled(levels: FunctionProto) -> FunctionProto:
    """Make V, which multiplies the table of values by the step and so adds floats, not levels.

    Each is added to a zero, which is exact for a positive step.

    Args:
        levels: the function (entries, advances, values, shape) that V is made from.

    Returns:
        The function V, with the step as one more input.
    """
    values = levels.input[2]
    step, floats, products = islice(_list_free_letters(levels), 3)
    nodes = [
        helper.make_node("CastLike", [values, step], [floats]),
        helper.make_node("Mul", [floats, step], [products]),
    ]
    for node in levels.node:
        nodes.append(NodeProto())
        nodes[-1].CopyFrom(node)
        nodes[-1].input[:] = [products if value == values else value for value in node.input]
        if node.op_type == "ConstantOfShape":
            del nodes[-1].attribute[:]  # float32
    return helper.make_function(
        DOMAIN, "V", [*levels.input, step], list(levels.output), nodes, list(levels.opset_import)
    )


def compose(name: str, first: FunctionProto, second: FunctionProto) -> FunctionProto:
    """Join two functions: the second is applied to the output of the first.

    Args:
        name: of the new function.
        first: its inputs come first.
        second: its first input is the output of the first.

    Returns:
        One function for both.
    """
    # 1. Names that the first function does not have, for every value of the second.
    letters = _list_free_letters(first)
    new = {second.input[0]: first.output[0]}
    for value in (*second.input[1:], *find_makers(second.node)):
        new[value] = next(letters)

    # 2. The second function's nodes under these names, behind the first one's.
    nodes = list(first.node)
    for node in second.node:
        own = NodeProto()
        own.CopyFrom(node)
        own.input[:] = [new[value] for value in node.input]
        own.output[:] = [new[value] for value in node.output]
        nodes.append(own)
    inputs = [*first.input, *(new[value] for value in second.input[1:])]
    outputs = [new[value] for value in second.output]
    return helper.make_function(DOMAIN, name, inputs, outputs, nodes, list(first.opset_import))


def _list_free_letters(function: FunctionProto) -> Iterator[str]:
    taken = {*function.input, *find_makers(function.node)}
    return (letter for letter in string.ascii_letters if letter not in taken)
