"""Export a traced PyTorch module as a float ONNX graph; the one user of torch.onnx.

What comes out is the exported program and the graph, with notes for the report.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx
import torch
from ecqx_onnx_converters.graph.graph import FloatGraph

from ecqx_onnx.checkpoint.forward import Example
from ecqx_onnx.checkpoint.tracing import (
    Dynamic,
    find_reason,
    name_axes,
    silence_exporters,
    trace,
    trace_fixed,
)
from ecqx_onnx.errors import ModelError
from ecqx_onnx.quantization.parametrizations import (
    copy_module,
    find_parametrized,
    merge_parametrizations,
)

# The lowest that torch's exporter writes; every target can read it, and the converter raises it at
# need.
BASE_OPSET = 18


@dataclass(frozen=True, eq=False)
class Exported:
    """A traced network, twice: as torch runs it, and as an ONNX float graph.

    Attributes:
        program: as torch.export gives it.
        graph: the same network, its weights apart.
        notes: sentences for the report (a batch size that had to be fixed, say).
    """

    program: torch.export.ExportedProgram
    graph: FloatGraph
    notes: tuple[str, ...]


def export(model: torch.nn.Module, example: Example, *, dynamic: Dynamic | None = None) -> Exported:
    """Trace `model` on `example` with a free batch size, and export it.

    Where the batch size cannot be left free (the model reshapes with a constant, say) it is fixed
    to the example's, and the notes say so.

    Args:
        model: the module; it is as before afterwards.
        example: a batch, or the forward's arguments in a tuple or by name.
        dynamic: which axes are free, see `trace`; None for the batch.

    Returns:
        The program and its graph.

    Raises:
        ModelError: torch cannot trace the model, or ONNX lacks an operator.
    """
    program, notes = trace(model, example, dynamic=dynamic)
    try:
        return Exported(program, export_float_graph(program), notes)
    except ModelError as error:
        if dynamic is not None:
            raise
        program, note = trace_fixed(model, example, error)
        return Exported(program, export_float_graph(program), (*notes, note))


def prepare(model: torch.nn.Module) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """Copy a float model as it is exported: without parametrizations, in float32.

    Args:
        model: the user's module; it is not changed.

    Returns:
        (the copy in evaluation mode, notes for the report).

    Raises:
        ModelError: the model needs a change before it can be exported and cannot be copied.
    """
    inner: torch.nn.Module = getattr(model, "_orig_mod", model)
    parametrized = find_parametrized(inner)
    dtypes = {p.dtype for p in inner.parameters() if p.is_floating_point()} - {torch.float32}
    types = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
    try:
        copy = copy_module(inner).eval()
    except Exception as error:  # a copy runs any module's own code
        if not parametrized and not types:
            return inner, ()
        raise ModelError(
            f"the model cannot be copied ({find_reason(error)}): call remove_parametrizations and"
            " .float() on it before"
        ) from error
    merge_parametrizations(copy)
    notes = [
        f"{entry.kind} is merged into the weight '{entry.name}' that it computes"
        for entry in parametrized
    ]
    if types:
        copy.float()
        notes.append(f"parameters of {' and '.join(types)} are converted to float32")
    return copy, tuple(notes)


def export_float_graph(
    program: torch.export.ExportedProgram, *, keep: Collection[str] = ()
) -> FloatGraph:
    """The float ONNX graph of an exported program, inputs named as in the program.

    Args:
        program: as torch.export gives it.
        keep: parameters that no constant folding may compute with, so that they stay in the graph
            under their names.

    Returns:
        The graph with its weights apart.

    Raises:
        ModelError: ONNX lacks an operator.
    """
    inputs = list(program.graph_signature.user_inputs)
    outputs = _name_outputs(program)
    with silence_exporters(), torch.no_grad():
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=BASE_OPSET,
                input_names=[str(name) for name in inputs],
                output_names=outputs,
                external_data=False,
                verbose=False,
                optimize=not keep,
            )
            if keep and exported is not None:
                _optimize_around(exported, keep)
        except (
            Exception
        ) as error:  # torch.onnx wraps anything in its own error classes, none of them public
            raise ModelError(f"torch.onnx cannot export the model: {find_reason(error)}") from error
    assert exported is not None  # only the old exporter returns nothing
    proto = exported.model_proto
    _rename_lengths(proto.graph, name_axes(program))
    return FloatGraph.from_model(proto)


def _rename_lengths(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Free lengths by the names that users know, not by the tracer's symbols ("s77")."""
    if not names:
        return
    symbols = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = symbols.sub(lambda found: names[found[0]], dim.dim_param)


def _optimize_around(exported: torch.onnx.ONNXProgram, keep: Collection[str]) -> None:
    """Run the exporter's own optimization without folding these initializers.

    They are inputs of the graph meanwhile: what is no constant is not folded.
    """
    inputs = exported.model.graph.inputs
    initializers = exported.model.graph.initializers
    kept = [initializers[name] for name in keep if name in initializers]
    inputs.extend(kept)
    exported.optimize()
    names = {value.name for value in kept}
    inputs = exported.model.graph.inputs
    for value in [value for value in inputs if value.name in names]:
        inputs.remove(value)


def _name_outputs(program: torch.export.ExportedProgram) -> list[str] | None:
    """The keys of a dict that the model returns; "output" for a single tensor.

    None where the exporter is to choose.
    """
    count = len(program.graph_signature.user_outputs)
    spec = program.call_spec.out_spec
    is_dict = spec is not None and spec.type is dict and isinstance(spec.context, list)
    keys = list(spec.context) if is_dict else []
    taken = {str(name) for name in program.graph_signature.user_inputs}
    names = [str(key) for key in keys]
    if len(names) == count and len(set(names)) == count and not taken & set(names):
        return names
    return ["output"] if count == 1 else None
