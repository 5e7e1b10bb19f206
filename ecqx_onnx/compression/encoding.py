"""Makes the file that holds rounded weights, by the planner and writer that `convert` uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ecqx_onnx_converters import FloatGraph, Matching, WriteReport, build, make_plan
from ecqx_onnx_converters.matching.matching import GraphWeight
from ecqx_onnx_converters.passes.float16 import Halved, round_steps, store_float16
from ecqx_onnx_converters.passes.work import Work, apply_passes
from ecqx_onnx_converters.planning.plan import Plan
from ecqx_onnx_converters.serialization.writer import Built

from ecqx_onnx.compression.model.weights import Weight
from ecqx_onnx.compression.rounding.ordered import Layers, RoundedModel
from ecqx_onnx.compression.rounding.rounding import Rounded
from ecqx_onnx.tensors import QuantTensor, Scale

EXACT = 1 << 30  # bytes of payloads up to which a file's size is counted to the byte


@dataclass(frozen=True)
class FileOptions:
    """How the file is written, as for `convert`.

    Attributes:
        floats: "float32" or "float16", for biases, steps and whatever stays float.
    """

    storage: str = "auto"
    dequantize: str = "auto"
    target: str = "onnxruntime"
    opset: int | None = None
    floats: str = "float32"


@dataclass(frozen=True, eq=False)
class Encoded:
    """A model that could be written.

    Attributes:
        plan: for `deliver`.
        nbytes: of the whole file.
        coded_bytes: of the quantized weights with their tables and steps.
        entries: how many weights these are.
        metadata: what the file says of itself.
        notes: what float16 did.
    """

    plan: Plan
    nbytes: int
    coded_bytes: int
    entries: int
    metadata: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        """Coded bits per quantized weight."""
        return 8 * self.coded_bytes / max(1, self.entries)


def encode(
    layers: Layers,
    model: RoundedModel,
    options: FileOptions,
    *,
    metadata: Mapping[str, Any],
) -> Encoded:
    """The file in memory.

    Args:
        layers: the network that was rounded.
        model: its weights.
        options: how to write it.
        metadata: what the file says of itself.

    Returns:
        The plan of the file and its sizes in bytes; nothing is written.

    Raises:
        OptionError: the options don't go together.
    """
    work = Work(_make_graph(layers, model), _make_matching(layers, model))
    if options.floats == "float16":
        work = apply_passes((round_steps, store_float16), work)
    half = any(halved.names or halved.steps for halved in work.find_notes(Halved))
    notes = tuple(work.sentences)
    plan = make_plan(
        work.graph,
        work.matching,
        target=options.target,
        storage=options.storage,
        dequantize=options.dequantize,
        opset=options.opset,
        prefer="disk" if options.storage == "auto" else "auto",  # a budget counts bytes
    )
    notes = (*notes, *plan.notes)
    stated = {**metadata, "floats": "float16"} if half else dict(metadata)
    built = build(plan, metadata=stated)
    nbytes = _count_file_bytes(built)
    # Functions that decode are part of what coded weights take; small against them, but counted.
    functions = sum(function.ByteSize() for function in built.model.functions)
    coded = functions + sum(row.nbytes for row in built.tensors)
    entries = sum(int(np.prod(row.shape)) for row in built.tensors)
    return Encoded(plan, nbytes, coded, entries, stated, notes)


def _count_file_bytes(built: Built) -> int:
    """Of the file; of a model beyond one protobuf, of the file and its data, nearly."""
    payload = sum(values.nbytes for values in built.payloads.values())
    if payload < EXACT:
        return built.to_model().ByteSize()
    return built.model.ByteSize() + payload


def _make_graph(layers: Layers, model: RoundedModel) -> FloatGraph:
    """The graph with corrected biases; its weights stay float, as the planner wants them."""
    arrays = dict(layers.graph.weights)
    for bias in layers.biases.values():
        if bias in model.changed:
            arrays[bias] = model.changed[bias]
    return FloatGraph(layers.graph.proto, arrays)


def _make_matching(layers: Layers, model: RoundedModel) -> Matching:
    found = []
    for weight in layers.weights:
        rounded = model.rounded.get(weight.name)
        if rounded is not None:
            tensor = as_tensor(weight, rounded)
            found.append(GraphWeight(weight.name, tensor, (weight.name,)))
    return Matching(tuple(found), ())


def as_tensor(weight: Weight, rounded: Rounded) -> QuantTensor:
    """Bring rounded levels to the initializer's layout, with one step or one per row.

    Args:
        weight: whose layout it is.
        rounded: its levels [groups, rows, columns] and steps [groups, rows, 1].

    Returns:
        int8 levels of the weight's shape; one float32 step where all rows have the same.
    """
    levels = weight.from_matrices(rounded.levels)
    steps = rounded.steps
    first = steps.reshape(-1)[0]
    if bool((steps == first).all()):
        return QuantTensor(weight.name, levels, Scale(np.array(first, np.float32)))
    return QuantTensor(weight.name, levels, Scale(steps.reshape(weight.step_shape())))


def _write_report_bits(report: WriteReport) -> float:
    """Bits of the whole file per quantized weight."""
    entries = sum(int(np.prod(row.shape)) for row in report.tensors)
    return 8 * report.nbytes / max(1, entries)
