"""Save a quantized model with all that belongs to it in one file, and load it: model.pt.

The file holds the levels, the float parameters, the traced network (.pt2 bytes) as the PyTorch
reference, and its float ONNX graph with each quantized weight already placed, so that converting
neither traces nor exports. It is a dict of tensors, texts and numbers: nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ecqx_onnx_converters.graph.graph import FloatGraph
from ecqx_onnx_converters.graph.outputs import replace_on_success
from ecqx_onnx_converters.matching.matching import GraphWeight, Matching, match

from ecqx_onnx.checkpoint.document import BadDocument, escape_text, read_document
from ecqx_onnx.checkpoint.export import Exported
from ecqx_onnx.checkpoint.insight import Insight, to_document
from ecqx_onnx.errors import FileError, ModelError
from ecqx_onnx.inputs.program.program import load_program, run_module, save_program
from ecqx_onnx.inputs.torch_file import load_plain
from ecqx_onnx.preprocessing.preprocessing import Preprocessing
from ecqx_onnx.tensors import Codebook, QuantTensor, Scale

FORMAT = "ecqx-onnx checkpoint"
VERSION = 1


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything about one quantized model.

    Attributes:
        tensors: the quantized weights by their PyTorch names.
        state: the other entries of the state dict.
        aliases: other names of quantized weights (tied weights), each with the weight's own.
        program: the traced network (a .pt2), its weights blanked; `module()` puts them back.
        graph: the float ONNX graph, without the weights that are quantized.
        matching: where each quantized weight sits in the graph.
        recipe: how it was made, for people and for the ONNX metadata.
        preprocessing: what happens to raw samples before the network; travels with the model.
        labels: names of the classes; may be empty.
        notes: sentences for the report, such as a batch size that had to be fixed.
        insight: what a report shows of the training; None if it was made without a Quantizer.
        ranges: (lowest, highest) of activations that were trained on 8 bits, by their names in the
            graph; else empty.
        preprocessing_known: False where nobody said what happens to raw samples; `preprocessing`
            then changes nothing.
    """

    tensors: tuple[QuantTensor, ...]
    state: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]
    program: bytes
    graph: FloatGraph
    matching: Matching
    recipe: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing = field(default_factory=lambda: Preprocessing("array"))
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    insight: Insight | None = None
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    preprocessing_known: bool = True

    def module(self) -> torch.nn.Module:
        """Make the PyTorch reference: the traced network with the dequantized weights.

        Returns:
            A module in evaluation mode.

        Raises:
            FileError: if a weight that the program wants is missing or of another shape or type.
            ModelError: if the program's parts do not fit each other.
        """
        program = load_program(self.program, "the checkpoint's program", weights_are_blank=True)
        for name, blank in list(program.state_dict.items()):
            value = self._find_value(name, blank)
            if isinstance(blank, torch.nn.Parameter):
                value = torch.nn.Parameter(value, requires_grad=False)
            program.state_dict[name] = value
        return run_module(program)

    def _find_value(self, name: str, blank: torch.Tensor) -> torch.Tensor:
        """What belongs in the place of one of the program's blanked tensors."""
        owner = self.aliases.get(name, name)
        quantized = next((tensor for tensor in self.tensors if tensor.name == owner), None)
        if name in self.state:
            value = self.state[name]
        elif quantized is not None:
            value = torch.from_numpy(np.ascontiguousarray(quantized.dequantize())).to(blank.dtype)
        else:
            raise FileError(
                f"the checkpoint lacks {name!r}, which its program wants; save it again"
            )
        if value.shape != blank.shape or value.dtype != blank.dtype:
            raise FileError(
                f"the checkpoint's {name!r} is {value.dtype} of shape {tuple(value.shape)}, its"
                f" program wants {blank.dtype} of shape {tuple(blank.shape)}; save it again"
            )
        return value


def build(
    exported: Exported,
    tensors: tuple[QuantTensor, ...],
    *,
    recipe: Mapping[str, Any] | None = None,
    preprocessing: Preprocessing | None = None,
    labels: tuple[str, ...] = (),
    insight: Insight | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> Checkpoint:
    """Put the parts of a checkpoint together: place the tensors in the graph, blank the program.

    Args:
        exported: the traced network. Its parameters hold the tensors' dequantized values, bit for
            bit. It is as before afterwards.
        tensors: the quantized weights by their names in the state dict.
        recipe: how they were made; plain JSON values.
        preprocessing: of raw samples; None if nobody said.
        labels: names of the classes.
        insight: what a report shows of the training.
        ranges: (lowest, highest) of trained activations by their names in the graph.

    Returns:
        A checkpoint, in memory.

    Raises:
        ModelError: if a tensor has no parameter, or that one does not hold the tensor's values.
    """
    state = exported.program.state_dict
    by_name = {tensor.name: tensor for tensor in tensors}
    # 1. What of the state is a quantized weight, what another name of one, and what stays.
    rest, aliases = _divide_state(state, by_name)
    # 2. Where each quantized weight sits in the graph, which then need not hold it.
    matching = match(exported.graph.weights, tensors)
    placed = {weight.name for weight in matching.found}
    left = {name: w for name, w in exported.graph.weights.items() if name not in placed}
    # 3. The program without its weights: they are in `tensors` and `rest`.
    blanks = {name: _make_blank(value) for name, value in state.items()}
    exported.program.state_dict.update(blanks)
    try:
        program = save_program(exported.program)
    finally:
        exported.program.state_dict.update(state)
    return Checkpoint(
        tensors=tensors,
        state=rest,
        aliases=aliases,
        program=program,
        graph=FloatGraph(exported.graph.proto, left),
        matching=matching,
        recipe=dict(recipe or {}),
        preprocessing=preprocessing or Preprocessing("array"),
        labels=labels,
        notes=exported.notes,
        insight=insight,
        ranges=dict(ranges or {}),
        preprocessing_known=preprocessing is not None,
    )


def _divide_state(
    state: Mapping[str, torch.Tensor], by_name: Mapping[str, QuantTensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(entries that are no quantized weight, other names of those that are one)."""
    for name in by_name.keys() - state.keys():
        raise ModelError(
            f"the exported model has no parameter {name!r}; export the model that was quantised"
        )
    owners = {state[name].data_ptr(): name for name in by_name}
    rest: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in state.items():
        owner = owners.get(value.data_ptr())
        if not value.numel():  # empty tensors share the address 0
            owner = name if name in by_name else None
        if owner is None or by_name[owner].shape != tuple(value.shape):
            rest[name] = value.detach()
        elif name != owner:
            aliases[name] = owner
        elif not np.array_equal(value.detach().cpu().numpy(), by_name[name].dequantize()):
            raise ModelError(
                f"{name!r} does not hold its quantised values; call quantizer.step() after the"
                " optimizer's"
            )
    return rest, aliases


def _make_blank(value: torch.Tensor) -> torch.Tensor:
    """A tensor of zeros in the same place: one stored zero stands for all of them."""
    zero = torch.zeros((), dtype=value.dtype).expand(value.shape)
    if not value.numel():
        zero = value.detach().clone()
    if isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(zero, requires_grad=False)
    return zero


def save(checkpoint: Checkpoint, path: str | Path, *, force: bool = False) -> None:
    """Write a checkpoint as model.pt.

    Args:
        checkpoint: what to write.
        path: of the file; it appears once it is whole.
        force: replace a file that is there.

    Raises:
        FileError: if the file exists (without `force`) or cannot be written.

    Example:
        ecqx_onnx.checkpoint.save(ecqx_onnx.as_checkpoint(quantizer, example=x), "model.pt")
    """
    document = _make_document(checkpoint)
    with replace_on_success(Path(path), force=force) as temporary:
        try:
            torch.save(document, temporary)
        except RuntimeError as error:  # a full disk reaches us as the archive writer's RuntimeError
            raise FileError(
                f"{path}: cannot be written ({str(error).splitlines()[0]}); free some space or"
                " choose another place"
            ) from error


def _make_document(checkpoint: Checkpoint) -> dict[str, Any]:
    """The dict in the file; `document.read_document` is the reverse."""
    graph = checkpoint.graph.proto.SerializeToString(deterministic=True)
    levels: dict[str, torch.Tensor] = {}
    tensors: list[dict[str, Any]] = []
    for tensor in checkpoint.tensors:
        levels[tensor.name] = torch.from_numpy(np.ascontiguousarray(tensor.levels))
        entry = {"name": tensor.name, "levels": levels[tensor.name]}
        tensors.append({**entry, **_write_meaning(tensor.meaning)})
    graph_weights = {}
    for name, weight in checkpoint.graph.weights.items():
        graph_weights[name] = torch.from_numpy(np.array(weight))
    document = {
        "format": FORMAT,
        "version": VERSION,
        "tensors": tensors,
        "state": dict(checkpoint.state),
        "aliases": dict(checkpoint.aliases),
        "program": _write_bytes(checkpoint.program),
        "graph": _write_bytes(graph),
        "graph_weights": graph_weights,
        "placed": [_write_placed(weight, levels) for weight in checkpoint.matching.found],
        "missing": [[entry.name, entry.reason] for entry in checkpoint.matching.missing],
        "recipe": json.dumps(checkpoint.recipe, sort_keys=True),
        "preprocessing": checkpoint.preprocessing.to_json(),
        "labels": list(checkpoint.labels),
        "notes": list(checkpoint.notes),
    }
    # What older versions did not write stands there only where it says something.
    if not checkpoint.preprocessing_known:
        document["preprocessing_known"] = False
    if checkpoint.ranges:
        document["ranges"] = {name: list(bounds) for name, bounds in checkpoint.ranges.items()}
    if checkpoint.insight is not None:
        text, pairs = to_document(checkpoint.insight)
        document["insight"] = {"facts": text, "pairs": torch.from_numpy(pairs)}
    return document


def _write_bytes(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _write_placed(weight: GraphWeight, levels: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """A quantized weight's place in the graph."""
    entry = {
        "initializer": weight.name,
        "name": weight.tensor.name,
        "levels": _share_storage(weight.tensor.levels, levels),
        **_write_meaning(weight.tensor.meaning),
        "sources": list(weight.sources),
        "rescaled": weight.rescaled,
    }
    if weight.factor is not None:
        entry["factor"] = torch.from_numpy(np.array(weight.factor, np.float32))
    return entry


def load(path: str | Path) -> Checkpoint:
    """Read model.pt; nothing in it is run or unpickled.

    Args:
        path: of the file, whoever wrote it.

    Returns:
        The checkpoint, every part of it checked.

    Raises:
        FileError: if it is missing, damaged, of another version, or no checkpoint of ours.
    """
    document = load_plain(path)
    if not is_checkpoint(document):
        raise FileError(
            f"{path}: is no checkpoint of ecqx-onnx; give what `ecqx-onnx quantize` or"
            " `ecqx_onnx.save` wrote"
        )
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise FileError(
            f"{path}: is a checkpoint of version {ascii(version)[:40]}, this ecqx-onnx reads"
            f" version {VERSION}; update it"
        )
    try:
        parts = read_document(document)
    except BadDocument as error:
        raise FileError(f"{path}: is damaged or incomplete ({error}); save it again") from error
    except FileError as error:
        raise FileError(f"{path}: {escape_text(str(error))}") from error
    return Checkpoint(**vars(parts))


def is_checkpoint(document: Any) -> bool:
    """Whether what `load_plain` gave says that it is a checkpoint of ours.

    Args:
        document: any value from a file.

    Returns:
        True for a dict with our format's name.
    """
    if not isinstance(document, dict):
        return False
    stated = document.get("format")
    return type(stated) is str and stated == FORMAT


def _write_meaning(meaning: Scale | Codebook) -> dict[str, torch.Tensor]:
    """The entry for a scale or a codebook, as `document` reads it."""
    if isinstance(meaning, Scale):
        return {"step": torch.from_numpy(np.array(meaning.step, np.float32))}
    return {"codebook": torch.from_numpy(np.array(meaning.values, np.float32))}


def _share_storage(levels: np.ndarray, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Levels as a tensor over the storage of a parameter of which they are a view, if they are one.

    torch.save stores a storage once, however many tensors look into it.
    """
    for tensor in parameters.values():
        # Where the levels would begin in the parameter, an int8 being one byte.
        offset = levels.__array_interface__["data"][0] - tensor.data_ptr()
        is_inside = offset >= 0 and offset + levels.size <= tensor.numel()
        if levels.size and is_inside and np.shares_memory(levels, tensor.numpy()):
            return tensor.as_strided(levels.shape, levels.strides, offset)
    return torch.from_numpy(np.ascontiguousarray(levels))
