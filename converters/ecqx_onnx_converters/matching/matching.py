"""Find the weights of a float graph that consist of known quantized tensors.

Weights of the graph and QuantTensors enter; where each QuantTensor sits leaves, with its levels as
the graph lays them out.

The exporter keeps a parameter's name, or loses it; transposes Linear weights for MatMul; multiplies
BatchNorm into conv weights under the old name; permutes the gate rows of LSTM and GRU and stacks
their directions; splits and transposes attention projections. So a weight is looked for, in this
order:

    1. by name, bit for bit, as it is or transposed;
    2. by name, up to one float32 factor per channel (BatchNorm);
    3. by value, bit for bit, as it is or transposed;
    4. by rows: each row, or each column, is a row or column of some QuantTensor, bit for bit.

Whatever is found reproduces the graph's float values: exactly, except in 2, where the exporter
itself had rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ecqx_onnx.tensors import Codebook, QuantTensor, Scale
from ecqx_onnx_converters.matching.rows import RowIndex

# A BatchNorm factor f arrives as fl(fl(kΔ)·f), two roundings, and is restored as fl(k·fl(s)), two
# more, each of at most 2^-24.
BATCHNORM_ROUNDING = 4 * 2.0**-24
SAMPLED = 64  # values that are compared before whole tensors are


@dataclass(frozen=True)
class Integers:
    """Says that the graph reads level + offset as an integer (QLinearConv, DequantizeLinear, …).

    Attributes:
        type: the TensorProto type of the integer.
        offset: the integer of level 0.
        bits: of each level. Fewer than 8: a UINT8 holds several levels along the last axis (as
            MatMulNBits and GatherBlockQuantized read them), the first in its low bits.
    """

    type: int
    offset: int = 0
    bits: int = 8

    @property
    def digits(self) -> int:
        """How many levels an integer holds."""
        return 8 // self.bits


@dataclass(frozen=True, eq=False)
class GraphWeight:
    """One initializer of the float graph and the levels that it consists of.

    Attributes:
        name: the initializer.
        tensor: levels in the graph's layout (a numpy view of the parameter's levels where the
            layouts differ by a permutation only); a step has the levels' number of dimensions, or
            none.
        sources: names of the parameters that the levels come from.
        factor: float32, broadcasts against the levels, multiplied onto a Codebook's values; None
            for 1. (A Scale has it in its step.)
        rescaled: the graph's values are the parameter's times a BatchNorm factor, restored to a
            relative 2^-22, not bit for bit.
        integers: the graph reads integers here; the tensor's step is 1 then. None for a float
            weight.
    """

    name: str
    tensor: QuantTensor
    sources: tuple[str, ...]
    factor: np.ndarray | None = None
    rescaled: bool = False
    integers: Integers | None = None

    def dequantize(self) -> np.ndarray:
        """The values that the written graph computes.

        Returns:
            float32, in the shape of the levels; the levels themselves where the graph reads
            integers.
        """
        values = self.tensor.dequantize()
        return values if self.factor is None else values * self.factor


@dataclass(frozen=True)
class Missing:
    """A QuantTensor that is nowhere in the graph, and why one thinks so."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Matching:
    """Where QuantTensors sit in a float graph.

    Attributes:
        found: weights of the graph, in the graph's order.
        missing: QuantTensors that are nowhere in it.
    """

    found: tuple[GraphWeight, ...]
    missing: tuple[Missing, ...]


def match(weights: Mapping[str, np.ndarray], tensors: Sequence[QuantTensor]) -> Matching:
    """Finds where quantized tensors sit among the weights of a float graph.

    Args:
        weights: initializer name -> values; other types than float32 are passed over.
        tensors: levels and what they stand for, in the layout of the parameters.

    Returns:
        The weights found, in the order of `weights`, and the tensors that are nowhere.
    """
    floats = {}
    for name, values in weights.items():
        if values.dtype == np.float32 and values.size:
            floats[name] = values
    tensors = [tensor for tensor in tensors if tensor.size]

    # 1. and 2. By name: bit for bit, or up to a factor per channel.
    found: dict[str, GraphWeight] = {}
    for tensor in tensors:
        if tensor.name in floats:
            weight = _match_by_name(tensor, floats[tensor.name])
            if weight is not None:
                found[tensor.name] = weight

    # 3. and 4. By value, or by rows, whatever has no levels yet.
    by_value = _ByValue(tensors)
    rows = RowIndex(tensors)
    for name, values in floats.items():
        if name not in found:
            weight = by_value.find(name, values) or _match_by_rows(rows, name, values)
            if weight is not None:
                found[name] = weight

    # 5. What is nowhere. Of tied weights one name survives: its copies are not missing.
    sources: set[str] = set()
    for weight in found.values():
        sources.update(weight.sources)
    copies = set()
    for tensor in tensors:
        if tensor.name in sources:
            copies.add(_sample_values(tensor.shape, tensor))
    missing = []
    for tensor in tensors:
        if tensor.name not in sources and _sample_values(tensor.shape, tensor) not in copies:
            missing.append(Missing(tensor.name, _explain_missing(tensor, floats)))
    ordered = tuple(found[name] for name in floats if name in found)
    return Matching(ordered, tuple(missing))


def _match_by_name(tensor: QuantTensor, values: np.ndarray) -> GraphWeight | None:
    """The weight of the tensor's own name: bit for bit, else up to a factor per channel."""
    layouts = [layout for layout in _list_layouts(tensor) if layout.shape == values.shape]
    for layout in layouts:
        if np.array_equal(layout.dequantize(), values):
            return GraphWeight(tensor.name, _flatten_step(layout), (tensor.name,))
    for layout in layouts:
        weight = _match_rescaled(layout, values)
        if weight is not None:
            return weight
    return None


def _list_layouts(tensor: QuantTensor) -> list[QuantTensor]:
    """As it is and, for a matrix, transposed."""
    return [tensor, tensor.transpose((1, 0))] if len(tensor.shape) == 2 else [tensor]


def _match_rescaled(layout: QuantTensor, values: np.ndarray) -> GraphWeight | None:
    """values = what layout's levels stand for, times one factor per channel, to BATCHNORM_ROUNDING;
    None when that's not so."""
    scaled = isinstance(layout.meaning, Scale) and layout.meaning.step.ndim == 0
    base = layout.levels.astype(np.float32) if scaled else layout.dequantize()
    for split, others in _list_channel_shapes(values.shape):
        factor, dead = _find_factor(base.reshape(split), values.reshape(split), others)
        if factor is not None:
            if len(split) > values.ndim:  # [groups, 1, out, …] -> [in, out, …]
                spread = (*split[:2], *factor.shape[2:])
                joined = (values.shape[0], *factor.shape[2:])
                factor = np.broadcast_to(factor, spread).reshape(joined)
                dead = np.broadcast_to(dead, spread).reshape(joined)
            weight = with_factor(layout, factor, dead, scaled=scaled)
            if weight is not None:
                return weight
    return None


def _list_channel_shapes(
    shape: tuple[int, ...],
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(shape to see the weight in, dimensions that share a factor): output channels first, then
    inputs, then a ConvTranspose's outputs in each of its groups, [groups, in / groups, out /
    groups, …]."""
    for axis in range(min(2, len(shape))):
        yield shape, tuple(other for other in range(len(shape)) if other != axis)
    if len(shape) <= 2:
        return
    for groups in range(2, shape[0] + 1):
        if shape[0] % groups == 0:
            yield (groups, shape[0] // groups, *shape[1:]), (1, *range(3, len(shape) + 1))


def _find_factor(
    base: np.ndarray, values: np.ndarray, shared: tuple[int, ...]
) -> tuple[np.ndarray | None, np.ndarray]:
    """(float32 factor with base · factor = values to BATCHNORM_ROUNDING, or None; where all values
    are zero), keepdims."""
    # A BatchNorm weight of 0 makes a channel of zeros: any factor will do.
    dead = ~(values != 0).any(axis=shared, keepdims=True)
    with np.errstate(all="ignore"):
        ratio = values.astype(np.float64) / base  # NaN where both are zero: no condition
        # The middle of a channel's ratios: none is further from it than half their spread.
        lowest = np.fmin.reduce(ratio, axis=shared, keepdims=True)
        highest = np.fmax.reduce(ratio, axis=shared, keepdims=True)
        factor = np.where(dead, 1.0, (lowest + highest) / 2).astype(np.float32)
        restored = np.where(dead, np.float32(0), base * factor)
        close = np.abs(restored - values) <= BATCHNORM_ROUNDING * np.abs(values)
    if not close.all():
        return None, dead
    return factor, dead


def with_factor(
    layout: QuantTensor, factor: np.ndarray, dead: np.ndarray, *, scaled: bool
) -> GraphWeight | None:
    """Multiplies what levels stand for by one factor per channel.

    Args:
        layout: the tensor, in the graph's layout.
        factor: float32, broadcasts against the levels.
        dead: bool, like `factor`: channels whose product is zero; their levels become 0.
        scaled: the factor multiplies the levels themselves, in place of their step.

    Returns:
        The weight under the tensor's name: a Scale has the factor in its step, and its sign in the
        levels; beside a Codebook it stands alone. None where a level's sign would leave int8.
    """
    if isinstance(layout.meaning, Codebook):
        alive = replace(layout, levels=layout.levels * ~dead) if dead.any() else layout
        return GraphWeight(layout.name, alive, (layout.name,), factor, rescaled=True)
    levels = layout.levels
    if dead.any() or (factor < 0).any():  # a step is positive: the sign goes into the levels
        flipped = levels * np.where(dead, 0, np.sign(factor)).astype(np.int16)
        if flipped.max() > 127:
            return None
        levels = flipped.astype(np.int8)
    step = np.abs(factor)
    if not scaled:
        step = step * layout.meaning.step
    step = np.where(dead, layout.meaning.step.reshape(-1)[0], step).astype(np.float32)
    tensor = _flatten_step(replace(layout, levels=levels, meaning=Scale(step)))
    return GraphWeight(layout.name, tensor, (layout.name,), rescaled=True)


def _flatten_step(tensor: QuantTensor) -> QuantTensor:
    """The same with the smallest step: dimensions along which it doesn't vary have length 1; one
    value means shape ()."""
    if not isinstance(tensor.meaning, Scale):
        return tensor
    step = tensor.meaning.step
    for axis in range(step.ndim):
        first = step.take([0], axis)
        if step.shape[axis] > 1 and (step == first).all():
            step = first
    if step.size == 1:
        step = step.reshape(())
    return replace(tensor, meaning=Scale(step))


class _ByValue:
    """Finds whole tensors by their values, as they are or transposed."""

    def __init__(self, tensors: Sequence[QuantTensor]) -> None:
        self.layouts: dict[tuple, list[QuantTensor]] = {}
        for tensor in tensors:
            for layout in _list_layouts(tensor):
                self.layouts.setdefault(_sample_values(layout.shape, layout), []).append(layout)

    def find(self, name: str, values: np.ndarray) -> GraphWeight | None:
        """The weight `name` of these float32 values; None where no tensor has them, bit for bit."""
        for layout in self.layouts.get(_sample_values(values.shape, values), []):
            if np.array_equal(layout.dequantize(), values):
                return GraphWeight(name, _flatten_step(layout), (layout.name,))
        return None


def _sample_values(shape: tuple[int, ...], source: np.ndarray | QuantTensor) -> tuple:
    """(shape, some values as bytes), the same for equal tensors."""
    last = np.prod(shape, dtype=np.int64) - 1
    where = np.unravel_index(np.linspace(0, last, SAMPLED).astype(np.int64), shape)
    if isinstance(source, np.ndarray):
        values = source[where]
    elif isinstance(source.meaning, Codebook):
        values = source.meaning.values[source.levels[where]]
    else:
        steps = np.broadcast_to(source.meaning.step, shape)[where]
        values = source.levels[where].astype(np.float32) * steps
    return shape, (values + np.float32(0)).tobytes()  # + 0: a negative zero equals a positive one


def _match_by_rows(rows: RowIndex, name: str, values: np.ndarray) -> GraphWeight | None:
    """The weight put together from rows of QuantTensors; a matrix also from its columns."""
    gathered = rows.find(name, values)
    if gathered is not None:
        return GraphWeight(name, _flatten_step(gathered.tensor), gathered.sources)
    if values.ndim != 2:
        return None
    gathered = rows.find(name, values.T)
    if gathered is None:
        return None
    transposed = gathered.tensor.transpose((1, 0))
    return GraphWeight(name, _flatten_step(transposed), gathered.sources)


def _explain_missing(tensor: QuantTensor, floats: Mapping[str, np.ndarray]) -> str:
    """Why a tensor is nowhere in the graph, as far as one can tell."""
    if tensor.name not in floats:
        return (
            "no weight of the graph has its name or its values; the exporter may have merged it "
            "with another operation"
        )
    if floats[tensor.name].size != tensor.size:
        return (
            f"the graph's weight of this name has shape {floats[tensor.name].shape}, not "
            f"{tensor.shape}"
        )
    return (
        "the graph's weight of this name has other values, and no factor per channel relates them"
    )
