"""Find a network's weights: the parameters that its operators multiply with what flows through it.

A torch.export program enters, a Weight for each name leaves. The operators are convolutions, matrix
products, einsum, recurrent kernels and table look-ups whose indices depend on the values of an
input (token embeddings). With constant or shape-derived indices (positions) a table stays float, as
do buffers, masks, anchors, gains, norms and whatever is only added or scaled with.

A weight may be computed on its way, ŵ = f(w): through views, and through arithmetic entry by entry,
where the parameter of ŵ's shape is the weight and what scales or centers it is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

# operator -> positions of its operands that are multiplied, and the axis of the output channels
# there (None: see `_axis`)
MULTIPLIED: Mapping[str, Mapping[int, int | None]] = {
    **{f"conv{n}d": {1: 0} for n in (1, 2, 3)},
    "convolution": {1: None},
    "_convolution": {1: None},
    **{f"conv_transpose{n}": {1: 1} for n in ("1d", "2d", "3d")},
    "linear": {1: 0},
    "bilinear": {2: 0},
    "_trilinear": {1: 0},
    **{name: {0: -2, 1: -1} for name in ("matmul", "mm", "bmm", "__matmul__")},
    **{name: {1: -2, 2: -1} for name in ("addmm", "baddbmm", "addbmm")},
    "mv": {0: 0},
    "dot": {},
    "addmv": {1: 0},
    "einsum": {1: None},
    "tensordot": {0: 0, 1: -1},
    "_grouped_mm": {1: -1},
    "grouped_mm_fallback": {1: -1},  # of transformers, for experts on CPUs
    "scaled_dot_product_attention": {},
    **{name: {2: 0} for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    **{name: {2: 0, 3: 0} for name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")},
}
LOOKUPS = {  # operator -> (position of the table, position of the indices)
    "embedding": (0, 1),
    "embedding_bag": (0, 1),
    "_embedding_bag": (0, 1),
    "_embedding_bag_forward_only": (0, 1),
    "index_select": (0, 2),
    "index": (0, 1),
    "gather": (0, 2),
}
MATRIX_PRODUCTS = frozenset(
    ["matmul", "mm", "bmm", "__matmul__", "addmm", "baddbmm", "addbmm"]
)  # their operands lie as they like
VIEWS = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "permute",
        "transpose",
        "t",
        "numpy_T",
        "mT",
        "matrix_H",
        "T",
        "contiguous",
        "clone",
        "alias",
        "detach",
        "detach_",
        "to",
        "_to_copy",
        "unsqueeze",
        "squeeze",
        "slice",
        "select",
        "chunk",
        "split",
        "split_with_sizes",
        "unbind",
        "getitem",
        "narrow",
        "flatten",
        "unflatten",
        "expand",
        "expand_as",
        "view_as",
        "reshape_as",
        "movedim",
        "moveaxis",
        "swapaxes",
        "swapdims",
        "lift_fresh_copy",
        "type_as",
        "float",
        "double",
        "half",
        "bfloat16",
        "flip",
        "cat",
        "stack",
        "repeat",
        "broadcast_to",
        "dropout",
        "_assert_tensor_metadata",
    ]
)
ELEMENTWISE = frozenset(
    [
        "mul",
        "div",
        "sub",
        "add",
        "rsub",
        "neg",
        "pow",
        "sqrt",
        "rsqrt",
        "exp",
        "log",
        "tanh",
        "sigmoid",
        "abs",
        "sign",
        "square",
        "clamp",
        "clamp_min",
        "clamp_max",
        "where",
        "round",
        "floor",
        "masked_fill",
        "softmax",
        "relu",
        "mul_",
        "div_",
        "add_",
        "sub_",
        "true_divide",
        "multiply",
        "divide",
        "subtract",
        "_weight_norm",
        "_weight_norm_interface",
        "_softmax",
        "softplus",
        "batch_norm",
    ]
)
SHAPES_ONLY = frozenset(  # give no value of what they read
    [
        "sym_size",
        "sym_numel",
        "sym_stride",
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "size",
    ]
)


@dataclass(frozen=True)
class Weight:
    """One parameter that is a weight.

    Attributes:
        name: its name in the program's state dict.
        operator: who multiplies it ("linear").
        axis: of its output channels, where steps per channel make sense.
        computed: whether arithmetic lies between the parameter and the operator.
    """

    name: str
    operator: str
    axis: int
    computed: bool


def find_weights(program: torch.export.ExportedProgram) -> dict[str, Weight]:
    """The program's weights, in the order of its parameters.

    Args:
        program: as torch.export gives it, decomposed or not; it is only looked at.

    Returns:
        Parameter name -> Weight, for parameters of two or more dimensions. Of tied parameters those
        that the program reads.
    """
    signature = program.graph_signature
    finder = _Finder(
        dict(signature.inputs_to_parameters), frozenset(map(str, signature.user_inputs))
    )
    finder.visit(program.graph_module, {})
    shapes = {
        name: tuple(program.state_dict[name].shape)
        for name in signature.inputs_to_parameters.values()
    }
    found = {name: weight for name, weight in finder.found.items() if len(shapes[name]) >= 2}
    return {name: found[name] for name in shapes if name in found}


class _Finder:
    """Walks a program's graph and the graphs of its branches and loops."""

    def __init__(self, parameters: Mapping[str, str], inputs: frozenset[str]) -> None:
        self.parameters, self.inputs = parameters, inputs
        self.found: dict[str, Weight] = {}
        self.outer: dict[
            Node, Node
        ] = {}  # an inner graph's placeholder -> what the outer graph hands it
        self.known: dict[Node, bool] = {}

    def visit(self, module: GraphModule, given: Mapping[Node, Node]) -> None:
        self.outer.update(given)
        for node in module.graph.nodes:
            if node.op != "call_function":
                continue
            operator = _name(node)
            for position, axis in MULTIPLIED.get(operator, {}).items():
                if position < len(node.args):
                    for operand in _nodes_in(node.args[position]):
                        self._take(operand, operator, self._axis(node, position, axis))
            if operator in LOOKUPS:
                table, indices = LOOKUPS[operator]
                places = list(_nodes_in(node.args[indices])) if indices < len(node.args) else []
                if any(self._depends_on_values(place) for place in places):
                    for operand in _nodes_in(node.args[table]):
                        self._take(operand, operator, -1)
            for inner, handed in _inner_graphs(module, node):
                places = [place for place in inner.graph.nodes if place.op == "placeholder"]
                self.visit(inner, dict(zip(reversed(places), reversed(handed), strict=False)))

    def _axis(self, node: Node, position: int, axis: int | None) -> int:
        if axis is not None:
            return axis
        transposed = (
            _name(node) in ("convolution", "_convolution")
            and len(node.args) > 6
            and node.args[6] is True
        )
        return 1 if transposed else 0

    def _take(self, operand: Node, operator: str, axis: int) -> None:
        """Every parameter that the operand is, or is computed from entry by entry."""
        ahead, seen = [(operand, False)], set()
        while ahead:
            node, computed = ahead.pop()
            node = self.outer.get(node, node)
            if node in seen:
                continue
            seen.add(node)
            if node.op == "placeholder":
                name = self.parameters.get(node.name)
                if name is not None and name not in self.found:
                    self.found[name] = Weight(
                        name, operator, _axis_in_parameter(operand, node, axis), computed
                    )
                continue
            if node.op != "call_function":
                continue
            operator_here = _name(node)
            if operator_here in VIEWS:
                sources = list(_nodes_in(node.args[:1]))
                grows = operator_here in ("expand", "expand_as", "broadcast_to", "repeat")
                if computed and grows and any(_size(source) != _size(node) for source in sources):
                    continue  # a gain, spread over a weight
                ahead += [(source, computed) for source in sources]
            elif operator_here in ELEMENTWISE:
                operands = _nodes_in((node.args, node.kwargs))
                ahead += [(source, True) for source in operands if _shape(source) == _shape(node)]

    def _depends_on_values(self, node: Node) -> bool:
        node = self.outer.get(node, node)
        if node not in self.known:
            self.known[node] = False
            if node.op == "placeholder":
                self.known[node] = node.name in self.inputs
            elif node.op == "call_function" and _name(node) not in SHAPES_ONLY:
                self.known[node] = any(
                    self._depends_on_values(source) for source in node.all_input_nodes
                )
        return self.known[node]


def _axis_in_parameter(operand: Node, parameter: Node, axis: int) -> int:
    """The operand's axis in the parameter's layout: the same one, or for a transposed matrix the
    other."""
    dims, own = len(_shape(operand) or ()), len(_shape(parameter) or ())
    axis = axis % max(dims, 1)
    if (
        dims == own == 2
        and _shape(operand) == tuple(reversed(_shape(parameter) or ()))
        and operand is not parameter
    ):
        turns = _turns(operand, parameter)
        return 1 - axis if turns % 2 else axis
    return min(axis, max(own - 1, 0))


def _turns(node: Node, end: Node) -> int:
    """How many transpositions lie between the two."""
    count = 0
    while node is not end and node.op == "call_function":
        count += _name(node) in (
            "t",
            "transpose",
            "permute",
            "numpy_T",
            "mT",
            "T",
            "swapaxes",
            "swapdims",
        )
        sources = [
            source for source in _nodes_in((node.args, node.kwargs)) if _size(source) == _size(node)
        ]
        if not sources:
            break
        node = sources[0]
    return count


def _inner_graphs(module: GraphModule, node: Node) -> Iterator[tuple[GraphModule, list[Node]]]:
    """The graphs that a branch, loop or context calls, and what it hands them, last argument
    last."""
    operands = list(_nodes_in((node.args, node.kwargs)))
    graphs = [
        place
        for place in operands
        if place.op == "get_attr" and isinstance(_attribute(module, place), GraphModule)
    ]
    handed = [place for place in operands if place not in graphs]
    for place in graphs:
        inner: Any = _attribute(module, place)
        yield inner, handed


def _attribute(module: GraphModule, node: Node) -> Any:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def _name(node: Node) -> str:
    """ "linear" of aten.linear.default; a Python function's own name."""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    return str(getattr(packet, "__name__", None) or getattr(target, "__name__", target))


def _nodes_in(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _nodes_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _nodes_in(item)


def _shape(node: Node) -> tuple | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _size(node: Node) -> int | None:
    shape = _shape(node)
    if shape is None or not all(isinstance(length, int) for length in shape):
        return None
    return int(torch.Size(shape).numel())
