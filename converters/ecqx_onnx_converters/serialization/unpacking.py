"""Turns a written file back into the float graph that it came from and the levels of its weights.

Each weight is checked against its checksum. What `make_plan` and `write` then make of both is the
same model in another storage or another form of dequantization.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ecqx_onnx.errors import FileError, ModelError
from ecqx_onnx_converters.graph.files import read_proto
from ecqx_onnx_converters.graph.graph import (
    FloatGraph,
    list_graphs,
    list_value_names,
    rename_values,
)
from ecqx_onnx_converters.graph.uses import find_makers, find_uses
from ecqx_onnx_converters.matching.digits import join_digits
from ecqx_onnx_converters.matching.matching import GraphWeight, Integers, Matching
from ecqx_onnx_converters.serialization.reading import (
    Record,
    StoredWeight,
    is_as_written,
    read_metadata,
    read_records,
    read_weights,
)
from ecqx_onnx_converters.storage import DOMAIN


@dataclass(frozen=True, eq=False)
class Unpacked:
    """A written file as what it was made of.

    Attributes:
        graph: Reads the weights of `matching` as floats; integers that it reads as such are plain
            initializers again.
        matching: The quantized weights.
        kernels: Names of weights that feed integer kernels.
        metadata: What the file said beside its list of tensors.
    """

    graph: FloatGraph
    matching: Matching
    kernels: tuple[str, ...]
    metadata: Mapping[str, Any]

    def with_floats(self) -> FloatGraph:
        """Fill in the weights.

        Returns:
            The graph with plain float32 weights.
        """
        proto = ModelProto()
        proto.CopyFrom(self.graph.proto)
        floats = {}
        for weight in self.matching.found:
            values = np.ascontiguousarray(weight.dequantize())
            floats[weight.name] = values
            proto.graph.initializer.append(
                TensorProto(name=weight.name, data_type=TensorProto.FLOAT, dims=values.shape)
            )
        return FloatGraph(proto, {**self.graph.weights, **floats})


def unpack(path: Path | str) -> Unpacked:
    """Read a written file.

    Args:
        path: Of the ONNX file; external data lies beside it.

    Returns:
        Its float graph, its quantized weights, and its metadata.

    Raises:
        FileError: The file is damaged.
        ModelError: It holds no weights of ours.
    """
    # 1. The weights, as far as the file is what was written.
    metadata = read_metadata(read_proto(path))
    stored = read_weights(path)
    records = read_records(metadata)
    _check_as_written(path, stored)
    # 2. Take the nodes out that make the weights' floats.
    graph = FloatGraph.load(path)
    main = graph.proto.graph
    makers = find_makers(main.node)
    before = set(find_uses(main))
    found: list[GraphWeight] = []
    plain: dict[str, TensorProto] = {}
    for record, item in zip(records, stored, strict=True):
        if not record.value:
            continue
        maker = makers.get(record.value)
        if maker not in main.node:  # made by nobody, or listed twice
            raise FileError(
                f"'{path}' makes no value '{record.value}', its weight '{record.name}';"
                " the file is damaged"
            )
        if record.integers:
            plain[record.value] = _make_integers(item, record.value)
        else:
            found.append(_make_weight(record, item, makers[record.value]))
        main.node.remove(makers[record.value])
    # 3. Take out what only these nodes read, and what comes back in another form.
    graph = _remove_unread(graph, before, {*plain, *(weight.name for weight in found)})
    # 4. Integers that the graph still reads: rows of an embedding are gathered from its levels.
    read = find_uses(main)
    gathered: dict[str, TensorProto] = {}
    for record, item in zip(records, stored, strict=True):
        if record.levels and not record.integers and record.levels in read:
            values = _make_integers(item, record.levels, transposed=record.transposed)
            gathered[record.levels] = values
    for name in gathered:
        if name in makers and makers[name] in main.node:
            main.node.remove(makers[name])
    graph = _remove_unread(graph, before, set(gathered))
    main.initializer.extend([*plain.values(), *gathered.values()])
    _drop_functions(graph.proto)
    # 5. Names as they were before the writer shortened them.
    named = tuple(_restore_names(main, found, records))
    kernels = []
    for old, new in zip(found, named, strict=True):
        if _feeds_kernel(makers[old.name]):
            kernels.append(new.name)
    ours = ("format", "storage", "tensors")
    content = {key: value for key, value in metadata.items() if key not in ours}
    return Unpacked(graph, Matching(named, ()), tuple(kernels), content)


def _check_as_written(path: Path | str, stored: Sequence[StoredWeight]) -> None:
    """An error where a checksum doesn't fit, or where there is nothing to unpack."""
    if not stored:
        raise ModelError(
            f"'{path}' holds no weights that ecqx-onnx has stored; there is nothing to unpack"
        )
    damaged = [item.weight.name for item in stored if not item.crc_ok]
    if damaged:
        raise FileError(
            f"'{path}' is damaged: the integers of weight '{damaged[0]}' don't have the checksum"
            f" that they were written with ({len(damaged)} of {len(stored)} weights); convert or"
            " pack the model again"
        )
    if is_as_written(path) is False:
        raise FileError(
            f"'{path}' is damaged, or some tool has changed it: its graph and parameters don't have"
            " the checksum that they were written with; unpack it as it was written, and change it"
            " after that"
        )


def _make_integers(item: StoredWeight, name: str, *, transposed: bool = False) -> TensorProto:
    """A weight's integers as a plain initializer, in the type that the graph reads.

    transposed: in the transpose of the weight's own axes.
    """
    levels = item.weight.tensor.levels.T if transposed else item.weight.tensor.levels
    form = item.weight.integers or Integers(TensorProto.INT8)
    values = join_digits(levels, form)
    dtype = helper.tensor_dtype_to_np_dtype(form.type)
    raw = bytes(numpy_helper.from_array(values.astype(dtype)).raw_data)
    return helper.make_tensor(name, form.type, values.shape, raw, raw=True)


def _make_weight(record: Record, item: StoredWeight, maker: NodeProto) -> GraphWeight:
    """A weight under its name in the file's graph, with the axes as the graph reads them."""
    weight = item.weight
    # DequantizeLinear gives [out, in] to Gemm with transB = 1.
    if record.transposed and maker.op_type != "Transpose":
        factor = None if weight.factor is None else weight.factor.T
        weight = replace(weight, tensor=weight.tensor.transpose((1, 0)), factor=factor)
    return replace(weight, name=record.value)


def _feeds_kernel(maker: NodeProto) -> bool:
    """Whether integer kernels read the weight: only in front of them a zero point is stated."""
    return maker.op_type == "DequantizeLinear" and len(maker.input) == 3


def _remove_unread(graph: FloatGraph, before: set[str], replaced: set[str]) -> FloatGraph:
    """The graph less what only the removed nodes read: decoders, their data, steps.

    before: all that was read with these nodes in place. replaced: values that come back in another
    form, and are removed as well. The proto is changed in place.
    """
    main = graph.proto.graph
    weights = dict(graph.weights)
    while True:
        # 1. Dead is what was read once and is no more.
        read = set(find_uses(main))
        for scope in list_graphs(main):
            read.update(value.name for value in scope.output)
        dead = (before - read) | replaced
        # 2. Nodes that make nothing else; what they read may be dead in the next turn.
        nodes = []
        for node in main.node:
            outputs = set(node.output)
            if not read & outputs and dead & outputs:
                nodes.append(node)
        for node in nodes:
            main.node.remove(node)
        # 3. Dead tensors.
        for index in reversed(range(len(main.initializer))):
            name = main.initializer[index].name
            if name in dead:
                weights.pop(name, None)
                del main.initializer[index]
        for index in reversed(range(len(main.sparse_initializer))):
            if main.sparse_initializer[index].values.name in dead:
                del main.sparse_initializer[index]
        if not nodes:
            return FloatGraph(graph.proto, weights)


def _drop_functions(model: ModelProto) -> None:
    """Our functions, and the import of their domain: the writer adds those that it needs."""
    for values in (model.functions, model.opset_import):
        for index in reversed(range(len(values))):
            if values[index].domain == DOMAIN:
                del values[index]


def _restore_names(
    main: GraphProto, found: Sequence[GraphWeight], records: Sequence[Record]
) -> Iterator[GraphWeight]:
    """Weights under the names that they had before the writer shortened them, if these are free."""
    taken = list_value_names(main)
    names = {record.value: record.name for record in records}
    outputs = {value.name for value in main.output}
    for weight in found:
        name = names[weight.name]
        if name in taken or name in outputs:
            name = weight.name
        elif weight.name not in outputs:
            rename_values(main, weight.name, name)
            taken.add(name)
        yield replace(weight, name=name, tensor=replace(weight.tensor, name=name))
