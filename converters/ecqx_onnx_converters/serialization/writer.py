"""Writes a plan as an .onnx file, whole or not at all, and reports what lies in it.

Enters: the plan of each weight's storage and dequantization. Leaves: one file, or two where the
tensors need more than one protobuf holds, and a `WriteReport`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    helper,
)

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.dequantization.dequantization import (
    Dequantization,
    make_folded,
    make_function,
    make_integer,
    make_standard,
)
from ecqx_onnx_converters.dequantization.fused import (
    FUSED,
    compose,
    find_permutation,
    fold_transpose_into_gemm,
    fuse,
    make_scaled,
)
from ecqx_onnx_converters.dequantization.integers import (
    INTEGER_FUNCTIONS,
    make_integer_function,
    make_integers,
)
from ecqx_onnx_converters.dequantization.standard import apply_standard
from ecqx_onnx_converters.graph.files import (
    PROTOBUF_LIMIT,
    find_data_path,
    replace_model,
    to_little_endian,
    write_proto,
)
from ecqx_onnx_converters.graph.graph import list_graphs, list_value_names
from ecqx_onnx_converters.graph.names import NameMaker
from ecqx_onnx_converters.graph.opsets import set_opset
from ecqx_onnx_converters.graph.outputs import check_output
from ecqx_onnx_converters.graph.uses import find_makers, find_uses
from ecqx_onnx_converters.graph.well_formed import find_fault
from ecqx_onnx_converters.passes.shapes import fix_batch
from ecqx_onnx_converters.planning.packed_choice import choose_fused
from ecqx_onnx_converters.planning.plan import Entry, Plan
from ecqx_onnx_converters.serialization.checksum import compute_checksum
from ecqx_onnx_converters.serialization.compact import (
    drop_defaults,
    shorten_integers,
    shorten_names,
)
from ecqx_onnx_converters.serialization.metadata import (
    FORMAT,
    METADATA_KEY,
    compute_levels_crc,
    to_text,
)
from ecqx_onnx_converters.serialization.report import WriteReport, WrittenTensor
from ecqx_onnx_converters.storage import DOMAIN
from ecqx_onnx_converters.storage.packed.onnx_decoder import TENSOR

EXTERNAL_FROM = PROTOBUF_LIMIT - (1 << 20)  # bytes of tensors; leaves room for the graph


@dataclass(frozen=True, eq=False)
class Built:
    """A finished model.

    Attributes:
        model: The model; some of its initializers are declared without data.
        payloads: Their values by name.
        tensors: What was written of each quantized weight.
    """

    model: ModelProto
    payloads: Mapping[str, np.ndarray]
    tensors: tuple[WrittenTensor, ...] = field(default=())

    def to_model(self) -> ModelProto:
        """Put the data in place; for models that fit one protobuf.

        Returns:
            A copy of the model that is complete.
        """
        model = ModelProto()
        model.CopyFrom(self.model)
        for tensor in model.graph.initializer:
            if tensor.name in self.payloads:
                tensor.raw_data = self.payloads[tensor.name].tobytes()
        return model


def write(
    plan: Plan,
    path: Path | str,
    *,
    metadata: Mapping[str, Any] | None = None,
    force: bool = False,
    external_data: bool | None = None,
    accept: Callable[[Path], None] | None = None,
    sources: Sequence[Path] = (),
    valid: bool = True,
) -> WriteReport:
    """Write a plan as a file. Same plan and metadata, same bytes.

    Args:
        plan: What to write.
        path: Of the ONNX file.
        metadata: JSON-able, goes into the file under METADATA_KEY beside the list of tensors.
        force: Whether a file of that name may be replaced.
        external_data: Whether tensors lie in `<path>.data` beside it; None: where they need more
            than one protobuf holds.
        accept: Raises if the written file, still in a temporary place, is not to take its name.
        sources: Files that are read, none of which is replaced.
        valid: Whether onnx's checker has to accept the file; not where it rejects what the plan was
            made of, which runtimes take.

    Returns:
        What was written.

    Raises:
        FileError: If the file is in the way, can't be written or is rejected.
    """
    path = Path(path)
    built = build(plan, metadata=metadata)
    if external_data is None:
        external_data = _count_tensor_bytes(built) > EXTERNAL_FROM
    if external_data:
        check_output(find_data_path(path), force=force)
    with replace_model(path, force=force, sources=sources) as temporary:
        write_proto(built.model, built.payloads, temporary, external=external_data)
        if valid:
            _check_model(temporary)
        if accept is not None:
            accept(temporary)
        nbytes = sum(part.stat().st_size for part in temporary.parent.iterdir())
    return WriteReport(
        path=path,
        nbytes=nbytes,
        opset=plan.opset,
        target=plan.target.name,
        tensors=built.tensors,
        kept=plan.kept,
        missing=plan.missing,
        notes=plan.notes,
    )


def build(plan: Plan, *, metadata: Mapping[str, Any] | None = None) -> Built:
    """Build the model in memory; the plan's graph is left as it is.

    The metadata's list of tensors has a row for each weight, since keys would outweigh the rest:

        [name, crc32 of the int8 levels row-major as stored, float value, integer value, layout,
        storage, sources]

    The values are names in the file's graph; integer value: 0 where a fused call leaves it no name.
    layout: 0; 1 if stored transposed; 2 if the graph reads integers, not floats. storage: 0 for the
    file's usual one. sources: 0 for just the name. Zeros at the end are left out.

    Args:
        plan: What to write.
        metadata: See `write`.

    Returns:
        The model.
    """
    model = ModelProto()
    model.CopyFrom(plan.graph.proto)
    quantized = {entry.weight.name for entry in plan.entries}
    graph = model.graph
    # 1. The float graph less its quantized weights, for the plan's target and opset.
    _clear_graph(graph, quantized)
    if plan.target.one_sample:
        fix_batch(graph)
    set_opset(model, plan.opset)
    model.ir_version = max(plan.target.ir_version(plan.opset), 8)
    model.producer_name = "ecqx-onnx"
    model.ClearField("producer_version")
    # 2. Levels, and what makes weights of them.
    fused = choose_fused(plan.entries)
    tensors = _put_weights(model, plan, fused)
    transposed = fold_transpose_into_gemm(graph)
    if not plan.target.one_sample:
        _state_shapes(graph, plan)
    # 3. Fewer bytes for the same.
    drop_defaults(model, plan.opset)
    shorten_integers(model)
    renamed = shorten_names(model)
    payloads = {}
    for name, values in plan.graph.weights.items():
        if name not in quantized:
            payloads[renamed[name]] = values
    # 4. Metadata, with a checksum over all of this.
    storages = Counter(entry.stored.storage for entry in plan.entries)
    usual = storages.most_common(1)[0][0] if storages else "dense"
    records = [_make_record(entry, renamed, usual, fused, transposed) for entry in plan.entries]
    content = {"format": FORMAT, **(metadata or {}), "storage": usual, "tensors": records}
    _write_metadata(model, content, payloads)
    return Built(model, payloads, tensors)


def _clear_graph(graph: GraphProto, quantized: Collection[str]) -> None:
    """Removes quantized weights and inferred shapes, in place."""
    for values in (graph.initializer, graph.input):  # old exporters list weights as inputs, too
        for index in reversed(range(len(values))):
            if values[index].name in quantized:
                del values[index]
    for scope in list_graphs(graph):
        # Shapes that every runtime infers; they outweigh a small model's weights.
        scope.ClearField("value_info")


def _state_shapes(graph: GraphProto, plan: Plan) -> None:
    """Adds the plan's shapes of values that the plan's graph makes, in place."""
    made = find_makers(plan.graph.proto.graph.node)
    listed = {value.name for value in graph.output}
    for value in plan.shapes:
        if value.name in made and value.name not in listed:
            graph.value_info.append(value)


def _write_metadata(
    model: ModelProto, content: Mapping[str, Any], payloads: Mapping[str, np.ndarray]
) -> None:
    """Puts the text under METADATA_KEY, in place."""
    for index in reversed(range(len(model.metadata_props))):
        if model.metadata_props[index].key == METADATA_KEY:
            del model.metadata_props[index]

    def read_elsewhere(tensor: TensorProto) -> bytes | None:
        if tensor.name not in payloads:
            return None
        return to_little_endian(payloads[tensor.name])

    def compute_whole(start: int) -> int:
        return compute_checksum(model, read_elsewhere, start=start)

    model.metadata_props.add(key=METADATA_KEY, value=to_text(content, compute_whole))


def _put_weights(model: ModelProto, plan: Plan, fused: str | None) -> tuple[WrittenTensor, ...]:
    """Storage, dequantization and functions; sparse tensors last, since other tools drop them.

    fused: name of the function that decodes and dequantizes at once, see `choose_fused`.
    """
    graph = model.graph
    names = NameMaker(list_value_names(graph))
    uses = find_uses(graph)
    for entry in plan.entries:
        names.taken.update(_list_names(entry))
    nodes: list[NodeProto] = []
    functions: dict[tuple[str, str], FunctionProto] = {}
    sparse: list[SparseTensorProto] = []
    rows: list[WrittenTensor] = []
    seen: set[str] = set()
    for entry in plan.entries:
        stored = entry.stored
        weight = entry.weight
        is_first = stored.levels not in seen  # tied weights share their levels
        is_fused = fused is not None and stored.storage == "packed"
        # 1. The levels, and what decodes them.
        if is_first:
            seen.add(stored.levels)
            graph.initializer.extend(stored.initializers)
            sparse.extend(stored.sparse_initializers)
            if not is_fused:
                nodes.extend(stored.nodes)
            for part in stored.functions:
                functions[part.domain, part.name] = part
        # 2. Steps or codebook, and the function that multiplies by them.
        permutation = _find_read_permutation(entry, fused)
        dequantization = _make_dequantization(entry, names, permutation)
        fresh = [part for part in dequantization.initializers if part.name not in seen]
        graph.initializer.extend(fresh)
        seen.update(part.name for part in dequantization.initializers)
        if dequantization.function is not None and not is_fused:
            name = dequantization.function
            make = make_integer_function if name in INTEGER_FUNCTIONS else make_function
            functions[DOMAIN, name] = make(name, plan.opset)
        # 3. The nodes: one call for both, or the levels' own and those of the dequantization.
        if fused is not None and is_fused:
            nodes.extend(fuse(stored, fused, dequantization.node))
        elif entry.form is None or entry.form.dense:
            nodes.extend([*dequantization.before, dequantization.node])
            if entry.form is None and permutation is not None:
                before = names("t")
                nodes[-1].output[0] = before
                nodes.append(
                    helper.make_node("Transpose", [before], [weight.name], perm=permutation)
                )
        # 4. DequantizeLinear at each consumer, where that is the form.
        if entry.form is not None and not entry.form.integer:
            apply_standard(
                weight.tensor,
                uses[weight.name],
                weight=weight.name,
                levels=stored.levels,
                type=stored.type,
                step=dequantization.initializers[0].name,
                names=names,
            )
        rows.append(_make_row(entry, is_first))
    # 5. Where calls are fused, the decoder's last function is replaced.
    if fused is not None:
        levels_function = functions.pop((DOMAIN, TENSOR))
        if fused == "V":
            functions[DOMAIN, fused] = make_scaled(levels_function)
        else:
            second = make_function(FUSED[fused], plan.opset)
            functions[DOMAIN, fused] = compose(fused, levels_function, second)
    # 6. Into the model: weights before the nodes that read them.
    existing = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *existing])
    graph.sparse_initializer.extend(sparse)
    for part in functions.values():
        model.functions.add().CopyFrom(part)
    set_opset(model, plan.opset)
    present = {imported.domain for imported in model.opset_import}
    for domain in sorted({domain for domain, _ in functions} - present):
        model.opset_import.append(helper.make_opsetid(domain, 1))
    return tuple(rows)


def _list_names(entry: Entry) -> set[str]:
    """Every name that a stored weight takes in the graph."""
    stored = entry.stored
    names = {stored.levels}
    names.update(part.name for part in stored.initializers)
    names.update(sparse.values.name for sparse in stored.sparse_initializers)
    for node in stored.nodes:
        names.update(node.output)
    return names


def _find_read_permutation(entry: Entry, fused: str | None) -> tuple[int, ...] | None:
    """Of the weight's axes, to the order in which its dequantization reads the levels.

    None where that is their own.
    """
    if fused is not None and entry.stored.storage == "packed":
        return find_permutation(entry.stored)
    return entry.permutation


def _make_dequantization(
    entry: Entry, names: NameMaker, permutation: tuple[int, ...] | None
) -> Dequantization:
    """Constants and node that make the weight of its levels, in the form that was planned."""
    weight = entry.weight
    stored = entry.stored
    constant = names("s")
    # 1. The graph reads integers.
    if weight.integers is not None:
        return make_integers(
            weight.integers,
            weight.tensor.levels.ndim,
            levels=stored.levels,
            output=weight.name,
            constant=constant,
        )
    # 2. A function of ours.
    if entry.form is None:
        tensor = weight.tensor
        factor = weight.factor
        if permutation is not None:
            tensor = tensor.transpose(permutation)
            factor = None if factor is None else factor.transpose(permutation)
        return make_folded(
            tensor, levels=stored.levels, output=weight.name, constant=constant, factor=factor
        )
    # 3. DequantizeLinear.
    tensor = weight.tensor.transpose((1, 0)) if entry.form.transposed else weight.tensor
    if entry.form.integer:
        made = make_integer(
            tensor, levels=stored.levels, type=stored.type, output=weight.name, constant=constant
        )
    else:
        made = make_standard(tensor, levels=stored.levels, output=weight.name, constant=constant)
    if not isinstance(made, Dequantization):
        raise TypeError(f"planning let through what DequantizeLinear can't express: {made.reason}")
    return made


def _make_row(entry: Entry, is_first: bool) -> WrittenTensor:
    """What the report says of one weight."""
    tensor = entry.weight.tensor
    nbytes = 0
    label = f"{entry.stored.label}, shared"
    if is_first:
        nbytes = entry.stored.nbytes
        label = entry.stored.label
    return WrittenTensor(
        name=entry.weight.name,
        sources=entry.weight.sources,
        shape=tensor.shape,
        bits=tensor.bits,
        zeros=tensor.zeros,
        entropy=tensor.entropy,
        storage=label,
        dequantization=entry.dequantization,
        nbytes=nbytes,
        rescaled=entry.weight.rescaled,
        reason=entry.reason,
    )


def _make_record(
    entry: Entry,
    renamed: Mapping[str, str],
    usual: str,
    fused: str | None,
    transposed: Collection[str],
) -> list[Any]:
    """What the metadata says of one weight, see `build`. transposed: names folded into Gemm."""
    weight = entry.weight
    stored = entry.stored
    is_transposed = entry.permutation is not None
    if entry.form is not None and entry.form.transposed:
        is_transposed = True
    # 1. The levels in the order in which they are read.
    permutation = _find_read_permutation(entry, fused)
    if permutation is None and is_transposed:
        permutation = (1, 0)
    levels = weight.tensor.levels
    if permutation is not None:
        levels = levels.transpose(permutation)
    # 2. What is usual is 0, and zeros at the end are left out.
    layout = int(is_transposed or weight.name in transposed)
    if weight.integers is not None:
        layout = 2
    sources: Any = 0 if weight.sources == (weight.name,) else list(weight.sources)
    storage: Any = 0 if stored.storage == usual else stored.storage
    rest: list[Any] = [renamed.get(stored.levels, 0), layout, storage, sources]
    while rest and rest[-1] == 0:
        rest.pop()
    value = renamed.get(weight.name, "")
    return [weight.name, compute_levels_crc(levels), value, *rest]


def _count_tensor_bytes(built: Built) -> int:
    """Bytes of all tensors."""
    inside = sum(tensor.ByteSize() for tensor in built.model.graph.initializer)
    return inside + sum(values.nbytes for values in built.payloads.values())


def _check_model(path: Path) -> None:
    """FileError for what onnx's checker rejects."""
    fault = find_fault(path)
    if fault is not None:
        raise FileError(f"the model would not be valid ONNX and was not written: {fault}")
