"""What every validation shares, whoever ran the model: data, bounds, checks of the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
from ecqx_onnx_converters.serialization.reading import read_metadata, read_weights

from ecqx_onnx.data import Split
from ecqx_onnx.errors import CheckFailed, FileError
from ecqx_onnx.inputs.onnx_file import OnnxFile, read_onnx
from ecqx_onnx.preprocessing.preprocessing import Preprocessing
from ecqx_onnx.runtime.decoded_model import DecodedModel, decode_model
from ecqx_onnx.tensors import QuantTensor
from ecqx_onnx.validation import checks
from ecqx_onnx.validation.outputs.bounds import Bound, derive_bound
from ecqx_onnx.validation.outputs.comparison import Batch, Comparison
from ecqx_onnx.validation.report import Check
from ecqx_onnx.validation.stored.parameters import compare_parameters, list_float_tensors
from ecqx_onnx.validation.stored.weights import compare_weights

SYNTHETIC_BATCH = 4


def read_preprocessing(file: OnnxFile | Path | str) -> Preprocessing | None:
    """Read the preprocessing that a file records.

    Args:
        file: An .onnx file, or its path.

    Returns:
        The preprocessing; None in a foreign file.

    Raises:
        FileError: It is there and cannot be used.
    """
    file = file if isinstance(file, OnnxFile) else read_onnx(file)
    stored = file.metadata.get("preprocessing")
    if stored is None:
        return None
    try:
        return Preprocessing.from_json(stored if isinstance(stored, str) else json.dumps(stored))
    except FileError as error:
        raise FileError(f"{file.path}: {error}") from error


def preprocess_batches(split: Split, size: int) -> Iterator[Batch]:
    """Read a split in batches as a model takes them.

    Args:
        split: Samples with their preprocessing.
        size: Samples in a batch.

    Yields:
        The one input of a batch, and its labels.
    """
    for x, y in split.batches(size):
        yield (x,), y


def derive_bounds(comparison: Comparison, outputs: Sequence) -> list[Bound]:
    """Say how far two ways of computing each output may lie apart.

    Args:
        comparison: A pass beside a reference, or one without.
        outputs: Arrays, one for each output.

    Returns:
        The derived bounds, or without a reference the coarse ones.
    """
    if comparison.differences:
        return [replace(difference.bound, runs=1) for difference in comparison.differences]
    return [derive_bound(output, None) for output in outputs]


def check_stored_weights(
    model: onnx.ModelProto,
    decoded_model: DecodedModel,
    tensors: Sequence[QuantTensor],
    *,
    float_model: Callable[..., bytes | None] | None = None,
) -> list[Check]:
    """Compare every tensor of a file with what the file itself, and its origin, say of it.

    Args:
        model: The file's, with its data in it.
        decoded_model: What the runtime makes of the model's constants.
        tensors: The quantized weights of PyTorch's model; empty to check the file in itself.
        float_model: Makes the ONNX model from before the quantization, as for `validate`; None
            where there is none, or where it isn't the one that the file was made from.

    Returns:
        One check of the checksum, one of the quantized weights, one of the float parameters; those
        that can be made.
    """
    try:
        found = [check] if (check := checks.check_contents(model)) is not None else []
        stored = read_weights(model)
    except FileError as error:  # the metadata promises weights that are not there as promised
        return [Check("weights", False, None, None, str(error))]
    if stored or tensors:
        decoded = {**decoded_model.integers, **decoded_model.weights}
        found.append(
            checks.check_weights(compare_weights(stored, decoded, tensors), alone=not tensors)
        )
    metadata = read_metadata(model)
    if (
        float_model is None or not metadata or metadata.get("activations")
    ):  # integer kernels: scales wander into parameters
        return found
    serialized = float_model(floats=metadata.get("floats") or "float32")
    if serialized is None:
        return found
    wanted = decode_model(onnx.load_model_from_string(serialized))
    compared = compare_parameters(
        list_float_tensors(decoded_model.proto), list_float_tensors(wanted.proto), stored=stored
    )
    found.append(checks.check_parameters(compared, reference="PyTorch's model"))
    return found


def decode_or_report(model: onnx.ModelProto, found: list[Check]) -> DecodedModel | None:
    """Let the runtime decode a model's weights.

    Args:
        model: With its data in it.
        found: Checks so far; a failed one is appended where the runtime cannot decode the weights.

    Returns:
        The decoded model, or None.
    """
    try:
        return decode_model(model)
    except CheckFailed as error:
        found.append(
            Check("weights", False, None, None, f"the runtime cannot decode the weights: {error}")
        )
        return None


def choose_latency_baseline(
    file: OnnxFile,
    decoded_model: DecodedModel | None,
    float_model: Callable[..., bytes | None] | None,
) -> bytes | None:
    """Choose the model that latency is compared with.

    Args:
        file: The file to measure.
        decoded_model: Its decoded float model, or None.
        float_model: Makes the model from before integer kernels, or None.

    Returns:
        A serialized model: for integer kernels the one before them, where it is known, else the
        decoded float model; None without either.
    """
    if float_model is not None and checks.has_quantized_activations(file):
        return float_model()
    return None if decoded_model is None else decoded_model.serialize()
