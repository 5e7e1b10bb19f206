"""Finds the weights of a float ONNX graph by the operators that multiply with them.

A weight is what Conv, ConvTranspose, Gemm, MatMul, LSTM, GRU and RNN multiply their input with, or
the table whose rows a Gather picks. Everything else (biases, norms, masks, anchors) stays float.

Every weight is seen as `groups` matrices [rows, columns]: row r of a group is one output, and its
columns are what that output's input vector x is multiplied with. Rounding works on these matrices.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ecqx_onnx_converters.graph.graph import FloatGraph
from ecqx_onnx_converters.graph.uses import Use, find_uses

from ecqx_onnx.errors import OptionError

RECURRENT = ("LSTM", "GRU", "RNN")
SMALLEST = 64  # entries; a smaller tensor takes no fewer bytes as integers with step and record


@dataclass(frozen=True)
class Window:
    """How a convolution cuts its input into the vectors that the weight is multiplied with.

    kernel, strides, pads (all begins, then all ends), dilations: one entry per spatial axis.
    auto_pad: ONNX's attribute; "NOTSET" where `pads` counts.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]
    auto_pad: str = "NOTSET"


@dataclass(frozen=True)
class Product:
    """One place where a weight is multiplied with an activation.

    operator: ONNX's name of the node. value: name of the activation; None for a Gather.
    node_output: first output of the node, by which it is found again.
    layout: how vectors lie in the activation: "window" (convolution), "channels" (axis 1, for
        ConvTranspose), "last" (last axis), "second_last", "first" (Gemm with transA), "sequence"
        (LSTM's input) or "hidden" (LSTM's own output), "rows" (Gather).
    main: whether the node lies in the main graph, where its input can be watched.
    """

    operator: str
    value: str | None
    node_output: str
    layout: str
    main: bool
    window: Window | None = None


@dataclass(frozen=True)
class Weight:
    """One float initializer that can be stored as integers.

    shape: of the initializer. groups: how many matrices of their own inputs it consists of.
    kind: "conv", "conv_transpose", "matrix" ([rows, columns]), "matrix_transposed", "stack"
        ([..., columns, rows]), "recurrent" ([directions, rows, columns]) or "table".
    products: every place that reads it; rounding uses the first that can be watched.
    """

    name: str
    shape: tuple[int, ...]
    groups: int
    kind: str
    products: tuple[Product, ...]

    @property
    def size(self) -> int:
        """How many entries it has."""
        return int(np.prod(self.shape))

    @property
    def watched(self) -> Product | None:
        """The first product whose input can be watched.

        It says how much an error of this weight matters; None for tables.
        """
        for product in self.products:
            if product.main and product.value is not None:
                return product
        return None

    def to_matrices(self, values: np.ndarray) -> np.ndarray:
        """Bring values from the initializer's layout to matrices.

        Args:
            values: an array of the initializer's shape.

        Returns:
            [groups, rows, columns]; a copy or a view.
        """
        if self.kind == "conv":
            return values.reshape(self.groups, self.shape[0] // self.groups, -1)
        if self.kind == "conv_transpose":
            inner = self.shape[0] // self.groups
            return values.reshape(self.groups, inner, -1).transpose(0, 2, 1)
        if self.kind in ("matrix_transposed", "stack"):
            return values.reshape(self.groups, *self.shape[-2:]).transpose(0, 2, 1)
        if self.kind == "table":
            return values.reshape(1, self.shape[0], -1)
        return values.reshape(self.groups, *self.shape[-2:])

    def from_matrices(self, matrices: np.ndarray) -> np.ndarray:
        """Bring matrices back to the initializer's layout.

        Args:
            matrices: [groups, rows, columns].

        Returns:
            A contiguous array of the initializer's shape.
        """
        if self.kind in ("conv_transpose", "matrix_transposed", "stack"):
            matrices = matrices.transpose(0, 2, 1)
        return np.ascontiguousarray(matrices).reshape(self.shape)

    def step_shape(self) -> tuple[int, ...]:
        """Give the shape of one step per row, which broadcasts against the initializer.

        Returns:
            The shape; () where the layout has no place for a step per row.
        """
        ones = (1,) * (len(self.shape) - 1)
        if self.kind == "conv":
            return (self.shape[0], *ones)
        if self.kind == "conv_transpose" and self.groups == 1:
            return (1, self.shape[1], *ones[1:])
        if self.kind == "matrix":
            return (self.shape[0], 1)
        if self.kind == "matrix_transposed":
            return (1, self.shape[1])
        if self.kind == "recurrent" and self.groups == 1:
            return (1, self.shape[1], 1)
        return ()


@dataclass(frozen=True)
class Passed:
    """A float tensor of two or more dimensions that is no weight, and why not."""

    name: str
    shape: tuple[int, ...]
    reason: str


def find_weights(graph: FloatGraph) -> tuple[tuple[Weight, ...], tuple[Passed, ...]]:
    """The weights in the order in which the graph uses them, and the tensors that are none.

    Args:
        graph: a float graph with all its weights.
    Returns:
        (weights, passed): `passed` holds the other float tensors of two or more dimensions.
    """
    uses = find_uses(graph.proto.graph)
    order = _order_of_nodes(graph)
    main = {id(node) for node in graph.proto.graph.node}
    outputs = {value.name for value in graph.proto.graph.output}
    weights: list[Weight] = []
    passed: list[Passed] = []
    for name, values in graph.weights.items():
        if values.dtype != np.float32 or values.ndim < 2:
            continue
        found = _as_weight(name, values, uses.get(name, ()), main)
        if name in outputs:
            found = Passed(name, values.shape, "it is an output of the model")
        if isinstance(found, Weight):
            weights.append(found)
        else:
            passed.append(found)
    weights.sort(key=lambda weight: _position(weight, order))
    return tuple(weights), tuple(passed)


def select_weights(
    weights: Sequence[Weight],
    passed: Sequence[Passed],
    *,
    include: Sequence[str],
    exclude: Sequence[str],
) -> tuple[tuple[Weight, ...], tuple[Passed, ...]]:
    """Choose weights by patterns of their names.

    Args:
        weights: as `find_weights` gives them, like what follows.
        passed: tensors that are no weights.
        include: patterns, of which a weight matches one; none for all weights.
        exclude: patterns, of which it matches none.

    Returns:
        (the weights chosen, the tensors that are none or were not chosen).

    Raises:
        OptionError: a pattern matches no weight.
    """
    names = [weight.name for weight in weights]
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                first = names[0] if names else "none"
                raise OptionError(f"{option} '{pattern}' matches no weight; the first is '{first}'")
    kept, left = [], list(passed)
    for weight in weights:
        wanted = not include or any(fnmatch.fnmatchcase(weight.name, p) for p in include)
        if wanted and not any(fnmatch.fnmatchcase(weight.name, p) for p in exclude):
            kept.append(weight)
        else:
            left.append(Passed(weight.name, weight.shape, "left out, as asked for"))
    return tuple(kept), tuple(left)


def _order_of_nodes(graph: FloatGraph) -> dict[str, int]:
    order: dict[str, int] = {}
    for index, node in enumerate(graph.proto.graph.node):
        for output in node.output:
            order[output] = index
    return order


def _position(weight: Weight, order: Mapping[str, int]) -> int:
    """Where the graph first reads it; what subgraphs read comes last."""
    places = [order.get(product.node_output, len(order)) for product in weight.products]
    return min(places)


def _as_weight(
    name: str, values: np.ndarray, uses: Sequence[Use], main: set[int]
) -> Weight | Passed:
    """The tensor as a weight, if all of its readers agree on its layout."""
    if not uses:
        return Passed(name, values.shape, "no node reads it")
    if values.size < SMALLEST:
        return Passed(name, values.shape, f"{values.size} numbers take no fewer bytes as integers")
    if not np.isfinite(values).all():
        return Passed(name, values.shape, "it holds infinities or NaN")
    if not values.any():
        return Passed(name, values.shape, "it holds zeros only")
    candidates: list[Weight] = []
    for use in uses:
        one = _by_operator(name, values, use, id(use.node) in main)
        if one is None:
            what = f"{use.node.op_type} reads it as input {use.position}, where no weight is"
            return Passed(name, values.shape, what)
        candidates.append(one)
    # A table that is also a matrix (tied embeddings) is rounded as the matrix that it is.
    dense = [one for one in candidates if one.kind != "table"] or candidates
    if len({(one.kind, one.groups) for one in dense}) > 1:
        return Passed(name, values.shape, "its readers see it in different layouts")
    products: dict[Product, None] = {}  # each once, in order
    for one in (*dense, *candidates):
        products.update(dict.fromkeys(one.products))
    first = dense[0]
    return Weight(name, first.shape, first.groups, first.kind, tuple(products))


def _by_operator(name: str, values: np.ndarray, use: Use, main: bool) -> Weight | None:
    if use.node.domain not in ("", "ai.onnx"):
        return None
    operator = use.node.op_type
    if operator in ("Conv", "ConvTranspose") and use.position == 1 and values.ndim >= 3:
        return _convolution(name, values.shape, use, main)
    if operator in ("Gemm", "MatMul") and use.position in (0, 1):
        return _matrix(name, values.shape, use, main)
    if operator in RECURRENT and use.position in (1, 2) and values.ndim == 3:
        return _recurrent(name, values.shape, use, main)
    if operator == "Gather" and use.position == 0 and use.attributes.get("axis", 0) == 0:
        product = Product("Gather", None, use.node.output[0], "rows", main)
        return Weight(name, values.shape, 1, "table", (product,))
    return None


def _convolution(name: str, shape: tuple[int, ...], use: Use, main: bool) -> Weight | None:
    attributes = use.attributes
    spatial = len(shape) - 2
    groups = int(attributes.get("group", 1))
    if groups < 1 or shape[0] % groups:
        return None
    auto_pad = attributes.get("auto_pad", b"NOTSET")
    window = Window(
        kernel=tuple(shape[2:]),
        strides=tuple(attributes.get("strides", (1,) * spatial)),
        pads=tuple(attributes.get("pads", (0,) * (2 * spatial))),
        dilations=tuple(attributes.get("dilations", (1,) * spatial)),
        auto_pad=auto_pad.decode() if isinstance(auto_pad, bytes) else auto_pad,
    )
    value, output = use.node.input[0], use.node.output[0]
    if use.node.op_type == "Conv":
        product = Product("Conv", value, output, "window", main, window)
        return Weight(name, shape, groups, "conv", (product,))
    product = Product("ConvTranspose", value, output, "channels", main)
    return Weight(name, shape, groups, "conv_transpose", (product,))


def _matrix(name: str, shape: tuple[int, ...], use: Use, main: bool) -> Weight | None:
    """Gemm's B, MatMul's second operand; or either one's first operand, W x instead of x W."""
    attributes, operator = use.attributes, use.node.op_type
    value, output = use.node.input[1 - use.position], use.node.output[0]
    if value == name:
        return None
    if operator == "MatMul" and use.position == 1:
        kind = "matrix_transposed" if len(shape) == 2 else "stack"
        groups = int(np.prod(shape[:-2]))
        layout = "last" if len(shape) == 2 else "unwatched"
        return Weight(name, shape, groups, kind, (Product(operator, value, output, layout, main),))
    if len(shape) != 2:
        return None
    if operator == "MatMul":
        product = Product(operator, value, output, "second_last", main)
        return Weight(name, shape, 1, "matrix", (product,))
    if use.position == 1:
        kind = "matrix" if attributes.get("transB", 0) else "matrix_transposed"
        layout = "first" if attributes.get("transA", 0) else "last"
    else:
        kind = "matrix_transposed" if attributes.get("transA", 0) else "matrix"
        layout = "last" if attributes.get("transB", 0) else "first"
    return Weight(name, shape, 1, kind, (Product(operator, value, output, layout, main),))


def _recurrent(name: str, shape: tuple[int, ...], use: Use, main: bool) -> Weight:
    """W [directions, gates, inputs] reads the sequence; R [directions, gates, hidden] the state."""
    operator, output = use.node.op_type, use.node.output[0]
    batch_first = bool(use.attributes.get("layout", 0))
    if use.position == 1:
        product = Product(operator, use.node.input[0], output or _any(use), "sequence", main)
        return Weight(name, shape, shape[0], "recurrent", (product,))
    watched = bool(output) and not batch_first
    layout = "hidden" if watched else "unwatched"
    product = Product(operator, output or None, output or _any(use), layout, main)
    return Weight(name, shape, shape[0], "recurrent", (product,))


def _any(use: Use) -> str:
    return next(output for output in use.node.output if output)
