"""Turn a Quantizer, a module, a program or a path into a checkpoint in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ecqx_onnx_converters.matching.matching import match

from ecqx_onnx.checkpoint.checkpoint import Checkpoint, build, is_checkpoint, load
from ecqx_onnx.checkpoint.export import (
    Exported,
    export,
    export_float_graph,
    prepare,
)
from ecqx_onnx.checkpoint.forward import Example, adapt_forward, divide_arguments
from ecqx_onnx.checkpoint.insight import observe
from ecqx_onnx.checkpoint.tracing import (
    Dynamic,
    find_written_buffers,
    notes_on,
    trace,
    trace_fixed,
)
from ecqx_onnx.errors import ModelError, OptionError
from ecqx_onnx.inputs.program.program import run_module
from ecqx_onnx.inputs.safetensors_file import is_safetensors
from ecqx_onnx.inputs.torch_file import is_program, load_plain
from ecqx_onnx.inputs.user_code import is_function_spec
from ecqx_onnx.options.input_shape import InputShape
from ecqx_onnx.preprocessing.preprocessing import Preprocessing
from ecqx_onnx.quantization.activations import ActivationRounding
from ecqx_onnx.quantization.parametrizations import (
    copy_module,
    find_parametrized,
    merge_parametrizations,
)
from ecqx_onnx.quantization.weights import find_weights
from ecqx_onnx.sources.example import choose_example
from ecqx_onnx.sources.loading import Loaded, load_model
from ecqx_onnx.sources.post_training import WeightSelection, find_quantized_tensors
from ecqx_onnx.tensors import QuantTensor
from ecqx_onnx.validation.references.float_probe import FloatProbe, example_of

FOLDED_UP_TO = 8192  # entries: what torch's exporter computes while it exports
Source = Any  # Quantizer | nn.Module | ExportedProgram | Checkpoint | path


def as_checkpoint(
    model: Source,
    *,
    example: Example | None = None,
    factory: str | None = None,
    input_shape: InputShape | None = None,
    dynamic: Dynamic | None = None,
    trust_pickle: bool = False,
    bits: int | None = None,
    entropy_weight: float = 0.0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
    labels: Sequence[str] = (),
    recipe: Mapping[str, Any] | None = None,
    allow_float: bool = False,
    probe: FloatProbe | None = None,
    strict: bool = True,
) -> Checkpoint:
    """Turn any of the sources that `convert` takes into a checkpoint in memory.

    Args:
        model: a Quantizer, nn.Module, ExportedProgram, Checkpoint, or the path of a file. One that
            is given is not changed.
        example: a batch, or the forward's arguments in a tuple or by name; wanted for modules.
        factory: "FILE.py:FACTORY" of the network that a state dict belongs to.
        input_shape: of one sample, without the batch, in place of an example; or each input by
            name.
        dynamic: which axes are free, {input: {axis: name}}; None for the batch where that can be.
        trust_pickle: unpickle the file, which runs its author's code.
        bits: 2 to 8, for float weights that are quantized here, without training.
        entropy_weight: how much shorter code counts against exactness; with `bits`.
        include: patterns of weights that are quantized whatever reads them.
        exclude: patterns of weights that stay float.
        preprocessing: of raw samples.
        labels: names of the classes.
        recipe: plain JSON values to be kept.
        allow_float: a model none of whose weights is quantized gives a Checkpoint without tensors
            instead of a ModelError.
        probe: sees the float model before it is quantized.
        strict: False takes a state dict that lacks names of the model's, or has more; notes tell.

    Returns:
        The checkpoint.

    Raises:
        ModelError: if the model cannot be traced, or has no weights to quantize.
        OptionError: for options that do not go with this model.
        FileError: if a file cannot be read.
    """
    if isinstance(model, Checkpoint):
        _refuse_second_quantization(bits)
        _refuse_shape(input_shape, dynamic)
        return model
    if isinstance(model, str | Path):
        if is_function_spec(str(model)) or Path(model).suffix == ".py":
            raise ModelError(
                f"{model}: is Python code; give the file of its weights, and the code beside it:"
                " --model FILE.py:FACTORY"
            )
        if _is_for_checkpoint(model, factory=factory, trust_pickle=trust_pickle):
            _refuse_second_quantization(bits, f"{model}: ")
            _refuse_shape(input_shape, dynamic, f"{model}: ")
            return load(model)
        loaded = load_model(model, factory=factory, trust_pickle=trust_pickle, strict=strict)
    else:
        loaded = Loaded(model)
    details = _Details(
        recipe=dict(recipe or {}),
        preprocessing=preprocessing or loaded.preprocessing,
        labels=tuple(labels) or loaded.labels,
    )
    if hasattr(loaded.model, "tensors"):
        _refuse_second_quantization(bits)
        example = choose_example(example, input_shape, loaded)
        return _convert_quantizer(loaded.model, example, dynamic, details)
    if isinstance(loaded.model, torch.export.ExportedProgram):
        _refuse_shape(input_shape, dynamic)
    else:
        example = choose_example(example, input_shape, loaded)
    chosen = WeightSelection(bits, entropy_weight, tuple(include), tuple(exclude), allow_float)
    return _convert_float(loaded, example, dynamic, chosen, details, probe)


@dataclass(frozen=True, eq=False)
class _Details:
    """What a checkpoint holds besides the network."""

    recipe: dict[str, Any]
    preprocessing: Preprocessing | None
    labels: tuple[str, ...]


def _convert_quantizer(
    quantizer: Any, example: Example, dynamic: Dynamic | None, details: _Details
) -> Checkpoint:
    """The checkpoint of a model that was trained; `quantizer` is a Quantizer."""
    tensors = quantizer.tensors()
    seen = observe(quantizer)
    rounding = quantizer.activations
    ranges: Mapping[str, tuple[float, float]] = {}
    # The graph is exported without the rounding of activations: the converter places its own.
    with contextlib.nullcontext() if rounding is None else rounding.on(attached=False):
        exported = export(_merge_computed(quantizer.model), example, dynamic=dynamic)
    if rounding is not None:
        ranges = _find_ranges_in_graph(rounding, exported, example)
    return build(
        _unfold(exported, tensors),
        tensors,
        recipe={**quantizer.recipe(), **details.recipe},
        preprocessing=details.preprocessing,
        labels=details.labels,
        insight=seen,
        ranges=ranges,
    )


def _merge_computed(model: torch.nn.Module) -> torch.nn.Module:
    """The model with each weight a parameter: a copy where it computes some (weight_norm)."""
    if not find_parametrized(model):
        return model
    copy = copy_module(model).eval()
    merge_parametrizations(copy)
    return copy


def _convert_float(
    loaded: Loaded,
    example: Example | None,
    dynamic: Dynamic | None,
    chosen: WeightSelection,
    details: _Details,
    probe: FloatProbe | None,
) -> Checkpoint:
    """The checkpoint of a float model; its weights are recognized, or quantized here."""
    # 1. The network as a program, and as a module where it is one.
    module = None
    program = loaded.model
    if isinstance(program, torch.export.ExportedProgram):
        notes = notes_on(program)
    else:
        assert example is not None  # only programs come without one
        module, changes = prepare(loaded.model)
        program, findings = trace(module, example, dynamic=dynamic)
        notes = (*changes, *findings)
    notes = (*notes, *loaded.notes)
    if chosen.bits:
        options = {"bits": chosen.bits, "entropy_weight": chosen.entropy_weight, "trained": False}
        details = replace(details, recipe=details.recipe | options)
    # 2. Its weights.
    tensors = _quantize_program(program, chosen, probe)
    if probe is not None:
        _show_float(probe, program, module, example, details.preprocessing)
    # 3. Both together; with a fixed batch size where it does not go with a free one.
    try:
        return _build_quantized(program, tensors, notes, details)
    except ModelError as error:
        if module is None or example is None or dynamic is not None:
            raise
        failure = error
    program, note = trace_fixed(module, example, failure)
    tensors = _quantize_program(program, chosen, probe)
    return _build_quantized(program, tensors, (*notes, note), details)


def _quantize_program(
    program: torch.export.ExportedProgram, chosen: WeightSelection, probe: FloatProbe | None
) -> tuple[QuantTensor, ...]:
    state = dict(program.state_dict)
    tensors = find_quantized_tensors(state, find_weights(program), chosen)
    if probe is not None:
        probe.see_weights(state, tensors)
    return tensors


def _show_float(
    probe: FloatProbe,
    program: torch.export.ExportedProgram,
    module: torch.nn.Module | None,
    example: Any,
    preprocessing: Preprocessing | None,
) -> None:
    """Let the probe see the float model as it is now: a run may write buffers."""
    names = tuple(map(str, program.graph_signature.user_inputs))
    if module is None or not _is_plain(example):
        probe.see_float(run_module(program), example_of(program), preprocessing, names=names)
        return
    shown = copy_module(module) if find_written_buffers(program) else module
    probe.see_float(shown, _as_float32(example), preprocessing, names=names)


def _is_plain(example: Any) -> bool:
    """Whether a module takes the tensors by their position."""
    several = example if isinstance(example, list | tuple) else (example,)
    return all(isinstance(value, torch.Tensor) for value in several)


def _build_quantized(
    program: torch.export.ExportedProgram,
    tensors: tuple[QuantTensor, ...],
    notes: tuple[str, ...],
    details: _Details,
) -> Checkpoint:
    """The checkpoint of a program with quantized weights; the program is as before afterwards."""
    before = dict(program.state_dict)
    program.state_dict.update(_write_back(before, tensors))
    try:
        exported = Exported(program, export_float_graph(program), notes)
        return build(
            _unfold(exported, tensors),
            tensors,
            recipe=details.recipe,
            preprocessing=details.preprocessing,
            labels=details.labels,
        )
    finally:
        program.state_dict.update(before)


def rebuild(
    program: torch.export.ExportedProgram,
    tensors: tuple[QuantTensor, ...],
    notes: tuple[str, ...],
    *,
    recipe: Mapping[str, Any],
    preprocessing: Preprocessing | None,
    labels: Sequence[str] = (),
) -> Checkpoint:
    """Build the checkpoint of a program whose weights were quantized elsewhere.

    Args:
        program: the float network, with its values; as before afterwards.
        tensors: the quantized weights by their names in its state dict.
        notes: sentences for the report.
        recipe: how the weights were made; plain JSON values.
        preprocessing: of raw samples; None if nobody said.
        labels: names of the classes.

    Returns:
        The checkpoint; its weights are exactly those that the tensors stand for.

    Raises:
        ModelError: a tensor is no parameter of the program, or ONNX lacks an operator.
    """
    details = _Details(dict(recipe), preprocessing, tuple(labels))
    return _build_quantized(program, tensors, notes, details)


def _as_float32(example: Any) -> Any:
    """The example for a model that was converted to float32."""
    if isinstance(example, torch.Tensor):
        return example.float() if example.is_floating_point() else example
    return tuple(_as_float32(x) for x in example)


def _unfold(exported: Exported, tensors: Sequence[QuantTensor]) -> Exported:
    """The same with a graph that computes with quantized weights itself.

    Used where the exporter had folded that computation into floats.
    """
    # A cheap look first: is there a weight small enough to be folded, and not there?
    small = [tensor.name for tensor in tensors if 0 < tensor.size <= FOLDED_UP_TO]
    if all(name in exported.graph.weights for name in small):
        return exported
    missing = [entry.name for entry in match(exported.graph.weights, tensors).missing]
    if not missing:
        return exported
    again = export_float_graph(exported.program, keep=missing)
    if len(match(again.weights, tensors).missing) < len(missing):
        return replace(exported, graph=again)
    return exported


def _refuse_second_quantization(bits: int | None, name: str = "") -> None:
    if bits:
        raise OptionError(
            f"{name}the weights are quantised already, which --bits {bits} can't do again; leave it"
            " out, or give the float model"
        )


def _refuse_shape(input_shape: InputShape | None, dynamic: Dynamic | None, name: str = "") -> None:
    if dynamic is not None:
        raise OptionError(
            f"{name}the model says itself which axes are free; leave --dynamic out, or give it"
            " where the model is exported"
        )
    if input_shape:
        raise OptionError(
            f"{name}the model says itself what shape it takes; leave --input-shape out"
        )


def _find_ranges_in_graph(
    rounding: ActivationRounding, exported: Exported, example: Example
) -> Mapping[str, tuple[float, float]]:
    """The ranges that a training ended with, by the names of their values in the graph."""
    from ecqx_onnx.runtime.calibration import find_ranges_by_value

    arguments = divide_arguments(rounding.module, example)
    # Values are found by what they are on random inputs, which hardly any two share.
    generator = torch.Generator().manual_seed(0)
    probe = [
        torch.randn(x.shape, generator=generator) if x.is_floating_point() else x.cpu()
        for x in arguments.tensors
    ]
    device = next(rounding.module.parameters()).device
    with adapt_forward(rounding.module, arguments):
        seen = rounding.values(*(x.to(device) for x in probe))
    arrays = {place: value.float().cpu().numpy() for place, value in seen.items()}
    return find_ranges_by_value(
        exported.graph, [x.numpy() for x in probe], arrays, rounding.bounds()
    )


def _is_for_checkpoint(path: str | Path, *, factory: str | None, trust_pickle: bool) -> bool:
    """Whether the file is a checkpoint, and is given without what belongs to other files."""
    if factory is not None or trust_pickle or is_safetensors(Path(path)):
        return False
    return not is_program(path) and is_checkpoint(load_plain(path))


def _write_back(
    state: Mapping[str, torch.Tensor], tensors: Sequence[QuantTensor]
) -> dict[str, torch.Tensor]:
    """The state entries that hold quantized weights, with their dequantized values.

    Tied entries stay one tensor.
    """
    owners = {state[tensor.name].data_ptr(): tensor for tensor in tensors}
    values: dict[str, torch.Tensor] = {}
    changed = {}
    for name, old in state.items():
        tensor = owners.get(old.data_ptr()) if old.numel() else None
        if tensor is None or tensor.shape != tuple(old.shape):
            continue
        if tensor.name not in values:
            value = torch.from_numpy(np.ascontiguousarray(tensor.dequantize())).to(old.dtype)
            if isinstance(state[tensor.name], torch.nn.Parameter):
                value = torch.nn.Parameter(value, requires_grad=False)
            values[tensor.name] = value
        changed[name] = values[tensor.name]
    return changed
