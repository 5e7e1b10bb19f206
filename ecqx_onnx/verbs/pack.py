"""Any .onnx file -> the same model with its quantised weights stored in fewer bytes; and back, for tools that cannot fold.

`pack` looks for weights that some quantiser has put on few values, stores their integers anew and checks the result against
the original. A model in which nothing gets smaller is copied as it is, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from ecqx_onnx_converters import FloatGraph, Matching, WriteReport, make_plan, write
from ecqx_onnx_converters.foreign import qonnx
from ecqx_onnx_converters.graph.files import find_data_path, replace_model
from ecqx_onnx_converters.graph.opsets import lower_opset
from ecqx_onnx_converters.graph.outputs import check_output
from ecqx_onnx_converters.planning.plan import Kept
from ecqx_onnx_converters.planning.planner import check_forms
from ecqx_onnx_converters.serialization import unpacking
from ecqx_onnx_converters.targets import check_name, find_target
from onnx import ModelProto

from ecqx_onnx import __version__
from ecqx_onnx.delivery.delivery import deliver
from ecqx_onnx.errors import CheckFailed, OptionError
from ecqx_onnx.inputs.model_copy import copy_model
from ecqx_onnx.inputs.onnx_file import OnnxFile, read_onnx
from ecqx_onnx.recognition.packing_plan import plan_packing, raise_graph
from ecqx_onnx.validation.equivalence import Equivalence, compare_models
from ecqx_onnx.validation.float_distance import is_untrained, recipe_of


@dataclass(frozen=True)
class PackReport:
    """What `pack` did.

    written: None where the model was passed through unchanged, for the `reason`. kept: weights that stay as they were.
    checks: of the packed model against the original; empty when it was passed through, or no check was wanted.
    """

    path: Path
    original_bytes: int
    nbytes: int
    written: WriteReport | None
    reason: str
    kept: tuple[Kept, ...]
    notes: tuple[str, ...]
    equivalence: Equivalence | None


def pack(
    model: str | Path,
    out: str | Path,
    *,
    storage: str = "auto",
    dequantize: str = "auto",
    target: str = "onnxruntime",
    opset: int | None = None,
    check: bool = True,
    inputs: Mapping[str, np.ndarray] | None = None,
    rewrite: bool = True,
    force: bool = False,
) -> PackReport:
    """Write the .onnx file `model`, whoever made it, with its quantised weights stored anew, losslessly.

    check: run both in onnxruntime, on `inputs` (by name; random ones without), and write nothing if they differ: CheckFailed.
    rewrite: allow what reaches past the weights: an old graph is raised to an opset that has the shorter storages, and
    BatchNormalization goes into the scales before it, which rounds. If the check finds a difference, it is done without both.
    """
    out = Path(out)
    if (suffix := find_target(target).suffix) != ".onnx":
        raise OptionError(
            f"pack writes .onnx files, and target '{target}' loads {suffix}: convert, or unpack, the model for it"
        )
    check_forms(storage, dequantize)
    check_output(out, force=force, source=model)
    check_name(out, target)
    file = read_onnx(model)
    if file.metadata.get("tensors"):
        return pass_through(
            file, out, "its weights are stored by ecqx-onnx already", (), (), force=force
        )
    graph = FloatGraph.load(file.path)
    notes = list_notes(file.proto)
    defined = qonnx.define_operators(graph.proto)
    options: dict[str, Any] = {
        "storage": storage,
        "dequantize": dequantize,
        "target": target,
        "opset": opset,
    }
    raised = raise_graph(graph, find_target(target), opset) if rewrite else None
    if raised is not None:
        notes = (
            *notes,
            f"raised from opset {graph.opset} to {raised.opset} by onnx's version converter",
        )
    plan, kept, batchnorms = plan_packing(raised or graph, options, fold_batchnorm=rewrite)
    folded = [entry.name for entry in batchnorms if entry.weight is not None]
    if not plan.entries and defined is None:
        return pass_through(file, out, explain_nothing(kept), kept, notes, force=force)
    if folded:
        notes = (
            *notes,
            f"{len(folded)} BatchNormalization went into the scales of the weights before, up to rounding",
        )
    if defined is not None:
        notes = (*notes, defined)
    elif (fault := find_fault(file)) is not None:  # the writer would refuse it, too
        return pass_through(
            file, out, f"onnx's checker rejects the original: {fault}", kept, notes, force=force
        )
    equivalence, reason, again = None, "", False
    with replace_model(out, force=force, sources=list_sources(file)) as temporary:
        written = write(plan, temporary, metadata={"version": __version__})
        if written.nbytes >= file.size and defined is None:
            reason = f"with its weights packed it would take {written.nbytes:,} bytes, no less than the {file.size:,} that it has"
        elif check:
            equivalence = compare_models(file.path, temporary, inputs=inputs)
            again = (bool(folded) or raised is not None) and not equivalence.ok
            if not equivalence.ok and not again:
                raise CheckFailed(
                    f"{out}: not written, the packed model is not the original: {equivalence.failure}"
                )
        if reason or again:
            for part in list(temporary.parent.iterdir()):
                part.unlink()
    if again:
        return pack(file.path, out, **options, inputs=inputs, rewrite=False, force=force)
    if reason:
        return pass_through(file, out, reason, kept, notes, force=force)
    written = replace(written, path=out, kept=kept)
    return PackReport(out, file.size, written.nbytes, written, "", kept, notes, equivalence)


def unpack(
    model: str | Path,
    out: str | Path,
    *,
    floats: bool = False,
    dequantize: str = "auto",
    target: str = "qdq",
    opset: int | None = None,
    force: bool = False,
) -> WriteReport:
    """Write a file of ours with dense integers, for runtimes and converters that can't decode or fold.

    FileError if it is damaged. floats: plain float32 weights instead.
    """
    out = Path(out)
    check_output(out, force=force, source=model)
    check_name(out, target)
    file = read_onnx(model)
    unpacked = unpacking.unpack(model)
    lower_opset(unpacked.graph.proto, opset or find_target(target).max_opset)
    graph, matching, kernels = unpacked.graph, unpacked.matching, unpacked.kernels
    if floats:
        graph, matching, kernels = unpacked.with_floats(), Matching((), ()), ()
    options: dict[str, Any] = {
        "target": target,
        "storage": "dense",
        "dequantize": dequantize,
        "opset": opset,
    }
    plan = make_plan(graph, matching, **options, integer=kernels)
    if floats:
        plan = replace(
            plan, kept=tuple(replace(kept, reason="float, as asked for") for kept in plan.kept)
        )
    report = deliver(plan, out, metadata=unpacked.metadata, force=force, sources=list_sources(file))
    if not is_untrained(unpacked.metadata):
        return report
    error = recipe_of(unpacked.metadata).get("float_error")
    known = (
        f", and lay {error:g} (relative error) from it then"
        if isinstance(error, int | float)
        else ""
    )
    told = f"its weights were quantised from a float model without training{known}; `validate --against` it tells how far"
    return replace(report, notes=(*report.notes, told))


def list_notes(proto: ModelProto) -> tuple[str, ...]:
    inputs = {value.name for value in proto.graph.input}
    listed = [tensor.name for tensor in proto.graph.initializer if tensor.name in inputs]
    if proto.ir_version < 4 or not listed:  # before, every initializer had to be listed as an input
        return ()
    return (
        f"{len(listed)} of its tensors are optional inputs; packed ones can't be overridden any more",
    )


def find_fault(file: OnnxFile) -> str | None:
    """What onnx's checker has against the model, in one line."""
    try:
        onnx.checker.check_model(str(file.path), full_check=not file.proto.graph.sparse_initializer)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        return " ".join(str(error).split())[:300]
    return None


def explain_nothing(kept: tuple[Kept, ...]) -> str:
    if not kept:
        return "it has no weight of two or more dimensions"
    return f"none of its {len(kept)} weights can be packed ({kept[0].name}: {kept[0].reason})"


def list_sources(file: OnnxFile) -> tuple[Path, ...]:
    """What must not be replaced by what is made of it."""
    return (file.path, *file.external)


def pass_through(
    file: OnnxFile,
    out: Path,
    reason: str,
    kept: tuple[Kept, ...],
    notes: tuple[str, ...],
    *,
    force: bool,
) -> PackReport:
    """The same bytes; external data go to a file beside it that is named after `out`."""
    if file.external:
        check_output(find_data_path(out), force=force)
        notes = (*notes, f"its external data are in {find_data_path(out).name}")
    with replace_model(out, force=force, sources=list_sources(file)) as temporary:
        copied = (temporary, *copy_model(file, temporary))
        nbytes = sum(part.stat().st_size for part in copied)
    return PackReport(out, file.size, nbytes, None, reason, kept, notes, None)
