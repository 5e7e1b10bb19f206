"""Declaring another opset for a model, or saying why its meaning would change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, defs

from ecqx_onnx_converters.graph.graph import find_opset, list_graphs
from ecqx_onnx_converters.refusal import Refusal

# Same inputs and attributes in a newer opset, but another meaning.
CHANGED = {
    "GroupNormalization": 21,  # scale and bias per channel, were per group
    "GridSample": 20,  # modes were renamed
    "Split": 18,  # equal parts have to be asked for
    "RoiAlign": 16,  # where pixels lie has another default
    "Softmax": 13,  # over one axis, was over all from that axis on
    "LogSoftmax": 13,
    "Hardmax": 13,
    "Upsample": 9,
}
# What onnxruntime has in the standard domain before, or without, the standard, in every opset.
RUNTIME_OWN = ("LayerNormalization", "SimplifiedLayerNormalization")


def refuse_opset(model: ModelProto, opset: int) -> Refusal | None:
    """Tells why a model can't merely declare a newer opset.

    Args:
        model: It isn't changed; its functions are looked at, too.
        opset: The one to declare.

    Returns:
        None when every node means the same in `opset`; else the first one that doesn't.

    Raises:
        FileError: If the model imports no standard operator set.
    """
    present = find_opset(model)
    if opset <= present:
        return None
    for node in _list_standard_nodes([*list_graphs(model.graph), *model.functions]):
        if not has_same_meaning(node, present, opset):
            return Refusal(
                f"{node.op_type} changes between opset {present}, the graph's, and {opset}; export "
                f"the graph with opset {opset}"
            )
    return None


def has_same_meaning(node: NodeProto, old: int, new: int) -> bool:
    """Tells whether a node means the same in two opsets, by onnx's operator schemas and CHANGED.

    Args:
        node: Of the standard domain.
        old: The opset that it was written for.
        new: A newer one.

    Returns:
        False, too, for operators that onnx doesn't know.
    """
    if is_runtime_own(node, old):
        return True
    try:
        before = defs.get_schema(node.op_type, old)
        after = defs.get_schema(node.op_type, new)
    except defs.SchemaError:
        return False
    if before.since_version == after.since_version:
        return True
    if after.deprecated or old < CHANGED.get(node.op_type, 0) <= new:
        return False
    if len(before.inputs) > len(after.inputs):
        return False
    # The node lacks the inputs that are new, so each of them must be one that may be left out.
    single = defs.OpSchema.FormalParameterOption.Single
    added = after.inputs[len(before.inputs) :]
    if any(port.option == single for port in added):
        return False
    stated = {attribute.name for attribute in node.attribute}
    for name, attribute in before.attributes.items():
        if name in after.attributes:
            old_default = attribute.default_value.SerializeToString()
            new_default = after.attributes[name].default_value.SerializeToString()
            if old_default != new_default:
                return False
        # Gone, or an input now; what it is when nobody states it has not changed.
        elif name in stated:
            return False
    return True


def is_runtime_own(node: NodeProto, opset: int) -> bool:
    """Tells whether onnxruntime alone gives a node of the standard domain its meaning.

    Args:
        node: Of the standard domain.
        opset: The one that its graph imports.

    Returns:
        True for an operator of RUNTIME_OWN that the standard has not in that opset.
    """
    return node.op_type in RUNTIME_OWN and not defs.has(node.op_type, opset, "")


def set_opset(model: ModelProto, opset: int) -> None:
    """Declares an opset, in place, for a model and its functions; `refuse_opset` must have agreed.

    Args:
        model: Whose imports of the standard domain change.
        opset: The version to declare.
    """
    for owner in (model, *model.functions):
        for entry in owner.opset_import:
            if entry.domain in ("", "ai.onnx"):
                entry.version = opset


def lower_opset(model: ModelProto, opset: int) -> None:
    """Declares a lower opset, in place, where every node means in it what it means now.

    Args:
        model: Otherwise it stays as it is.
        opset: The version to declare.

    Raises:
        FileError: If the model imports no standard operator set.
    """
    present = find_opset(model)
    if opset >= present:
        return
    set_opset(model, opset)
    if refuse_opset(model, present) is not None or has_newer_form(model, opset):
        set_opset(model, present)


def has_newer_form(model: ModelProto, opset: int) -> bool:
    """Tells whether some node has an attribute or an input that its operator lacks in an opset.

    Args:
        model: Whose operators all exist in `opset`.
        opset: The older version.

    Returns:
        True if a node of the graph can't be written like that in `opset`.
    """
    for node in _list_standard_nodes(list_graphs(model.graph)):
        if is_runtime_own(node, opset):
            continue
        schema = defs.get_schema(node.op_type, opset)
        if len(node.input) > schema.max_input:
            return True
        if any(part.name not in schema.attributes for part in node.attribute):
            return True
    return False


def _list_standard_nodes(scopes: Iterable[GraphProto | FunctionProto]) -> Iterator[NodeProto]:
    """The nodes of these graphs and functions that are of the standard operator set."""
    for scope in scopes:
        for node in scope.node:
            if node.domain in ("", "ai.onnx"):
                yield node
