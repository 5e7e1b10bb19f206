"""Limits on what an .onnx file may claim, checked once, before anything else looks at the model.

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
# Depth of calls up to which a runtime's time grows with the nodes; beyond, with their square.
USUAL_CALL = 5
MOST_NESTED_NODES = 10_000
DEEPEST_CALL = 100  # functions that call each other
# Weights for each number that says where they lie, in a tensor of mostly zeros.
LARGEST_RATIO = 4096
SMALL = 1 << 26  # weights that any tensor may have, even of nothing but zeros
# Fields that hold no names: documentation, and the values of metadata and external data.
FREE_TEXT = {"doc_string", "value"}

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
    imports = list(model.opset_import)
    for function in model.functions:
        imports.extend(function.opset_import)
    for entry in imports:
        if not 0 <= entry.version <= HIGHEST_OPSET:
            raise FileError(
                f"{path}: imports opset {entry.version} of '{entry.domain}', and there is none; "
                "the file is damaged"
            )
    _check_nodes(path, model.graph.node, model.opset_import)
    _check_values(path, model.graph)
    for node in _walk_nodes(model.graph.node):
        for attribute in node.attribute:
            for graph in _list_graphs(attribute):
                _check_values(path, graph)
    for function in model.functions:
        _check_nodes(path, function.node, function.opset_import)


def may_have_size(size: int, told: int) -> bool:
    """Whether a tensor that is stored as places and values may be so large.

    Args:
        size: Its number of weights.
        told: How many numbers the file holds for it.

    Returns:
        False where a few bytes claim gigabytes.
    """
    return 0 <= size <= max(SMALL, LARGEST_RATIO * told)


def _check_values(path: Path | str, graph: GraphProto) -> None:
    """Runtimes stumble over types that ONNX does not have."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        data_type = value.type.tensor_type.elem_type
        if data_type not in TensorProto.DataType.values():
            raise FileError(
                f"{path}: value '{value.name}' has data type {data_type}, which ONNX does not know"
            )


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

    def measure_function(key: tuple[str, str]) -> tuple[int, int]:
        """(nodes, depth of calls) of a function."""
        if key not in sizes:
            why = ""
            if key in open_calls:
                why = "calls itself"
            elif len(open_calls) >= DEEPEST_CALL:
                why = f"is called by more than {DEEPEST_CALL} others"
            if why:
                raise FileError(
                    f"{path}: function '{key[1]}' {why}; the file can't be run, export the model "
                    "again"
                )
            open_calls.append(key)
            sizes[key] = add_up(functions[key].node)
            open_calls.pop()
        return sizes[key]

    def add_up(nodes: Any) -> tuple[int, int]:
        """The same of a list of nodes; one without calls has depth 0."""
        count = 0
        depth = 0
        for node in _walk_nodes(nodes):
            count += 1
            key = (node.domain, node.op_type)
            if key in functions:
                inner_count, inner_depth = measure_function(key)
                count += inner_count
                depth = max(depth, inner_depth + 1)
        return count, depth

    found = [add_up(model.graph.node), *map(measure_function, functions)]
    for count, depth in found:
        # Nested calls cost a runtime more than the same nodes side by side.
        most = MOST_NODES if depth <= USUAL_CALL else MOST_NESTED_NODES
        if count > most:
            raise FileError(
                f"{path}: its graph has {count} nodes once functions are put in place of their "
                f"calls, {depth} deep, and more"
                f" than {most} are not loaded in reasonable time; export the model with fewer"
            )


def _walk_nodes(nodes: Any) -> Iterator[NodeProto]:
    """These, and the nodes of the graphs inside them. (Messages lie in no more than 100 others:
    protobuf's own limit.)"""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in _list_graphs(attribute):
                yield from _walk_nodes(graph.node)


def _list_graphs(attribute: AttributeProto) -> Iterator[GraphProto]:
    if attribute.HasField("g"):
        yield attribute.g
    yield from attribute.graphs


def _check_nodes(path: Path | str, nodes: Any, imports: Any) -> None:
    """Checks each node against its operator in the opset that is imported for it."""
    versions = {entry.domain or "ai.onnx": entry.version for entry in imports}
    for node in _walk_nodes(nodes):
        _check_node(path, node, versions)


def _check_node(path: Path | str, node: NodeProto, versions: dict[str, int]) -> None:
    domain = node.domain or "ai.onnx"
    schema = _find_schema(node.op_type, versions.get(domain, 0), domain)
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
        if attribute is None:
            if wanted.required:
                raise FileError(f"{name} lacks the attribute '{wanted.name}'; the file is damaged")
            continue
        if attribute.ref_attr_name:  # its value is an attribute of the function's call
            continue
        wanted_type: Any = wanted.type  # an enum, of which onnx's stubs don't tell
        if attribute.type != wanted_type.value:
            raise FileError(
                f"{name} has an attribute '{wanted.name}' of another type than its operator's; the "
                "file is damaged"
            )


@cache
def _find_schema(operator: str, version: int, domain: str) -> defs.OpSchema | None:
    """None for operators that onnx does not define."""
    try:
        return defs.get_schema(operator, version, "" if domain == "ai.onnx" else domain)
    except (defs.SchemaError, TypeError, OverflowError):
        return None
