"""Trace a PyTorch module on an example input, and export its float ONNX graph.

What comes out is the exported program and the graph, with notes for the report. This is the one
user of torch.onnx.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree
from ecqx_onnx_converters.graph.graph import FloatGraph

from ecqx_onnx.errors import ModelError
from ecqx_onnx.quantization.parametrizations import (
    copy_module,
    find_parametrized,
    merge_parametrizations,
)

# The lowest that torch's exporter writes; every target can read it, and the converter raises it at
# need.
BASE_OPSET = 18
# What the exporters log to.
LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch._export")


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


def export(model: torch.nn.Module, example: torch.Tensor | Sequence[torch.Tensor]) -> Exported:
    """Trace `model` on `example` with a free batch size, and export it.

    Where the batch size cannot be left free (the model reshapes with a constant, say) it is fixed
    to the example's, and the notes say so.

    Args:
        model: the module; it is as before afterwards.
        example: a batch, or a tuple of the forward's arguments.

    Returns:
        The program and its graph.

    Raises:
        ModelError: torch cannot trace the model, or ONNX lacks an operator.
    """
    program, notes = trace(model, example)
    try:
        return Exported(program, export_float_graph(program), notes)
    except ModelError as error:
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
            f"the model cannot be copied ({_find_reason(error)}): call remove_parametrizations and"
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


def trace(
    model: torch.nn.Module, example: torch.Tensor | Sequence[torch.Tensor]
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """Trace `model` in evaluation mode, with a free batch size where that can be.

    Args:
        model: the module; its mode is as before afterwards.
        example: a batch, or the forward's arguments; one tensor may stand for several of them.

    Returns:
        (the program, notes for the report): a batch size that had to be fixed, inputs that nothing
        reads, buffers that forward writes.

    Raises:
        ModelError: torch cannot trace the model.
    """
    example = _separate(example, model)
    was_training = model.training
    model.eval()
    try:
        program, notes = _trace_program(model, example)
        signature = program.graph_signature
        inputs = set(map(str, signature.user_inputs))
        if inputs & set(map(str, signature.user_outputs)):
            with _copy_inputs_returned(model):
                program, notes = _trace_program(model, example)
    finally:
        model.train(was_training)
    return program, (*notes, *notes_on(program))


@contextlib.contextmanager
def _copy_inputs_returned(model: torch.nn.Module) -> Iterator[None]:
    """Let forward return a copy of an input that it would return itself.

    In ONNX no input is an output.
    """
    own = vars(model).get("forward")  # of the instance, not of its class
    forward = model.forward

    @functools.wraps(forward)
    def copying(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]

        def separate(value: Any) -> Any:
            is_input = any(value is one for one in given)
            return value.clone() if is_input and isinstance(value, torch.Tensor) else value

        return torch.utils._pytree.tree_map(separate, forward(*args, **kwargs))

    model.forward = copying
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def trace_fixed(
    model: torch.nn.Module, example: torch.Tensor | Sequence[torch.Tensor], error: Exception
) -> tuple[torch.export.ExportedProgram, str]:
    """Trace `model` for the example's own batch size, after a free one has failed.

    Args:
        model: the module; its mode is as before afterwards.
        example: a batch, or the forward's arguments.
        error: how it failed with a free batch size.

    Returns:
        (the program, a note for the report).

    Raises:
        Exception: the first error again, if this fails too.
    """
    example = _separate(example, model)
    was_training = model.training
    model.eval()
    try:
        with _silence_exporters(), torch.no_grad():
            program = torch.export.export(model, example)
    except Exception:
        raise error from None
    finally:
        model.train(was_training)
    return program, f"the batch size is fixed to {_find_batch(example)}: with a free one, {error}"


def _find_batch(example: tuple[torch.Tensor, ...]) -> int:
    return next((int(x.shape[0]) for x in example if x.ndim), 1)


def _separate(
    example: torch.Tensor | Sequence[torch.Tensor], model: torch.nn.Module
) -> tuple[torch.Tensor, ...]:
    """The forward's arguments as tensors of their own, floats in the model's type.

    The tracer takes arguments that share memory for one input.
    """
    example = (example,) if isinstance(example, torch.Tensor) else tuple(example)
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    wanted = next(iter(types)) if len(types) == 1 else None
    separate = tuple(x.detach().clone() for x in example)
    if wanted is None:
        return separate
    return tuple(x.to(wanted) if x.is_floating_point() else x for x in separate)


def notes_on(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    """What a user should know of a program: inputs that nothing reads, buffers that it writes.

    Args:
        program: any exported program.

    Returns:
        One sentence for each; most programs have none.
    """
    signature = program.graph_signature
    inputs = set(map(str, signature.user_inputs))
    notes = []
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in inputs and not node.users:
            notes.append(
                f"nothing reads the input '{node.name}': if the model should, it was traced with"
                " one tensor given twice"
            )
    written = sorted(find_written_buffers(program))
    if written:
        names = ", ".join(written)
        notes.append(
            f"forward writes the model's buffers ({names}): the file holds them as they are now,"
            " every run starts from there"
        )
    return tuple(notes)


def find_written_buffers(program: torch.export.ExportedProgram) -> set[str]:
    """Find the buffers that a program writes.

    Args:
        program: as torch.export gives it.

    Returns:
        Their names: declared as written, or changed by an operator that works in place on a buffer
        or on a view of it.
    """
    signature = program.graph_signature
    buffers = dict(signature.inputs_to_buffers)
    written = set(signature.buffers_to_mutate.values())
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        source = node.args[0] if node.args else None
        while isinstance(source, torch.fx.Node) and source.op == "call_function":
            source = source.args[0] if source.args else None
        if isinstance(source, torch.fx.Node) and source.name in buffers:
            written.add(buffers[source.name])
    return written


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
    with _silence_exporters(), torch.no_grad():
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
            raise ModelError(
                f"torch.onnx cannot export the model: {_find_reason(error)}"
            ) from error
    assert exported is not None  # only the old exporter returns nothing
    return FloatGraph.from_model(exported.model_proto)


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


def _trace_program(
    model: torch.nn.Module, example: tuple[torch.Tensor, ...]
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    # A batch of one is taken for a constant by the tracer, so trace with two.
    """The program and a note if its batch size is fixed; the module is in evaluation mode."""
    traced = tuple(torch.cat([x, x]) if x.ndim and x.shape[0] == 1 else x for x in example)
    batch = torch.export.Dim("batch")
    with _silence_exporters(), torch.no_grad():
        try:
            dynamic = tuple({0: batch} if x.ndim else None for x in traced)
            shapes = _group_shapes_by_argument(model, dynamic)
            return torch.export.export(model, traced, dynamic_shapes=shapes), ()
        except Exception as error:
            first = error
        try:
            reason = f"the model does not trace with a free one ({_find_reason(first)})"
            note = f"the batch size is fixed to {_find_batch(example)}: {reason}"
            return torch.export.export(model, example), (note,)
        except Exception as error:
            raise ModelError(
                f"torch.export cannot trace the model: {_find_reason(error)}"
            ) from error


def _group_shapes_by_argument(model: torch.nn.Module, dynamic: tuple[dict | None, ...]) -> tuple:
    """torch.export wants a starred argument's shapes in a tuple of their own."""
    import inspect

    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    return (dynamic,) if kinds and kinds[0] is inspect.Parameter.VAR_POSITIONAL else dynamic


def _find_reason(error: BaseException) -> str:
    """The first line of the innermost cause.

    torch wraps the useful sentence in several layers of advice.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def _silence_exporters() -> Iterator[None]:
    """Let torch's exporters run without a word.

    They print progress and warn of their own internals; none of it is for our users.
    """
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
