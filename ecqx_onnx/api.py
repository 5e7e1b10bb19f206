"""The verbs: save, convert, validate, quantize as functions of paths and values; the command line only adds words."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import onnx
import torch
from ecqx_onnx_converters import FloatGraph, Matching, WriteReport, make_plan
from ecqx_onnx_converters.activations import carried_ranges, quantise_activations, with_pooling
from ecqx_onnx_converters.batchnorm import BatchNorm, fold_batchnorms
from ecqx_onnx_converters.equalisation import equalised, find_places
from ecqx_onnx_converters.files import PROTOBUF_LIMIT
from ecqx_onnx_converters.float16 import round_parameters, with_float16, with_half_steps
from ecqx_onnx_converters.integer_nodes import find_integer_nodes
from ecqx_onnx_converters.matching import match
from ecqx_onnx_converters.outputs import check_output
from ecqx_onnx_converters.targets import check_name, find_target

from ecqx_onnx import __version__
from ecqx_onnx.checkpoint import Checkpoint, build, is_checkpoint, is_program, load, load_plain
from ecqx_onnx.checkpoint import save as save_checkpoint
from ecqx_onnx.data import Dataset, Split
from ecqx_onnx.deployment import Deployed
from ecqx_onnx.errors import DataError, FileError, InputError, ModelError, OptionError
from ecqx_onnx.export import Exported, export, float_graph, notes_on, prepare, trace, trace_fixed, written_buffers
from ecqx_onnx.float_probe import FloatProbe, example_of
from ecqx_onnx.insight import observe
from ecqx_onnx.loading import Loaded, apply_state, load_factory, load_model, load_state
from ecqx_onnx.parametrizations import copy_module
from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.program import run_module
from ecqx_onnx.quantization.activations import ActivationRounding
from ecqx_onnx.quantization.quantizer import Report
from ecqx_onnx.quantization.state_file import StateFile, state_path
from ecqx_onnx.quantization.training import EpochRecord, Training
from ecqx_onnx.recognition import NotRecognised, recognise
from ecqx_onnx.safetensors_file import is_safetensors
from ecqx_onnx.tensors import QuantTensor
from ecqx_onnx.user_code import is_function_spec, load_function
from ecqx_onnx.validation import ValidationReport
from ecqx_onnx.validation.delivery import deliver
from ecqx_onnx.validation.devices import TIME_LIMIT, DeviceTable
from ecqx_onnx.validation.float_distance import FloatBounds
from ecqx_onnx.validation.metrics import Proportion
from ecqx_onnx.validation.plausibility import MOST_CLASSES, Confusion, doubt_accuracy
from ecqx_onnx.weights import MATRIX_PRODUCTS, Weight, find_weights

FOLDED_UP_TO = 8192  # entries: what torch's exporter computes while it exports
Source = Any  # Quantizer | nn.Module | ExportedProgram | Checkpoint | path


def save(
    source: Source,
    path: str | Path,
    *,
    example: torch.Tensor | Sequence[torch.Tensor] | None = None,
    preprocessing: Preprocessing | None = None,
    labels: Sequence[str] = (),
    recipe: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Checkpoint:
    """Write a Quantizer, or a module whose weights are already on few values, as a self-contained model.pt.

    example: one batch of the model's input (or a tuple of the forward's arguments); only its shape and type matter.
    """
    checkpoint = as_checkpoint(source, example=example, preprocessing=preprocessing, labels=labels, recipe=recipe)
    save_checkpoint(checkpoint, path, force=force)
    return checkpoint


def convert(
    model: Source,
    out: str | Path,
    *,
    example: torch.Tensor | Sequence[torch.Tensor] | None = None,
    factory: str | None = None,
    input_shape: Sequence[int] | None = None,
    trust_pickle: bool = False,
    bits: int | None = None,
    entropy_weight: float = 0.0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    storage: str = "auto",
    dequantize: str = "auto",
    target: str = "onnxruntime",
    opset: int | None = None,
    activations: str = "float32",
    calibration: Any = None,
    calibration_method: str = "minmax",
    calibration_samples: int = 512,
    floats: str = "float32",
    data: Any = None,
    float_bounds: FloatBounds | None = None,
    strict: bool = True,
    force: bool = False,
) -> WriteReport:
    """Write `model` (a path, a Quantizer, a module, a program or a Checkpoint) as an .onnx file.

    bits: quantise a float model without training, so that errors cancel (see quantization/rounding.py), or with an entropy_weight
    by entropy-constrained assignment. Without it a float model is refused. Quantised is what a convolution, matrix product,
    recurrent operator or token embedding multiplies, whatever `include` names besides, and never what `exclude` names.
    activations: "float32", or "int8" for integer kernels; their ranges come from `calibration` (a data set as `load_dataset`
    takes it, a Dataset or a Split; its training samples where it has any) by "minmax", "percentile" or "entropy", or without it
    from the checkpoint of a training with activations="int8".
    data, float_bounds: with bits, the result is compared with the float model on this data set (as `load_dataset` takes it, its
    test split), else on random inputs, and the report warns beyond the bounds.
    floats: "float16" stores parameters that stay float in half the bytes, rounded; `validate` knows that from the file.
    """
    if floats not in ("float32", "float16"):
        raise OptionError(f"float parameters cannot be stored as '{floats}'; choose float32 or float16")
    given = {"--entropy-weight": entropy_weight, "--exclude": exclude, "--include": include}
    without_bits = [option for option, value in given.items() if value]
    if not bits and without_bits:
        raise OptionError(f"{without_bits[0]} goes with --bits, which quantises a float model")
    if not bits and (data is not None or float_bounds is not None):
        raise OptionError("--data and bounds on the distance from the float model go with --bits; leave them out")
    check_output(out, force=force, source=model)
    check_name(out, target)
    probe = FloatProbe(_test_split(data), float_bounds or FloatBounds()) if bits else None
    checkpoint = as_checkpoint(
        model,
        example=example,
        factory=factory,
        input_shape=input_shape,
        trust_pickle=trust_pickle,
        bits=bits,
        entropy_weight=entropy_weight,
        include=include,
        exclude=exclude,
        probe=probe,
        strict=strict,
    )
    told: tuple[str, ...] = ()
    if probe is not None:
        check = probe.judge(checkpoint.module(), class_names=bool(checkpoint.labels))
        told = (("warning: " if check.passed is False else "") + check.sentence,)
        if probe.error is not None and math.isfinite(probe.error):
            checkpoint = replace(checkpoint, recipe={**checkpoint.recipe, "float_error": float(f"{probe.error:.3g}")})
    graph, matching, batchnorms = fold_batchnorms(checkpoint.graph, checkpoint.matching)
    matching, steps = with_half_steps(matching) if floats == "float16" else (matching, 0)
    checkpoint, quantised = replace(checkpoint, graph=graph, matching=matching), None
    if activations != "float32":
        checkpoint = replace(checkpoint, graph=with_pooling(graph))
        checkpoint, ranges = _ranges(checkpoint, activations, target, calibration, calibration_method, calibration_samples)
        quantised = quantise_activations(checkpoint.graph, checkpoint.matching.found, ranges)
        graph, matching = quantised.graph, replace(matching, found=quantised.found)
    elif calibration is not None:
        raise OptionError("calibration data are for --activations int8; add it, or leave the data out")
    notes = (*checkpoint.notes, *told, *_left(batchnorms))
    if floats == "float16":
        graph, halved = with_float16(graph, {weight.name for weight in matching.found})
        notes = (*notes, replace(halved, steps=steps).sentence)
        floats = floats if halved.names or steps else "float32"
    plan = make_plan(
        graph,
        matching,
        target=target,
        storage=storage,
        dequantize=dequantize,
        opset=opset,
        integer=() if quantised is None else quantised.weights,
    )
    metadata: dict[str, Any] = {"version": __version__, "recipe": _without_defaults(checkpoint.recipe)}
    if checkpoint.preprocessing_known:
        recorded = json.loads(checkpoint.preprocessing.to_json())
        metadata["preprocessing"] = {key: value for key, value in recorded.items() if value is not None}
        notes = (*notes, f"preprocessing that the file records: {checkpoint.preprocessing.describe()}")
    else:
        notes = (*notes, NO_PREPROCESSING)
    if checkpoint.labels != tuple(map(str, range(len(checkpoint.labels)))):
        metadata["labels"] = list(checkpoint.labels)
    if floats != "float32":
        metadata["floats"] = floats
    if quantised is not None:
        source = "trained" if calibration is None else calibration_method
        metadata["activations"] = {"type": "uint8", "calibration": source}
        notes = (*notes, RANGES_FROM[source == "trained"])
    report = deliver(plan, out, metadata=metadata, force=force)
    report = replace(report, notes=(*report.notes, *notes))
    return report if quantised is None else replace(report, kernels=quantised.kernels, stays=quantised.stays)


def _left(batchnorms: Sequence[BatchNorm]) -> tuple[str, ...]:
    return tuple(f"BatchNormalization '{entry.name}' stays: {entry.reason}" for entry in batchnorms if entry.weight is None)


NO_PREPROCESSING = (
    "the file records no preprocessing, as none is known: give `save` the one of the training (preprocessing=...), or FILE.py"
    " a PREPROCESSING"
)
CALIBRATION_BATCH = 64
RANGES_FROM = ("ranges of activations: calibrated on the data given", "ranges of activations: those that training ended with")


def _ranges(
    checkpoint: Checkpoint, activations: str, target: str, calibration: Any, method: str, samples: int
) -> tuple[Checkpoint, Mapping[str, tuple[float, float]]]:
    """Of the activations that are to be 8 bits: what they are on the calibration data, else what they were trained with. On data,
    channels are made equally large first, where that costs nothing."""
    from ecqx_onnx.calibration import METHODS, calibrate_ranges, channel_peaks
    from ecqx_onnx.data import load_dataset

    if activations != "int8":
        raise OptionError(f"there are no activations of type '{activations}'; choose float32 or int8")
    if method not in METHODS:
        raise OptionError(f"there is no calibration method '{method}'; choose one of {', '.join(METHODS)}")
    if find_target(target).no_integers:
        raise OptionError(f"target '{target}' cannot have int8 activations: {find_target(target).no_integers}")
    graph, matching = checkpoint.graph, checkpoint.matching
    values = find_integer_nodes(graph, matching.found).ranges
    if calibration is None:
        if not checkpoint.ranges:
            raise OptionError("--activations int8 needs data that activations take their ranges from; add --calibration DATA")
        return checkpoint, carried_ranges(graph, values, checkpoint.ranges)
    data = load_dataset(str(calibration)) if isinstance(calibration, str | Path) else calibration
    split = (data.train or data.test) if isinstance(data, Dataset) else data
    if checkpoint.preprocessing_known:
        split = split.with_preprocessing(checkpoint.preprocessing)
    split = split.fitted(_input_lengths(checkpoint.graph.proto)).take(samples)
    if (value := split.only_value()) is not None:
        raise DataError(
            f"{split.source.name} holds nothing but the value {value:g} in the {len(split)} samples for calibration, which tells"
            " no range: calibrate on data as the model was trained on"
        )
    places = [place for place in find_places(graph, matching) if place.value in values]
    peaks = channel_peaks(
        _with_floats(graph, matching), [p.value for p in places], (x for x, _ in split.batches(CALIBRATION_BATCH))
    )
    if peaks:
        graph, matching = equalised(graph, matching, places, peaks)
    batches = (x for x, _ in split.batches(CALIBRATION_BATCH))
    ranges = calibrate_ranges(_with_floats(graph, matching), values, batches, method=method)
    return replace(checkpoint, graph=graph, matching=matching), ranges


def _input_lengths(proto: onnx.ModelProto) -> list[int | None]:
    """The shape of one sample of the first input; None for a free length."""
    dims = proto.graph.input[0].type.tensor_type.shape.dim if proto.graph.input else ()
    return [dim.dim_value or None for dim in dims[1:]]


def _without_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were chosen: all of them would outweigh a small net's weights. Of the data, the name without its path."""
    from ecqx_onnx.quantization import Recipe, train

    defaults = {name: parameter.default for name, parameter in inspect.signature(train).parameters.items()}
    defaults |= Recipe().to_json()
    chosen = {name: v for name, v in recipe.items() if name == "bits" or v != defaults.get(name, inspect.Signature.empty)}
    return chosen | ({"data": Path(chosen["data"]).name} if isinstance(chosen.get("data"), str) else {})


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
        _refuse_again(bits)
        _refuse_shape(input_shape)
        return model
    if isinstance(model, str | Path):
        if is_function_spec(str(model)) or Path(model).suffix == ".py":
            raise ModelError(
                f"{model}: is Python code; give the file of its weights, and the code beside it: --model FILE.py:FACTORY"
            )
        if factory is None and not trust_pickle and not is_safetensors(Path(model)) and _is_checkpoint_file(model):
            _refuse_again(bits, f"{model}: ")
            _refuse_shape(input_shape, f"{model}: ")
            return load(model)
        loaded = load_model(model, factory=factory, trust_pickle=trust_pickle, strict=strict)
    else:
        loaded = Loaded(model)
    recipe, seen = dict(recipe or {}), None
    ranges: Mapping[str, tuple[float, float]] = {}
    if hasattr(loaded.model, "tensors"):
        quantizer = loaded.model
        _refuse_again(bits)
        tensors = quantizer.tensors()
        recipe = {**quantizer.recipe(), **recipe}
        seen = observe(quantizer)
        example = _example(example, input_shape or loaded.input_shape, loaded.preprocessing)
        rounding = quantizer.activations
        with contextlib.nullcontext() if rounding is None else rounding.on(attached=False):
            exported = export(quantizer.model, example)
        if rounding is not None:
            ranges = _ranges_in_graph(rounding, exported, example)
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
        _refuse_shape(input_shape)
        module, program, notes = None, loaded.model, notes_on(loaded.model)
    else:
        example = _example(example, input_shape or loaded.input_shape, loaded.preprocessing)
        module, notes = prepare(loaded.model)
        program, more = trace(module, example)
        notes = (*notes, *more)
    if bits:
        recipe |= {"bits": bits, "entropy_weight": entropy_weight, "trained": False}
    notes = (*notes, *loaded.notes)
    chosen = _Chosen(bits, entropy_weight, tuple(include), tuple(exclude), allow_float)
    for fixed in (False, True):
        before = dict(program.state_dict)
        tensors = _tensors_of(before, find_weights(program), chosen)
        if probe is not None:
            probe.see_weights(before, tensors)
            if module is None:
                probe.see_float(run_module(program), example_of(program), preprocessing)
            elif not fixed:
                ran = copy_module(module) if written_buffers(program) else module  # the file holds buffers as they are now
                probe.see_float(ran, _as_float32(example), preprocessing or loaded.preprocessing)
        program.state_dict.update(_written_back(before, tensors))  # the caller's program has its own again below
        try:
            exported = _unfolded(Exported(program, float_graph(program), notes), tensors)
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
    absent = [t.name for t in tensors if t.size and t.size <= FOLDED_UP_TO and t.name not in exported.graph.weights]
    if not absent:
        return exported
    missing = [entry.name for entry in match(exported.graph.weights, tensors).missing]
    if not missing:
        return exported
    again = float_graph(exported.program, keep=missing)
    if len(match(again.weights, tensors).missing) < len(missing):
        return replace(exported, graph=again)
    return exported


def _refuse_again(bits: int | None, name: str = "") -> None:
    if bits:
        raise OptionError(
            f"{name}the weights are quantised already, which --bits {bits} can't do again; leave it out, or give the float model"
        )


def _refuse_shape(input_shape: Sequence[int] | None, name: str = "") -> None:
    if input_shape:
        raise OptionError(f"{name}the model says itself what shape it takes; leave --input-shape out")


def _ranges_in_graph(
    rounding: ActivationRounding, exported: Exported, example: torch.Tensor | Sequence[torch.Tensor]
) -> Mapping[str, tuple[float, float]]:
    """The ranges that a training ended with, by the names of their values in the graph."""
    from ecqx_onnx.calibration import ranges_by_value

    example = (example,) if isinstance(example, torch.Tensor) else tuple(example)
    generator = torch.Generator().manual_seed(0)
    probe = [torch.randn(x.shape, generator=generator) if x.is_floating_point() else x.cpu() for x in example]
    device = next(rounding.module.parameters()).device
    seen = rounding.values(*(x.to(device) for x in probe))
    arrays = {place: value.float().cpu().numpy() for place, value in seen.items()}
    return ranges_by_value(exported.graph, [x.numpy() for x in probe], arrays, rounding.bounds())


def is_onnx(source: Source | None) -> TypeGuard[str | Path]:
    """Whether it names an .onnx file."""
    return isinstance(source, str | Path) and Path(source).suffix.lower() == ".onnx"


def _is_checkpoint_file(path: str | Path) -> bool:
    return not is_program(path) and is_checkpoint(load_plain(path))


@dataclass(frozen=True)
class _Chosen:
    """How a float model's weights become quantised: the options of `convert`."""

    bits: int | None
    entropy_weight: float
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    allow_float: bool

    def check(self, names: Sequence[str]) -> None:
        """OptionError for a pattern that matches nothing."""
        for option, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise OptionError(f"--{option} '{pattern}' matches no parameter; the first is '{next(iter(names), '')}'")

    def included(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.include)

    def excluded(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.exclude)


def _tensors_of(state: Mapping[str, torch.Tensor], weights: Mapping[str, Weight], chosen: _Chosen) -> tuple[QuantTensor, ...]:
    """The quantised weights of a state dict: recognised, or quantised here when `bits` says so. ModelError for a float model.

    weights: what the network multiplies, see `find_weights`. With `bits` nothing else is looked at; without, whatever lies on few
    values is recognised, since that loses nothing.
    """
    chosen.check(list(state))
    multiplied = {state[name].data_ptr(): weight for name, weight in weights.items()}
    seen: set[int] = set()
    found: list[QuantTensor] = []
    refusals: list[NotRecognised] = []
    unused: list[str] = []
    for name, value in state.items():
        if not value.is_floating_point() or value.ndim < 2 or not value.numel() or value.data_ptr() in seen:
            continue
        if chosen.excluded(name):
            continue
        seen.add(value.data_ptr())
        weight = multiplied.get(value.data_ptr())
        used = weight is not None or chosen.included(name)
        if chosen.bits and not used:
            unused.append(name)
            continue
        values = value.detach().cpu().float().numpy()
        if not np.isfinite(values).all():
            if not used:
                continue
            raise ModelError(f"the weight {name!r} holds NaN or infinite values; train it again or repair it before converting")
        result = recognise(name, values)
        if isinstance(result, NotRecognised) and chosen.bits:
            axis = weight.axis if weight is not None and weight.operator in MATRIX_PRODUCTS else 0
            result = _assigned(name, value.detach().cpu().float(), chosen.bits, chosen.entropy_weight, axis=axis)
        if isinstance(result, QuantTensor):
            found.append(result)
        else:
            refusals.append(result)
    if not found and not chosen.allow_float:
        if chosen.bits and unused:
            raise ModelError(
                f"no operator multiplies '{unused[0]}' or another parameter, so there is no weight to quantise; name what you"
                " want quantised with --include"
            )
        if chosen.bits and chosen.exclude:
            raise OptionError(f"--exclude {' '.join(chosen.exclude)} leaves no weight to quantise; exclude fewer")
        if not refusals:
            raise ModelError("the model has no weight of two or more dimensions, so there is nothing to quantise; give another")
        first = f" ({refusals[0].name}: {refusals[0].reason})"
        raise ModelError(
            f"the model's weights are float, none lies on few values{first}; "
            "train with `ecqx-onnx quantize`, or add --bits 4 to quantise without training"
        )
    return tuple(found)


def _assigned(name: str, weight: torch.Tensor, bits: int, entropy_weight: float, *, axis: int = 0) -> QuantTensor:
    """axis: of the output channels, which have a step each from 6 bits on."""
    from ecqx_onnx.quantization.assignment import assign
    from ecqx_onnx.quantization.grid import choose_grid, fit_step
    from ecqx_onnx.quantization.rounding import cancelling_levels
    from ecqx_onnx.tensors import Scale

    grid = choose_grid(weight, bits)
    # So many levels need neither the percentile rule's clipping, for which training would have to make up, nor one step for all
    # channels, which small ones pay for; and a step per channel is what BatchNorm leaves anyway.
    channel: int | None = axis if bits >= 6 else None
    if channel is not None:
        others = tuple(place for place in range(weight.ndim) if place != axis)
        largest = weight.abs().amax(others, keepdim=True)
        smallest = torch.finfo(torch.float32).tiny
        step = torch.where(largest > 0, (largest / max(grid.highest, -grid.lowest)).clamp(min=smallest), 1.0)
    else:
        step = fit_step(weight, grid)
    if entropy_weight:
        levels = assign(weight, step, grid, axis=channel, strength=entropy_weight).levels
    else:
        levels = cancelling_levels(weight, step, grid)
    return QuantTensor(name, levels.numpy(), Scale(step.numpy()))


def _written_back(state: Mapping[str, torch.Tensor], tensors: Sequence[QuantTensor]) -> dict[str, torch.Tensor]:
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
            values[tensor.name] = torch.nn.Parameter(value, requires_grad=False) if is_parameter else value
        changed[name] = values[tensor.name]
    return changed


def _example(
    example: torch.Tensor | Sequence[torch.Tensor] | None, shape: Sequence[int] | None, preprocessing: Preprocessing | None
) -> torch.Tensor | Sequence[torch.Tensor]:
    if example is not None:
        return example
    if shape is None:
        raise OptionError(
            "the model's input shape is not known; add --input-shape 3,32,32 (no batch), or INPUT_SHAPE = (3, 32, 32) to FILE.py"
        )
    if math.prod(shape) > 2**28:
        raise OptionError(f"an input of shape {tuple(shape)} has more than 2^28 entries; give the shape of one sample")
    if preprocessing is not None and preprocessing.kind == "indices":
        return torch.zeros(2, *shape, dtype=torch.int64)
    return torch.zeros(2, *shape)


def validate(
    onnx_file: str | Path,
    *,
    against: Source | None = None,
    data: Any = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    factory: str | None = None,
    input_shape: Sequence[int] | None = None,
    trust_pickle: bool = False,
    samples: int | None = None,
    float_bounds: FloatBounds | None = None,
    strict: bool = True,
    batch_size: int = 64,
    latency_runs: int = 50,
    progress: Callable[[int, int], None] | None = None,
) -> ValidationReport:
    """Does the .onnx file say the same as PyTorch? `report.ok`, and one check a question.

    against: what it was converted from (anything that `convert` takes), or the float model that was quantised: differences to
    that one are shown, and only the accuracy is judged. Or the path of the .onnx file that `pack` was given. data: a data set's
    name (see `load_dataset`), a Dataset or a Split; its test split is used, preprocessed as the file's metadata says. samples:
    only so many of it.
    float_bounds: how far a file of `convert(bits=...)` may lie from its float model.
    inputs: instead of data, against an .onnx file, one array for each of its inputs.
    """
    from ecqx_onnx import validation

    if is_onnx(against):
        if factory is not None:
            raise OptionError(f"--model names the network of a state dict, and {against} is an .onnx file: leave it out")
        if Path(against).is_file() and Path(onnx_file).is_file() and Path(against).samefile(onnx_file):
            raise OptionError(f"{against} is the file itself, which proves nothing; give what it was made from")
        if inputs is not None and data is not None:
            raise OptionError("--inputs and --data both say what to run on; give one of them")
        sides, _ = _sides(
            None,
            data,
            onnx_file=onnx_file,
            factory=None,
            input_shape=None,
            trust_pickle=False,
            samples=samples,
            names_from=against,
        )
        return validation.validate_against_original(
            onnx_file,
            against,
            split=sides["split"],
            notes=sides["notes"],
            inputs=inputs,
            batch_size=batch_size,
            latency_runs=latency_runs,
            progress=progress,
        )
    if inputs is not None:
        raise OptionError("--inputs are for a validation against an .onnx file; beside PyTorch give --data, or nothing")
    sides, _ = _sides(
        against,
        data,
        onnx_file=onnx_file,
        factory=factory,
        input_shape=input_shape,
        trust_pickle=trust_pickle,
        strict=strict,
        samples=samples,
    )
    return validation.validate(
        onnx_file,
        **sides,
        float_bounds=float_bounds,
        batch_size=batch_size,
        latency_runs=latency_runs,
        progress=progress,
    )


def validate_on(
    devices: Sequence[str],
    onnx_file: str | Path,
    *,
    against: Source | None = None,
    data: Any = None,
    factory: str | None = None,
    input_shape: Sequence[int] | None = None,
    trust_pickle: bool = False,
    samples: int | None = None,
    float_bounds: FloatBounds | None = None,
    strict: bool = True,
    batch_size: int = 64,
    latency_runs: int = 50,
    time_limit: float = TIME_LIMIT,
    progress: Callable[[int, int, str], None] | None = None,
) -> DeviceTable:
    """As `validate`, on each of the devices (see docs/devices.md), the reports side by side.

    time_limit: seconds for what runs on one device. progress: called with (batches done, in all, the device).
    InputError before anything runs if one is absent; one that fails later stands in `troubles`, and the others go on.
    """
    from ecqx_onnx.onnx_file import read_onnx
    from ecqx_onnx.validation import devices as room

    read_onnx(onnx_file)  # a damaged file is no device's trouble
    if is_onnx(against):
        raise OptionError(f"devices are compared with PyTorch's model, and {against} is an .onnx file: leave --device out")
    found = [room.find_device(name) for name in devices]
    sides, _ = _sides(
        against,
        data,
        onnx_file=onnx_file,
        factory=factory,
        input_shape=input_shape,
        trust_pickle=trust_pickle,
        strict=strict,
        samples=samples,
    )
    reports, troubles = [], []
    for device in found:
        shown = None if progress is None else functools.partial(_on_device, progress, device.name)
        try:
            report = room.validate_on(
                device,
                onnx_file,
                **sides,
                float_bounds=float_bounds,
                batch_size=batch_size,
                latency_runs=latency_runs,
                time_limit=time_limit,
                progress=shown,
            )
            reports.append(report)
        except InputError as error:
            troubles.append(room.Trouble(device.name, str(error)))
    return room.DeviceTable(tuple(reports), tuple(troubles))


def _on_device(progress: Callable[[int, int, str], None], device: str, done: int, total: int) -> None:
    progress(done, total, device)


def _sides(
    against: Source | None,
    data: Any,
    *,
    onnx_file: str | Path,
    factory: str | None,
    input_shape: Sequence[int] | None,
    trust_pickle: bool,
    samples: int | None,
    strict: bool = True,
    names: Sequence[str] = (),
    names_from: str | Path | None = None,
) -> tuple[dict[str, Any], Any]:
    """What a file is compared with: the PyTorch side and the data, as validation takes them; and the data set.

    The data's classes get the numbers that the file's class names give them; where the file has no names, those of the
    checkpoint, of the .onnx file `names_from`, or `names`.
    """
    from ecqx_onnx.data import load_dataset
    from ecqx_onnx.data.class_names import match_classes

    checkpoint = None
    if against is not None:
        checkpoint = as_checkpoint(
            against,
            factory=factory,
            input_shape=input_shape,
            trust_pickle=trust_pickle,
            strict=strict,
            allow_float=True,
        )
    dataset, notes = load_dataset(data) if isinstance(data, str) else data, ()
    if isinstance(dataset, Dataset):
        known, outputs = _class_names(onnx_file)
        if not known and names_from is not None:
            known = _class_names(names_from)[0]
        if not known:
            known = names or (() if checkpoint is None else checkpoint.labels)
        dataset, notes = match_classes(dataset, known, outputs=outputs)
    split = dataset.test if isinstance(dataset, Dataset) else dataset
    if isinstance(split, Split) and samples is not None:
        split = split.take(samples)
    sides = {
        "reference": None if checkpoint is None else checkpoint.module(),
        "tensors": () if checkpoint is None else checkpoint.tensors,
        "float_reference": checkpoint is not None and not checkpoint.tensors,
        "float_model": None if checkpoint is None else functools.partial(_float_model, checkpoint),
        "split": split,
        "notes": notes,
        "class_names": checkpoint is not None and bool(checkpoint.labels),
    }
    return sides, dataset


def _test_split(data: Any) -> Split | None:
    """The test split of a data set, or of its name; None for None."""
    from ecqx_onnx.data import load_dataset

    dataset = load_dataset(str(data)) if isinstance(data, str | Path) else data
    return dataset.test if isinstance(dataset, Dataset) else dataset


def _class_names(path: str | Path) -> tuple[tuple[str, ...], int | None]:
    """What an .onnx file says of its classes: their names, empty if none, and how many scores its first output holds."""
    from ecqx_onnx.onnx_file import read_onnx

    file = read_onnx(path)
    labels = file.metadata.get("labels")
    names = tuple(map(str, labels)) if isinstance(labels, list) else ()
    outputs = file.proto.graph.output
    dims = outputs[0].type.tensor_type.shape.dim if outputs else ()
    return names, dims[1].dim_value or None if len(dims) == 2 else None


def deploy(
    onnx_file: str | Path,
    folder: str | Path,
    *,
    to: str,
    against: Source | None = None,
    data: Any = None,
    factory: str | None = None,
    input_shape: Sequence[int] | None = None,
    trust_pickle: bool = False,
    samples: int | None = None,
    labels: Sequence[str] = (),
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Deployed:
    """Write a folder that is ready for web, android, ios or linux: model, manifest, golden outputs, runner, README.

    The file is validated first (see `validate` for against, data and samples); one that fails is not deployed.
    labels: the classes' names, instead of those that the file (or else the data set) holds.
    """
    from ecqx_onnx import deployment, validation
    from ecqx_onnx.data import load_dataset

    platform = deployment.find_platform(to)
    dataset = load_dataset(data) if isinstance(data, str) else data
    sides, dataset = _sides(
        against,
        dataset,
        onnx_file=onnx_file,
        factory=factory,
        input_shape=input_shape,
        trust_pickle=trust_pickle,
        samples=samples,
        names=labels,
    )
    report = validation.validate(onnx_file, **sides, latency_runs=0, progress=progress)
    return deployment.deploy(
        onnx_file,
        platform,
        folder,
        report=report,
        reference=sides["reference"],
        split=sides["split"],
        labels=labels,
        data_labels=dataset.labels if isinstance(dataset, Dataset) else (),
        data_name=dataset.name if isinstance(dataset, Dataset) else "the given data",
        force=force,
    )


def _float_model(checkpoint: Checkpoint, *, floats: str = "float32") -> bytes | None:
    """The checkpoint's graph with its weights as floats; None where that is more than a protobuf holds.

    floats: "float16" for parameters rounded as `convert` with this option rounds them.
    """
    graph, matching, _ = fold_batchnorms(checkpoint.graph, checkpoint.matching)
    if floats == "float16":
        matching, _ = with_half_steps(matching)
    whole = _with_floats(graph, matching)
    if floats == "float16":
        whole = round_parameters(whole, {weight.name for weight in matching.found})
    size = sum(values.nbytes for values in whole.weights.values())
    return None if size > PROTOBUF_LIMIT else whole.to_model().SerializeToString()


def _with_floats(graph: FloatGraph, matching: Matching) -> FloatGraph:
    """The graph with its quantised weights in place."""
    placed = {weight.name: weight.dequantize() for weight in matching.found}
    return FloatGraph(graph.proto, {**graph.weights, **placed})


@dataclass(frozen=True, eq=False)
class Quantized:
    """What `quantize` did. accuracy: on the test split, which no choice was made on; before is the float network's, after that of
    the quantised one, with activations rounded as they were while training."""

    path: Path
    before: Proportion | None
    after: Proportion
    best_epoch: int
    history: tuple[EpochRecord, ...]
    report: Report
    tensors: tuple[QuantTensor, ...]
    data: str
    notes: tuple[str, ...]
    activations: str = "float32"

    @property
    def zeros(self) -> float:
        return sum(t.zeros * t.size for t in self.tensors) / sum(t.size for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return sum(t.entropy * t.size for t in self.tensors) / sum(t.size for t in self.tensors)


def quantize(
    factory: str,
    *,
    data: str,
    out: str | Path,
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resume: bool = False,
    force: bool = False,
    strict: bool = True,
    progress: Callable[..., None] | None = None,
    seed: int = 0,
    **options: Any,
) -> Quantized:
    """Train and quantise the network of 'FILE.py:FACTORY' on a data set, and save it as a checkpoint.

    weights: its float state dict; without it the network starts as the factory made it, under `seed`. mean, std: the
    input's normalisation; by default PREPROCESSING of FILE.py, else the training split's own statistics.
    options: those of `quantization.train` and the Quantizer; augment, start and relevance by name or as FILE.py:FUNCTION (for a
    relevance it is called and returns the composite). While training, OUT.training holds what `resume` needs. Under torchrun
    every process calls this, and the first one writes.
    """
    from ecqx_onnx.data import load_dataset
    from ecqx_onnx.quantization import train
    from ecqx_onnx.quantization.distributed import process_group, rank

    out = Path(out)
    check_output(out, force=force, source=weights)
    if out.suffix.lower() == ".onnx":
        raise FileError(f"{out}: what is written is a checkpoint, not an .onnx file; name it {out.with_suffix('.pt')}")
    named: dict[str, Any] = {name: _shown(options[name]) for name in ("augment", "relevance", "start") if name in options}
    options = {**options, **_loaded(options)}
    torch.manual_seed(seed)
    loaded = load_factory(factory)
    dataset = load_dataset(data)
    dataset = _fitted(dataset, loaded)
    dataset, told = _preprocessed(dataset, loaded, mean, std, factory=factory)
    state_notes: tuple[str, ...] = ()
    if weights is not None:
        state_notes = apply_state(loaded.model, load_state(weights), weights, strict=strict)
    _check_patterns(options, [name for name, _ in loaded.model.named_parameters()])
    x, _ = next(dataset.test.batches(2))
    try:
        outputs = loaded.model.eval()(torch.from_numpy(x)).shape[-1]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{data}: a batch of shape {x.shape} does not go through {factory} ({reason}); give data of the shape that it takes"
        ) from error
    dataset.check_outputs(outputs)
    confusion = None if weights is None else confuse(loaded.model, dataset.test)
    before = None
    if weights is not None:
        before = accuracy(loaded.model, dataset.test) if confusion is None else confusion.right
    told = (*state_notes, *dataset.notes, told, *doubt_accuracy(confusion, who="the float model"))
    if weights is None:
        told = (*told, "no --weights are given: the network starts from random values and is trained from scratch")
    state_file = state_path(out)
    shown = None if progress is None else training_progress(progress)
    with process_group():
        trained = train(loaded.model, dataset, seed=seed, progress=shown, state_file=state_file, resume=resume, **options)
        first = rank() == 0
    after = accuracy(trained.quantizer.model, dataset.test)
    trained.quantizer.model.to("cpu")
    checkpoint = as_checkpoint(
        trained.quantizer,
        example=torch.from_numpy(x),
        preprocessing=dataset.preprocessing,
        labels=dataset.labels,
        recipe={**trained.setup, "data": dataset.name, "best_epoch": trained.best_epoch, **named},
    )
    checkpoint = with_history(checkpoint, trained, before=before, after=after, data=dataset.name)
    if first:
        save_checkpoint(checkpoint, out, force=force)
        StateFile(state_file).remove()
    return Quantized(
        out,
        before,
        after,
        trained.best_epoch,
        trained.history,
        trained.quantizer.report(),
        checkpoint.tensors,
        dataset.name,
        (*told, *checkpoint.notes),
        trained.quantizer.options.activations,
    )


@torch.no_grad()
def _fitted(dataset: Dataset, loaded: Loaded) -> Dataset:
    """The data with the channels that the network takes: by INPUT_SHAPE, else by what it runs on."""
    if loaded.input_shape is not None:
        return dataset.fitted(loaded.input_shape)
    for candidate in (dataset, *(dataset.fitted((channels, None, None)) for channels in (1, 3))):
        x, _ = next(candidate.test.batches(2))
        with contextlib.suppress(RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            loaded.model.eval()(torch.from_numpy(x))
            return candidate
    return dataset


def _preprocessed(
    dataset: Dataset, loaded: Loaded, mean: Sequence[float] | None, std: Sequence[float] | None, *, factory: str
) -> tuple[Dataset, str]:
    """(the data as the training takes them, a sentence that says how and who decided it)."""
    if bool(mean) != bool(std):
        given, missing = ("--mean", "--std") if mean else ("--std", "--mean")
        neutral = "1" if mean else "0"
        raise OptionError(f"{given} goes with {missing}: give both ({missing} {neutral} changes nothing)")
    file = Path(factory.rpartition(":")[0]).name
    where = f"the data's type decided; {file} has no PREPROCESSING"
    if loaded.preprocessing is not None:
        dataset, where = dataset.with_preprocessing(loaded.preprocessing), f"PREPROCESSING of {file}"
    if mean and std:
        dataset, where = dataset.normalized(mean, std), "mean and std as given, " + where
    elif loaded.preprocessing is None and dataset.preprocessing.kind != "indices":
        dataset = dataset.normalized()
        where = f"mean and std estimated from the training samples of {dataset.name}; " + where
    return dataset, f"preprocessing: {dataset.preprocessing.describe()} ({where})"


def with_history(
    checkpoint: Checkpoint, trained: Training, *, before: Proportion | None, after: Proportion | None, data: str
) -> Checkpoint:
    """The checkpoint of a training, with what a report shows of it. before, after: accuracies on the test split."""
    assert checkpoint.insight is not None  # it was made from a Quantizer
    insight = replace(
        checkpoint.insight,
        history=tuple(asdict(record) for record in trained.history),
        best_epoch=trained.best_epoch,
        before=_counts(before),
        after=_counts(after),
        data=data,
    )
    return replace(checkpoint, insight=insight)


def _counts(accuracy: Proportion | None) -> dict[str, int] | None:
    return {"hits": accuracy.hits, "total": accuracy.total} if accuracy else None


def _loaded(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the options name: an augmentation, and the user's own functions."""
    from ecqx_onnx.data.augmentation import AUGMENTATIONS
    from ecqx_onnx.quantization.zennit_import import import_zennit

    found: dict[str, Any] = {}
    for name in ("augment", "start", "relevance"):
        value = options.get(name)
        if isinstance(value, str) and is_function_spec(value):
            if name == "relevance":
                import_zennit()  # as the user's file will, and may not be able to by itself
            found[name] = load_function(value)
    if "relevance" in found:
        found["relevance"] = found["relevance"]()
    augment = options.get("augment")
    if isinstance(augment, str) and "augment" not in found:
        if augment not in AUGMENTATIONS:
            raise OptionError(f"augmentation '{augment}' is unknown: use one of {', '.join(AUGMENTATIONS)}, or FILE.py:FUNCTION")
        found["augment"] = AUGMENTATIONS[augment]
    return found


def _shown(value: Any) -> Any:
    """An option for the recipe: a file by its name alone, whatever folder it lies in."""
    if isinstance(value, str) and is_function_spec(value):
        file, _, function = value.rpartition(":")
        return f"{Path(file).name}:{function}"
    return value if isinstance(value, str | None) else getattr(value, "__name__", type(value).__name__)


@torch.no_grad()
def _check_patterns(options: Mapping[str, Any], names: Sequence[str]) -> None:
    """OptionError for a pattern that no parameter's name matches: told before the training that it is for, not after."""
    from ecqx_onnx.quantization import Recipe

    patterns = {name: options[name] for name in ("exclude", "bits") if name in options}
    for unmatched in Recipe(**patterns).unmatched(names):
        raise OptionError(f"--{unmatched} matches no parameter; the first is '{next(iter(names), '')}'")


def accuracy(model: torch.nn.Module, split: Any, *, batch_size: int = 256) -> Proportion:
    """Share of the split that the model classifies right."""
    with contextlib.suppress(NotImplementedError):  # an exported program has its evaluation mode only
        model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    right = 0
    for x, y in split.batches(batch_size):
        right += int((model(torch.from_numpy(x).to(device)).argmax(1).cpu().numpy() == y).sum())
    return Proportion(right, len(split))


@torch.no_grad()
def confuse(model: torch.nn.Module, split: Any, *, batch_size: int = 256) -> Confusion | None:
    """Which class of the split the model takes for which; None for more classes than can be counted in pairs."""
    with contextlib.suppress(NotImplementedError):  # an exported program has its evaluation mode only
        model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found: Confusion | None = None
    for x, y in split.batches(batch_size):
        scores = model(torch.from_numpy(x).to(device))
        if scores.ndim != 2 or scores.shape[1] > MOST_CLASSES:
            return None
        counted = Confusion.count(y, scores.argmax(1).cpu().numpy(), scores.shape[1])
        found = counted if found is None else found + counted
    return found


def training_progress(progress: Callable[..., None]) -> Callable[[Any], None]:
    """Training's progress value -> (done, total, text) as the command line's bar wants it."""

    def show(at: Any) -> None:
        text = (
            f"epoch {at.epoch}/{at.epochs}  loss {at.loss:.3f}  accuracy {at.accuracy:.2%}  "
            f"zeros {at.zeros:.1%}  {at.bits_per_weight:.2f} bit/weight"
        )
        progress((at.epoch - 1) * at.steps + at.step, at.epochs * at.steps, text)

    return show
