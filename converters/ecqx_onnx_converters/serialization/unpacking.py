"""A file that `write` made -> the float graph that it came from and the levels of its weights, each checked against its CRC.

What `make_plan` and `write` then make of both is the same model in another storage or another form of dequantisation.
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
from ecqx_onnx_converters.graph.uses import find_uses
from ecqx_onnx_converters.matching.matching import GraphWeight, Matching
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
    """graph: reads the weights of `matching` as floats; integers that it reads as such are plain initializers again.

    kernels: names of weights that feed integer kernels. metadata: what the file said beside its list of tensors.
    """

    graph: FloatGraph
    matching: Matching
    kernels: tuple[str, ...]
    metadata: Mapping[str, Any]

    def with_floats(self) -> FloatGraph:
        """The graph with plain float32 weights."""
        floats = {
            weight.name: np.ascontiguousarray(weight.dequantize()) for weight in self.matching.found
        }
        proto = ModelProto()
        proto.CopyFrom(self.graph.proto)
        proto.graph.initializer.extend(
            TensorProto(name=name, data_type=TensorProto.FLOAT, dims=values.shape)
            for name, values in floats.items()
        )
        return FloatGraph(proto, {**self.graph.weights, **floats})


def unpack(path: Path | str) -> Unpacked:
    """FileError for a damaged file, ModelError for one that holds no weights of ours."""
    metadata = read_metadata(read_proto(path))
    stored, records = read_weights(path), read_records(metadata)
    if not stored:
        raise ModelError(
            f"'{path}' holds no weights that ecqx-onnx has stored; there is nothing to unpack"
        )
    damaged = [item.weight.name for item in stored if not item.crc_ok]
    if damaged:
        raise FileError(
            f"'{path}' is damaged: the integers of weight '{damaged[0]}' don't have the checksum that they were written with"
            f" ({len(damaged)} of {len(stored)} weights); convert or pack the model again"
        )
    if is_as_written(path) is False:
        raise FileError(
            f"'{path}' is damaged, or some tool has changed it: its graph and parameters don't have the checksum that they were"
            " written with; unpack it as it was written, and change it after that"
        )
    graph = FloatGraph.load(path)
    main = graph.proto.graph
    makers = {output: node for node in main.node for output in node.output}
    before = set(find_uses(main))
    found: list[GraphWeight] = []
    plain: dict[str, TensorProto] = {}
    for record, item in zip(records, stored, strict=True):
        if (
            record.value and makers.get(record.value) not in main.node
        ):  # made by nobody, or listed twice
            raise FileError(
                f"'{path}' makes no value '{record.value}', its weight '{record.name}'; the file is damaged"
            )
        if record.integers:
            plain[record.value] = make_integers(item, record.value)
        elif record.value:
            found.append(make_weight(record, item, makers[record.value]))
        if record.value:
            main.node.remove(makers[record.value])
    read = find_uses(main)
    for record, item in zip(records, stored, strict=True):
        if (
            record.levels and not record.integers and record.levels in read
        ):  # rows of an embedding are gathered from its integers
            plain[record.levels] = make_integers(item, record.levels, turned=record.transposed)
    graph = remove_unread(graph, before, {*plain, *(weight.name for weight in found)})
    main.initializer.extend(plain.values())
    _drop_functions(graph.proto)
    named = tuple(restore_names(main, found, records))
    kernels = tuple(
        new.name for old, new in zip(found, named, strict=True) if feeds_kernel(makers[old.name])
    )
    content = {
        key: value for key, value in metadata.items() if key not in ("format", "storage", "tensors")
    }
    return Unpacked(graph, Matching(named, ()), kernels, content)


def make_integers(item: StoredWeight, name: str, *, turned: bool = False) -> TensorProto:
    """turned: in the transpose of the weight's layout."""
    form, levels = (
        item.weight.integers,
        item.weight.tensor.levels.T if turned else item.weight.tensor.levels,
    )
    kind, offset = (TensorProto.INT8, 0) if form is None else (form.type, form.offset)
    wide = levels.astype(np.int16) + offset
    return helper.make_tensor(name, kind, levels.shape, make_raw(wide, kind), raw=True)


def make_raw(values: np.ndarray, kind: int) -> bytes:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    return bytes(numpy_helper.from_array(values.astype(dtype)).raw_data)


def make_weight(record: Record, item: StoredWeight, maker: NodeProto) -> GraphWeight:
    """Under its name in the file's graph, in the layout that the graph reads."""
    weight = item.weight
    if (
        record.transposed and maker.op_type != "Transpose"
    ):  # DequantizeLinear gives [out, in] to Gemm with transB = 1
        factor = None if weight.factor is None else weight.factor.T
        weight = replace(weight, tensor=weight.tensor.transpose((1, 0)), factor=factor)
    return replace(weight, name=record.value)


def feeds_kernel(maker: NodeProto) -> bool:
    """Only in front of integer kernels does the writer state a zero point."""
    return maker.op_type == "DequantizeLinear" and len(maker.input) == 3


def remove_unread(graph: FloatGraph, before: set[str], replaced: set[str]) -> FloatGraph:
    """Less what only the removed nodes read (decoders, their data, steps), and less what comes back in another form."""
    main, weights = graph.proto.graph, dict(graph.weights)
    while True:
        read = set(find_uses(main)) | {
            value.name for scope in list_graphs(main) for value in scope.output
        }
        dead = (before - read) | replaced
        nodes = [
            node for node in main.node if not read & set(node.output) and dead & set(node.output)
        ]
        for node in nodes:
            main.node.remove(node)
        for index in reversed(
            [index for index, tensor in enumerate(main.initializer) if tensor.name in dead]
        ):
            weights.pop(main.initializer[index].name, None)
            del main.initializer[index]
        for index in reversed(
            [
                index
                for index, sparse in enumerate(main.sparse_initializer)
                if sparse.values.name in dead
            ]
        ):
            del main.sparse_initializer[index]
        if not nodes:
            return FloatGraph(graph.proto, weights)


def _drop_functions(model: ModelProto) -> None:
    """Our functions, and the import of their domain: the writer adds those that it needs."""
    for index in reversed(
        [index for index, function in enumerate(model.functions) if function.domain == DOMAIN]
    ):
        del model.functions[index]
    for index in reversed(
        [index for index, entry in enumerate(model.opset_import) if entry.domain == DOMAIN]
    ):
        del model.opset_import[index]


def restore_names(
    main: GraphProto, found: Sequence[GraphWeight], records: Sequence[Record]
) -> Iterator[GraphWeight]:
    """Weights under the names that they had before the writer shortened them, where these are free."""
    taken, names = list_value_names(main), {record.value: record.name for record in records}
    for weight in found:
        name = names[weight.name]
        if name in taken or any(name == value.name for value in main.output):
            name = weight.name
        elif weight.name not in {value.name for value in main.output}:
            rename_values(main, weight.name, name)
            taken.add(name)
        yield replace(weight, name=name, tensor=replace(weight.tensor, name=name))
