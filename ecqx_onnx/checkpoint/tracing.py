"""Trace a PyTorch module on an example input with torch.export, some of its axes free.

The first axis of every input is the batch and is left free where that can be. Other axes are fixed
as in the example unless `dynamic` names them: {"tokens": {0: "batch", 1: "time"}}.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ecqx_onnx.checkpoint.forward import Arguments, Example, adapt_forward, divide_arguments
from ecqx_onnx.errors import ModelError, OptionError

BATCH = "batch"
# What the exporters log to.
LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch._export")
AXIS_NAMES = "ecqx_axis_names"  # of a placeholder's meta: axis -> name
Dynamic = Mapping[str, Mapping[int, str]]  # input -> {axis: name}


def trace(
    model: torch.nn.Module, example: Example, *, dynamic: Dynamic | None = None
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """Trace `model` in evaluation mode.

    Args:
        model: the module; its mode is as before afterwards.
        example: a batch, or the forward's arguments, in a tuple or by name; one tensor may stand
            for several of them.
        dynamic: which axes are free, {input: {axis: name}}; None for the first axis of each input,
            where that can be.

    Returns:
        (the program, notes for the report): a batch size that had to be fixed, which axes are
        free, inputs that nothing reads, buffers that forward writes, outputs that are no tensors.

    Raises:
        ModelError: torch cannot trace the model, or not with these axes free.
        OptionError: `dynamic` names what is no input or axis.
    """
    arguments = divide_arguments(model, example)
    was_training = model.training
    model.eval()
    try:
        with (
            adapt_forward(model, arguments) as told,
            _compute_experts_batched(model),
            silence_exporters(),
            torch.no_grad(),
        ):
            program, notes = _trace_program(model, arguments, dynamic)
    finally:
        model.train(was_training)
    return program, (*notes, *told.notes, *notes_on(program), *_tell_axes(program, dynamic))


def trace_fixed(
    model: torch.nn.Module, example: Example, error: Exception
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
    arguments = divide_arguments(model, example)
    was_training = model.training
    model.eval()
    try:
        with (
            adapt_forward(model, arguments),
            _compute_experts_batched(model),
            silence_exporters(),
            torch.no_grad(),
        ):
            program = torch.export.export(model, arguments.tensors)
    except Exception:
        raise error from None
    finally:
        model.train(was_training)
    batch = _find_batch(arguments.tensors)
    return program, f"the batch size is fixed to {batch}: with a free one, {error}"


@contextlib.contextmanager
def _compute_experts_batched(model: torch.nn.Module) -> Iterator[None]:
    """Let transformers' mixtures of experts run on operators that ONNX has.

    They call a kernel of grouped products unless their model is told otherwise.
    """
    told: list[tuple[Any, Any]] = []
    try:
        for module in model.modules():
            ask: Any = getattr(module, "get_experts_implementation", None)
            tell: Any = getattr(module, "set_experts_implementation", None)
            if callable(ask) and callable(tell):
                before = ask()
                tell("batched_mm")
                told.append((tell, before))
    except Exception:  # another library's own business: it is traced as it is
        pass
    try:
        yield
    finally:
        for tell, before in reversed(told):
            tell(before)


def _trace_program(
    model: torch.nn.Module, arguments: Arguments, dynamic: Dynamic | None
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """The program and a note if its batch size is fixed; the module is in evaluation mode."""
    names = _name_inputs(model, arguments)
    if dynamic is not None:
        return _trace_with_axes(model, arguments, names, dynamic), ()
    # A batch of one is taken for a constant by the tracer, so trace with two.
    tensors = arguments.tensors
    traced = tuple(torch.cat([x, x]) if x.ndim and x.shape[0] == 1 else x for x in tensors)
    batch = torch.export.Dim(BATCH)
    try:
        axes = [{0: batch} if x.ndim else None for x in traced]
        shapes = _group_by_argument(model, arguments, axes)
        return torch.export.export(model, traced, dynamic_shapes=shapes), ()
    except Exception as error:
        first = error
    try:
        reason = f"the model does not trace with a free one ({find_reason(first)})"
        note = f"the batch size is fixed to {_find_batch(tensors)}: {reason}"
        return torch.export.export(model, tensors), (note,)
    except Exception as error:
        raise ModelError(f"torch.export cannot trace the model: {find_reason(error)}") from error


def _trace_with_axes(
    model: torch.nn.Module, arguments: Arguments, names: Sequence[str], dynamic: Dynamic
) -> torch.export.ExportedProgram:
    """The program with just these axes free."""
    _check_axes(names, arguments.tensors, dynamic)
    free = [dynamic.get(name, {}) for name in names]
    traced = tuple(_lengthen(x, own) for x, own in zip(arguments.tensors, free, strict=True))
    axes = [dict.fromkeys(own, torch.export.Dim.DYNAMIC) or None for own in free]
    shapes = _group_by_argument(model, arguments, axes)
    try:
        program = torch.export.export(model, traced, dynamic_shapes=shapes)
    except Exception as error:
        free_axes: list[str] = []
        for name, own in dynamic.items():
            free_axes += [f"{name}:{axis}" for axis in own]
        wanted = ", ".join(free_axes)
        raise ModelError(
            f"the model does not trace with {wanted} free: {find_reason(error)}; free fewer axes"
        ) from error
    inputs = set(map(str, program.graph_signature.user_inputs))
    places = [
        node for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs
    ]
    for place, own in zip(places, free, strict=True):
        place.meta[AXIS_NAMES] = dict(own)
    return program


def _check_axes(names: Sequence[str], tensors: Sequence[torch.Tensor], dynamic: Dynamic) -> None:
    """OptionError for an input or an axis that there is not."""
    shapes = dict(zip(names, (tuple(x.shape) for x in tensors), strict=True))
    for name, own in dynamic.items():
        if name not in shapes:
            raise OptionError(
                f"--dynamic names the input '{name}', and the model's are {', '.join(names)}"
            )
        for axis in own:
            if not 0 <= axis < len(shapes[name]):
                raise OptionError(
                    f"--dynamic {name}:{axis}: the input has the shape {list(shapes[name])}, so"
                    f" its axes are 0 to {len(shapes[name]) - 1}"
                )


def _lengthen(x: torch.Tensor, axes: Mapping[int, str]) -> torch.Tensor:
    """The tracer takes a length of one for a constant: two instead, where the axis is free."""
    for axis in axes:
        if x.shape[axis] == 1:
            x = torch.cat([x, x], axis)
    return x


def _name_inputs(model: torch.nn.Module, arguments: Arguments) -> tuple[str, ...]:
    """The inputs' names as the tracer gives them."""
    if arguments.names is not None:
        return arguments.names
    parameters = list(inspect.signature(model.forward).parameters.values())
    if _has_starred(model):
        own = parameters[0].name
        return tuple(f"{own}_{place}" for place in range(len(arguments.tensors)))
    names = [parameter.name for parameter in parameters]
    return tuple(names[: len(arguments.tensors)])


def _has_starred(model: torch.nn.Module) -> bool:
    parameters = list(inspect.signature(model.forward).parameters.values())
    return bool(parameters) and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL


def _group_by_argument(
    model: torch.nn.Module, arguments: Arguments, axes: Sequence[dict | None]
) -> tuple:
    """torch.export wants a starred argument's shapes in a tuple of their own."""
    starred = arguments.names is None and _has_starred(model)
    return (tuple(axes),) if starred else tuple(axes)


def _find_batch(tensors: Sequence[torch.Tensor]) -> int:
    return next((int(x.shape[0]) for x in tensors if x.ndim), 1)


def notes_on(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    """What a user should know of a program: inputs that nothing reads, buffers that it writes.

    Args:
        program: any exported program.

    Returns:
        One sentence for each; most programs have none.
    """
    notes = []
    for node in _find_inputs(program):
        if not node.users:
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


def _find_inputs(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    inputs = set(map(str, program.graph_signature.user_inputs))
    nodes = program.graph.nodes
    return [node for node in nodes if node.op == "placeholder" and node.name in inputs]


def _tell_axes(program: torch.export.ExportedProgram, dynamic: Dynamic | None) -> tuple[str, ...]:
    """Which lengths are fixed, where a user may want to choose."""
    names = name_axes(program)
    shown = []
    is_plain = True  # one input of floats, whose batch alone is free
    for node in _find_inputs(program):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        lengths = [names.get(str(length), str(length)) for length in value.shape]
        shown.append(f"{node.name} [{', '.join(lengths)}]")
        is_plain = is_plain and value.is_floating_point()
    if dynamic is None and is_plain and len(shown) < 2:
        return ()
    return (
        f"inputs: {', '.join(shown)}; a number is a length that is fixed, --dynamic NAME:AXIS"
        " frees it",
    )


def name_axes(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Find a name for each free length of a program's inputs.

    Args:
        program: as torch.export gives it, or loaded.

    Returns:
        The tracer's symbol ("s77") -> the name that was asked for; else "batch" for the first axis
        and INPUT_AXIS for another.
    """
    found: dict[str, str] = {}
    for node in _find_inputs(program):
        value = node.meta.get("val")
        asked = node.meta.get(AXIS_NAMES, {})
        for axis, length in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            symbol = str(length)
            if isinstance(length, int) or symbol in found or not symbol.isidentifier():
                continue
            is_batch = axis == 0 and BATCH not in found.values()
            found[symbol] = asked.get(axis) or (BATCH if is_batch else f"{node.name}_{axis}")
    return found


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


def find_reason(error: BaseException) -> str:
    """The first line of the innermost cause.

    torch wraps the useful sentence in several layers of advice.

    Args:
        error: raised by one of torch's exporters.

    Returns:
        One line of at most 300 characters.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def silence_exporters() -> Iterator[None]:
    """Let torch's exporters run without a word.

    They print progress and warn of their own internals; none of it is for our users.

    Returns:
        A context.
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
