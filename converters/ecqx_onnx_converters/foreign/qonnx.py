"""Read the weights that QONNX's fake quantization makes.

    Quant(x, scale, zero point, bits), also called IntQuant
        y = (round(clip(x / scale + zero point, lowest, highest)) - zero point) · scale
    BipolarQuant(x, scale)
        y = scale where x >= 0, else -scale

with lowest, highest of a `bits`-bit integer, signed or not; narrow leaves out the lowest signed,
the highest unsigned one. [Pappalardo et al. 2022, QONNX: Representing arbitrary-precision quantized
neural networks, sec. 4; its operators' specifications, versions 1 and 2.]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from onnx import NodeProto, TensorProto

from ecqx_onnx_converters.foreign.quantization_nodes import (
    Constant,
    Grid,
    Rule,
    make_grid,
    read_attribute,
)
from ecqx_onnx_converters.refusal import Refusal

DOMAINS = ("qonnx.custom_op.general", "onnx.brevitas", "finn.custom_op.general")
Rounding = Callable[[np.ndarray], np.ndarray]


def _round_half_up(x: np.ndarray) -> np.ndarray:
    """Halves away from zero."""
    return np.sign(x) * np.floor(np.abs(x) + np.float32(0.5))


def _round_half_down(x: np.ndarray) -> np.ndarray:
    """Halves towards zero."""
    return np.sign(x) * np.ceil(np.abs(x) - np.float32(0.5))


def _round_up(x: np.ndarray) -> np.ndarray:
    """Away from zero."""
    return np.sign(x) * np.ceil(np.abs(x))


ROUNDINGS: Mapping[str, Rounding] = {
    "ROUND": np.rint,
    "HALF_EVEN": np.rint,
    "FLOOR": np.floor,
    "CEIL": np.ceil,
    "ROUND_TO_ZERO": np.trunc,
    "DOWN": np.trunc,
    "UP": _round_up,
    "HALF_UP": _round_half_up,
    "HALF_DOWN": _round_half_down,
}


def _read_quant(node: NodeProto, inputs: Sequence[Constant | None]) -> Grid | Refusal:
    """Levels and step of a weight that Quant makes."""
    floats = _list_floats(inputs[:3])
    bits = _read_bits(inputs)
    if len(floats) != 3 or bits is None:
        return Refusal("its Quant has inputs that aren't float32 tensors and a bit width")
    x, scale, zero = floats
    rounding = ROUNDINGS.get(read_rounding_mode(node))
    if rounding is None:
        return Refusal(
            f"it is rounded by {read_rounding_mode(node)}, which QONNX calls none of "
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


RULES: Mapping[str, Rule] = {
    "Quant": _read_quant,
    "IntQuant": _read_quant,
    "BipolarQuant": _read_bipolar_quant,
}


def _list_floats(inputs: Sequence[Constant | None]) -> list[np.ndarray]:
    """The values of those inputs that are there and float32."""
    values = []
    for constant in inputs:
        if constant is not None and constant.type == TensorProto.FLOAT:
            values.append(constant.values)
    return values


def _read_bits(inputs: Sequence[Constant | None]) -> np.ndarray | None:
    """The bit width, float32 or int32; None where there is none."""
    last = inputs[3] if len(inputs) == 4 else None
    if last is None or last.type not in (TensorProto.FLOAT, TensorProto.INT32):
        return None
    return last.values


def _compute_bounds(bits: int, *, signed: bool, narrow: bool) -> tuple[int, int]:
    """(lowest, highest) integer."""
    if signed:
        return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    return 0, 2**bits - 1 - narrow


def read_rounding_mode(node: NodeProto) -> str:
    """Read how a node rounds.

    Args:
        node: A Quant, IntQuant or Trunc.

    Returns:
        In upper case, a key of ROUNDINGS or whatever else the node states.
    """
    for entry in node.attribute:
        if entry.name == "rounding_mode":
            return entry.s.decode(errors="replace").upper()
    return "FLOOR" if node.op_type == "Trunc" else "ROUND"


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
