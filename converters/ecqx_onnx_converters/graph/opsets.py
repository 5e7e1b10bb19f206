"""(model, opset) -> the same model declared for a newer opset, or the reason why its meaning would
change."""

from __future__ import annotations

from onnx import ModelProto, NodeProto, defs

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


def refuse_opset(model: ModelProto, opset: int) -> Refusal | None:
    """None when every node means the same in `opset`, so that the model only has to declare it."""
    present = find_opset(model)
    if opset <= present:
        return None
    scopes = [
        *(nodes.node for nodes in list_graphs(model.graph)),
        *(function.node for function in model.functions),
    ]
    for node in (node for nodes in scopes for node in nodes if node.domain in ("", "ai.onnx")):
        if not has_same_meaning(node, present, opset):
            return Refusal(
                f"{node.op_type} changes between opset {present}, the graph's, and {opset}; export "
                f"the graph with opset {opset}"
            )
    return None


def has_same_meaning(node: NodeProto, old: int, new: int) -> bool:
    try:
        before, after = defs.get_schema(node.op_type, old), defs.get_schema(node.op_type, new)
    except defs.SchemaError:
        return False
    if before.since_version == after.since_version:
        return True
    if after.deprecated or old < CHANGED.get(node.op_type, 0) <= new:
        return False
    single = defs.OpSchema.FormalParameterOption.Single
    if len(before.inputs) > len(after.inputs) or any(
        port.option == single for port in after.inputs[len(before.inputs) :]
    ):
        return False
    stated = {attribute.name for attribute in node.attribute}
    for name, attribute in before.attributes.items():
        if name in after.attributes:
            if (
                after.attributes[name].default_value.SerializeToString()
                != attribute.default_value.SerializeToString()
            ):
                return False
        elif (
            name in stated
        ):  # gone, or an input now; what it is when nobody states it has not changed
            return False
    return True


def set_opset(model: ModelProto, opset: int) -> None:
    """Declares the opset, for the model and its functions; `refuse_opset` must have agreed."""
    for owner in (model, *model.functions):
        for entry in owner.opset_import:
            if entry.domain in ("", "ai.onnx"):
                entry.version = opset


def lower_opset(model: ModelProto, opset: int) -> None:
    """Declares a lower opset, in place, where every node means in it what it means now; otherwise
    leaves the model as it is."""
    present = find_opset(model)
    if opset >= present:
        return
    set_opset(model, opset)
    if refuse_opset(model, present) is not None or has_newer_form(model, opset):
        set_opset(model, present)


def has_newer_form(model: ModelProto, opset: int) -> bool:
    """Some node has an attribute or an input that its operator lacks in `opset`."""
    for node in (
        node
        for scope in list_graphs(model.graph)
        for node in scope.node
        if node.domain in ("", "ai.onnx")
    ):
        schema = defs.get_schema(node.op_type, opset)
        if len(node.input) > schema.max_input or any(
            part.name not in schema.attributes for part in node.attribute
        ):
            return True
    return False
