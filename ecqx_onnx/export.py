"""A PyTorch module and one example input -> its exported program and its float ONNX graph. The one user of torch.onnx."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from ecqx_onnx_converters.graph import FloatGraph

from ecqx_onnx.errors import ModelError

BASE_OPSET = 18  # the lowest that torch's exporter writes; every target can read it, and the converter raises it at need


@dataclass(frozen=True, eq=False)
class Exported:
    """A traced network, twice: as torch runs it, and as an ONNX float graph.

    notes: sentences for the report (a batch size that had to be fixed, say).
    """

    program: torch.export.ExportedProgram
    graph: FloatGraph
    notes: tuple[str, ...]


def export(model: torch.nn.Module, example: torch.Tensor | Sequence[torch.Tensor]) -> Exported:
    """Trace `model` on `example` (a batch, or a tuple of the forward's arguments) with a free batch size.

    ModelError when torch cannot trace the model. Where the batch size cannot be left free (the model reshapes with a
    constant, say) it is fixed to the example's, and the notes say so.
    """
    example = (example,) if isinstance(example, torch.Tensor) else tuple(example)
    was_training = model.training
    model.eval()
    try:
        program, notes = _trace(model, example)
    finally:
        model.train(was_training)
    return Exported(program, float_graph(program), notes)


def float_graph(program: torch.export.ExportedProgram) -> FloatGraph:
    """The float ONNX graph of an exported program, inputs named as in the program. ModelError if ONNX lacks an operator."""
    inputs = list(program.graph_signature.user_inputs)
    outputs = ["output"] if len(program.graph_signature.user_outputs) == 1 else None
    with _quiet():
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=BASE_OPSET,
                input_names=[str(name) for name in inputs],
                output_names=outputs,
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # torch.onnx wraps anything in its own error classes, none of them public
            raise ModelError(f"torch.onnx cannot export the model: {_reason(error)}") from error
    assert exported is not None  # only the old exporter returns nothing
    return FloatGraph.from_model(exported.model_proto)


def _trace(model: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    # A batch of one is taken for a constant by the tracer, so trace with two.
    traced = tuple(torch.cat([x, x]) if x.ndim and x.shape[0] == 1 else x for x in example)
    batch = torch.export.Dim("batch")
    with _quiet(), torch.no_grad():
        try:
            dynamic = tuple({0: batch} if x.ndim else None for x in traced)
            return torch.export.export(model, traced, dynamic_shapes=_per_argument(model, dynamic)), ()
        except Exception as error:
            first = error
        try:
            note = (
                f"the batch size is fixed to {example[0].shape[0]}: the model does not trace with a free one ({_reason(first)})"
            )
            return torch.export.export(model, example), (note,)
        except Exception as error:
            raise ModelError(f"torch.export cannot trace the model: {_reason(error)}") from error


def _per_argument(model: torch.nn.Module, dynamic: tuple[dict | None, ...]) -> tuple:
    """torch.export wants a starred argument's shapes in a tuple of their own."""
    import inspect

    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    return (dynamic,) if kinds and kinds[0] is inspect.Parameter.VAR_POSITIONAL else dynamic


def _reason(error: BaseException) -> str:
    """The innermost cause's first line: torch wraps the useful sentence in several layers of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporters print progress and warn of their own internals; none of it is for our users."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch._export")]
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
