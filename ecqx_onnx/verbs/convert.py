"""Write a quantized model as an .onnx file."""

from __future__ import annotations

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
    IntegerKernels,
    carry_ranges,
    quantize_activations,
    replace_pooling,
)
from ecqx_onnx_converters.passes.equalization import equalize, find_places
from ecqx_onnx_converters.passes.float16 import Halved
from ecqx_onnx_converters.passes.integer_nodes import find_integer_nodes
from ecqx_onnx_converters.passes.sequence import list_passes
from ecqx_onnx_converters.passes.work import Work, apply_passes
from ecqx_onnx_converters.targets import check_name, find_target

from ecqx_onnx import __version__
from ecqx_onnx.checkpoint.float_model import restore_float_weights
from ecqx_onnx.data import Dataset, Split
from ecqx_onnx.delivery.delivery import deliver
from ecqx_onnx.delivery.wire import measure_wire
from ecqx_onnx.errors import DataError, OptionError
from ecqx_onnx.options.convert import ConvertOptions
from ecqx_onnx.options.input_shape import InputShape
from ecqx_onnx.options.option import check_limits, get_defaults, refuse_unknown_options
from ecqx_onnx.options.quantize import QuantizeOptions
from ecqx_onnx.options.quantizer import Recipe
from ecqx_onnx.validation.references.float_distance import ROUNDED, FloatBounds
from ecqx_onnx.validation.references.float_probe import FloatProbe

if TYPE_CHECKING:
    from ecqx_onnx.checkpoint.checkpoint import Checkpoint
    from ecqx_onnx.checkpoint.forward import Example
    from ecqx_onnx.sources.to_checkpoint import Source


@refuse_unknown_options
def convert(
    model: Source,
    out: str | Path,
    *,
    example: Example | None = None,
    factory: str | None = None,
    input_shape: InputShape | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    trust_pickle: bool = False,
    bits: int | None = None,
    bits_per_weight: float | None = None,
    entropy_weight: float = 0.0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    storage: str = "auto",
    prefer: str = "auto",
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
    """Write a quantized model as an .onnx file.

    Quantized with `bits` is what a convolution, matrix product, recurrent operator or token
    embedding multiplies, whatever `include` names besides, and never what `exclude` names.

    Args:
        model: a path, a Quantizer, a module, an exported program or a Checkpoint; with `bits` or
            `bits_per_weight` also a float .onnx file.
        out: the .onnx file to write (.ort for targets that load that).
        example: for a module, one batch of its input, or a tuple of the forward's arguments;
            only shape and type matter.
        factory: FILE.py:FACTORY, the network of a state dict.
        input_shape: of one input without the batch, where FILE.py has no INPUT_SHAPE; or an
            `TypedShape` for each input by name.
        dynamic: which axes are free, {input: {axis: name}}; by default the first of every input.
        trust_pickle: unpickle a module, which runs its author's code.
        bits: 2 to 8: quantize a float model without training, so that errors cancel (see
            quantization/levels/rounding.py); without it a float model is refused.
        bits_per_weight: instead of bits, quantize on an open grid, to so many coded bits for each
            weight, 0.05 to 16.
        entropy_weight: with bits, quantize by entropy-constrained assignment instead; at least 0.
        include: with bits, patterns of more parameter names to quantize.
        exclude: with bits, patterns of parameter names that stay float.
        storage: "auto", "dense", "sparse" or "packed".
        prefer: with storage "auto", "disk" for the fewest bytes, "load" for nothing that is decoded
            at load, or "auto", see `make_plan`.
        dequantize: "auto", "folded" (float speed) or "standard" (DequantizeLinear).
        target: the runtime that must load the file.
        opset: by default the lowest that holds the weights.
        activations: "float32", or "int8" for integer kernels.
        calibration: with activations="int8", a data set (as `load_dataset` takes it, a Dataset or a
            Split; its training samples where it has any) that their ranges come from; without it,
            those of a training with activations="int8". With bits or bits_per_weight, samples as
            `compress` takes them, by whose second moments errors are fed back.
        calibration_method: "minmax", "percentile" or "entropy".
        calibration_samples: number of samples for it; at least 1.
        floats: "float16" stores parameters that stay float in half the bytes, rounded; `validate`
            knows that from the file.
        data: with bits, a data set on whose test split the result is compared with the float model;
            by default random inputs.
        float_bounds: with bits, beyond which distance from the float model the report warns.
        strict: refuse a state dict that lacks weights, or has others.
        force: replace `out` if it exists.

    Returns:
        How each weight is stored, what stays float and why, and notes.

    Raises:
        InputError: if something given can't be used, or the target can't hold the model.

    Example:
        report = ecqx_onnx.convert("model.pt", "out.onnx")
        print(report.nbytes)
    """
    # 1. Refuse what does not go together, before anything is loaded.
    if floats not in ("float32", "float16"):
        raise OptionError(
            f"float parameters cannot be stored as '{floats}'; choose float32 or float16"
        )
    if bits and bits_per_weight is not None:
        raise OptionError("--bits and --bits-per-weight both say how many: give one of them")
    is_float_file = isinstance(model, str | Path) and Path(model).suffix.lower() == ".onnx"
    rounds_here = bool(bits) and calibration is not None and activations == "float32"
    if is_float_file or bits_per_weight is not None or rounds_here:
        return _convert_at_once(
            model,
            Path(out),
            example=example,
            factory=factory,
            input_shape=input_shape,
            dynamic=dynamic,
            trust_pickle=trust_pickle,
            bits=bits or None,
            bits_per_weight=bits_per_weight,
            entropy_weight=entropy_weight,
            include=include,
            exclude=exclude,
            file=(storage, dequantize, target, opset, floats),
            activations=activations,
            calibration=calibration,
            calibration_samples=calibration_samples,
            data=data,
            float_bounds=float_bounds,
            force=force,
        )
    given = {"--entropy-weight": entropy_weight, "--exclude": exclude, "--include": include}
    without_bits = [option for option, value in given.items() if value]
    if not bits and without_bits:
        raise OptionError(f"{without_bits[0]} goes with --bits, which quantises a float model")
    if not bits and (data is not None or float_bounds is not None):
        raise OptionError(
            "--data and bounds on the distance from the float model go with --bits; leave them out"
        )
    if activations == "float32" and calibration is not None:
        raise OptionError(
            "calibration data are for --activations int8; add it, or leave the data out"
        )
    check_limits(
        ConvertOptions,
        bits=bits or None,
        entropy_weight=entropy_weight,
        calibration_samples=calibration_samples,
    )
    check_output(out, force=force, source=model)
    check_name(out, target)

    # 2. Load the model, quantized if that is asked for.
    from ecqx_onnx.sources.to_checkpoint import as_checkpoint  # torch; not for an .onnx

    probe = FloatProbe(_test_split(data), float_bounds or ROUNDED) if bits else None
    checkpoint = as_checkpoint(
        model,
        example=example,
        factory=factory,
        input_shape=input_shape,
        dynamic=dynamic,
        trust_pickle=trust_pickle,
        bits=bits,
        entropy_weight=entropy_weight,
        include=include,
        exclude=exclude,
        probe=probe,
        strict=strict,
    )
    checkpoint, probe_notes = _judge_rounding(checkpoint, probe)

    # 3. Rewrite the graph: BatchNorm into weights, scales to float16, activations to integers.
    def make_integers(work: Work) -> Work:
        work, ranges = find_ranges(
            replace_pooling(work),
            checkpoint,
            activations,
            target=target,
            calibration=calibration,
            method=calibration_method,
            samples=calibration_samples,
        )
        return quantize_activations(work, ranges)

    passes = list_passes(floats, activations=None if activations == "float32" else make_integers)
    work = apply_passes(passes, Work(checkpoint.graph, checkpoint.matching))
    notes = [*checkpoint.notes, *probe_notes, *work.sentences]
    integers = next(iter(work.find_notes(IntegerKernels)), None)

    # 4. Plan how each weight is stored.
    plan = make_plan(
        work.graph,
        work.matching,
        target=target,
        storage=storage,
        prefer=prefer,
        dequantize=dequantize,
        opset=opset,
        integer=() if integers is None else integers.weights,
    )

    # 5. Write the file, with what a user of it should know.
    metadata = _describe_checkpoint(checkpoint)
    if checkpoint.preprocessing_known:
        described = checkpoint.preprocessing.describe()
        notes.append(f"preprocessing that the file records: {described}")
    else:
        notes.append(NO_PREPROCESSING)
    if any(halved.names or halved.steps for halved in work.find_notes(Halved)):
        metadata["floats"] = floats
    if integers is not None:
        source = "trained" if calibration is None else calibration_method
        metadata["activations"] = {"type": "uint8", "calibration": source}
        notes.append(RANGES_TRAINED if source == "trained" else RANGES_CALIBRATED)
    report = deliver(plan, out, metadata=metadata, force=force)
    wire = measure_wire(report.path)
    notes.extend(wire.sentences)
    report = replace(report, notes=(*report.notes, *notes), wire_bytes=wire.written)
    if integers is None:
        return report
    return replace(report, kernels=integers.kernels, stays=integers.stays)


def _convert_at_once(
    model: Source,
    out: Path,
    *,
    example: Any,
    factory: str | None,
    input_shape: InputShape | None,
    dynamic: Any,
    trust_pickle: bool,
    bits: int | None,
    bits_per_weight: float | None,
    entropy_weight: float,
    include: Sequence[str],
    exclude: Sequence[str],
    file: tuple[str, str, str, int | None, str],
    activations: str,
    calibration: Any,
    calibration_samples: int,
    data: Any,
    float_bounds: FloatBounds | None,
    force: bool,
) -> WriteReport:
    """What needs the exported graph only: a float .onnx, bits per weight, rounding by data."""
    from ecqx_onnx.compression.encoding import FileOptions
    from ecqx_onnx.verbs.convert_float import FloatOptions, convert_float

    if bits is None and bits_per_weight is None:
        raise OptionError(
            f"{model} is an .onnx file: if it is quantised, `ecqx-onnx pack` makes it smaller; if"
            " it holds floats, add --bits 4 or --bits-per-weight 3, or give `ecqx-onnx compress` a"
            " budget and samples"
        )
    if entropy_weight:
        raise OptionError(
            "--entropy-weight goes with --bits and a PyTorch model; fewer --bits-per-weight have"
            " the same effect here"
        )
    if activations != "float32":
        raise OptionError(
            f"--activations {activations} goes with a PyTorch model and --bits; leave it out"
        )
    check_limits(
        ConvertOptions,
        bits=bits,
        bits_per_weight=bits_per_weight,
        calibration_samples=calibration_samples,
    )
    options = FloatOptions(
        bits=bits,
        bits_per_weight=bits_per_weight,
        include=tuple(include),
        exclude=tuple(exclude),
        calibration=calibration,
        calibration_samples=calibration_samples,
        data=data,
        bounds=float_bounds or ROUNDED,
        file=FileOptions(*file),
    )
    return convert_float(
        model,
        out,
        options,
        factory=factory,
        example=example,
        input_shape=input_shape,
        dynamic=dynamic,
        trust_pickle=trust_pickle,
        force=force,
    )


NO_PREPROCESSING = (
    "the file records no preprocessing, as none is known: give `save` the one of the training"
    " (preprocessing=...), or FILE.py a PREPROCESSING"
)
CALIBRATION_BATCH = 64
RANGES_CALIBRATED = "ranges of activations: calibrated on the data given"
RANGES_TRAINED = "ranges of activations: those that training ended with"


def _judge_rounding(
    checkpoint: Checkpoint, probe: FloatProbe | None
) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint with its distance from the float model recorded, and a sentence about it."""
    if probe is None:
        return checkpoint, ()
    check = probe.judge(checkpoint.module(), class_names=bool(checkpoint.labels))
    warning = "warning: " if check.passed is False else ""
    if probe.error is not None and math.isfinite(probe.error):
        recipe = {**checkpoint.recipe, "float_error": float(f"{probe.error:.3g}")}
        checkpoint = replace(checkpoint, recipe=recipe)
    return checkpoint, (warning + check.sentence,)


def _describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """The file's metadata: how it was made, its preprocessing, its class names."""
    metadata: dict[str, Any] = {
        "version": __version__,
        "recipe": _drop_defaults(checkpoint.recipe),
    }
    if checkpoint.preprocessing_known:
        recorded = json.loads(checkpoint.preprocessing.to_json())
        known = {key: value for key, value in recorded.items() if value is not None}
        metadata["preprocessing"] = known
    numbers = tuple(map(str, range(len(checkpoint.labels))))
    if checkpoint.labels != numbers:  # "0", "1", ... are no names
        metadata["labels"] = list(checkpoint.labels)
    return metadata


def find_ranges(
    work: Work,
    checkpoint: Checkpoint,
    activations: str,
    *,
    target: str,
    calibration: Any,
    method: str,
    samples: int,
) -> tuple[Work, Mapping[str, tuple[float, float]]]:
    """Find between which numbers the activations lie that are to be 8 bits.

    On calibration data, channels are made equally large first, where that costs nothing.

    Args:
        work: the model's graph and weights, rewritten so far.
        checkpoint: the model, which may know ranges from its training.
        activations: their type; "int8" is the only one there is.
        target: the runtime that must load the file.
        calibration: a data set, its name, or a Split; None for the ranges of the training.
        method: "minmax", "percentile" or "entropy".
        samples: use at most so many.

    Returns:
        The work, its channels equalized, and (lowest, highest) by the value's name.

    Raises:
        OptionError: for a type or method that there is none, a target without integers, or if
            nothing says the ranges.
        DataError: if the samples tell none.
    """
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
    values = find_integer_nodes(work.graph, work.matching.found).ranges
    if calibration is None:
        if not checkpoint.ranges:
            raise OptionError(
                "--activations int8 needs data that activations take their ranges from; add"
                " --calibration DATA"
            )
        return work, carry_ranges(work.graph, values, checkpoint.ranges)
    split = _load_calibration(checkpoint, calibration, samples)

    # Equalize channels: W and the activations before it change by factors that cancel.
    places = [place for place in find_places(work) if place.value in values]
    peaks = measure_channel_peaks(
        restore_float_weights(work),
        [place.value for place in places],
        (x for x, _ in split.batches(CALIBRATION_BATCH)),
    )
    if peaks:
        work = equalize(work, places, peaks)
    batches = (x for x, _ in split.batches(CALIBRATION_BATCH))
    return work, calibrate_ranges(restore_float_weights(work), values, batches, method=method)


def _load_calibration(checkpoint: Checkpoint, calibration: Any, samples: int) -> Split:
    """Samples as the model takes them, at most so many; DataError if they hold one value only."""
    from ecqx_onnx.data import load_dataset

    data = load_dataset(str(calibration)) if isinstance(calibration, str | Path) else calibration
    split: Split = (data.train or data.test) if isinstance(data, Dataset) else data
    if checkpoint.preprocessing_known:
        split = split.with_preprocessing(checkpoint.preprocessing)
    split = split.fitted(_find_input_lengths(checkpoint.graph.proto)).take(samples)
    value = split.find_only_value()
    if value is not None:
        raise DataError(
            f"{split.source.name} holds nothing but the value {value:g} in the {len(split)} samples"
            " for calibration, which tells no range: calibrate on data as the model was trained on"
        )
    return split


def _find_input_lengths(proto: onnx.ModelProto) -> list[int | None]:
    """The shape of one sample of the first input; None for a free length."""
    if not proto.graph.input:
        return []
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    return [dim.dim_value or None for dim in dims[1:]]


def _drop_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were chosen: all of them would outweigh a small net's weights.

    Of the data, the name without its path.
    """
    defaults = {**get_defaults(QuantizeOptions), **Recipe().to_json()}
    chosen = {}
    for name, value in recipe.items():
        if name == "bits" or name not in defaults or value != defaults[name]:
            chosen[name] = value
    if isinstance(chosen.get("data"), str):
        chosen["data"] = Path(chosen["data"]).name
    return chosen


def _test_split(data: Any) -> Split | None:
    """The test split of a data set, or of its name; None for None."""
    from ecqx_onnx.data import load_dataset

    dataset = load_dataset(str(data)) if isinstance(data, str | Path) else data
    return dataset.test if isinstance(dataset, Dataset) else dataset
