"""Write a quantized model as a self-contained checkpoint, model.pt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecqx_onnx.options.option import refuse_unknown_options
from ecqx_onnx.preprocessing.preprocessing import Preprocessing

if TYPE_CHECKING:
    from ecqx_onnx.checkpoint.checkpoint import Checkpoint
    from ecqx_onnx.checkpoint.forward import Example
    from ecqx_onnx.sources.to_checkpoint import Source


@refuse_unknown_options
def save(
    source: Source,
    path: str | Path,
    *,
    example: Example | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    preprocessing: Preprocessing | None = None,
    labels: Sequence[str] = (),
    recipe: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Checkpoint:
    """Write a quantized model as a self-contained checkpoint.

    Args:
        source: a Quantizer, or a module whose weights are already on few values.
        path: the checkpoint to write, such as model.pt.
        example: one batch of the model's input, or the forward's arguments in a tuple or by name,
            {"input_ids": ids}; only shape and type matter.
        dynamic: which axes are free, {input: {axis: name}}; by default the first of every input.
        preprocessing: how raw samples become the model's input.
        labels: names of the classes, in the order of the model's scores.
        recipe: how the model was made, plain values by name.
        force: replace the file if it exists.

    Returns:
        The checkpoint that was written.

    Raises:
        InputError: if the model can't be exported, or the file can't be written.

    Example:
        ecqx_onnx.save(quantizer, "model.pt", example=x)
    """
    from ecqx_onnx.checkpoint.checkpoint import save as save_checkpoint
    from ecqx_onnx.sources.to_checkpoint import as_checkpoint

    checkpoint = as_checkpoint(
        source,
        example=example,
        dynamic=dynamic,
        preprocessing=preprocessing,
        labels=labels,
        recipe=recipe,
    )
    save_checkpoint(checkpoint, path, force=force)
    return checkpoint
