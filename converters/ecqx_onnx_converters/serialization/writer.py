"""Plan -> ModelProto -> .onnx file, whole or not at all; and a report of what lies in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import FunctionProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.dequantization.dequantization import (
    Dequantization,
    make_folded,
    make_function,
    make_integer,
    make_integers,
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
from ecqx_onnx_converters.graph.uses import find_uses
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
    """A finished model. payloads: values of the initializers that `model` declares without data."""

    model: ModelProto
    payloads: Mapping[str, np.ndarray]
    tensors: tuple[WrittenTensor, ...] = field(default=())

    def to_model(self) -> ModelProto:
        """With the data in place; for models that fit one protobuf."""
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
) -> WriteReport:
    """Writes `path`, and `<path>.data` beside it when the tensors need more than one protobuf holds (or external_data=True).

    metadata: JSON-able, goes into the file under METADATA_KEY beside the list of tensors. Same plan, same bytes.
    accept: raises if the written file, still in a temporary place, is not to take its name.
    sources: files that are read, none of which is replaced.
    """
    path = Path(path)
    built = build(plan, metadata=metadata)
    if external_data is None:
        external_data = count_tensor_bytes(built) > EXTERNAL_FROM
    if external_data:
        check_output(find_data_path(path), force=force)
    with replace_model(path, force=force, sources=sources) as temporary:
        write_proto(built.model, built.payloads, temporary, external=external_data)
        check_model(temporary)
        if accept is not None:
            accept(temporary)
        nbytes = sum(part.stat().st_size for part in temporary.parent.iterdir())
    return WriteReport(
        path, nbytes, plan.opset, plan.target.name, built.tensors, plan.kept, plan.missing
    )


def build(plan: Plan, *, metadata: Mapping[str, Any] | None = None) -> Built:
    """The model in memory; the plan's graph is left as it is."""
    model = ModelProto()
    model.CopyFrom(plan.graph.proto)
    quantized = {entry.weight.name for entry in plan.entries}
    graph = model.graph
    for values in (
        graph.initializer,
        graph.input,
    ):  # old exporters list weights among the inputs, too
        for index in reversed(
            [index for index, value in enumerate(values) if value.name in quantized]
        ):
            del values[index]
    for scope in list_graphs(graph):
        scope.ClearField(
            "value_info"
        )  # shapes that every runtime infers; they outweigh a small model's weights
    if plan.target.one_sample:
        fix_batch(graph)
    set_opset(model, plan.opset)
    model.ir_version = max(plan.target.ir_version(plan.opset), 8)
    model.producer_name = "ecqx-onnx"
    model.ClearField("producer_version")
    fused = choose_fused(plan.entries)
    tensors = _put_weights(model, plan, fused)
    turned = fold_transpose_into_gemm(graph)
    drop_defaults(model, plan.opset)
    shorten_integers(model)
    renamed = shorten_names(model)
    payloads = {
        renamed[name]: values
        for name, values in plan.graph.weights.items()
        if name not in quantized
    }
    usual = Counter(entry.stored.storage for entry in plan.entries).most_common(1)
    records = [make_record(entry, renamed, usual[0][0], fused, turned) for entry in plan.entries]
    content = {
        "format": FORMAT,
        **(metadata or {}),
        "storage": usual[0][0] if usual else "dense",
        "tensors": records,
    }
    for index in reversed(
        [index for index, entry in enumerate(model.metadata_props) if entry.key == METADATA_KEY]
    ):
        del model.metadata_props[index]

    def elsewhere(tensor: TensorProto) -> bytes | None:
        return to_little_endian(payloads[tensor.name]) if tensor.name in payloads else None

    text = to_text(content, lambda start: compute_checksum(model, elsewhere, start=start))
    model.metadata_props.add(key=METADATA_KEY, value=text)
    return Built(model, payloads, tensors)


def _put_weights(model: ModelProto, plan: Plan, fused: str | None) -> tuple[WrittenTensor, ...]:
    """Storage, dequantisation and functions; sparse tensors last, since other tools drop them."""
    graph, names, uses = (
        model.graph,
        NameMaker(list_value_names(model.graph)),
        find_uses(model.graph),
    )
    names.taken.update(name for entry in plan.entries for name in list_names(entry))
    nodes: list[NodeProto] = []
    functions: dict[tuple[str, str], FunctionProto] = {}
    sparse: list[SparseTensorProto] = []
    rows: list[WrittenTensor] = []
    seen: set[str] = set()
    for entry in plan.entries:
        first, whole = (
            entry.stored.levels not in seen,
            fused is not None and entry.stored.storage == "packed",
        )
        if first:
            seen.add(entry.stored.levels)
            graph.initializer.extend(entry.stored.initializers)
            sparse.extend(entry.stored.sparse_initializers)
            nodes.extend([] if whole else entry.stored.nodes)
            functions.update({(part.domain, part.name): part for part in entry.stored.functions})
        permutation = find_read_permutation(entry, fused)
        dequantization = make_dequantization(entry, names, permutation)
        graph.initializer.extend(
            part for part in dequantization.initializers if part.name not in seen
        )
        seen.update(part.name for part in dequantization.initializers)
        if dequantization.function is not None and not whole:
            functions[DOMAIN, dequantization.function] = make_function(
                dequantization.function, plan.opset
            )
        if fused is not None and whole:
            nodes.extend(fuse(entry.stored, fused, dequantization.node))
        elif entry.form is None or entry.form.dense:
            nodes.extend([*dequantization.before, dequantization.node])
            if entry.form is None and permutation is not None:
                nodes[-1].output[0] = names("t")
                nodes.append(
                    helper.make_node(
                        "Transpose", [nodes[-1].output[0]], [entry.weight.name], perm=permutation
                    )
                )
        if entry.form is not None and not entry.form.integer:
            step = dequantization.initializers[0].name
            weight, stored = entry.weight, entry.stored
            apply_standard(
                weight.tensor,
                uses[weight.name],
                weight=weight.name,
                levels=stored.levels,
                type=stored.type,
                step=step,
                names=names,
            )
        rows.append(report_row(entry, dequantization, first))
    if fused is not None:
        levels = functions.pop((DOMAIN, TENSOR))
        functions[DOMAIN, fused] = (
            make_scaled(levels)
            if fused == "V"
            else compose(fused, levels, make_function(FUSED[fused], plan.opset))
        )
    existing = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *existing])
    graph.sparse_initializer.extend(sparse)
    for part in functions.values():
        model.functions.add().CopyFrom(part)
    set_opset(model, plan.opset)
    present = {entry.domain for entry in model.opset_import}
    for domain in sorted({domain for domain, _ in functions} - present):
        model.opset_import.append(helper.make_opsetid(domain, 1))
    return tuple(rows)


def list_names(entry: Entry) -> set[str]:
    parts = (
        *entry.stored.initializers,
        *(sparse.values for sparse in entry.stored.sparse_initializers),
    )
    return {
        entry.stored.levels,
        *(part.name for part in parts),
        *(name for node in entry.stored.nodes for name in node.output),
    }


def find_read_permutation(entry: Entry, fused: str | None) -> tuple[int, ...] | None:
    """Of the weight's axes, to the order in which its dequantisation reads the levels; None where that is their own."""
    return (
        find_permutation(entry.stored)
        if fused is not None and entry.stored.storage == "packed"
        else entry.permutation
    )


def make_dequantization(
    entry: Entry, names: NameMaker, permutation: tuple[int, ...] | None
) -> Dequantization:
    weight, constant = entry.weight, names("s")
    if weight.integers is not None:
        return make_integers(
            weight.integers, levels=entry.stored.levels, output=weight.name, constant=constant
        )
    if entry.form is None:
        tensor, factor = weight.tensor, weight.factor
        if permutation is not None:
            tensor, factor = (
                tensor.transpose(permutation),
                None if factor is None else factor.transpose(permutation),
            )
        return make_folded(
            tensor, levels=entry.stored.levels, output=weight.name, constant=constant, factor=factor
        )
    tensor = weight.tensor.transpose((1, 0)) if entry.form.transposed else weight.tensor
    stored = entry.stored
    if entry.form.integer:
        made = make_integer(
            tensor, levels=stored.levels, type=stored.type, output=weight.name, constant=constant
        )
    else:
        made = make_standard(tensor, levels=stored.levels, output=weight.name, constant=constant)
    if not isinstance(made, Dequantization):
        raise TypeError(f"planning let through what DequantizeLinear can't express: {made.reason}")
    return made


def report_row(entry: Entry, dequantization: Dequantization, first: bool) -> WrittenTensor:
    tensor = entry.weight.tensor
    nbytes = dequantization.nbytes + (entry.stored.nbytes if first else 0)
    label = entry.stored.label if first else f"{entry.stored.label}, shared"
    return WrittenTensor(
        entry.weight.name, entry.weight.sources, tensor.shape, tensor.bits, tensor.zeros, tensor.entropy,
        label, entry.dequantization, nbytes, entry.weight.rescaled, entry.reason,
    )  # fmt: skip


def make_record(
    entry: Entry, renamed: Mapping[str, str], usual: str, fused: str | None, turned: Collection[str]
) -> list[Any]:
    """What the metadata says of one weight, as a row, since keys would outweigh the rest:

    [name, crc32 of the int8 levels row-major as stored, float value, integer value, layout, storage, sources]. The values are
    names in the file's graph; integer value: 0 where a fused call leaves it no name. layout: 0, 1 if stored transposed, 2 if the
    graph reads integers, not floats. storage: 0 for the file's usual one. sources: 0 for just the name. Zeros at the end are
    left out.
    """
    weight, stored = entry.weight, entry.stored
    stored_turned = entry.permutation is not None or (
        entry.form is not None and entry.form.transposed
    )
    permutation = find_read_permutation(entry, fused) or (
        (1, 0) if stored_turned else range(weight.tensor.levels.ndim)
    )
    layout = 2 if weight.integers is not None else int(stored_turned or weight.name in turned)
    sources = 0 if weight.sources == (weight.name,) else list(weight.sources)
    rest = [
        renamed.get(stored.levels, 0),
        layout,
        0 if stored.storage == usual else stored.storage,
        sources,
    ]
    while rest and rest[-1] == 0:
        rest.pop()
    return [
        weight.name,
        compute_levels_crc(weight.tensor.levels.transpose(permutation)),
        renamed.get(weight.name, ""),
        *rest,
    ]


def count_tensor_bytes(built: Built) -> int:
    inside = sum(tensor.ByteSize() for tensor in built.model.graph.initializer)
    return inside + sum(values.nbytes for values in built.payloads.values())


def check_model(path: Path) -> None:
    """onnx's checker, with shape inference unless there are sparse tensors (which strict inference rejects)."""
    model = onnx.load(path, load_external_data=False)
    full = not model.graph.sparse_initializer
    del model
    try:
        onnx.checker.check_model(str(path), full_check=full)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise FileError(
            f"the model would not be valid ONNX and was not written: {str(error).strip().splitlines()[0]}"
        ) from error
