"""A trained, quantised model <-> model.pt: one self-contained file, read without unpickling objects.

It holds the levels, the float parameters, the traced network (.pt2 bytes) as the PyTorch reference, and its float ONNX
graph with each quantised weight already placed, so that converting neither traces nor exports. Loaded with
torch.load(weights_only=True): a dict of tensors, strings and numbers.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from ecqx_onnx_converters.graph import FloatGraph
from ecqx_onnx_converters.matching import GraphWeight, Matching, Missing, match
from ecqx_onnx_converters.outputs import replacing
from google.protobuf.message import DecodeError

from ecqx_onnx.errors import FileError, ModelError
from ecqx_onnx.export import Exported
from ecqx_onnx.insight import Insight, from_document, to_document
from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.program import load_program, run_module, save_program
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
        program = load_program(
            self.program, "the checkpoint's program", weights_are_blank=True
        )
        weights = {tensor.name: torch.from_numpy(np.ascontiguousarray(tensor.dequantize())) for tensor in self.tensors}
        for name, blank in list(program.state_dict.items()):
            value = self.state[name] if name in self.state else weights[self.aliases.get(name, name)]
            if value.shape != blank.shape:
                raise FileError(
                    f"the checkpoint's {name!r} has shape {tuple(value.shape)}, its program wants {tuple(blank.shape)}; "
                    "save it again"
                )
            is_parameter = isinstance(blank, torch.nn.Parameter)
            program.state_dict[name] = torch.nn.Parameter(value, requires_grad=False) if is_parameter else value
        return run_module(program)


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
        raise ModelError(f"the exported model has no parameter {name!r}; export the model that was quantised")
    for name, value in state.items():
        owner = first.get(value.data_ptr()) if value.numel() else name if name in by_name else None
        if owner is None or by_name[owner].shape != tuple(value.shape):
            rest[name] = value.detach()
        else:
            if name == owner and not np.array_equal(value.detach().cpu().numpy(), by_name[name].dequantize()):
                raise ModelError(f"{name!r} does not hold its quantised values; call quantizer.step() after the optimizer's")
            if name != owner:
                aliases[name] = owner
    for name, value in state.items():  # one stored zero stands for a whole tensor of them
        zero = torch.zeros((), dtype=value.dtype).expand(value.shape)
        blank[name] = torch.nn.Parameter(zero, requires_grad=False) if isinstance(value, torch.nn.Parameter) else zero
    matching = match(exported.graph.weights, tensors)
    placed = {weight.name for weight in matching.found}
    graph = FloatGraph(exported.graph.proto, {name: w for name, w in exported.graph.weights.items() if name not in placed})
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
    levels = {tensor.name: torch.from_numpy(np.ascontiguousarray(tensor.levels)) for tensor in checkpoint.tensors}
    document = {
        "format": FORMAT,
        "version": VERSION,
        "tensors": [{"name": t.name, "levels": levels[t.name], **_meaning_out(t.meaning)} for t in checkpoint.tensors],
        "state": dict(checkpoint.state),
        "aliases": dict(checkpoint.aliases),
        "program": torch.frombuffer(bytearray(checkpoint.program), dtype=torch.uint8),
        "graph": torch.frombuffer(bytearray(checkpoint.graph.proto.SerializeToString(deterministic=True)), dtype=torch.uint8),
        "graph_weights": {name: torch.from_numpy(np.array(weight)) for name, weight in checkpoint.graph.weights.items()},
        "placed": [
            {
                "initializer": w.name,
                "name": w.tensor.name,
                "levels": _shared(w.tensor.levels, levels),
                **_meaning_out(w.tensor.meaning),
                "sources": list(w.sources),
                "rescaled": w.rescaled,
                **({} if w.factor is None else {"factor": torch.from_numpy(np.array(w.factor, np.float32))}),
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
    with replacing(Path(path), force=force) as temporary:
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
        raise FileError(f"{path}: is no checkpoint of ecqx-onnx; give what `ecqx-onnx quantize` or `ecqx_onnx.save` wrote")
    version = document.get("version")
    if version != VERSION:
        raise FileError(f"{path}: is a checkpoint of version {version!r}, this ecqx-onnx reads version {VERSION}; update it")
    try:
        return _read(document)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        json.JSONDecodeError,
        DecodeError,
    ) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileError(f"{path}: is damaged or incomplete ({what}); save it again") from error


def torch_file(path: str | Path) -> Path:
    """The path of a file that torch may have written. FileError if there is none, or it is plainly something else."""
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file" if not path.is_dir() else f"{path}: is a folder; name a file in it")
    if path.suffix.lower() == ".onnx":
        raise FileError(
            f"{path}: is an .onnx file where a PyTorch model is needed; `ecqx-onnx pack` stores the weights of an .onnx file"
            " in fewer bytes, and `ecqx-onnx validate --against` takes one"
        )
    if not path.stat().st_size:
        raise FileError(f"{path}: is empty; save it again")
    return path


def is_program(path: str | Path) -> bool:
    """Whether the file is a .pt2 archive. FileError if there is no such file."""
    path = torch_file(path)
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as members:
            return any(name.endswith("archive_format") or "/models/" in name for name in members.namelist())
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise FileError(f"{path}: is damaged ({error}); save it again") from error


def load_plain(path: str | Path) -> Any:
    """What torch.load(weights_only=True) gives: tensors, numbers, strings, lists and dicts. FileError otherwise."""
    path = Path(path)
    if is_program(path):
        raise FileError(
            f"{path}: is a .pt2 program, where a checkpoint or state dict is needed; `ecqx-onnx convert` takes it without --model"
        )
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as members:
                claimed = sum(member.file_size for member in members.infolist())
                if claimed > path.stat().st_size:  # torch stores uncompressed; anything else is a bomb or a lie
                    raise FileError(f"{path}: its parts claim {claimed} bytes, the file has {path.stat().st_size}; save it again")
                if (broken := members.testzip()) is not None:  # torch.load doesn't look at checksums
                    raise FileError(f"{path}: is damaged: its part '{broken}' doesn't have its checksum; save it again")
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise FileError(f"{path}: may not be read; check its permissions") from error
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) or "WeightsUnpickler" in str(error):
            raise FileError(
                f"{path}: holds pickled Python objects, not only tensors (or is damaged); "
                "save a state dict, or give `ecqx-onnx convert` --trust-pickle if you trust its author"
            ) from error
        raise FileError(f"{path}: is damaged or was not written by torch.save; save it again") from error
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        OSError,
        OverflowError,
        AttributeError,
        IndexError,
        zipfile.BadZipFile,
    ) as error:
        raise FileError(f"{path}: is damaged or was not written by torch.save; save it again") from error


def is_checkpoint(document: Any) -> bool:
    return isinstance(document, dict) and document.get("format") == FORMAT


def _read(document: Mapping[str, Any]) -> Checkpoint:
    tensors = tuple(_tensor_in(entry) for entry in document["tensors"])
    found = tuple(_placed_in(entry) for entry in document["placed"])
    graph = onnx.ModelProto.FromString(document["graph"].numpy().tobytes())
    declared = {initializer.name: tuple(initializer.dims) for initializer in _initializers(graph.graph)}
    for weight in found:
        if declared.get(weight.name) != weight.tensor.shape:
            raise ValueError(f"{weight.name!r} has shape {weight.tensor.shape}, its graph declares {declared.get(weight.name)}")
    return Checkpoint(
        tensors=tensors,
        state=dict(document["state"]),
        aliases=dict(document["aliases"]),
        program=document["program"].numpy().tobytes(),
        graph=FloatGraph(graph, {name: weight.numpy() for name, weight in document["graph_weights"].items()}),
        matching=Matching(found, tuple(Missing(str(name), str(reason)) for name, reason in document["missing"])),
        recipe=json.loads(document["recipe"]),
        preprocessing=Preprocessing.from_json(document["preprocessing"]),
        labels=tuple(document["labels"]),
        notes=tuple(document["notes"]),
        insight=_insight_in(document.get("insight")),
        ranges=_ranges_in(document.get("ranges", {})),
        preprocessing_known=bool(document.get("preprocessing_known", True)),
    )


def _ranges_in(entry: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    ranges = {str(name): (float(low), float(high)) for name, (low, high) in entry.items()}
    for name, (low, high) in ranges.items():
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(f"the range of {name!r} is {low} to {high}")
    return ranges


def _insight_in(entry: Mapping[str, Any] | None) -> Insight | None:
    return None if entry is None else from_document(entry["facts"], entry["pairs"].numpy())


def _initializers(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """Of the graph and of every graph inside its nodes."""
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [*graph.initializer, *(i for g in inner for i in _initializers(g))]


def _meaning_out(meaning: Scale | Codebook) -> dict[str, torch.Tensor]:
    if isinstance(meaning, Scale):
        return {"step": torch.from_numpy(np.array(meaning.step, np.float32))}
    return {"codebook": torch.from_numpy(np.array(meaning.values, np.float32))}


def _tensor_in(entry: Mapping[str, Any]) -> QuantTensor:
    """ValueError on levels or steps that no quantiser of ours writes."""
    name, levels = str(entry["name"]), entry["levels"].numpy()
    if levels.dtype != np.int8:
        raise ValueError(f"the levels of {name!r} are {levels.dtype}, not int8")
    if "step" in entry:
        step = entry["step"].numpy()
        if step.dtype != np.float32 or not (np.isfinite(step).all() and (step > 0).all()):
            raise ValueError(f"the step of {name!r} is not positive and finite")
        if np.broadcast_shapes(step.shape, levels.shape) != levels.shape or step.ndim not in (0, levels.ndim):
            raise ValueError(f"the step of {name!r} has shape {step.shape}, its levels {levels.shape}")
        return QuantTensor(name, levels, Scale(step))
    values = entry["codebook"].numpy()
    if values.dtype != np.float32 or values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"the codebook of {name!r} is no vector of finite floats")
    if levels.size and not (-values.size <= int(levels.min()) and int(levels.max()) < values.size):
        raise ValueError(f"the levels of {name!r} reach beyond its codebook of {values.size} values")
    return QuantTensor(name, levels, Codebook(values))


def _placed_in(entry: Mapping[str, Any]) -> GraphWeight:
    factor = entry["factor"].numpy() if "factor" in entry else None
    tensor = _tensor_in(entry)
    if factor is not None and (not np.isfinite(factor).all() or np.broadcast_shapes(factor.shape, tensor.shape) != tensor.shape):
        raise ValueError(f"the factor of {tensor.name!r} is not finite or does not fit its levels")
    return GraphWeight(str(entry["initializer"]), tensor, tuple(map(str, entry["sources"])), factor, bool(entry["rescaled"]))


def _shared(levels: np.ndarray, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A tensor over the parameter's own storage where `levels` is a view of it, so that torch.save stores it once."""
    for tensor in parameters.values():
        offset = levels.__array_interface__["data"][0] - tensor.data_ptr()
        if levels.size and offset >= 0 and offset + levels.size <= tensor.numel() and np.shares_memory(levels, tensor.numpy()):
            return tensor.as_strided(levels.shape, levels.strides, offset)
    return torch.from_numpy(np.ascontiguousarray(levels))
