"""Reads a model as users name it, and makes it a float graph ready to be compressed.

An .onnx file is read without torch: float16 becomes float32, old opsets are raised to one that the
storages need, model-local functions are inlined, and BatchNormalization goes into the weights
before it. A PyTorch model is exported first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ecqx_onnx_converters.graph.graph import FloatGraph
from ecqx_onnx_converters.graph.opset_raising import raise_opset
from ecqx_onnx_converters.graph.opsets import refuse_opset
from ecqx_onnx_converters.graph.well_formed import complete_imports, find_fault, sort_nodes
from ecqx_onnx_converters.matching.matching import GraphWeight, Matching
from ecqx_onnx_converters.passes.batchnorm import BatchNorm, fold_batchnorms
from ecqx_onnx_converters.passes.work import Work
from onnx import TensorProto
from onnx.inliner import inline_local_functions

from ecqx_onnx.compression.model.constants import apply_moves
from ecqx_onnx.compression.model.half import is_half, to_float32
from ecqx_onnx.compression.model.weights import find_weights
from ecqx_onnx.errors import ModelError, OptionError
from ecqx_onnx.inputs.onnx_file import OnnxFile, read_onnx
from ecqx_onnx.options.input_shape import InputShape
from ecqx_onnx.preprocessing.preprocessing import Preprocessing
from ecqx_onnx.tensors import QuantTensor, Scale
from ecqx_onnx.validation.references.onnx_reference import find_integer_operator

WANTED_OPSETS = (21, 18, 13)  # the first that can be had brings short integers, or packed ones


@dataclass(frozen=True, eq=False)
class FloatModel:
    """A float network.

    Attributes:
        graph: float32, with all its weights; BatchNormalization folded.
        source: what the user named, in words.
        file_bytes: of the .onnx file; of a PyTorch model, of its parameters as float32.
        preprocessing, labels: of a PyTorch model's file; None and () where nothing is said.
        notes: sentences for the report.
        checkpoint: of a PyTorch model, else None.
        valid: whether onnx's checker accepts the file; onnxruntime runs more than it does.
    """

    graph: FloatGraph
    source: str
    file_bytes: int
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    checkpoint: Any = field(default=None, repr=False)
    valid: bool = True


def load_float_model(
    model: Any,
    *,
    factory: str | None = None,
    example: Any = None,
    input_shape: InputShape | None = None,
    dynamic: Any = None,
    trust_pickle: bool = False,
) -> FloatModel:
    """Read an .onnx file, or export a PyTorch model.

    Args:
        model: path of an .onnx file; or whatever `convert` takes (module, state dict, program).
        factory: as for `convert`; for PyTorch models only, as the four that follow.
        example: as for `convert`.
        input_shape: as for `convert`.
        dynamic: as for `convert`.
        trust_pickle: as for `convert`.

    Returns:
        The float graph that is compressed, and what was done to it.

    Raises:
        ModelError: its weights are integers already, or it can't be read as a float network.
        FileError: the file is missing or damaged.
    """
    if is_onnx_path(model):
        given = {"--model": factory, "--input-shape": input_shape, "--dynamic": dynamic}
        option = next((name for name, value in given.items() if value is not None), None)
        if option is not None:
            raise OptionError(
                f"{option} is for PyTorch models, and {model} says itself what it takes: leave it"
                " out"
            )
        return _load_onnx(Path(model))
    return _from_pytorch(
        model,
        factory=factory,
        example=example,
        input_shape=input_shape,
        dynamic=dynamic,
        trust_pickle=trust_pickle,
    )


def is_onnx_path(model: Any) -> bool:
    """Whether `model` names an .onnx file.

    Args:
        model: anything that a user gives.

    Returns:
        True for a path (string or Path) that ends in .onnx, in any case.
    """
    return isinstance(model, str | Path) and Path(model).suffix.lower() == ".onnx"


def _load_onnx(path: Path) -> FloatModel:
    """A float .onnx file. ModelError or FileError with the reason where it is none."""
    file = read_onnx(path)
    _refuse_integers(path, file)
    graph = FloatGraph.load(path)
    complete_imports(graph.proto)
    sort_nodes(graph.proto.graph)
    notes: list[str] = []
    if graph.proto.functions:
        inlined = inline_local_functions(graph.to_model())
        graph = FloatGraph.from_model(inlined)
    if is_half(graph):
        graph = to_float32(graph)
        notes.append("its float16 weights are compressed as float32 ones; inputs and outputs stay")
    graph, raised = _raise(graph)
    notes.extend(raised)
    graph, folded = fold_into_weights(apply_moves(graph))
    if folded:
        notes.append(f"{folded} BatchNormalization went into the weights before, up to rounding")
    valid = find_fault(path) is None
    return FloatModel(graph, str(path), file.size, notes=tuple(notes), valid=valid)


def _refuse_integers(path: Path, file: OnnxFile) -> None:
    if file.metadata.get("tensors"):
        raise ModelError(
            f"{path}: its weights are stored as integers by ecqx-onnx already; give the float model"
        )
    name = find_integer_operator(file)
    if name is not None:
        raise ModelError(
            f"{path}: is quantised already ({name} nodes); give the float model, or make this"
            f" file smaller without a loss: ecqx-onnx pack {path} OUT.onnx"
        )


def _raise(graph: FloatGraph) -> tuple[FloatGraph, list[str]]:
    """The graph in an opset that storages can be declared for, and what was done to it."""
    for wanted in WANTED_OPSETS:
        if graph.opset >= wanted or refuse_opset(graph.proto, wanted) is None:
            return graph, []
        raised = raise_opset(graph, wanted)
        if isinstance(raised, FloatGraph):
            note = f"raised from opset {graph.opset} to {wanted} by onnx's version converter"
            return raised, [note]
    return graph, []


def fold_into_weights(graph: FloatGraph) -> tuple[FloatGraph, int]:
    """Multiply BatchNormalization into the float weights before it.

    The factor of each output channel is read off a weight of ones that goes through the same
    folding as quantised weights do.

    Args:
        graph: with all its weights; it is not changed.

    Returns:
        (the new graph, how many weights were multiplied).
    """
    weights, _ = find_weights(graph)
    ones = []
    for weight in weights:
        levels = np.ones(weight.shape, np.int8)
        tensor = QuantTensor(weight.name, levels, Scale(np.array(1.0, np.float32)))
        ones.append(GraphWeight(weight.name, tensor, (weight.name,)))
    work = fold_batchnorms(Work(graph, Matching(tuple(ones), ())))
    folded = work.graph
    inside = {entry.weight for entry in work.find_notes(BatchNorm) if entry.weight is not None}
    if not inside:
        return graph, 0
    values = dict(folded.weights)
    for entry in work.matching.found:
        if entry.name in inside:
            values[entry.name] = graph.weights[entry.name] * entry.dequantize()
        elif entry.name in graph.weights:
            values[entry.name] = graph.weights[entry.name]
    declared = {tensor.name for tensor in folded.proto.graph.initializer}
    for name in inside - declared:
        _declare(folded, name, values[name])
    return FloatGraph(folded.proto, values), len(inside)


def _declare(graph: FloatGraph, name: str, values: np.ndarray) -> None:
    tensor = graph.proto.graph.initializer.add(name=name, data_type=TensorProto.FLOAT)
    tensor.dims.extend(values.shape)


def _from_pytorch(
    model: Any,
    *,
    factory: str | None,
    example: Any,
    input_shape: InputShape | None,
    dynamic: Any,
    trust_pickle: bool,
) -> FloatModel:
    from ecqx_onnx.sources.to_checkpoint import as_checkpoint

    checkpoint = as_checkpoint(
        model,
        factory=factory,
        example=example,
        input_shape=input_shape,
        dynamic=dynamic,
        trust_pickle=trust_pickle,
        allow_float=True,
    )
    source = str(model) if isinstance(model, str | Path) else type(model).__name__
    if checkpoint.tensors:
        raise ModelError(
            f"{source}: {len(checkpoint.tensors)} of its weights are on few values already; write "
            "it"
            " with ecqx-onnx convert, or give the float model"
        )
    graph, folded = fold_into_weights(apply_moves(checkpoint.graph))
    notes = list(checkpoint.notes)
    if folded:
        notes.append(f"{folded} BatchNormalization went into the weights before, up to rounding")
    return FloatModel(
        graph,
        source,
        4 * sum(int(value.numel()) for value in checkpoint.state.values()),
        checkpoint.preprocessing,
        checkpoint.labels,
        tuple(notes),
        checkpoint,
    )
