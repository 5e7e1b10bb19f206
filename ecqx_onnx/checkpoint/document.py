"""Check the dict inside a model.pt and turn it into typed values within bounds.

A checkpoint may come from anyone. Each entry is read once, here, by a reader that knows its type;
what is missing, of another type or out of bounds ends in a BadDocument that names the entry. Every
later room sees only the checked values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from ecqx_onnx_converters.graph.graph import FloatGraph, list_graphs
from ecqx_onnx_converters.matching.matching import GraphWeight, Matching, Missing
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from ecqx_onnx.checkpoint.insight import Insight, from_document
from ecqx_onnx.inputs.bounded_json import BadJson, parse_json
from ecqx_onnx.preprocessing.preprocessing import Preprocessing
from ecqx_onnx.tensors import Codebook, QuantTensor, Scale

LONGEST_NAME = 1024  # characters of a weight's name; real ones have at most some 200
LONGEST_TEXT = 10_000  # of a note or a reason
MOST_ENTRIES = 100_000  # weights, labels, notes
LARGEST_CODEBOOK = 256
MOST_JSON_BYTES = 1024 * 1024  # a recipe has some hundreds
MOST_JSON_ITEMS = 50_000
LONGEST_INSIGHT = 64 * 1024 * 1024  # characters of JSON: 100 000 epochs of history


class BadDocument(ValueError):  # noqa: N818 - says what is wrong
    """An entry of the checkpoint that no quantizer of ours writes; the message names it."""


@dataclass(frozen=True, eq=False)
class Document:
    """What a checkpoint holds, checked. The fields are those of `checkpoint.Checkpoint`."""

    tensors: tuple[QuantTensor, ...]
    state: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]
    program: bytes
    graph: FloatGraph
    matching: Matching
    recipe: Mapping[str, Any]
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    notes: tuple[str, ...]
    insight: Insight | None
    ranges: Mapping[str, tuple[float, float]]
    preprocessing_known: bool


def read_document(document: Mapping[Any, Any]) -> Document:
    """Check a checkpoint's dict and turn it into typed values.

    Args:
        document: as torch_file.load_plain gives it; its tensors are dense and bounded.

    Returns:
        Its values; texts among them are printable.

    Raises:
        BadDocument: if an entry is missing, of another type, or out of bounds.
        FileError: if the preprocessing cannot be used.
    """
    tensors = _read_list(document, "tensors", _read_tensor)
    names = [tensor.name for tensor in tensors]
    if len(set(names)) != len(names):
        raise BadDocument("'tensors' names a weight twice")
    state = _read_mapping(document, "state", _read_state_tensor)
    aliases = _read_mapping(document, "aliases", _read_name)
    for alias, owner in aliases.items():
        if owner not in names:
            raise BadDocument(f"'aliases' takes {alias!r} from {owner!r}, which is no weight of it")
    found = _read_list(document, "placed", _read_placed)
    missing = _read_list(document, "missing", _read_missing)
    return Document(
        tensors=tensors,
        state=state,
        aliases=aliases,
        program=_read_bytes(_take_entry(document, "program"), "program"),
        graph=_read_graph(document, found),
        matching=Matching(found, missing),
        recipe=_read_recipe(document),
        preprocessing=Preprocessing.from_json(
            _read_text(document, "preprocessing", MOST_JSON_BYTES)
        ),
        labels=_read_list(document, "labels", _read_label),
        notes=_read_list(document, "notes", _read_sentence),
        insight=_read_insight(document),
        ranges=_read_ranges(document),
        preprocessing_known=_read_flag(document.get("preprocessing_known", True)),
    )


def escape_text(text: str) -> str:
    """Escape what is not printable in a text of a file for people.

    Args:
        text: anything, control characters and lone surrogates included.

    Returns:
        The text with those written out, as `\\x1b`.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# Plain entries


def _take_entry(document: Any, key: str) -> Any:
    """An entry of what should be a dict."""
    if not isinstance(document, dict):
        raise BadDocument(f"{type(document).__name__} where a dict with {key!r} should be")
    if key not in document:
        raise BadDocument(f"{key!r} is missing")
    return document[key]


def _read_text(document: Any, key: str, longest: int) -> str:
    """A text of at most `longest` characters."""
    value = _take_entry(document, key)
    if type(value) is not str or len(value) > longest:
        raise BadDocument(f"{key!r} is no text of at most {longest} characters")
    return value


def _read_flag(value: Any) -> bool:
    """True or False; no number stands for them."""
    if type(value) is not bool:
        raise BadDocument(f"{ascii(value)[:40]} where True or False should be")
    return value


def _read_list(document: Any, key: str, read: Callable[[Any], Any]) -> tuple[Any, ...]:
    """Each entry of a list, by a reader that checks it."""
    values = _take_entry(document, key)
    if not isinstance(values, list | tuple) or len(values) > MOST_ENTRIES:
        raise BadDocument(f"{key!r} is no list of at most {MOST_ENTRIES} entries")
    read_values = []
    for at, value in enumerate(values):
        with _name_place(f"{key!r} [{at}]"):
            read_values.append(read(value))
    return tuple(read_values)


def _read_mapping(
    document: Any, key: str, read: Callable[[Any], Any], *, each: str = ""
) -> dict[str, Any]:
    """Each entry of a dict by name, by a reader that checks it. each: what errors call one."""
    values = _take_entry(document, key)
    if not isinstance(values, dict) or len(values) > MOST_ENTRIES:
        raise BadDocument(f"{key!r} is no dict of at most {MOST_ENTRIES} entries")
    read_values = {}
    for name, value in values.items():
        with _name_place(f"{each or repr(key)} of {ascii(name)[:80]}"):
            read_values[_read_name(name)] = read(value)
    return read_values


@contextmanager
def _name_place(place: str) -> Iterator[None]:
    """Errors from inside say where they were found."""
    try:
        yield
    except BadDocument as error:
        raise BadDocument(f"{place}: {error}") from None


def _read_name(value: Any) -> str:
    """A weight's, a parameter's or an initializer's name."""
    if type(value) is not str or not 0 < len(value) <= LONGEST_NAME or not value.isprintable():
        raise BadDocument(f"the name {ascii(value)[:80]} is none of 1 to {LONGEST_NAME} letters")
    return value


def _read_label(value: Any) -> str:
    """Class names come from folders: whatever they hold, the training is not lost."""
    if type(value) is not str or len(value) > LONGEST_TEXT:
        raise BadDocument(f"{ascii(value)[:80]} is no label")
    return escape_text(value)


def _read_sentence(value: Any) -> str:
    if type(value) is not str or len(value) > LONGEST_TEXT:
        raise BadDocument(f"{ascii(value)[:80]} is no text of at most {LONGEST_TEXT} characters")
    return escape_text(value)


def _read_ranges(document: Any) -> dict[str, tuple[float, float]]:
    """Of trained activations; older checkpoints have none."""
    if "ranges" not in document:
        return {}
    return _read_mapping(document, "ranges", _read_range, each="the range")


def _read_range(value: Any) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise BadDocument(f"{ascii(value)[:80]} is no range")
    low, high = value
    if type(low) not in (int, float) or type(high) not in (int, float):
        raise BadDocument(f"{ascii(value)[:80]} is no range of two numbers")
    if not (abs(low) <= 3.4e38 and abs(high) <= 3.4e38 and low <= high):
        raise BadDocument(f"the range is {low} to {high}")
    return float(low), float(high)


# Tensors


def _take_tensor(value: Any, what: str) -> torch.Tensor:
    """A dense tensor in main memory; `what` names it in errors."""
    if not isinstance(value, torch.Tensor):
        raise BadDocument(f"{what} is {type(value).__name__}, not a tensor")
    if value.layout != torch.strided or value.device.type != "cpu":
        raise BadDocument(f"{what} is no plain tensor in main memory")
    return value.detach().resolve_conj().resolve_neg()


def _take_array(value: Any, dtype: type, what: str) -> np.ndarray:
    """The tensor as an array of exactly this type."""
    tensor = _take_tensor(value, what)
    wanted = torch.from_numpy(np.zeros(0, dtype)).dtype
    if tensor.dtype != wanted:
        found = str(tensor.dtype).removeprefix("torch.")
        raise BadDocument(f"{what} has {found}, not {np.dtype(dtype).name}")
    return tensor.numpy()


def _read_bytes(value: Any, what: str) -> bytes:
    array = _take_array(value, np.uint8, repr(what))
    if array.ndim != 1:
        raise BadDocument(f"{what!r} has {array.ndim} dimensions, not one")
    return array.tobytes()


def _read_state_tensor(value: Any) -> torch.Tensor:
    return _take_tensor(value, "it")


def _read_tensor(entry: Any) -> QuantTensor:
    """Levels with a step or a codebook."""
    name = _read_name(_take_entry(entry, "name"))
    levels = _take_array(_take_entry(entry, "levels"), np.int8, f"the levels of {name!r}")
    if "step" in entry:
        return QuantTensor(name, levels, Scale(_read_step(entry["step"], levels, name)))
    if "codebook" not in entry:
        raise BadDocument(f"{name!r} has neither 'step' nor 'codebook'")
    values = _take_array(entry["codebook"], np.float32, f"the codebook of {name!r}")
    if values.ndim != 1 or not 1 <= values.size <= LARGEST_CODEBOOK:
        raise BadDocument(
            f"the codebook of {name!r} has shape {values.shape}, not [1 to {LARGEST_CODEBOOK}]"
        )
    if not np.isfinite(values).all():
        raise BadDocument(f"the codebook of {name!r} is not finite")
    if levels.size and not (-values.size <= levels.min() and levels.max() < values.size):
        raise BadDocument(
            f"the levels of {name!r} reach beyond its codebook of {values.size} values"
        )
    return QuantTensor(name, levels, Codebook(values))


def _read_step(value: Any, levels: np.ndarray, name: str) -> np.ndarray:
    step = _take_array(value, np.float32, f"the step of {name!r}")
    if not (np.isfinite(step).all() and (step > 0).all()):
        raise BadDocument(f"the step of {name!r} is not positive and finite")
    if not _can_broadcast(step.shape, levels.shape) or step.ndim not in (0, levels.ndim):
        raise BadDocument(f"the step of {name!r} has shape {step.shape}, its levels {levels.shape}")
    return step


def _can_broadcast(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether an array of `shape` broadcasts to `target` itself."""
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


def _read_placed(entry: Any) -> GraphWeight:
    """A quantized weight's place in the graph."""
    tensor = _read_tensor(entry)
    initializer = _read_name(_take_entry(entry, "initializer"))
    factor = None
    if "factor" in entry:
        factor = _take_array(entry["factor"], np.float32, f"the factor of {tensor.name!r}")
        if not np.isfinite(factor).all() or not _can_broadcast(factor.shape, tensor.shape):
            raise BadDocument(
                f"the factor of {tensor.name!r} is not finite or does not fit its levels"
            )
    with _name_place("'rescaled'"):
        rescaled = _read_flag(_take_entry(entry, "rescaled"))
    sources = _read_list(entry, "sources", _read_name)
    return GraphWeight(initializer, tensor, sources, factor, rescaled)


def _read_missing(entry: Any) -> Missing:
    if not isinstance(entry, list | tuple) or len(entry) != 2:
        raise BadDocument(f"{ascii(entry)[:80]} is no pair of a name and a reason")
    return Missing(_read_name(entry[0]), _read_sentence(entry[1]))


# The graph


def _read_graph(document: Mapping[Any, Any], found: tuple[GraphWeight, ...]) -> FloatGraph:
    """The float graph, its weights' shapes and types as it declares them."""
    data = _read_bytes(_take_entry(document, "graph"), "graph")
    try:
        proto = onnx.ModelProto.FromString(data)
    except Exception as error:  # protobuf's own classes, by its backend
        raise BadDocument("'graph' is no ONNX model") from error
    _read_texts(proto)
    declared: dict[str, onnx.TensorProto] = {}
    for graph in list_graphs(proto.graph):
        for initializer in graph.initializer:
            declared[initializer.name] = initializer
    for name in declared:
        _read_name(name)
    for weight in found:
        shape = None
        if weight.name in declared:
            shape = tuple(declared[weight.name].dims)
        if shape != weight.tensor.shape:
            raise BadDocument(
                f"{weight.name!r} has shape {weight.tensor.shape}, its graph declares {shape}"
            )
    weights = {}
    for name, tensor in _read_mapping(document, "graph_weights", _read_state_tensor).items():
        weights[name] = _read_weight(name, tensor, declared.get(name))
    return FloatGraph(proto, weights)


def _read_texts(message: Message) -> None:
    """Check that every text in the message is UTF-8: protobuf gives others as bytes."""
    for field, value in message.ListFields():
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in values:
                _read_texts(inner)
        elif field.type == FieldDescriptor.TYPE_STRING and not _are_texts(value):
            raise BadDocument(f"'graph' has a {field.name!r} that is no UTF-8")


def _are_texts(value: Any) -> bool:
    if isinstance(value, str | bytes):
        return isinstance(value, str)
    return all(isinstance(item, str) for item in value)


def _read_weight(name: str, tensor: torch.Tensor, declared: onnx.TensorProto | None) -> np.ndarray:
    try:
        values = tensor.numpy()
    except (TypeError, RuntimeError) as error:  # bfloat16 and narrower types
        raise BadDocument(f"'graph_weights' of {name!r} has {tensor.dtype}") from error
    if declared is None:
        raise BadDocument(f"'graph_weights' has {name!r}, which the graph does not declare")
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(declared.data_type)
    except KeyError:
        dtype = None
    if tuple(declared.dims) != values.shape or dtype != values.dtype:
        raise BadDocument(
            f"'graph_weights' of {name!r} is {values.dtype} {values.shape}, the graph declares"
            f" {dtype} {tuple(declared.dims)}"
        )
    return values


# JSON inside the document


def _read_recipe(document: Mapping[Any, Any]) -> dict[str, Any]:
    text = _read_text(document, "recipe", MOST_JSON_BYTES)
    try:
        recipe = parse_json(
            text, most_bytes=MOST_JSON_BYTES, most_items=MOST_JSON_ITEMS, with_nan=True
        )
    except BadJson as error:
        raise BadDocument(f"'recipe' cannot be read: {error}") from None
    if not isinstance(recipe, dict):
        raise BadDocument(f"'recipe' is {type(recipe).__name__}, not an object")
    return {escape_text(name): _make_printable(value) for name, value in recipe.items()}


def _make_printable(value: Any) -> Any:
    """JSON of at most parse_json's depth, its texts printable."""
    if isinstance(value, str):
        return escape_text(value)
    if isinstance(value, list):
        return [_make_printable(item) for item in value]
    if isinstance(value, dict):
        return {escape_text(name): _make_printable(item) for name, item in value.items()}
    return value


def _read_insight(document: Mapping[Any, Any]) -> Insight | None:
    if document.get("insight") is None:
        return None
    with _name_place("'insight'"):
        entry = document["insight"]
        pairs = _take_array(_take_entry(entry, "pairs"), np.float16, "'pairs'")
        text = _read_text(entry, "facts", LONGEST_INSIGHT)
        try:
            return from_document(text, pairs)
        except ValueError as error:
            raise BadDocument(str(error)) from None
