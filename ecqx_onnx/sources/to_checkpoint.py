"""Turn a Quantizer, a module, a program or a path into a checkpoint in memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
    notes_on,
    prepare,
    trace,
    trace_fixed,
    written_buffers,
)
from ecqx_onnx.checkpoint.insight import observe
from ecqx_onnx.errors import ModelError, OptionError
from ecqx_onnx.inputs.program.program import run_module
from ecqx_onnx.inputs.safetensors_file import is_safetensors
from ecqx_onnx.inputs.torch_file import is_program, load_plain
from ecqx_onnx.inputs.user_code import is_function_spec
from ecqx_onnx.preprocessing.preprocessing import Preprocessing
from ecqx_onnx.quantization.activations import ActivationRounding
from ecqx_onnx.quantization.parametrizations import copy_module
from ecqx_onnx.quantization.weights import find_weights
from ecqx_onnx.sources.loading import Loaded, load_model
from ecqx_onnx.sources.post_training import _Chosen, find_quantized_tensors
from ecqx_onnx.tensors import QuantTensor
from ecqx_onnx.validation.float_probe import FloatProbe, example_of

FOLDED_UP_TO = 8192  # entries: what torch's exporter computes while it exports
Source = Any  # Quantizer | nn.Module | ExportedProgram | Checkpoint | path


def as_checkpoint(
    model: Source,
    *,
    example: torch.Tensor | Sequence[torch.Tensor] | None = None,
    factory: str | None = None,
    input_shape: Sequence[int] | None = None,
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
    """Any of the sources that `convert` takes -> a Checkpoint in memory. A model or program that is given is not changed.

    strict: False takes a state dict that lacks names of the model's, or has more; the notes tell.
    probe: sees the float model before it is quantised.
    allow_float: a model none of whose weights is quantised gives a Checkpoint without tensors instead of a ModelError.
    """
    if isinstance(model, Checkpoint):
        refuse_second_quantization(bits)
        refuse_shape(input_shape)
        return model
    if isinstance(model, str | Path):
        if is_function_spec(str(model)) or Path(model).suffix == ".py":
            raise ModelError(
                f"{model}: is Python code; give the file of its weights, and the code beside it: --model FILE.py:FACTORY"
            )
        if (
            factory is None
            and not trust_pickle
            and not is_safetensors(Path(model))
            and is_checkpoint_file(model)
        ):
            refuse_second_quantization(bits, f"{model}: ")
            refuse_shape(input_shape, f"{model}: ")
            return load(model)
        loaded = load_model(model, factory=factory, trust_pickle=trust_pickle, strict=strict)
    else:
        loaded = Loaded(model)
    recipe, seen = dict(recipe or {}), None
    ranges: Mapping[str, tuple[float, float]] = {}
    if hasattr(loaded.model, "tensors"):
        quantizer = loaded.model
        refuse_second_quantization(bits)
        tensors = quantizer.tensors()
        recipe = {**quantizer.recipe(), **recipe}
        seen = observe(quantizer)
        example = make_example(example, input_shape or loaded.input_shape, loaded.preprocessing)
        rounding = quantizer.activations
        with contextlib.nullcontext() if rounding is None else rounding.on(attached=False):
            exported = export(quantizer.model, example)
        if rounding is not None:
            ranges = find_ranges_in_graph(rounding, exported, example)
        return build(
            _unfolded(exported, tensors),
            tensors,
            recipe=recipe,
            preprocessing=preprocessing or loaded.preprocessing,
            labels=tuple(labels),
            insight=seen,
            ranges=ranges,
        )
    if isinstance(loaded.model, torch.export.ExportedProgram):
        refuse_shape(input_shape)
        module, program, notes = None, loaded.model, notes_on(loaded.model)
    else:
        example = make_example(example, input_shape or loaded.input_shape, loaded.preprocessing)
        module, notes = prepare(loaded.model)
        program, more = trace(module, example)
        notes = (*notes, *more)
    if bits:
        recipe |= {"bits": bits, "entropy_weight": entropy_weight, "trained": False}
    notes = (*notes, *loaded.notes)
    chosen = _Chosen(bits, entropy_weight, tuple(include), tuple(exclude), allow_float)
    for fixed in (False, True):
        before = dict(program.state_dict)
        tensors = find_quantized_tensors(before, find_weights(program), chosen)
        if probe is not None:
            probe.see_weights(before, tensors)
            if module is None:
                probe.see_float(run_module(program), example_of(program), preprocessing)
            elif not fixed:
                ran = (
                    copy_module(module) if written_buffers(program) else module
                )  # the file holds buffers as they are now
                probe.see_float(ran, _as_float32(example), preprocessing or loaded.preprocessing)
        program.state_dict.update(
            write_back(before, tensors)
        )  # the caller's program has its own again below
        try:
            exported = _unfolded(Exported(program, export_float_graph(program), notes), tensors)
            return build(
                exported,
                tensors,
                recipe=recipe,
                preprocessing=preprocessing or loaded.preprocessing,
                labels=tuple(labels),
            )
        except ModelError as error:
            if fixed or module is None or example is None:
                raise
            failure = error
        finally:
            program.state_dict.update(before)
        program, note = trace_fixed(module, example, failure)
        notes = (*notes, note)
    raise AssertionError  # the second pass returns or raises


def _as_float32(example: Any) -> Any:
    """The example for a model that was converted to float32."""
    if isinstance(example, torch.Tensor):
        return example.float() if example.is_floating_point() else example
    return tuple(_as_float32(x) for x in example)


def _unfolded(exported: Exported, tensors: Sequence[QuantTensor]) -> Exported:
    """The same with a graph that computes with quantised weights itself, where the exporter had folded that into floats."""
    absent = [
        t.name
        for t in tensors
        if t.size and t.size <= FOLDED_UP_TO and t.name not in exported.graph.weights
    ]
    if not absent:
        return exported
    missing = [entry.name for entry in match(exported.graph.weights, tensors).missing]
    if not missing:
        return exported
    again = export_float_graph(exported.program, keep=missing)
    if len(match(again.weights, tensors).missing) < len(missing):
        return replace(exported, graph=again)
    return exported


def refuse_second_quantization(bits: int | None, name: str = "") -> None:
    if bits:
        raise OptionError(
            f"{name}the weights are quantised already, which --bits {bits} can't do again; leave it out, or give the float model"
        )


def refuse_shape(input_shape: Sequence[int] | None, name: str = "") -> None:
    if input_shape:
        raise OptionError(
            f"{name}the model says itself what shape it takes; leave --input-shape out"
        )


def find_ranges_in_graph(
    rounding: ActivationRounding, exported: Exported, example: torch.Tensor | Sequence[torch.Tensor]
) -> Mapping[str, tuple[float, float]]:
    """The ranges that a training ended with, by the names of their values in the graph."""
    from ecqx_onnx.runtime.calibration import find_ranges_by_value

    example = (example,) if isinstance(example, torch.Tensor) else tuple(example)
    generator = torch.Generator().manual_seed(0)
    probe = [
        torch.randn(x.shape, generator=generator) if x.is_floating_point() else x.cpu()
        for x in example
    ]
    device = next(rounding.module.parameters()).device
    seen = rounding.values(*(x.to(device) for x in probe))
    arrays = {place: value.float().cpu().numpy() for place, value in seen.items()}
    return find_ranges_by_value(
        exported.graph, [x.numpy() for x in probe], arrays, rounding.bounds()
    )


def is_checkpoint_file(path: str | Path) -> bool:
    return not is_program(path) and is_checkpoint(load_plain(path))


def write_back(
    state: Mapping[str, torch.Tensor], tensors: Sequence[QuantTensor]
) -> dict[str, torch.Tensor]:
    """The state entries that hold quantised weights, with their dequantised values; tied entries stay one tensor."""
    owners = {state[tensor.name].data_ptr(): tensor for tensor in tensors}
    values: dict[str, torch.Tensor] = {}
    changed = {}
    for name, old in state.items():
        tensor = owners.get(old.data_ptr()) if old.numel() else None
        if tensor is None or tensor.shape != tuple(old.shape):
            continue
        if tensor.name not in values:
            value = torch.from_numpy(np.ascontiguousarray(tensor.dequantize())).to(old.dtype)
            is_parameter = isinstance(state[tensor.name], torch.nn.Parameter)
            values[tensor.name] = (
                torch.nn.Parameter(value, requires_grad=False) if is_parameter else value
            )
        changed[name] = values[tensor.name]
    return changed


def make_example(
    example: torch.Tensor | Sequence[torch.Tensor] | None,
    shape: Sequence[int] | None,
    preprocessing: Preprocessing | None,
) -> torch.Tensor | Sequence[torch.Tensor]:
    if example is not None:
        return example
    if shape is None:
        raise OptionError(
            "the model's input shape is not known; add --input-shape 3,32,32 (no batch), or INPUT_SHAPE = (3, 32, 32) to FILE.py"
        )
    if math.prod(shape) > 2**28:
        raise OptionError(
            f"an input of shape {tuple(shape)} has more than 2^28 entries; give the shape of one sample"
        )
    if preprocessing is not None and preprocessing.kind == "indices":
        return torch.zeros(2, *shape, dtype=torch.int64)
    return torch.zeros(2, *shape)
