"""Define QONNX's operators by standard ones, in the file, so that stock runtimes run it.

    Quant, IntQuant, BipolarQuant: see qonnx.py
    Trunc(x, scale, zero point, bits before, bits after)                            (version 1)
        y = (round(rint(x / scale + zero point) / 2^(before - after)) - zero point) · scale
    Trunc(x, scale, zero point, bits before, scale after, bits after)               (version 2)
        y = (round(clip(rint(x / scale + zero point) / t)) - zero point / t) · scale after
        t = 2^rint(log2(scale after / scale))

[QONNX's operators' specifications.] Each becomes a model-local function of its own domain and name.
Nodes that round in other ways than their siblings call functions of other names, Quant_FLOOR.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, TensorProto, helper

from ecqx_onnx_converters.foreign.qonnx import DOMAINS, ROUNDINGS, read_rounding_mode
from ecqx_onnx_converters.graph.graph import find_opset, list_graphs
from ecqx_onnx_converters.graph.opsets import refuse_opset, set_opset

OPSET = 12  # of the functions: the first with Round and with Constants of a plain number
QUANTS = ("Quant", "IntQuant")
# Operator -> how many inputs it may have.
INPUTS = {"Quant": (4,), "IntQuant": (4,), "BipolarQuant": (2,), "Trunc": (5, 6)}
INTEGER_ATTRIBUTES = (("signed", 1), ("narrow", 0))  # and their defaults
# Rounding mode -> steps from `value` to `rounded`.
Steps = tuple[tuple[str, str, str, dict[str, Any]], ...]
_MAGNITUDE: Steps = (("Sign", "value", "sign", {}), ("Abs", "value", "size", {}))
_HALF: Steps = (("Constant", "", "half", {"value_float": 0.5}),)
_SIGNED: Steps = (("Mul", "sign whole", "rounded", {}),)
_TO_ZERO: Steps = (*_MAGNITUDE, ("Floor", "size", "whole", {}), *_SIGNED)
_EVEN: Steps = (("Round", "value", "rounded", {}),)
ROUNDING_STEPS: dict[str, Steps] = {
    "ROUND": _EVEN,
    "HALF_EVEN": _EVEN,
    "FLOOR": (("Floor", "value", "rounded", {}),),
    "CEIL": (("Ceil", "value", "rounded", {}),),
    "ROUND_TO_ZERO": _TO_ZERO,
    "DOWN": _TO_ZERO,
    "UP": (*_MAGNITUDE, ("Ceil", "size", "whole", {}), *_SIGNED),
    "HALF_UP": (
        *_MAGNITUDE,
        *_HALF,
        ("Add", "size half", "more", {}),
        ("Floor", "more", "whole", {}),
        *_SIGNED,
    ),
    "HALF_DOWN": (
        *_MAGNITUDE,
        *_HALF,
        ("Sub", "size half", "less", {}),
        ("Ceil", "less", "whole", {}),
        *_SIGNED,
    ),
}
# highest = 2^(bits - signed) - 1 - narrow·(1 - signed)
# lowest = signed·(narrow - 2^(bits - signed))
BOUNDS: Steps = (
    ("Cast", "bits", "width", {"to": TensorProto.FLOAT}),
    ("Constant", "", "one", {"value_float": 1.0}),
    ("Constant", "", "two", {"value_float": 2.0}),
    ("Sub", "width signed", "magnitude_bits", {}),
    ("Pow", "two magnitude_bits", "magnitudes", {}),
    ("Sub", "one signed", "unsigned", {}),
    ("Mul", "narrow unsigned", "left_out", {}),
    ("Sub", "magnitudes one", "most", {}),
    ("Sub", "most left_out", "highest", {}),
    ("Sub", "narrow magnitudes", "least", {}),
    ("Mul", "signed least", "lowest", {}),
)


@dataclass(frozen=True)
class Definitions:
    """What became of the QONNX operators of a model.

    Attributes:
        defined: Operators that have a definition now.
        missing: Those that have none, each with the reason, in words.
    """

    defined: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True, order=True)
class _Variant:
    """Nodes that one function serves."""

    domain: str
    operator: str
    inputs: int
    mode: str


def define_operators(model: ModelProto) -> Definitions:
    """Add a definition of each QONNX operator that nodes still use.

    An operator stays undefined where its nodes have a form that the specification doesn't know;
    all stay so where the graph can't be raised to opset 12.

    Args:
        model: changed in place: functions, opset imports, attributes left to their defaults, and
            operator names where nodes of one operator round in several ways.

    Returns:
        What is defined now, and what isn't.
    """
    # 1. The operators that lack a definition.
    present = {(function.domain, function.name) for function in model.functions}
    users: dict[_Variant, list[NodeProto]] = {}
    missing: dict[str, None] = {}
    for scope in list_graphs(model.graph):
        for node in scope.node:
            if node.domain not in DOMAINS or (node.domain, node.op_type) in present:
                continue
            trouble = _find_trouble(node)
            if trouble is not None:
                missing[trouble] = None
                continue
            mode = "" if node.op_type == "BipolarQuant" else read_rounding_mode(node)
            variant = _Variant(node.domain, node.op_type, len(node.input), mode)
            users.setdefault(variant, []).append(node)
    if users and (refusal := refuse_opset(model, OPSET)) is not None:
        names = ", ".join(sorted({variant.operator for variant in users}))
        return Definitions((), (*missing, f"{names} (needs opset {OPSET}: {refusal.reason})"))

    # 2. A function for each of them.
    imported = {entry.domain for entry in model.opset_import}
    for variant in sorted(users):
        siblings = [
            other
            for other in users
            if (other.domain, other.operator) == (variant.domain, variant.operator)
        ]
        name = variant.operator
        if len(siblings) > 1:
            name = f"{variant.operator}_{variant.mode}_{variant.inputs}"
        for node in users[variant]:
            node.op_type = name
            _state_defaults(node)
        model.functions.append(_make_function(variant, name))
        if variant.domain not in imported:
            model.opset_import.append(helper.make_opsetid(variant.domain, 1))
            imported.add(variant.domain)
    if users:
        set_opset(model, max(OPSET, find_opset(model)))
    defined = sorted({variant.operator for variant in users})
    return Definitions(tuple(defined), tuple(missing))


def drop_uncalled(model: ModelProto) -> None:
    """Remove definitions that no node calls any more, since weights took the nodes' place.

    Args:
        model: changed in place; functions of other domains stay.
    """
    called: set[tuple[str, str]] = set()
    for scope in list_graphs(model.graph):
        called.update((node.domain, node.op_type) for node in scope.node)
    for function in model.functions:
        called.update((node.domain, node.op_type) for node in function.node)
    for index in reversed(range(len(model.functions))):
        function = model.functions[index]
        if function.domain in DOMAINS and (function.domain, function.name) not in called:
            del model.functions[index]
    still = {domain for domain, _ in called}
    for index in reversed(range(len(model.opset_import))):
        if model.opset_import[index].domain in DOMAINS and (
            model.opset_import[index].domain not in still
        ):
            del model.opset_import[index]


def list_defined(model: ModelProto) -> tuple[str, ...]:
    """List the operators that definitions in a model stand for.

    Args:
        model: any model.

    Returns:
        Their names, sorted.
    """
    names = {
        function.name.partition("_")[0]
        for function in model.functions
        if function.domain in DOMAINS
    }
    return tuple(sorted(names))


def _find_trouble(node: NodeProto) -> str | None:
    """What the node is, with the reason, where nothing defines it; None if it can be defined."""
    if node.op_type not in INPUTS:
        return f"{node.op_type} of {node.domain}"
    if len(node.input) not in INPUTS[node.op_type] or not all(node.input):
        return f"{node.op_type} with {len(node.input)} inputs"
    if node.op_type != "BipolarQuant" and read_rounding_mode(node) not in ROUNDINGS:
        return f"{node.op_type} that rounds by {read_rounding_mode(node)}"
    return None


def _state_defaults(node: NodeProto) -> None:
    """Gives a node the attributes that it leaves out: a function has no defaults for them."""
    if not _is_bounded(node.op_type.partition("_")[0], len(node.input)):
        return
    stated = {entry.name for entry in node.attribute}
    for name, default in INTEGER_ATTRIBUTES:
        if name not in stated:
            node.attribute.append(helper.make_attribute(name, default))


def _is_bounded(operator: str, inputs: int) -> bool:
    """Whether the operator clips to the integers of its attributes."""
    return operator in QUANTS or (operator == "Trunc" and inputs == 6)


def _make_function(variant: _Variant, name: str) -> FunctionProto:
    """An operator in standard ones."""
    if variant.operator == "BipolarQuant":
        inputs = ["x", "scale"]
        steps: Steps = (
            ("Constant", "", "nothing", {"value_float": 0.0}),
            ("Less", "x nothing", "negative", {}),
            ("Neg", "scale", "opposite", {}),
            ("Where", "negative opposite scale", "y", {}),
        )
    elif variant.operator in QUANTS:
        inputs = ["x", "scale", "zero", "bits"]
        steps = (
            *BOUNDS,
            ("Div", "x scale", "ratio", {}),
            ("Add", "ratio zero", "shifted", {}),
            ("Min", "shifted highest", "below", {}),
            ("Max", "below lowest", "value", {}),
            *ROUNDING_STEPS[variant.mode],
            ("Sub", "rounded zero", "level", {}),
            ("Mul", "level scale", "y", {}),
        )
    else:
        inputs, steps = _make_trunc_steps(variant)
    nodes = []
    attributes = []
    if _is_bounded(variant.operator, variant.inputs):
        attributes = [attribute for attribute, _ in INTEGER_ATTRIBUTES]
        nodes += _read_attributes(attributes)
    nodes += [
        helper.make_node(operator, sources.split(), [output], **values)
        for operator, sources, output, values in steps
    ]
    imports = [helper.make_opsetid("", OPSET)]
    return helper.make_function(variant.domain, name, inputs, ["y"], nodes, imports, attributes)


def _make_trunc_steps(variant: _Variant) -> tuple[list[str], Steps]:
    """Inputs and steps of either version of Trunc."""
    whole: Steps = (
        ("Div", "x scale", "ratio", {}),
        ("Add", "ratio zero", "shifted", {}),
        ("Round", "shifted", "before", {}),
    )
    if variant.inputs == 5:
        steps: Steps = (
            *whole,
            ("Sub", "bits_before bits", "fewer", {}),
            ("Cast", "fewer", "fewer_bits", {"to": TensorProto.FLOAT}),
            ("Constant", "", "two", {"value_float": 2.0}),
            ("Pow", "two fewer_bits", "divisor", {}),
            ("Div", "before divisor", "value", {}),
            *ROUNDING_STEPS[variant.mode],
            ("Sub", "rounded zero", "level", {}),
            ("Mul", "level scale", "y", {}),
        )
        return ["x", "scale", "zero", "bits_before", "bits"], steps
    steps = (
        *BOUNDS,
        *whole,
        ("Div", "scale_after scale", "growth", {}),
        ("Log", "growth", "logarithm", {}),
        ("Log", "two", "unit", {}),
        ("Div", "logarithm unit", "exponent", {}),
        ("Round", "exponent", "whole_exponent", {}),
        ("Pow", "two whole_exponent", "divisor", {}),
        ("Div", "before divisor", "divided", {}),
        ("Min", "divided highest", "below", {}),
        ("Max", "below lowest", "value", {}),
        *ROUNDING_STEPS[variant.mode],
        ("Div", "zero divisor", "zero_after", {}),
        ("Sub", "rounded zero_after", "level", {}),
        ("Mul", "level scale_after", "y", {}),
    )
    return ["x", "scale", "zero", "bits_before", "scale_after", "bits"], steps


def _read_attributes(names: Sequence[str]) -> list[NodeProto]:
    """Nodes that give a call's integer attributes as floats, under their names."""
    nodes = []
    for name in names:
        nodes.append(helper.make_node("Constant", [], [name + "_integer"]))
        nodes[-1].attribute.append(
            AttributeProto(name="value_int", ref_attr_name=name, type=AttributeProto.INT)
        )
        nodes.append(helper.make_node("Cast", [name + "_integer"], [name], to=TensorProto.FLOAT))
    return nodes
