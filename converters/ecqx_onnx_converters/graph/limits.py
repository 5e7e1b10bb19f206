"""What an .onnx file may claim, looked at once, before anything else: sizes of names, numbers of
nodes, kinds of attributes.

A file of a few kilobytes can ask for years and terabytes: functions that call each other twice,
names of megabytes, tensors whose dims have no data behind them. Everything after this module may
rely on: text is text; no name is longer than LONGEST_NAME; functions call no function that calls
them, and make no more than MOST_NODES nodes of the graph; a node of a standard operator has as many
inputs and outputs as its specification says, and attributes of the types that it says.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf.message import Message
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, defs

from ecqx_onnx.errors import FileError

HIGHEST_OPSET = 1 << 20  # of any domain
LONGEST_NAME = 4096  # bytes; exporters' names have some hundreds at most
MOST_NODES = 200_000  # of the graph with every function call replaced by the function
USUAL_CALL = (
    5  # depth of calls up to which a runtime's time grows with the nodes; beyond, with their square
)
MOST_NESTED_NODES = 10_000
DEEPEST_CALL = 100  # functions that call each other
LARGEST_RATIO = (
    4096  # weights for each number that says where they lie, in a tensor of mostly zeros
)
SMALL = 1 << 26  # weights that any tensor may have, even of nothing but zeros
FREE_TEXT = {
    "doc_string",
    "value",
}  # fields that hold no names: documentation; of metadata and external data

Calls = dict[tuple[str, str], FunctionProto]


def check_model(path: Path | str, model: ModelProto) -> None:
    """Refuses a model that claims more than any real one does.

    Args:
        path: Its file, for the sentence.
        model: As parsed, external data left where it is.

    Raises:
        FileError: What is beyond the limits, and where.
    """
    _check_text(path, model)
    _check_calls(path, model)
    imports = [
        *model.opset_import,
        *(entry for function in model.functions for entry in function.opset_import),
    ]
    for entry in imports:
        if not 0 <= entry.version <= HIGHEST_OPSET:
            raise FileError(
                f"{path}: imports opset {entry.version} of '{entry.domain}', and there is none; "
                "the file is damaged"
            )
    versions = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    for node in _nodes(model.graph.node):
        _check_node(path, node, versions)
    for graph in [
        model.graph,
        *(
            graph
            for node in _nodes(model.graph.node)
            for a in node.attribute
            for graph in _graphs(a)
        ),
    ]:
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type not in TensorProto.DataType.values():
                kind = value.type.tensor_type.elem_type
                raise FileError(
                    f"{path}: value '{value.name}' has data type {kind}, which ONNX does not know"
                )
    for function in model.functions:
        own = {entry.domain or "ai.onnx": entry.version for entry in function.opset_import}
        for node in _nodes(function.node):
            _check_node(path, node, own)


def may_have_size(size: int, told: int) -> bool:
    """Whether a tensor that is stored as places and values may be so large.

    Args:
        size: Its number of weights.
        told: How many numbers the file holds for it.

    Returns:
        False where a few bytes claim gigabytes.
    """
    return 0 <= size <= max(SMALL, LARGEST_RATIO * told)


def _check_text(path: Path | str, message: Message) -> None:
    """Protobuf hands over text that is not UTF-8 as bytes, on which runtimes stumble."""
    for field, value in message.ListFields():
        parts = value if field.is_repeated else [value]
        if field.message_type is not None:
            for part in parts:
                _check_text(path, part)
        elif field.type == field.TYPE_STRING:
            for part in parts:
                _check_name(path, part, free=field.name in FREE_TEXT)


def _check_name(path: Path | str, text: Any, *, free: bool) -> None:
    if not isinstance(text, str):
        raise FileError(
            f"{path}: holds a name that is no text ({bytes(text)[:40]!r}); the file is damaged"
        )
    if not free and len(text) > LONGEST_NAME:
        raise FileError(
            f"{path}: holds a name of {len(text)} characters ({text[:40]!r}...), more than "
            f"{LONGEST_NAME}; rename it"
        )


def _check_calls(path: Path | str, model: ModelProto) -> None:
    """Counts the nodes that are there once every call is replaced, without replacing one."""
    functions: Calls = {(part.domain, part.name): part for part in model.functions}
    sizes: dict[tuple[str, str], tuple[int, int]] = {}
    open_calls: list[tuple[str, str]] = []

    def size_of(key: tuple[str, str]) -> tuple[int, int]:
        """(nodes, depth of calls) of a function."""
        if key not in sizes:
            if key in open_calls or len(open_calls) >= DEEPEST_CALL:
                why = (
                    "calls itself"
                    if key in open_calls
                    else f"is called by more than {DEEPEST_CALL} others"
                )
                raise FileError(
                    f"{path}: function '{key[1]}' {why}; the file can't be run, export the model "
                    "again"
                )
            open_calls.append(key)
            sizes[key] = total(functions[key].node)
            open_calls.pop()
        return sizes[key]

    def total(nodes: Any) -> tuple[int, int]:
        count, depth = 0, 0
        for node in _nodes(nodes):
            key = (node.domain, node.op_type)
            inner = size_of(key) if key in functions else (0, -1)
            count += 1 + inner[0]
            depth = max(depth, inner[1] + 1)
        return count, depth

    found = [total(model.graph.node), *map(size_of, functions)]
    for count, depth in found:
        most = MOST_NODES if depth <= USUAL_CALL else MOST_NESTED_NODES
        if count > most:
            raise FileError(
                f"{path}: its graph has {count} nodes once functions are put in place of their "
                f"calls, {depth} deep, and more"
                f" than {most} are not loaded in reasonable time; export the model with fewer"
            )


def _nodes(nodes: Any) -> Iterator[NodeProto]:
    """These, and the nodes of the graphs inside them. (Messages lie in no more than 100 others:
    protobuf's own limit.)"""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in _graphs(attribute):
                yield from _nodes(graph.node)


def _graphs(attribute: AttributeProto) -> Iterator[GraphProto]:
    if attribute.HasField("g"):
        yield attribute.g
    yield from attribute.graphs


def _check_node(path: Path | str, node: NodeProto, versions: dict[str, int]) -> None:
    domain = node.domain or "ai.onnx"
    schema = _schema(node.op_type, versions.get(domain, 0), domain)
    if schema is None:
        return
    name = f"{path}: node '{node.name or ', '.join(node.output)}' ({node.op_type})"
    for what, count, least, most in (
        ("inputs", len(node.input), schema.min_input, schema.max_input),
        ("outputs", len(node.output), schema.min_output, schema.max_output),
    ):
        if not least <= count <= most:
            raise FileError(
                f"{name} has {count} {what}, where {least} to {most} are possible; the file is "
                "damaged"
            )
    found = {attribute.name: attribute for attribute in node.attribute}
    for wanted in schema.attributes.values():
        attribute = found.get(wanted.name)
        if attribute is None and wanted.required:
            raise FileError(f"{name} lacks the attribute '{wanted.name}'; the file is damaged")
        if (
            attribute is not None
            and not attribute.ref_attr_name
            and attribute.type != wanted.type.value
        ):
            raise FileError(
                f"{name} has an attribute '{wanted.name}' of another type than its operator's; the "
                "file is damaged"
            )


@cache
def _schema(operator: str, version: int, domain: str) -> defs.OpSchema | None:
    """None for operators that onnx does not define."""
    try:
        return defs.get_schema(operator, version, "" if domain == "ai.onnx" else domain)
    except (defs.SchemaError, TypeError, OverflowError):
        return None
