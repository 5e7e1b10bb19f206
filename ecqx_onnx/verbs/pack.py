"""Store the quantized weights of any .onnx file in fewer bytes, and unpack them again.

`pack` looks for weights that some quantizer has put on few values, stores their integers anew and
checks the result against the original. A model in which nothing gets smaller is copied as it is,
with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from ecqx_onnx_converters import Matching, WriteReport, write
from ecqx_onnx_converters.foreign.qonnx_functions import list_defined
from ecqx_onnx_converters.graph.files import find_data_path, replace_model
from ecqx_onnx_converters.graph.opsets import lower_opset
from ecqx_onnx_converters.graph.outputs import check_output
from ecqx_onnx_converters.graph.well_formed import find_fault
from ecqx_onnx_converters.passes.shapes import find_stated_shapes
from ecqx_onnx_converters.passes.sharing import share_equal_tensors
from ecqx_onnx_converters.planning.plan import Kept
from ecqx_onnx_converters.planning.planner import check_forms, check_preference
from ecqx_onnx_converters.serialization import unpacking
from ecqx_onnx_converters.targets import check_name, find_target
from onnx import ModelProto

from ecqx_onnx import __version__
from ecqx_onnx.delivery.delivery import deliver
from ecqx_onnx.delivery.wire import NOT_MEASURED, measure_wire
from ecqx_onnx.errors import CheckFailed, FileError, ModelError, OptionError
from ecqx_onnx.inputs.model_copy import copy_model
from ecqx_onnx.inputs.onnx_file import OnnxFile, read_onnx
from ecqx_onnx.options.option import refuse_unknown_options
from ecqx_onnx.recognition.foreign_graph import load_foreign_graph, make_runnable
from ecqx_onnx.recognition.left_alone import SMALLEST
from ecqx_onnx.recognition.packing_plan import StorageOptions, plan_packing, raise_graph
from ecqx_onnx.runtime.sessions import open_session
from ecqx_onnx.validation.equivalence import Equivalence, compare_models
from ecqx_onnx.validation.references.float_distance import is_untrained, recipe_of
from ecqx_onnx.verbs.reports import PackReport

# Of a file: what tensors stored once must save for a file to be written anew for that alone.
WORTH_SHARING = 0.01


@refuse_unknown_options
def pack(
    model: str | Path,
    out: str | Path,
    *,
    storage: str = "auto",
    prefer: str = "auto",
    dequantize: str = "auto",
    target: str = "onnxruntime",
    opset: int | None = None,
    check: bool = True,
    inputs: Mapping[str, np.ndarray] | None = None,
    rewrite: bool = True,
    force: bool = False,
) -> PackReport:
    """Write an .onnx file, whoever made it, with its quantized weights stored anew, losslessly.

    Args:
        model: the .onnx file.
        out: the .onnx file to write.
        storage: "auto", "dense", "sparse" or "packed".
        prefer: with storage "auto", "disk" for the fewest bytes, "load" for nothing that is decoded
            at load, or "auto", see `make_plan`.
        dequantize: "auto", "folded" (float speed) or "standard" (DequantizeLinear).
        target: the runtime that must load the file.
        opset: highest to write; by default what the target can load.
        check: run both in onnxruntime, and write nothing if they differ.
        inputs: what they run on, an array for each input by name; by default random ones.
        rewrite: allow what reaches past the weights: an old graph is raised to an opset that has
            the shorter storages, and BatchNormalization goes into the scales before it, which
            rounds. If the check finds a difference, it is done without both.
        force: replace `out` if it exists.

    Returns:
        What was stored how; or why the model was copied unchanged.

    Raises:
        CheckFailed: if the packed model is not the original.
        InputError: if the file or an option can't be used.

    Example:
        report = ecqx_onnx.pack("model-int8.onnx", "packed.onnx")
        print(report.original_bytes, report.nbytes)
    """
    out = Path(out)
    suffix = find_target(target).suffix
    if suffix != ".onnx":
        raise OptionError(
            f"pack writes .onnx files, and target '{target}' loads {suffix}: convert, or unpack,"
            " the model for it"
        )
    check_forms(storage, dequantize)
    check_preference(prefer, storage)
    check_output(out, force=force, source=model)
    check_name(out, target)
    file = read_onnx(model)
    wanted = StorageOptions(
        storage=storage, dequantize=dequantize, target=target, opset=opset, prefer=prefer
    )
    return _pack(file, out, wanted, check=check, inputs=inputs, rewrite=rewrite, force=force)


def _pack(
    file: OnnxFile,
    out: Path,
    wanted: StorageOptions,
    *,
    check: bool,
    inputs: Mapping[str, np.ndarray] | None,
    rewrite: bool,
    force: bool,
) -> PackReport:
    # 1. Plan the weights that get smaller.
    if file.metadata.get("tensors"):
        reason = "its weights are stored by ecqx-onnx already"
        return _pass_through(file, out, reason, (), force=force)
    foreign = load_foreign_graph(file)
    missing = foreign.definitions.missing
    if missing:
        reason = (
            f"it has {missing[0]}, which no runtime here has and which is not defined by standard"
            " operators, so that nothing could be checked"
        )
        return _pass_through(file, out, reason, (), force=force)
    shared = share_equal_tensors(foreign.graph)
    graph = shared.graph
    raised = raise_graph(graph, find_target(wanted.target), wanted.opset) if rewrite else None
    plan, kept, batchnorms = plan_packing(raised or graph, wanted, fold_batchnorm=rewrite)
    if not plan.entries and raised is not None:  # in vain
        raised = None
        plan, kept, batchnorms = plan_packing(graph, wanted, fold_batchnorm=False)
    plan = replace(plan, shapes=find_stated_shapes(graph))
    folded = [entry.name for entry in batchnorms if entry.weight is not None]
    is_defined = bool(foreign.definitions.defined)

    # 2. Copy the model where there is nothing to gain.
    worthless = shared.nbytes < WORTH_SHARING * file.size
    if not plan.entries and not is_defined and worthless:
        return _pass_through(file, out, _explain_nothing(kept), kept, force=force)
    notes = (*_list_notes(file.proto), *foreign.notes)
    if raised is not None:
        sentence = f"raised from opset {graph.opset} to {raised.opset} by onnx's version converter"
        notes = (*notes, sentence)
    if shared.nbytes:
        sentence = (
            f"{shared.nbytes:,} bytes left out: {shared.equal} tensors that are another's equal,"
            f" {shared.unread} that nothing reads"
        )
        notes = (*notes, sentence)
    if folded:
        sentence = (
            f"{len(folded)} BatchNormalization went into the scales of the weights before, up to"
            " rounding"
        )
        notes = (*notes, sentence)
    if defined := list_defined(plan.graph.proto):
        sentence = (
            f"{', '.join(defined)} of activations: defined in the file by standard operators, so"
            " that stock runtimes run it"
        )
        notes = (*notes, sentence)

    # 3. Write to a temporary place, which becomes `out` if it is smaller and says the same.
    equivalence: Equivalence | None = None
    reason = ""
    again = False
    with replace_model(out, force=force, sources=_list_sources(file)) as temporary:
        written = write(plan, temporary, metadata={"version": __version__}, valid=False)
        notes = (*notes, *_check_validity(file, temporary))
        if written.nbytes >= file.size and not is_defined:
            reason = (
                f"with its weights packed it would take {written.nbytes:,} bytes, no less than the"
                f" {file.size:,} that it has"
            )
        elif check:
            equivalence = compare_models(make_runnable(file), temporary, inputs=inputs)
            rewritten = bool(folded) or raised is not None
            again = rewritten and not equivalence.ok
            if not equivalence.ok and not again:
                raise CheckFailed(
                    f"{out}: not written, the packed model is not the original:"
                    f" {equivalence.failure}"
                )
        if reason or again:
            for part in list(temporary.parent.iterdir()):
                part.unlink()

    # 4. Where rewriting made the difference, do without it.
    if again:
        return _pack(
            read_onnx(file.path), out, wanted, check=True, inputs=inputs, rewrite=False, force=force
        )
    if reason:
        return _pass_through(file, out, reason, kept, force=force)
    notes = (*notes, *written.notes)
    written = replace(written, path=out, kept=kept, notes=())
    wire = NOT_MEASURED if file.external else measure_wire(out, file.path)
    return PackReport(out, file.size, written.nbytes, written, "", kept, notes, equivalence, wire)


@refuse_unknown_options
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
    """Write a file of ours with dense integers, for tools that can't decode or fold.

    Args:
        model: an .onnx file that `convert`, `compress` or `pack` has written.
        out: the .onnx file to write.
        floats: plain float32 weights instead of integers.
        dequantize: "auto", "folded" or "standard" (DequantizeLinear).
        target: who must load the file; "qdq" stands for tools that want standard operators.
        opset: highest to write; by default what the target can load.
        force: replace `out` if it exists.

    Returns:
        How each weight is stored, and notes.

    Raises:
        FileError: if the file is damaged: every weight's checksum is verified.
        InputError: if an option can't be used.

    Example:
        ecqx_onnx.unpack("packed.onnx", "dense.onnx")
    """
    out = Path(out)
    check_output(out, force=force, source=model)
    check_name(out, target)
    file = read_onnx(model)
    unpacked = unpacking.unpack(model)
    lower_opset(unpacked.graph.proto, opset or find_target(target).max_opset)
    wanted = StorageOptions(storage="dense", dequantize=dequantize, target=target, opset=opset)
    if floats:
        plan = wanted.make_plan(unpacked.with_floats(), Matching((), ()))
        kept = tuple(replace(entry, reason="float, as asked for") for entry in plan.kept)
        plan = replace(plan, kept=kept)
    else:
        plan = wanted.make_plan(unpacked.graph, unpacked.matching, integer=unpacked.kernels)
    report = deliver(
        plan,
        out,
        metadata=unpacked.metadata,
        force=force,
        sources=_list_sources(file),
        valid=find_fault(file.path) is None,
    )
    if not is_untrained(unpacked.metadata):
        return report
    error = recipe_of(unpacked.metadata).get("float_error")
    known = ""
    if isinstance(error, int | float):
        known = f", and lay {error:g} (relative error) from it then"
    sentence = (
        f"its weights were quantised from a float model without training{known}; `validate"
        " --against` it tells how far"
    )
    return replace(report, notes=(*report.notes, sentence))


def _list_notes(proto: ModelProto) -> tuple[str, ...]:
    """A sentence about tensors that callers could replace so far."""
    if proto.ir_version < 4:  # before, every initializer had to be listed as an input
        return ()
    inputs = {value.name for value in proto.graph.input}
    listed = [tensor.name for tensor in proto.graph.initializer if tensor.name in inputs]
    if not listed:
        return ()
    return (
        f"{len(listed)} of its tensors are optional inputs; packed ones can't be overridden any"
        " more",
    )


def _check_validity(file: OnnxFile, written: Path) -> tuple[str, ...]:
    """FileError for what onnx's checker rejects, and had not rejected before; a sentence where it
    had, since onnxruntime takes more."""
    fault = find_fault(written)
    if fault is None:
        return ()
    if find_fault(file.path) is None:
        raise FileError(f"the model would not be valid ONNX and was not written: {fault}")
    try:
        open_session(written)
    except CheckFailed as error:
        raise ModelError(
            f"{file.path}: cannot be packed, since onnx's checker rejects it ({fault}) and {error}"
        ) from None
    return (f"onnx's checker rejects it, as it rejects the original ({fault})",)


def _explain_nothing(kept: tuple[Kept, ...]) -> str:
    if not kept:
        return f"it has no weight of two or more dimensions and {SMALLEST} or more entries"
    largest = max(kept, key=lambda entry: math.prod(entry.shape))
    told = f"{largest.name}: {largest.reason}"
    if len(kept) == 1:
        return f"its one weight can't be packed ({told})"
    return f"none of its {len(kept)} weights can be packed, nor the largest ({told})"


def _list_sources(file: OnnxFile) -> tuple[Path, ...]:
    """What must not be replaced by what is made of it."""
    return (file.path, *file.external)


def _pass_through(
    file: OnnxFile,
    out: Path,
    reason: str,
    kept: tuple[Kept, ...],
    *,
    force: bool,
) -> PackReport:
    """The same bytes; external data go to a file beside it that is named after `out`."""
    notes: tuple[str, ...] = ()
    if file.external:
        check_output(find_data_path(out), force=force)
        notes = (f"its external data are in {find_data_path(out).name}",)
    with replace_model(out, force=force, sources=_list_sources(file)) as temporary:
        copied = (temporary, *copy_model(file, temporary))
        nbytes = sum(part.stat().st_size for part in copied)
    return PackReport(out, file.size, nbytes, None, reason, kept, notes, None)
