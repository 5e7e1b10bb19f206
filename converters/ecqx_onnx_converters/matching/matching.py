"""(weights of the float graph, QuantTensors) -> where each QuantTensor sits, with its levels as the
graph lays them out.

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


@dataclass(frozen=True)
class Integers:
    """The graph reads level + offset as an integer of TensorProto type `type` (QLinearConv,
    DequantizeLinear, …), no float."""

    type: int
    offset: int = 0


@dataclass(frozen=True, eq=False)
class GraphWeight:
    """One initializer of the float graph and the levels that it consists of.

    name: the initializer.
    tensor: levels in the graph's layout (a numpy view of the parameter's levels where the layouts
    differ by a permutation only);
        a step has the levels' number of dimensions, or none.
    sources: names of the parameters that the levels come from.
    factor: float32, broadcasts against the levels, multiplied onto a Codebook's values; None for 1.
    (A Scale has it in its step.)
    rescaled: the graph's values are the parameter's times a BatchNorm factor, restored to a
    relative 2^-22, not bit for bit.
    integers: the graph reads integers here; the tensor's step is 1 then. None for a float weight.
    """

    name: str
    tensor: QuantTensor
    sources: tuple[str, ...]
    factor: np.ndarray | None = None
    rescaled: bool = False
    integers: Integers | None = None

    def dequantize(self) -> np.ndarray:
        """float32: what the written graph computes; the levels where it reads integers."""
        values = self.tensor.dequantize()
        return values if self.factor is None else values * self.factor


@dataclass(frozen=True)
class Missing:
    """A QuantTensor that is nowhere in the graph, and why one thinks so."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Matching:
    found: tuple[GraphWeight, ...]
    missing: tuple[Missing, ...]


def match(weights: Mapping[str, np.ndarray], tensors: Sequence[QuantTensor]) -> Matching:
    """weights: initializer name -> float32 values (other types are passed over). Order of `found`:
    that of `weights`."""
    floats = {
        name: values
        for name, values in weights.items()
        if values.dtype == np.float32 and values.size
    }
    tensors = [tensor for tensor in tensors if tensor.size]
    found: dict[str, GraphWeight] = {}
    for tensor in tensors:
        if tensor.name in floats:
            weight = _match_by_name(tensor, floats[tensor.name])
            if weight is not None:
                found[tensor.name] = weight
    by_value = _ByValue(tensors)
    rows = RowIndex(tensors)
    for name, values in floats.items():
        if name not in found:
            weight = by_value.find(name, values) or _match_by_rows(rows, name, values)
            if weight is not None:
                found[name] = weight
    sources = {source for weight in found.values() for source in weight.sources}
    copies = {
        _sample_values(tensor.shape, tensor) for tensor in tensors if tensor.name in sources
    }  # of tied weights one name survives
    missing = tuple(
        Missing(tensor.name, _explain_missing(tensor, floats))
        for tensor in tensors
        if tensor.name not in sources and _sample_values(tensor.shape, tensor) not in copies
    )
    return Matching(tuple(found[name] for name in floats if name in found), missing)


def _match_by_name(tensor: QuantTensor, values: np.ndarray) -> GraphWeight | None:
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
            per_channel = tuple(
                1 if length == 1 else full for length, full in zip(factor.shape, split, strict=True)
            )
            if len(split) > values.ndim:  # [groups, 1, out, …] -> [in, out, …]
                spread = (split[0], split[1], *per_channel[2:])
                factor, dead = (
                    np.broadcast_to(part, spread).reshape(values.shape[0], *per_channel[2:])
                    for part in (factor, dead)
                )
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
    if len(shape) > 2:
        for groups in (groups for groups in range(2, shape[0] + 1) if shape[0] % groups == 0):
            yield (groups, shape[0] // groups, *shape[1:]), (1, *range(3, len(shape) + 1))


def _find_factor(
    base: np.ndarray, values: np.ndarray, shared: tuple[int, ...]
) -> tuple[np.ndarray | None, np.ndarray]:
    """(float32 factor with base · factor = values to BATCHNORM_ROUNDING, or None; where all values
    are zero), keepdims."""
    dead = ~(values != 0).any(
        axis=shared, keepdims=True
    )  # a BatchNorm weight of 0, say: any factor will do
    with np.errstate(all="ignore"):
        ratio = values.astype(np.float64) / base  # NaN where both are zero: no condition
        # The middle of a channel's ratios: none is further from it than half their spread.
        factor = (
            np.fmin.reduce(ratio, axis=shared, keepdims=True)
            + np.fmax.reduce(ratio, axis=shared, keepdims=True)
        ) / 2
        factor = np.where(dead, 1.0, factor).astype(np.float32)
        close = np.abs(
            np.where(dead, np.float32(0), base * factor) - values
        ) <= BATCHNORM_ROUNDING * np.abs(values)
    return (factor if close.all() else None), dead


def with_factor(
    layout: QuantTensor, factor: np.ndarray, dead: np.ndarray, *, scaled: bool
) -> GraphWeight | None:
    """The levels with what they stand for times `factor` per channel. dead: where that is zero, so
    that levels become 0. `scaled`: the factor multiplies the levels themselves. None where a
    level's sign would leave int8."""
    if isinstance(layout.meaning, Codebook):
        alive = replace(layout, levels=layout.levels * ~dead) if dead.any() else layout
        return GraphWeight(layout.name, alive, (layout.name,), factor, rescaled=True)
    levels = layout.levels
    if dead.any() or (factor < 0).any():  # a step is positive: the sign goes into the levels
        flipped = levels * np.where(dead, 0, np.sign(factor)).astype(np.int16)
        if flipped.max() > 127:
            return None
        levels = flipped.astype(np.int8)
    step = np.abs(factor) if scaled else np.abs(factor) * layout.meaning.step
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
    return replace(tensor, meaning=Scale(step.reshape(()) if step.size == 1 else step))


class _ByValue:
    """Finds whole tensors by their values, as they are or transposed."""

    def __init__(self, tensors: Sequence[QuantTensor]) -> None:
        self.layouts: dict[tuple, list[QuantTensor]] = {}
        for tensor in tensors:
            for layout in _list_layouts(tensor):
                self.layouts.setdefault(_sample_values(layout.shape, layout), []).append(layout)

    def find(self, name: str, values: np.ndarray) -> GraphWeight | None:
        for layout in self.layouts.get(_sample_values(values.shape, values), []):
            if np.array_equal(layout.dequantize(), values):
                return GraphWeight(name, _flatten_step(layout), (layout.name,))
        return None


SAMPLED = 64  # values that are compared before whole tensors are


def _sample_values(shape: tuple[int, ...], source: np.ndarray | QuantTensor) -> tuple:
    """(shape, some values as bytes), the same for equal tensors."""
    where = np.unravel_index(
        np.linspace(0, np.prod(shape, dtype=np.int64) - 1, SAMPLED).astype(np.int64), shape
    )
    if isinstance(source, np.ndarray):
        values = source[where]
    elif isinstance(source.meaning, Codebook):
        values = source.meaning.values[source.levels[where]]
    else:
        values = (
            source.levels[where].astype(np.float32)
            * np.broadcast_to(source.meaning.step, shape)[where]
        )
    return shape, (values + np.float32(0)).tobytes()  # + 0: a negative zero equals a positive one


def _match_by_rows(rows: RowIndex, name: str, values: np.ndarray) -> GraphWeight | None:
    """The weight put together from rows of QuantTensors; a matrix also from its columns."""
    gathered = rows.find(name, values)
    if gathered is not None:
        return GraphWeight(name, _flatten_step(gathered.tensor), gathered.sources)
    gathered = rows.find(name, values.T) if values.ndim == 2 else None
    return (
        None
        if gathered is None
        else GraphWeight(name, _flatten_step(gathered.tensor.transpose((1, 0))), gathered.sources)
    )


def _explain_missing(tensor: QuantTensor, floats: Mapping[str, np.ndarray]) -> str:
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
