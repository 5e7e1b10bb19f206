"""Write a quantized model as an .onnx file."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from ecqx_onnx_converters import WriteReport, make_plan
from ecqx_onnx_converters.graph.outputs import check_output
from ecqx_onnx_converters.passes.activations import (
    carry_ranges,
    quantize_activations,
    replace_pooling,
)
from ecqx_onnx_converters.passes.batchnorm import BatchNorm, fold_batchnorms
from ecqx_onnx_converters.passes.equalization import equalize, find_places
from ecqx_onnx_converters.passes.float16 import store_float16, store_half_steps
from ecqx_onnx_converters.passes.integer_nodes import find_integer_nodes
from ecqx_onnx_converters.targets import check_name, find_target

from ecqx_onnx import __version__
from ecqx_onnx.checkpoint.float_model import restore_float_weights
from ecqx_onnx.data import Dataset, Split
from ecqx_onnx.delivery.delivery import deliver
from ecqx_onnx.errors import DataError, OptionError
from ecqx_onnx.validation.float_distance import FloatBounds
from ecqx_onnx.validation.float_probe import FloatProbe

if TYPE_CHECKING:
    import torch

    from ecqx_onnx.checkpoint.checkpoint import Checkpoint
    from ecqx_onnx.sources.to_checkpoint import Source


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

    bits: quantise a float model without training, so that errors cancel (see levels/rounding.py), or with an entropy_weight
    by entropy-constrained assignment. Without it a float model is refused. Quantised is what a convolution, matrix product,
    recurrent operator or token embedding multiplies, whatever `include` names besides, and never what `exclude` names.
    activations: "float32", or "int8" for integer kernels; their ranges come from `calibration` (a data set as `load_dataset`
    takes it, a Dataset or a Split; its training samples where it has any) by "minmax", "percentile" or "entropy", or without it
    from the checkpoint of a training with activations="int8".
    data, float_bounds: with bits, the result is compared with the float model on this data set (as `load_dataset` takes it, its
    test split), else on random inputs, and the report warns beyond the bounds.
    floats: "float16" stores parameters that stay float in half the bytes, rounded; `validate` knows that from the file.
    """

    from ecqx_onnx.sources.to_checkpoint import as_checkpoint

    if floats not in ("float32", "float16"):
        raise OptionError(
            f"float parameters cannot be stored as '{floats}'; choose float32 or float16"
        )
    given = {"--entropy-weight": entropy_weight, "--exclude": exclude, "--include": include}
    without_bits = [option for option, value in given.items() if value]
    if not bits and without_bits:
        raise OptionError(f"{without_bits[0]} goes with --bits, which quantises a float model")
    if not bits and (data is not None or float_bounds is not None):
        raise OptionError(
            "--data and bounds on the distance from the float model go with --bits; leave them out"
        )
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
            checkpoint = replace(
                checkpoint, recipe={**checkpoint.recipe, "float_error": float(f"{probe.error:.3g}")}
            )
    graph, matching, batchnorms = fold_batchnorms(checkpoint.graph, checkpoint.matching)
    matching, steps = store_half_steps(matching) if floats == "float16" else (matching, 0)
    checkpoint, quantized = replace(checkpoint, graph=graph, matching=matching), None
    if activations != "float32":
        checkpoint = replace(checkpoint, graph=replace_pooling(graph))
        checkpoint, ranges = find_ranges(
            checkpoint, activations, target, calibration, calibration_method, calibration_samples
        )
        quantized = quantize_activations(checkpoint.graph, checkpoint.matching.found, ranges)
        graph, matching = quantized.graph, replace(matching, found=quantized.found)
    elif calibration is not None:
        raise OptionError(
            "calibration data are for --activations int8; add it, or leave the data out"
        )
    notes = (*checkpoint.notes, *told, *notes_on_unfolded_batchnorms(batchnorms))
    if floats == "float16":
        graph, halved = store_float16(graph, {weight.name for weight in matching.found})
        notes = (*notes, replace(halved, steps=steps).sentence)
        floats = floats if halved.names or steps else "float32"
    plan = make_plan(
        graph,
        matching,
        target=target,
        storage=storage,
        dequantize=dequantize,
        opset=opset,
        integer=() if quantized is None else quantized.weights,
    )
    metadata: dict[str, Any] = {"version": __version__, "recipe": drop_defaults(checkpoint.recipe)}
    if checkpoint.preprocessing_known:
        recorded = json.loads(checkpoint.preprocessing.to_json())
        metadata["preprocessing"] = {
            key: value for key, value in recorded.items() if value is not None
        }
        notes = (
            *notes,
            f"preprocessing that the file records: {checkpoint.preprocessing.describe()}",
        )
    else:
        notes = (*notes, NO_PREPROCESSING)
    if checkpoint.labels != tuple(map(str, range(len(checkpoint.labels)))):
        metadata["labels"] = list(checkpoint.labels)
    if floats != "float32":
        metadata["floats"] = floats
    if quantized is not None:
        source = "trained" if calibration is None else calibration_method
        metadata["activations"] = {"type": "uint8", "calibration": source}
        notes = (*notes, RANGES_FROM[source == "trained"])
    report = deliver(plan, out, metadata=metadata, force=force)
    report = replace(report, notes=(*report.notes, *notes))
    return (
        report
        if quantized is None
        else replace(report, kernels=quantized.kernels, stays=quantized.stays)
    )


def notes_on_unfolded_batchnorms(batchnorms: Sequence[BatchNorm]) -> tuple[str, ...]:
    return tuple(
        f"BatchNormalization '{entry.name}' stays: {entry.reason}"
        for entry in batchnorms
        if entry.weight is None
    )


NO_PREPROCESSING = (
    "the file records no preprocessing, as none is known: give `save` the one of the training (preprocessing=...), or FILE.py"
    " a PREPROCESSING"
)
CALIBRATION_BATCH = 64
RANGES_FROM = (
    "ranges of activations: calibrated on the data given",
    "ranges of activations: those that training ended with",
)


def find_ranges(
    checkpoint: Checkpoint,
    activations: str,
    target: str,
    calibration: Any,
    method: str,
    samples: int,
) -> tuple[Checkpoint, Mapping[str, tuple[float, float]]]:
    """Of the activations that are to be 8 bits: what they are on the calibration data, else what they were trained with. On data,
    channels are made equally large first, where that costs nothing."""
    from ecqx_onnx.data import load_dataset
    from ecqx_onnx.runtime.calibration import METHODS, calibrate_ranges, measure_channel_peaks

    if activations != "int8":
        raise OptionError(
            f"there are no activations of type '{activations}'; choose float32 or int8"
        )
    if method not in METHODS:
        raise OptionError(
            f"there is no calibration method '{method}'; choose one of {', '.join(METHODS)}"
        )
    if find_target(target).no_integers:
        raise OptionError(
            f"target '{target}' cannot have int8 activations: {find_target(target).no_integers}"
        )
    graph, matching = checkpoint.graph, checkpoint.matching
    values = find_integer_nodes(graph, matching.found).ranges
    if calibration is None:
        if not checkpoint.ranges:
            raise OptionError(
                "--activations int8 needs data that activations take their ranges from; add --calibration DATA"
            )
        return checkpoint, carry_ranges(graph, values, checkpoint.ranges)
    data = load_dataset(str(calibration)) if isinstance(calibration, str | Path) else calibration
    split = (data.train or data.test) if isinstance(data, Dataset) else data
    if checkpoint.preprocessing_known:
        split = split.with_preprocessing(checkpoint.preprocessing)
    split = split.fitted(find_input_lengths(checkpoint.graph.proto)).take(samples)
    if (value := split.find_only_value()) is not None:
        raise DataError(
            f"{split.source.name} holds nothing but the value {value:g} in the {len(split)} samples for calibration, which tells"
            " no range: calibrate on data as the model was trained on"
        )
    places = [place for place in find_places(graph, matching) if place.value in values]
    peaks = measure_channel_peaks(
        restore_float_weights(graph, matching),
        [p.value for p in places],
        (x for x, _ in split.batches(CALIBRATION_BATCH)),
    )
    if peaks:
        graph, matching = equalize(graph, matching, places, peaks)
    batches = (x for x, _ in split.batches(CALIBRATION_BATCH))
    ranges = calibrate_ranges(
        restore_float_weights(graph, matching), values, batches, method=method
    )
    return replace(checkpoint, graph=graph, matching=matching), ranges


def find_input_lengths(proto: onnx.ModelProto) -> list[int | None]:
    """The shape of one sample of the first input; None for a free length."""
    dims = proto.graph.input[0].type.tensor_type.shape.dim if proto.graph.input else ()
    return [dim.dim_value or None for dim in dims[1:]]


def drop_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were chosen: all of them would outweigh a small net's weights. Of the data, the name without its path."""
    from ecqx_onnx.quantization import Recipe, train

    defaults = {
        name: parameter.default for name, parameter in inspect.signature(train).parameters.items()
    }
    defaults |= Recipe().to_json()
    chosen = {
        name: v
        for name, v in recipe.items()
        if name == "bits" or v != defaults.get(name, inspect.Signature.empty)
    }
    return chosen | (
        {"data": Path(chosen["data"]).name} if isinstance(chosen.get("data"), str) else {}
    )


def _test_split(data: Any) -> Split | None:
    """The test split of a data set, or of its name; None for None."""
    from ecqx_onnx.data import load_dataset

    dataset = load_dataset(str(data)) if isinstance(data, str | Path) else data
    return dataset.test if isinstance(dataset, Dataset) else dataset
