"""A trained, quantised model <-> model.pt: one self-contained file, read without unpickling objects.

It holds the levels, the float parameters, the traced network (.pt2 bytes) as the PyTorch reference, and its float ONNX
graph with each quantised weight already placed, so that converting neither traces nor exports. Loaded with
torch.load(weights_only=True): a dict of tensors, strings and numbers.
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
from ecqx_onnx_converters.matching.matching import Matching, match

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
    """Everything about one quantised model.

    tensors: the quantised weights by their PyTorch names.
    state: the other entries of the state dict, and aliases: names that share a quantised weight (tied weights).
    program: the traced network, its weights blanked; `module()` puts them back.
    graph, matching: the float ONNX graph, and where each quantised weight sits in it.
    recipe: how it was made, for people and for the ONNX metadata; preprocessing and labels travel with the model.
    insight: what a report shows of the training; None in checkpoints that were made without a Quantizer.
    ranges: (lowest, highest) of activations that were trained on 8 bits, by their names in the graph; else empty.
    preprocessing_known: False where nobody said what happens to raw samples; `preprocessing` then changes nothing.
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
        """The PyTorch reference in evaluation mode: the traced network with the dequantised weights."""
        program = load_program(self.program, "the checkpoint's program", weights_are_blank=True)
        for name, blank in list(program.state_dict.items()):
            value = self._value_of(name, blank)
            if isinstance(blank, torch.nn.Parameter):
                value = torch.nn.Parameter(value, requires_grad=False)
            program.state_dict[name] = value
        return run_module(program)

    def _value_of(self, name: str, blank: torch.Tensor) -> torch.Tensor:
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
    """Put the parts together: place the tensors in the graph, blank the program's weights.

    The exported model's parameters must hold the tensors' dequantised values, bit for bit (ModelError otherwise).
    """
    state = exported.program.state_dict
    first: dict[int, str] = {}
    aliases, rest, blank = {}, {}, {}
    by_name = {tensor.name: tensor for tensor in tensors}
    for name in by_name.keys() & state.keys():
        first[state[name].data_ptr()] = name
    for name in by_name.keys() - state.keys():
        raise ModelError(
            f"the exported model has no parameter {name!r}; export the model that was quantised"
        )
    for name, value in state.items():
        owner = first.get(value.data_ptr()) if value.numel() else name if name in by_name else None
        if owner is None or by_name[owner].shape != tuple(value.shape):
            rest[name] = value.detach()
        else:
            if name == owner and not np.array_equal(
                value.detach().cpu().numpy(), by_name[name].dequantize()
            ):
                raise ModelError(
                    f"{name!r} does not hold its quantised values; call quantizer.step() after the optimizer's"
                )
            if name != owner:
                aliases[name] = owner
    for name, value in state.items():  # one stored zero stands for a whole tensor of them
        zero = (
            torch.zeros((), dtype=value.dtype).expand(value.shape)
            if value.numel()
            else value.detach().clone()
        )
        blank[name] = (
            torch.nn.Parameter(zero, requires_grad=False)
            if isinstance(value, torch.nn.Parameter)
            else zero
        )
    matching = match(exported.graph.weights, tensors)
    placed = {weight.name for weight in matching.found}
    graph = FloatGraph(
        exported.graph.proto,
        {name: w for name, w in exported.graph.weights.items() if name not in placed},
    )
    exported.program.state_dict.update(blank)
    try:
        program = save_program(exported.program)
    finally:
        exported.program.state_dict.update(state)
    return Checkpoint(
        tensors,
        rest,
        aliases,
        program,
        graph,
        matching,
        dict(recipe or {}),
        preprocessing or Preprocessing("array"),
        labels,
        exported.notes,
        insight,
        dict(ranges or {}),
        preprocessing is not None,
    )


def save(checkpoint: Checkpoint, path: str | Path, *, force: bool = False) -> None:
    """Write model.pt. FileError if it exists (without force) or cannot be written."""
    levels = {
        tensor.name: torch.from_numpy(np.ascontiguousarray(tensor.levels))
        for tensor in checkpoint.tensors
    }
    document = {
        "format": FORMAT,
        "version": VERSION,
        "tensors": [
            {"name": t.name, "levels": levels[t.name], **write_meaning(t.meaning)}
            for t in checkpoint.tensors
        ],
        "state": dict(checkpoint.state),
        "aliases": dict(checkpoint.aliases),
        "program": torch.frombuffer(bytearray(checkpoint.program), dtype=torch.uint8),
        "graph": torch.frombuffer(
            bytearray(checkpoint.graph.proto.SerializeToString(deterministic=True)),
            dtype=torch.uint8,
        ),
        "graph_weights": {
            name: torch.from_numpy(np.array(weight))
            for name, weight in checkpoint.graph.weights.items()
        },
        "placed": [
            {
                "initializer": w.name,
                "name": w.tensor.name,
                "levels": share_storage(w.tensor.levels, levels),
                **write_meaning(w.tensor.meaning),
                "sources": list(w.sources),
                "rescaled": w.rescaled,
                **(
                    {}
                    if w.factor is None
                    else {"factor": torch.from_numpy(np.array(w.factor, np.float32))}
                ),
            }
            for w in checkpoint.matching.found
        ],
        "missing": [[entry.name, entry.reason] for entry in checkpoint.matching.missing],
        "recipe": json.dumps(checkpoint.recipe, sort_keys=True),
        "preprocessing": checkpoint.preprocessing.to_json(),
        "labels": list(checkpoint.labels),
        "notes": list(checkpoint.notes),
    }
    if not checkpoint.preprocessing_known:
        document["preprocessing_known"] = False
    if checkpoint.ranges:
        document["ranges"] = {name: list(bounds) for name, bounds in checkpoint.ranges.items()}
    if checkpoint.insight is not None:
        text, pairs = to_document(checkpoint.insight)
        document["insight"] = {"facts": text, "pairs": torch.from_numpy(pairs)}
    with replace_on_success(Path(path), force=force) as temporary:
        try:
            torch.save(document, temporary)
        except RuntimeError as error:  # a full disk reaches us as the archive writer's RuntimeError
            raise FileError(
                f"{path}: cannot be written ({str(error).splitlines()[0]}); free some space or choose another place"
            ) from error


def load(path: str | Path) -> Checkpoint:
    """Read model.pt. FileError if it is missing, damaged, or no checkpoint of ours."""
    document = load_plain(path)
    if not is_checkpoint(document):
        raise FileError(
            f"{path}: is no checkpoint of ecqx-onnx; give what `ecqx-onnx quantize` or `ecqx_onnx.save` wrote"
        )
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise FileError(
            f"{path}: is a checkpoint of version {ascii(version)[:40]}, this ecqx-onnx reads version {VERSION}; update it"
        )
    try:
        parts = read_document(document)
    except BadDocument as error:
        raise FileError(f"{path}: is damaged or incomplete ({error}); save it again") from error
    except FileError as error:
        raise FileError(f"{path}: {escape_text(str(error))}") from error
    return Checkpoint(**vars(parts))


def is_checkpoint(document: Any) -> bool:
    """Whether what load_plain gave says that it is a checkpoint of ours."""
    if not isinstance(document, dict):
        return False
    stated = document.get("format")
    return type(stated) is str and stated == FORMAT


def write_meaning(meaning: Scale | Codebook) -> dict[str, torch.Tensor]:
    if isinstance(meaning, Scale):
        return {"step": torch.from_numpy(np.array(meaning.step, np.float32))}
    return {"codebook": torch.from_numpy(np.array(meaning.values, np.float32))}


def share_storage(levels: np.ndarray, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A tensor over the parameter's own storage where `levels` is a view of it, so that torch.save stores it once."""
    for tensor in parameters.values():
        offset = levels.__array_interface__["data"][0] - tensor.data_ptr()
        if (
            levels.size
            and offset >= 0
            and offset + levels.size <= tensor.numel()
            and np.shares_memory(levels, tensor.numpy())
        ):
            return tensor.as_strided(levels.shape, levels.strides, offset)
    return torch.from_numpy(np.ascontiguousarray(levels))
