"""Compute what a quantizing node makes of constants: integers, or levels and a step.

    QuantizeLinear      integer = saturate(round(x / scale) + zero point), halves to even
    Clip                integer = min(max(integer, lowest), highest)
    DequantizeLinear    weight = (integer - zero point) · scale

[ONNX, operators of opsets 10 to 25; Clip on integers is for QCDQ's narrow ranges.]

All in float32, as runtimes do it: the weight is theirs bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto

from ecqx_onnx_converters.refusal import Refusal
from ecqx_onnx_converters.storage.dense import TYPES

# TensorProto type -> (lowest, highest) integer.
RANGES = {
    **{kind: (least, most) for kind, (_, least, most) in TYPES.items()},
    TensorProto.UINT8: (0, 255),
}


@dataclass(frozen=True, eq=False)
class Constant:
    """Values that no input of the graph changes.

    Attributes:
        values: float32, or integers as int32.
        type: their TensorProto type.
        source: the initializer that they come from.
        maker: the node that computes them; None for the initializer itself.
    """

    values: np.ndarray
    type: int
    source: str
    maker: NodeProto | None = None


@dataclass(frozen=True, eq=False)
class Grid:
    """A float weight: level · step.

    Attributes:
        levels: int8.
        step: float32, positive and finite; broadcasts against the levels.
        source: the initializer that they come from.
    """

    levels: np.ndarray
    step: np.ndarray
    source: str


Rule = Callable[[NodeProto, Sequence[Constant | None]], "Constant | Grid | Refusal | None"]


def read_attribute(node: NodeProto, name: str, default: int) -> int:
    """Read a whole number among a node's attributes.

    Args:
        node: any node.
        name: of the attribute.
        default: what the operator takes where the node has none.

    Returns:
        The attribute's value, or the default.
    """
    for entry in node.attribute:
        if entry.name == name:
            return int(entry.i)
    return default


def _read_quantize_linear(node: NodeProto, inputs: Sequence[Constant | None]) -> Constant | Refusal:
    """The integers, as int32, that QuantizeLinear makes of float32 values."""
    x, scale, zero = _take_three(inputs)
    if x is None or scale is None or x.type != TensorProto.FLOAT or scale.type != TensorProto.FLOAT:
        return Refusal("it isn't quantised from float32 by a float32 scale")
    integer_type = read_attribute(node, "output_dtype", 0) or TensorProto.UINT8
    if zero is not None:
        integer_type = zero.type
    if integer_type not in RANGES:
        type_name = TensorProto.DataType.Name(integer_type)
        return Refusal(f"it is quantised to {type_name}; weights of at most 8 bits can be packed")
    along = _place_along_axis(node, x.values, scale.values)
    if isinstance(along, Refusal):
        return along
    origin = _spread_zero(zero, along)
    if isinstance(origin, Refusal):
        return origin
    with np.errstate(all="ignore"):
        rounded = np.rint(x.values / along) + origin
    if not np.isfinite(rounded).all():
        return Refusal("it has values, or scales, that aren't finite or are zero")
    integers = np.clip(rounded, *RANGES[integer_type]).astype(np.int32)
    return Constant(integers, integer_type, x.source, node)


def _read_clip(node: NodeProto, inputs: Sequence[Constant | None]) -> Constant | None:
    """The integers within Clip's bounds; None for floats, and where the integers come from no
    quantizing node."""
    x, lowest, highest = _take_three(inputs)
    if x is None or x.maker is None:
        return None
    if any(bound is not None and bound.values.size != 1 for bound in (lowest, highest)):
        return None
    values = x.values
    if lowest is not None:
        values = np.maximum(values, lowest.values.reshape(-1)[0])
    if highest is not None:
        values = np.minimum(values, highest.values.reshape(-1)[0])
    return Constant(values.astype(np.int32), x.type, x.source, node)


def _read_dequantize_linear(node: NodeProto, inputs: Sequence[Constant | None]) -> Grid | Refusal:
    """Levels and step of the float weight that DequantizeLinear makes of integers."""
    integers, scale, zero = _take_three(inputs)
    if integers is None or integers.type not in RANGES:
        return Refusal("it has more than 8 bits")
    output_type = read_attribute(node, "output_dtype", TensorProto.FLOAT)
    if scale is None or scale.type != TensorProto.FLOAT or output_type != TensorProto.FLOAT:
        return Refusal("it isn't dequantised to float32")
    along = _place_along_axis(node, integers.values, scale.values)
    if isinstance(along, Refusal):
        return along
    origin = _spread_zero(zero, along)
    if isinstance(origin, Refusal):
        return origin
    return make_grid(integers.values - origin, along, integers.source)


def make_grid(levels: np.ndarray, step: np.ndarray, source: str) -> Grid | Refusal:
    """Put levels and step together, if int8 holds the levels and the step is proper.

    Args:
        levels: integers of any type, the zero point subtracted.
        step: float32, broadcasts against the levels.
        source: the initializer that they come from.

    Returns:
        The weight; a Refusal where it is empty, a level lies outside -128 to 127, or a step isn't
        positive and finite.
    """
    if not levels.size:
        return Refusal("it is empty")
    if levels.min() < -128 or levels.max() > 127:
        return Refusal(
            f"its levels go from {int(levels.min())} to {int(levels.max())}, less the zero point, "
            "past int8"
        )
    if not ((step > 0) & np.isfinite(step)).all():
        return Refusal("its scale isn't positive and finite")
    if step.size == 1:
        step = step.reshape(())
    return Grid(levels.astype(np.int8), step, source)


def _take_three(
    inputs: Sequence[Constant | None],
) -> tuple[Constant | None, Constant | None, Constant | None]:
    """The inputs of a node that has up to three; None for one that it leaves out."""
    first, second, third = (*inputs, None, None, None)[:3]
    return first, second, third


def _place_along_axis(
    node: NodeProto, values: np.ndarray, scale: np.ndarray
) -> np.ndarray | Refusal:
    """The scale in a shape that broadcasts against the values: one, or one per index of the node's
    axis."""
    if scale.size == 1 and scale.ndim <= 1:
        return scale.reshape(())
    axis = read_attribute(node, "axis", 1)
    if scale.ndim == 1 and -values.ndim <= axis < values.ndim and values.shape[axis] == scale.size:
        shape = [1] * values.ndim
        shape[axis] = scale.size
        return scale.reshape(shape)
    return Refusal(
        f"it has a scale of shape {list(scale.shape)}, neither one nor one per index of an axis"
    )


def _spread_zero(zero: Constant | None, along: np.ndarray) -> np.ndarray | Refusal:
    """The zero point in the shape of the scale."""
    if zero is None:
        return np.zeros((), np.int32)
    if zero.values.size == 1:
        return zero.values.reshape(())
    if zero.values.size != along.size:
        return Refusal(f"it has {zero.values.size} zero points for {along.size} scales")
    return zero.values.reshape(along.shape)


RULES: Mapping[str, Rule] = {
    "QuantizeLinear": _read_quantize_linear,
    "Clip": _read_clip,
    "DequantizeLinear": _read_dequantize_linear,
}
