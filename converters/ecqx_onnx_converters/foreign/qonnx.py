"""Read QONNX's fake quantization, and define its operators by standard ones.

    Quant(x, scale, zero point, bits)
        y = (round(clip(x / scale + zero point, lowest, highest)) - zero point) · scale
    BipolarQuant(x, scale)
        y = scale where x >= 0, else -scale

with lowest, highest of a `bits`-bit integer, signed or not; narrow leaves out the lowest signed,
the highest unsigned one. [Pappalardo et al. 2022, QONNX: Representing arbitrary-precision quantized
neural networks, sec. 4.]

A runtime that lacks these operators runs the graph all the same once they are defined in it, as
model-local functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, TensorProto, helper

from ecqx_onnx_converters.foreign.quantization_nodes import (
    Constant,
    Grid,
    Rule,
    make_grid,
    read_attribute,
)
from ecqx_onnx_converters.graph.graph import find_opset, list_graphs
from ecqx_onnx_converters.graph.opsets import refuse_opset, set_opset
from ecqx_onnx_converters.refusal import Refusal

DOMAINS = ("qonnx.custom_op.general", "onnx.brevitas", "finn.custom_op.general")
ROUNDINGS = {"ROUND": np.rint, "FLOOR": np.floor, "CEIL": np.ceil, "ROUND_TO_ZERO": np.trunc}
ROUNDING_OPERATORS = {"ROUND": "Round", "FLOOR": "Floor", "CEIL": "Ceil"}
OPSET = 12  # of the functions: the first with Round and with Constants of a plain number


def _read_quant(node: NodeProto, inputs: Sequence[Constant | None]) -> Grid | Refusal:
    """Levels and step of a weight that Quant makes."""
    floats = _list_floats(inputs)
    if len(inputs) != 4 or len(floats) != 4:
        return Refusal("its Quant has inputs that aren't four float32 tensors")
    x, scale, zero, bits = floats
    rounding = ROUNDINGS.get(_read_rounding_mode(node))
    if rounding is None:
        return Refusal(
            f"it is rounded by {_read_rounding_mode(node)}, which QONNX calls none of "
            f"{', '.join(ROUNDINGS)}"
        )
    signed = read_attribute(node, "signed", 1)
    narrow = read_attribute(node, "narrow", 0)
    width = float(bits.reshape(())) if bits.size == 1 else np.nan
    if not (1 + signed <= width <= 8 and width == np.rint(width)):
        return Refusal(
            f"its bit width {bits.reshape(-1)[:4].tolist()} isn't one whole number from "
            f"{1 + signed} to 8"
        )
    if not (zero == np.rint(zero)).all() or not (np.isfinite(scale) & (scale > 0)).all():
        return Refusal("its zero point isn't whole or its scale isn't positive and finite")
    step = _broadcast_part(scale, x.shape)
    shift = _broadcast_part(zero, x.shape)
    if step is None or shift is None:
        return Refusal("its scale or zero point doesn't broadcast against it")
    lowest, highest = _compute_bounds(int(width), signed=bool(signed), narrow=bool(narrow))
    clipped = np.clip(x / step + shift, np.float32(lowest), np.float32(highest))
    levels = rounding(clipped) - shift
    return make_grid(levels.astype(np.int32), step, _name_source(inputs))


def _read_bipolar_quant(node: NodeProto, inputs: Sequence[Constant | None]) -> Grid | Refusal:
    """Levels of -1 and 1, and the step, of a weight that BipolarQuant makes."""
    floats = _list_floats(inputs)
    if len(inputs) != 2 or len(floats) != 2:
        return Refusal("its BipolarQuant has inputs that aren't two float32 tensors")
    x, scale = floats
    step = _broadcast_part(scale, x.shape)
    if step is None:
        return Refusal("its scale doesn't broadcast against it")
    return make_grid(np.where(x >= 0, 1, -1), step, _name_source(inputs))


RULES: Mapping[str, Rule] = {"Quant": _read_quant, "BipolarQuant": _read_bipolar_quant}


def _list_floats(inputs: Sequence[Constant | None]) -> list[np.ndarray]:
    """The values of those inputs that are there and float32."""
    values = []
    for constant in inputs:
        if constant is not None and constant.type == TensorProto.FLOAT:
            values.append(constant.values)
    return values


def _compute_bounds(bits: int, *, signed: bool, narrow: bool) -> tuple[int, int]:
    """(lowest, highest) integer."""
    if signed:
        return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    return 0, 2**bits - 1 - narrow


def _read_rounding_mode(node: NodeProto) -> str:
    """In upper case, as in ROUNDINGS; whatever else the node states."""
    for entry in node.attribute:
        if entry.name == "rounding_mode":
            return entry.s.decode(errors="replace").upper()
    return "ROUND"


def define_operators(model: ModelProto) -> str | None:
    """Add a definition of each QONNX operator that nodes still use.

    An operator stays undefined where its nodes round in several ways, or in one that no standard
    operator has; all stay so where the graph can't be raised to opset 12.

    Args:
        model: changed in place: functions, opset imports and, on Quant, attributes left to their
            defaults.

    Returns:
        A sentence for the report; None where nothing was defined.
    """
    # 1. The operators that lack a definition.
    present = {(function.domain, function.name) for function in model.functions}
    imported = {entry.domain for entry in model.opset_import}
    users: dict[tuple[str, str], list[NodeProto]] = {}
    for scope in list_graphs(model.graph):
        for node in scope.node:
            operator_key = (node.domain, node.op_type)
            known = node.domain in DOMAINS and node.op_type in RULES
            if known and operator_key not in present:
                users.setdefault(operator_key, []).append(node)
    wanted = sorted(users)
    if not wanted or refuse_opset(model, OPSET) is not None:
        return None

    # 2. A function for each of them that standard operators can express.
    defined = []
    for domain, operator in wanted:
        nodes = users[domain, operator]
        if operator == "Quant":
            modes = {_read_rounding_mode(node) for node in nodes}
            if len(modes) > 1 or not modes <= ROUNDING_OPERATORS.keys():
                continue
            for node in nodes:
                _state_defaults(node)
            model.functions.append(_make_quant_function(domain, ROUNDING_OPERATORS[modes.pop()]))
        else:
            model.functions.append(_make_bipolar_function(domain))
        defined.append(operator)
        if domain not in imported:
            model.opset_import.append(helper.make_opsetid(domain, 1))
            imported.add(domain)
    if not defined:
        return None
    set_opset(model, max(OPSET, find_opset(model)))
    return (
        f"{', '.join(defined)} of activations: defined in the file by standard operators, so that "
        "stock runtimes run it"
    )


def _state_defaults(node: NodeProto) -> None:
    """Gives a Quant node the attributes it leaves out: a function has no defaults for them."""
    stated = {entry.name for entry in node.attribute}
    for name, default in (("signed", 1), ("narrow", 0)):
        if name not in stated:
            node.attribute.append(helper.make_attribute(name, default))


Steps = tuple[tuple[str, str, str, dict[str, Any]], ...]


def _make_quant_function(domain: str, rounding: str) -> FunctionProto:
    """Quant in standard operators; signed, narrow: attributes of 0 or 1.

    highest = 2^(bits - signed) - 1 - narrow·(1 - signed)
    lowest = signed·(narrow - 2^(bits - signed))
    """
    nodes = []
    for name in ("signed", "narrow"):
        nodes.append(helper.make_node("Constant", [], [name + "_integer"]))
        nodes[-1].attribute.append(
            AttributeProto(name="value_int", ref_attr_name=name, type=AttributeProto.INT)
        )
        nodes.append(helper.make_node("Cast", [name + "_integer"], [name], to=TensorProto.FLOAT))
    steps: Steps = (
        ("Constant", "", "one", {"value_float": 1.0}),
        ("Constant", "", "two", {"value_float": 2.0}),
        ("Sub", "bits signed", "magnitude_bits", {}),
        ("Pow", "two magnitude_bits", "magnitudes", {}),
        ("Sub", "one signed", "unsigned", {}),
        ("Mul", "narrow unsigned", "left_out", {}),
        ("Sub", "magnitudes one", "most", {}),
        ("Sub", "most left_out", "highest", {}),
        ("Sub", "narrow magnitudes", "least", {}),
        ("Mul", "signed least", "lowest", {}),
        ("Div", "x scale", "ratio", {}),
        ("Add", "ratio zero", "shifted", {}),
        ("Min", "shifted highest", "below", {}),
        ("Max", "below lowest", "within", {}),
        (rounding, "within", "rounded", {}),
        ("Sub", "rounded zero", "level", {}),
        ("Mul", "level scale", "y", {}),
    )
    nodes += _make_nodes(steps)
    imports = [helper.make_opsetid("", OPSET)]
    return helper.make_function(
        domain, "Quant", ["x", "scale", "zero", "bits"], ["y"], nodes, imports, ["signed", "narrow"]
    )


def _make_bipolar_function(domain: str) -> FunctionProto:
    """BipolarQuant in standard operators."""
    steps: Steps = (
        ("Constant", "", "nothing", {"value_float": 0.0}),
        ("Less", "x nothing", "negative", {}),
        ("Neg", "scale", "opposite", {}),
        ("Where", "negative opposite scale", "y", {}),
    )
    return helper.make_function(
        domain,
        "BipolarQuant",
        ["x", "scale"],
        ["y"],
        _make_nodes(steps),
        [helper.make_opsetid("", OPSET)],
    )


def _make_nodes(steps: Steps) -> list[NodeProto]:
    """A node for each (operator, inputs, output, attributes)."""
    return [
        helper.make_node(operator, inputs.split(), [output], **values)
        for operator, inputs, output, values in steps
    ]


def _broadcast_part(part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """The part in as many dimensions as `shape`, or none for a single value; None when it doesn't
    broadcast against it."""
    if part.size == 1:
        return part.reshape(())
    if part.ndim > len(shape):
        return None
    part = part.reshape((1,) * (len(shape) - part.ndim) + part.shape)
    fits = all(length in (1, full) for length, full in zip(part.shape, shape, strict=True))
    return part if fits else None


def _name_source(inputs: Sequence[Constant | None]) -> str:
    """The initializer of a node's first input."""
    return inputs[0].source if inputs[0] is not None else ""
