"""What a training's result may take in bytes, and the compressed network that it goes on from."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecqx_onnx.errors import OptionError

SPARE = 24  # bytes by which the recipe may grow at the end, by the digits of the score

if TYPE_CHECKING:
    from ecqx_onnx.quantization.quantizer import Quantizer
    from ecqx_onnx.quantization.training.budget import Budget
    from ecqx_onnx.quantization.training.records import StartPoint


def make_budget(
    max_bytes: int | str | None,
    bits_per_weight: float | None,
    *,
    example: Any,
    details: Mapping[str, Any],
) -> Budget | None:
    """Make the budget of a training.

    Args:
        max_bytes: of the whole .onnx file, a number or text such as "40k".
        bits_per_weight: of the coded levels.
        example: inputs that the network is traced with.
        details: what the file records beside: preprocessing, labels and recipe.

    Returns:
        The budget; None where neither is given.

    Raises:
        OptionError: if both are given, or one makes no sense.
    """
    from ecqx_onnx.compression.search.bounds import make_bounds
    from ecqx_onnx.quantization.training.budget import Budget

    bounds = make_bounds(max_bytes=max_bytes, bits_per_weight=bits_per_weight)
    if bounds.max_bytes is not None and bounds.bits_per_weight is not None:
        raise OptionError("--max-bytes and --bits-per-weight are two budgets: give one of them")
    if bounds.max_bytes is not None:

        def write(quantizer: Quantizer) -> int:
            return _write_once(quantizer, example, details)

        return Budget(bounds.max_bytes - SPARE, _code, write, f"--max-bytes {max_bytes}")
    if bounds.bits_per_weight is not None:
        return Budget(
            bounds.bits_per_weight,
            _count_bits_per_weight,
            None,
            f"--bits-per-weight {bits_per_weight:g}",
        )
    return None


def _code(quantizer: Quantizer) -> int:
    """Bytes of all levels, packed."""
    from ecqx_onnx_converters.storage import Stored
    from ecqx_onnx_converters.storage.packed.encoder import encode_all
    from ecqx_onnx_converters.targets import find_target

    levels = [(tensor.name, tensor.levels) for tensor in quantizer.tensors()]
    stored = encode_all(levels, find_target("onnxruntime"))
    total = 0
    for entry, (_, array) in zip(stored, levels, strict=True):
        total += entry.nbytes if isinstance(entry, Stored) else array.size
    return total


def _count_bits_per_weight(quantizer: Quantizer) -> float:
    entries = sum(tensor.size for tensor in quantizer.tensors())
    return 8 * _code(quantizer) / max(1, entries)


def _write_once(quantizer: Quantizer, example: Any, details: Mapping[str, Any]) -> int:
    """Bytes of the file that `convert` writes of the network as it is now."""
    from ecqx_onnx.sources.to_checkpoint import as_checkpoint
    from ecqx_onnx.verbs.convert import convert

    was_training = quantizer.model.training
    checkpoint = as_checkpoint(quantizer, example=example, **details)
    quantizer.model.train(was_training)
    with tempfile.TemporaryDirectory(prefix="ecqx-onnx-") as folder:
        path = Path(folder) / "model.onnx"
        convert(checkpoint, path)
        return sum(file.stat().st_size for file in Path(folder).iterdir())


def load_start(path: str | Path) -> StartPoint:
    """Load a compressed network that a training goes on from.

    Args:
        path: a checkpoint, as `compress --checkpoint` or `quantize` writes it.

    Returns:
        Its levels and steps, and its other parameters.

    Raises:
        OptionError: if a weight of it has no uniform levels.
        FileError: if the file is no checkpoint.
    """
    from ecqx_onnx.checkpoint.checkpoint import load
    from ecqx_onnx.quantization.training.records import StartPoint
    from ecqx_onnx.tensors import Scale

    checkpoint = load(path)
    for tensor in checkpoint.tensors:
        if not isinstance(tensor.meaning, Scale):
            raise OptionError(
                f"{path}: the levels of '{tensor.name}' stand for a table of values, which training"
                " cannot go on from: give a checkpoint with one step a weight or channel"
            )
    return StartPoint(checkpoint.tensors, checkpoint.state)
