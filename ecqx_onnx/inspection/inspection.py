"""Say what is in an .onnx file or a checkpoint: each weight's levels, and where every byte goes.

Runs no model and unpickles nothing.
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from ecqx_onnx_converters.dequantization.fused import expand_call
from ecqx_onnx_converters.graph.graph import list_graphs
from ecqx_onnx_converters.planning.load_cost import describe_load
from ecqx_onnx_converters.serialization.reading import (
    StoredWeight,
    is_as_written,
    read_records,
    read_weights,
)
from ecqx_onnx_converters.storage import DOMAIN
from onnx import TensorProto

from ecqx_onnx.checkpoint.insight import Insight, to_document
from ecqx_onnx.errors import EcqxError, FileError
from ecqx_onnx.inputs.onnx_file import OnnxFile, count_stored_bytes, read_onnx
from ecqx_onnx.inspection.byte_parts import FLOATS, NARROW, count_byte_parts, list_scale_names
from ecqx_onnx.inspection.foreign_integers import describe_gain, list_foreign_integers
from ecqx_onnx.inspection.result import FloatWeight, InspectedTensor, Inspection


def inspect(path: Path | str) -> Inspection:
    """Look into a file: an .onnx, or a checkpoint of ours.

    Args:
        path: of the file, whoever wrote it.

    Returns:
        What is in it.

    Raises:
        FileError: if it is neither, or damaged.

    Example:
        inspect("model.onnx").parts["quantised integers"]
    """
    path = Path(path)
    if path.suffix in (".pt", ".pth") or zipfile.is_zipfile(path):
        return _inspect_checkpoint(path)
    return _inspect_onnx(read_onnx(path))


def _inspect_onnx(file: OnnxFile) -> Inspection:
    proto = file.proto
    warnings: list[str] = []
    stored: tuple[StoredWeight, ...] = ()
    inflated = False
    try:
        stored = read_weights(file.with_data())
    except FileError as error:
        warnings.append(str(error))
        inflated = _is_inflated(file)
    if inflated:
        count = len(file.metadata["tensors"])
        warnings.insert(
            0,
            f"INFLATED: the metadata lists {count} quantised weights, but some tool has turned them"
            " into floats",
        )
    wrong = [item.weight.name for item in stored if not item.crc_ok]
    if wrong:
        warnings.append(
            f"the levels of {', '.join(wrong)} do not have the metadata's checksum; the file was"
            " changed"
        )
    elif is_as_written(file.with_data()) is False:
        warnings.append(
            "graph, parameters or metadata do not have the file's own checksum; the file was"
            " changed"
        )
    rows = tuple(_list_rows(stored, proto))
    packed = [item.weight.tensor.levels for item in stored if item.storage == "packed"]
    facts = _list_facts(file)
    facts = (*facts, *(("load", sentence) for sentence in describe_load(packed)))
    if not file.metadata.get("tensors"):
        rows, gain = _list_foreign(file, warnings)
        facts = (*facts, *gain)
    scales = list_scale_names(proto)
    return Inspection(
        file=str(file.path),
        kind="ONNX model",
        nbytes=file.size,
        facts=facts,
        tensors=rows,
        floats=tuple(_list_float_weights(proto.graph, scales)),
        parts=count_byte_parts(file, scales),
        recipe=_read_json_object(file.metadata.get("recipe")),
        preprocessing=_read_json_object(file.metadata.get("preprocessing")),
        labels=_read_labels(file.metadata.get("labels")),
        inflated=inflated,
        warnings=tuple(warnings),
    )


def _list_foreign(
    file: OnnxFile, warnings: list[str]
) -> tuple[tuple[InspectedTensor, ...], list[tuple[str, str]]]:
    """Someone else's integers, and a fact about them; a warning where they can't be read."""
    try:
        rows = list_foreign_integers(file.path)
    except (EcqxError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        # Of a graph that no runtime takes: a name that nothing defines, scales that do not fit, …
        warnings.append(f"its integers can't be read: {error}")
        return (), []
    gain = describe_gain(rows)
    return rows, [("possible gain", gain)] if gain else []


def _is_inflated(file: OnnxFile) -> bool:
    """No listed weight has its integers in the file any more."""
    graph = file.proto.graph
    present = {tensor.name for tensor in graph.initializer if tensor.data_type in NARROW}
    present.update(sparse.values.name for sparse in graph.sparse_initializer)
    for node in graph.node:
        present.update(node.output)
    listed = [record.levels or record.value for record in read_records(file.metadata)]
    return bool(listed) and not any(name in present for name in listed)


def _list_facts(file: OnnxFile) -> tuple[tuple[str, str], ...]:
    proto = file.proto
    # Old files list initializers among the inputs, too.
    initializers = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in initializers]
    operators: Counter[str] = Counter()
    calls = 0  # of functions of ours, whose names are single letters
    for graph in list_graphs(proto.graph):
        operators.update(node.op_type for node in graph.node if node.domain != DOMAIN)
        calls += sum(node.domain == DOMAIN for node in graph.node)
    facts = [
        (
            "opset",
            ", ".join(
                f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in proto.opset_import
            ),
        ),
        ("IR version", str(proto.ir_version)),
        ("producer", f"{proto.producer_name} {proto.producer_version}".strip()),
        ("inputs", "; ".join(map(_describe_signature, inputs))),
        ("outputs", "; ".join(map(_describe_signature, proto.graph.output))),
        ("nodes", ", ".join(f"{count} {name}" for name, count in sorted(operators.items()))),
        ("functions", _describe_functions(proto, calls)),
        ("external data", ", ".join(path.name for path in file.external)),
        ("tool", str(file.metadata.get("tool_version", ""))),
    ]
    return tuple(fact for fact in facts if fact[1])


def _describe_functions(proto: onnx.ModelProto, calls: int) -> str:
    names = [function.name for function in proto.functions if function.domain != DOMAIN]
    own = len(proto.functions) - len(names)
    if own:
        names.append(f"{own} that decode and dequantize weights, in {calls} nodes")
    return ", ".join(names)


def _describe_signature(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    if not tensor.elem_type:
        return value.name
    dtype = "?"
    if tensor.elem_type in TensorProto.DataType.values():
        dtype = TensorProto.DataType.Name(tensor.elem_type)
    lengths = []
    for dim in tensor.shape.dim:
        stated = str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param
        lengths.append(stated or "?")
    return f"{value.name} {dtype.lower()}[{', '.join(lengths)}]"


def _list_rows(
    stored: tuple[StoredWeight, ...], proto: onnx.ModelProto
) -> Iterator[InspectedTensor]:
    types = {
        tensor.name: TensorProto.DataType.Name(tensor.data_type)
        for tensor in proto.graph.initializer
    }
    # Levels that the graph reads through functions of ours, not through standard operators.
    folded: set[str] = set()
    for node in proto.graph.node:
        for part in expand_call(node):
            if part.domain == DOMAIN and part.input:
                folded.add(part.input[0])
    seen: set[str] = set()
    for item in stored:
        storage = f"{item.storage} {types.get(item.levels_name, '')}".strip()
        shared = item.levels_name in seen  # tied weights
        seen.add(item.levels_name)
        form = "folded" if item.levels_name in folded else "standard"
        if item.weight.integers is not None:
            form = "read as integers"
        nbytes = item.nbytes
        if shared:
            storage = f"{storage}, shared"
            nbytes = 0
        yield InspectedTensor.from_tensor(
            item.weight.tensor, item.weight.sources, storage, form, nbytes
        )


def _list_float_weights(graph: onnx.GraphProto, scales: set[str]) -> Iterator[FloatWeight]:
    for inner in list_graphs(graph):
        for tensor in inner.initializer:
            if tensor.data_type in FLOATS and len(tensor.dims) >= 2 and tensor.name not in scales:
                yield FloatWeight(tensor.name, tuple(tensor.dims), count_stored_bytes(tensor))


def _split_insight_bytes(insight: Insight) -> tuple[bytes, bytes]:
    text, pairs = to_document(insight)
    return text.encode(), pairs.tobytes()


def _inspect_checkpoint(path: Path) -> Inspection:
    # Here, since it loads torch, which .onnx files do not need.
    from ecqx_onnx.checkpoint.checkpoint import load

    checkpoint = load(path)
    nbytes = path.stat().st_size
    graph_bytes = checkpoint.graph.proto.ByteSize()
    graph_bytes += sum(weight.nbytes for weight in checkpoint.graph.weights.values())
    integers = sum(tensor.size for tensor in checkpoint.tensors)
    parts = {
        "quantised integers": integers,  # a byte each
        "float parameters": sum(value.nbytes for value in checkpoint.state.values()),
        "traced network": len(checkpoint.program),
        "float ONNX graph": graph_bytes,
    }
    if checkpoint.insight is not None:
        parts["insight for the report"] = sum(map(len, _split_insight_bytes(checkpoint.insight)))
    parts["container"] = nbytes - sum(parts.values())
    floats = [
        FloatWeight(name, tuple(value.shape), value.nbytes)
        for name, value in checkpoint.state.items()
        if value.ndim >= 2 and value.is_floating_point()
    ]
    rows = [
        InspectedTensor.from_tensor(tensor, (tensor.name,), "int8 levels", "", tensor.size)
        for tensor in checkpoint.tensors
    ]
    placed = len(checkpoint.matching.found)
    missing = [f"{entry.name}: {entry.reason}" for entry in checkpoint.matching.missing]
    facts = (
        (
            "quantised",
            f"{len(rows)} weights of {integers:,} integers, {placed} placed in the ONNX graph",
        ),
        ("notes", "; ".join(checkpoint.notes)),
        ("not in the graph", "; ".join(missing)),
    )
    return Inspection(
        file=str(path),
        kind="checkpoint",
        nbytes=nbytes,
        facts=tuple(fact for fact in facts if fact[1]),
        tensors=tuple(rows),
        floats=tuple(floats),
        parts=parts,
        recipe=_read_json_object(dict(checkpoint.recipe)),
        preprocessing=_read_json_object(checkpoint.preprocessing.to_json()),
        labels=tuple(checkpoint.labels),
    )


def _read_json_object(value: Any) -> dict[str, Any]:
    """A JSON object from the metadata, as such or as its text; empty if it is neither."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


def _read_labels(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()
