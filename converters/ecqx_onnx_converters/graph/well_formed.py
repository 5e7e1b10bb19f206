"""Bring a graph that runtimes take into the form that ONNX's specification asks for.

onnxruntime sorts nodes itself, and takes an operator set that a model does not import in its newest
version. onnx's checker refuses both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, defs, helper

from ecqx_onnx_converters.graph.graph import list_graphs, list_subgraphs
from ecqx_onnx_converters.graph.opsets import has_same_meaning
from ecqx_onnx_converters.graph.uses import find_positions

USUAL_OPSET = 21  # for models that import none, where it means the same as the newest
# Domains that onnxruntime knows without an import.
KNOWN_DOMAINS = ("com.microsoft", "ai.onnx.ml", "ai.onnx.preview.training")
ALIAS = "ai.onnx"  # of the standard domain ""


def find_fault(path: Path | str) -> str | None:
    """Asks onnx's checker what it has against a file.

    Args:
        path: Of the model; external data lies beside it.

    Returns:
        Its reason in one line, at most 300 characters; None where it accepts the file.
    """
    model = onnx.load(path, load_external_data=False)
    # The full check infers shapes strictly, which rejects sparse initializers.
    full = not model.graph.sparse_initializer
    linked = _declare_linked(model, Path(path))
    try:
        onnx.checker.check_model(model if linked else str(path), full_check=full)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        return " ".join(str(error).split())[:300]
    return None


def _declare_linked(model: ModelProto, path: Path) -> bool:
    """Makes inputs, in place, of initializers whose data are links, which the checker refuses
    wherever they lead; whether there were any."""
    inputs = {value.name for value in model.graph.input}
    found = False
    for index in reversed(range(len(model.graph.initializer))):
        tensor = model.graph.initializer[index]
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if not (path.parent / entries.get("location", "")).is_symlink():
            continue
        found = True
        if tensor.name not in inputs:
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            model.graph.input.append(value)
        del model.graph.initializer[index]
    return found


def sort_nodes(graph: GraphProto) -> None:
    """Puts every node after those that it reads, in place, here and in subgraphs.

    Args:
        graph: Left as it is where it is sorted, or where nodes wait for each other.
    """
    for scope in list(list_graphs(graph)):
        order = _find_order(scope)
        if order is None:
            continue
        nodes = [NodeProto.FromString(scope.node[index].SerializeToString()) for index in order]
        del scope.node[:]
        scope.node.extend(nodes)


def complete_imports(model: ModelProto) -> None:
    """Imports, in place, the domains that nodes use and onnxruntime knows.

    Args:
        model: One without the standard domain gets it, whether a node uses it or not.
    """
    imported = {entry.domain for entry in model.opset_import}
    if not imported & {"", ALIAS}:
        model.opset_import.append(helper.make_opsetid("", _choose_opset(model)))
    used: set[str] = set()
    for scope in list_graphs(model.graph):
        used.update(node.domain for node in scope.node)
    used -= {function.domain for function in model.functions}
    for domain in KNOWN_DOMAINS:
        if domain in used - imported:
            model.opset_import.append(helper.make_opsetid(domain, 1))


def free_domain(model: ModelProto, domain: str) -> str | None:
    """Renames a domain of the model's own functions, in place, with all that calls them.

    Args:
        model: Whose functions may lie in the domain.
        domain: The one that is needed for others.

    Returns:
        The new name; None where no function lies in that domain.
    """
    if not any(function.domain == domain for function in model.functions):
        return None
    owners = (model, *model.functions)
    taken: set[str] = set()
    for owner in owners:
        taken.update(entry.domain for entry in owner.opset_import)
    taken.update(function.domain for function in model.functions)
    number = 1
    while f"{domain}_{number}" in taken:
        number += 1
    name = f"{domain}_{number}"
    for owner in owners:
        for entry in owner.opset_import:
            if entry.domain == domain:
                entry.domain = name
    for function in model.functions:
        if function.domain == domain:
            function.domain = name
    for node in _list_all_nodes(model):
        if node.domain == domain:
            node.domain = name
    return name


def _choose_opset(model: ModelProto) -> int:
    """What onnxruntime takes is the newest; an older one that means the same has more readers."""
    newest = int(defs.onnx_opset_version())
    for node in _list_all_nodes(model):
        if node.domain in ("", ALIAS) and not has_same_meaning(node, USUAL_OPSET, newest):
            return newest
    return USUAL_OPSET


def _list_all_nodes(model: ModelProto) -> Iterator[NodeProto]:
    """Nodes of the graph, of its functions, and of all graphs inside them."""
    for scope in list_graphs(model.graph):
        yield from scope.node
    for function in model.functions:
        for node in function.node:
            yield node
            for inner in list_subgraphs(node):
                for scope in list_graphs(inner):
                    yield from scope.node


def _find_order(graph: GraphProto) -> Sequence[int] | None:
    """Indices of the nodes, each after those that make what it reads, otherwise as they were.

    None where they are sorted already, or can't be.
    """
    nodes = graph.node
    makers = find_positions(nodes)
    makers.pop("", None)  # an output that is left out
    needs = [_find_needed(node, makers) for node in nodes]
    if all(not found or found[-1] < index for index, found in enumerate(needs)):
        return None
    order: list[int] = []
    done: set[int] = set()
    open_nodes: set[int] = set()
    for start in range(len(nodes)):
        stack = [start]
        while stack:
            index = stack[-1]
            missing = [need for need in needs[index] if need not in done]
            if index in done or not missing:
                stack.pop()
                open_nodes.discard(index)
                if index not in done:
                    done.add(index)
                    order.append(index)
                continue
            if index in open_nodes:  # what it waits for waits for it
                return None
            open_nodes.add(index)
            stack.extend(reversed(missing))
    return order


def _find_needed(node: NodeProto, makers: dict[str, int]) -> list[int]:
    """Indices of the nodes whose outputs a node, or a graph inside it, reads; sorted."""
    names = set(node.input)
    for inner in list_subgraphs(node):
        for scope in list_graphs(inner):
            names.update(value.name for value in scope.output)
            for part in scope.node:
                names.update(part.input)
    return sorted({makers[name] for name in names if name in makers})
