"""The packed codec's encoder: int8 levels become entropy-coded bytes that the graph itself decodes.

A runtime *folds* the decoder: while it loads the file, it computes once what depends on constants
only, and keeps the result (docs/packed-format.md). Packed tensors of a file share streams and their
decoder, so `encode_all` takes them together; `encode` packs a single one. A *piece* is a tensor, or
a slice of a large one (stages.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto, helper

from ecqx_onnx_converters.refusal import Refusal
from ecqx_onnx_converters.storage import DOMAIN, MAX_WEIGHTS, Stored
from ecqx_onnx_converters.storage.packed import bitstream, choices, onnx_decoder, stream
from ecqx_onnx_converters.storage.packed.grouping import arrange
from ecqx_onnx_converters.storage.packed.huffman import DIGIT
from ecqx_onnx_converters.storage.packed.reader import count_own_bytes
from ecqx_onnx_converters.storage.packed.stages import (
    Piece,
    cut_piece,
    is_staged,
    plan_stages,
)
from ecqx_onnx_converters.storage.packed.stream import SymbolSequence
from ecqx_onnx_converters.storage.packed.symbols import (
    add_contexts,
    count_pairs,
    find_whole_run,
    walk_levels,
)
from ecqx_onnx_converters.targets import Target

TRANSPOSE_BYTES = 40  # what a Transpose node costs

# A file's streams, each with the ascending indices of its pieces in what `pack_all` was given.
Streams = list[tuple[list[int], stream.Packed]]


def encode(levels: np.ndarray, name: str, target: Target) -> Stored | Refusal:
    """Encode one weight with a stream and a decoder of its own.

    Args:
        levels: int8, any shape.
        name: What the integer tensor shall be called.
        target: Whether it folds decoders, and its highest opset.

    Returns:
        Parts of a graph; or why these levels or this target cannot have them.
    """
    return encode_all([(name, levels)], target)[0]


def encode_all(tensors: Sequence[tuple[str, np.ndarray]], target: Target) -> list[Stored | Refusal]:
    """Encode all packed weights of a file.

    Args:
        tensors: Name and int8 levels of each.
        target: Whether it folds decoders, and its highest opset.

    Returns:
        For each weight parts of a graph, or why it cannot be packed. Parts that several share lie
        with the first that uses them, so keep all of them or none.
    """
    refusals = [_refuse_packing(levels, target) for _, levels in tensors]
    chosen = [tensor for tensor, refusal in zip(tensors, refusals, strict=True) if refusal is None]
    stored = iter(_encode_streams(chosen) if chosen else [])
    return [next(stored) if refusal is None else refusal for refusal in refusals]


def _refuse_packing(levels: np.ndarray, target: Target) -> Refusal | None:
    """Why these levels cannot be packed for this target; None if they can."""
    if not target.decoders:
        return Refusal(f"target '{target.name}' can't have nodes that decode weights")
    if target.max_opset < onnx_decoder.OPSET:
        return Refusal(
            f"its decoder needs opset {onnx_decoder.OPSET}, and {target.max_opset} is the highest"
            " here"
        )
    if not 0 < levels.size < MAX_WEIGHTS:
        return Refusal(f"a tensor of {levels.size} weights can't be packed")
    return None


def pack_all(
    tensors: Sequence[np.ndarray], *, stages: Sequence[int] | None = None
) -> tuple[Streams, int]:
    """Pack the tensors of a file, or pieces of them, into streams.

    Args:
        tensors: int8, none of them empty: all pieces of the file.
        stages: The stage in which each piece is decoded; None for a file of one stage. Each stage
            has streams of its own: pieces of different stages may share tables, but no payload.

    Returns:
        The streams, each with the ascending indices of its pieces; and how often their decoder
        calls the ONNX function `r`, which reads 8 bytes of each lane a call, see
        `choices.choose_calls`.
    """
    # 1. Levels become symbol sequences, and these are grouped. A small file is compact: its decoder
    #    takes fewer bytes, and more memory for each bit of the payload.
    top = stream.find_top(tensors)
    sequences = [find_symbol_sequence(levels, top) for levels in tensors]
    streams, compact = arrange(sequences)
    # 2. The length of a lane, as calls of `r`. For a small file one call fewer than estimated is
    #    often better: try.
    size = sum(coding.nbytes for _, coding in streams)
    if stages is not None:
        streams = list(_divide_by_stage(streams, stages))
    calls = choices.choose_calls(size, len(streams), staged=stages is not None)
    candidates = [calls]
    if compact and calls > 1:
        candidates = [calls - 1, calls]
    # 3. Write, and keep what takes fewer bytes.
    written: list[tuple[Streams, int]] = []
    for call_count in candidates:
        lane_bytes = DIGIT * call_count  # a call reads 8 digits, which in a payload are bytes
        made: Streams = []
        for members, coding in streams:
            members_sequences = [sequences[member] for member in members]
            packed = bitstream.write_stream(members_sequences, coding, lane_bytes, compact=compact)
            made.append((members, packed))
        written.append((made, call_count))
    return min(written, key=_count_written_bytes)


def _count_written_bytes(candidate: tuple[Streams, int]) -> int:
    """Bytes of all that depends on the number of calls."""
    streams, calls = candidate
    # Streams of one tensor that need a Split only because something is left over at the end.
    trimmed = sum(len(packed.parts) == 1 and packed.rest > 0 for _, packed in streams)
    arrays = sum(packed.nbytes for _, packed in streams)
    return arrays + calls * choices.CALL_BYTES + trimmed * choices.CUT_BYTES


def _divide_by_stage(
    streams: Sequence[tuple[list[int], stream.Coding]], stages: Sequence[int]
) -> Iterator[tuple[list[int], stream.Coding]]:
    """The streams of each stage, stage by stage; those of one coding have the same tables."""
    for stage in range(max(stages) + 1):
        for members, coding in streams:
            in_stage = [member for member in members if stages[member] == stage]
            if in_stage:
                yield in_stage, coding


@dataclass
class _Parts:
    """What becomes a tensor's `Stored`, while it is gathered."""

    nodes: list[NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    nbytes: int = 0


@dataclass
class _Gathered:
    """What the packed tensors of a file become, while it is gathered.

    tensors: of each tensor. fresh: names that are free in the graph. constants: see
    `onnx_decoder.make_stream_nodes`. shapes: names of the shapes that the file has already.
    """

    tensors: list[_Parts]
    fresh: Iterator[str]
    constants: dict[bytes, str] = field(default_factory=dict)
    shapes: dict[tuple[int, ...], str] = field(default_factory=dict)


def _encode_streams(tensors: Sequence[tuple[str, np.ndarray]]) -> list[Stored]:
    """Packed streams as parts of a graph, for each weight its own."""
    names = [name for name, _ in tensors]
    arrays = [levels for _, levels in tensors]
    # 1. Pieces of the tensors, each decoded in one stage, so that little is in memory at a time.
    staged = is_staged(arrays)
    pieces = plan_stages(arrays)
    piece_levels = [cut_piece(arrays[piece.tensor], piece) for piece in pieces]
    piece_stages = [piece.stage for piece in pieces] if staged else None
    streams, calls = pack_all(piece_levels, stages=piece_stages)
    piece_names = _name_pieces(pieces, names)
    # 2. What all streams share. It lies with the first tensor, since it has to lie once.
    first = streams[0][1]  # contexts and compactness are the same for all
    functions = onnx_decoder.make_functions(
        calls,
        with_contexts=first.context_model is not stream.ContextModel.PLAIN,
        compact=first.compact,
        staged=staged,
    )
    fresh = (f"{names[0]}_{index}" for index in count())
    gathered = _Gathered([_Parts() for _ in tensors], fresh)
    waits = [""]  # in a file of one stage nothing waits
    if staged:
        waits = _add_stages(gathered, stage_count=1 + max(piece.stage for piece in pieces))
    # 3. to 5. The nodes of each stream and of its pieces.
    for members, packed in streams:
        stage = waits[pieces[members[0]].stage]  # the same for all pieces of a stream
        own_pieces = [(piece_names[member], pieces[member].tensor) for member in members]
        _add_stream(gathered, own_pieces, packed, stage)
    # 6. A tensor's pieces become one again, since the model reads it as a whole.
    stored = []
    for index, name in enumerate(names):
        parts = gathered.tensors[index]
        slices = [member for member, piece in enumerate(pieces) if piece.tensor == index]
        if len(slices) > 1:
            axis = pieces[slices[0]].axis
            slice_names = [piece_names[member] for member in slices]
            parts.nodes.append(helper.make_node("Concat", slice_names, [name], axis=axis))
        stored.append(_make_stored(name, parts, functions))
    return stored


def _add_stages(gathered: _Gathered, *, stage_count: int) -> list[str]:
    """Add the numbers 1 that stages wait for to the first tensor, and name them."""
    owner = gathered.tensors[0]
    one_name, owner.initializers = onnx_decoder.make_one(gathered.fresh, gathered.constants)
    waits, owner.nodes = onnx_decoder.make_stages(one_name, stage_count, gathered.fresh)
    return waits


def _add_stream(
    gathered: _Gathered, pieces: Sequence[tuple[str, int]], packed: stream.Packed, stage: str
) -> None:
    """Add the nodes of a stream and of its pieces.

    pieces: the name of each, and the index of its tensor. stage: name of the number 1 that the
    stream waits for, "" in a file of one stage.
    """
    # 3. What the pieces of the stream share, payload and tables, lies with the first of them: it
    #    has to lie somewhere, once.
    _, owner_index = pieces[0]
    owner = gathered.tensors[owner_index]
    entries = [f"{name}_e" for name, _ in pieces]
    nodes, initializers, tables = onnx_decoder.make_stream_nodes(
        packed, gathered.fresh, entries, gathered.constants, stage=stage
    )
    owner.nodes.extend(nodes)
    owner.initializers.extend(initializers)
    for (name, tensor_index), part in zip(pieces, packed.parts, strict=True):
        parts = gathered.tensors[tensor_index]
        # 4. A shape is written once for all pieces that have it, since that saves bytes.
        shape = tuple(part.shape[axis] for axis in part.permutation)
        if shape not in gathered.shapes:
            shape_name = f"{name}_s"
            gathered.shapes[shape] = shape_name
            lengths = np.array(shape, np.int64)
            parts.initializers.append(onnx_decoder.make_tensor(shape_name, lengths))
        # 5. The nodes that no other piece shares.
        inputs = [f"{name}_e", *tables, gathered.shapes[shape]]
        if stage:
            inputs.append(stage)
        parts.nodes.extend(_make_level_nodes(name, part, inputs))
        parts.nbytes += count_own_bytes(part.entries, packed.slots)


def _make_stored(name: str, parts: _Parts, functions: tuple[FunctionProto, ...]) -> Stored:
    return Stored(
        storage="packed",
        label="packed",
        levels=name,
        type=TensorProto.INT8,
        opset=onnx_decoder.OPSET,
        initializers=tuple(parts.initializers),
        nodes=tuple(parts.nodes),
        functions=functions,
        own_bytes=parts.nbytes,
    )


def _name_pieces(pieces: Sequence[Piece], tensors: Sequence[str]) -> list[str]:
    """A name for each piece: the tensor's own where it is whole."""
    counts = Counter(piece.tensor for piece in pieces)
    names = []
    for piece in pieces:
        name = tensors[piece.tensor]
        if counts[piece.tensor] > 1:
            name = f"{name}_r{piece.begin}"
        names.append(name)
    return names


def _make_level_nodes(name: str, part: stream.Part, inputs: list[str]) -> Iterator[NodeProto]:
    """The call that turns a piece's entries into levels, and a Transpose to the weight's own axes
    where it is coded in another order."""
    levels = f"{name}_t" if part.permuted else name
    yield helper.make_node(onnx_decoder.TENSOR, inputs, [levels], domain=DOMAIN)
    if part.permuted:
        inverse = np.argsort(part.permutation).tolist()
        yield helper.make_node("Transpose", [levels], [name], perm=inverse)


def find_symbol_sequence(levels: np.ndarray, top: int) -> SymbolSequence:
    """Turn a tensor into the symbol sequence that takes fewer bits.

    Args:
        levels: int8, any shape, not empty.
        top: The largest |level| of the file.

    Returns:
        The tensor's pairs in its own order of axes or with the first two swapped, whichever is
        estimated to be smaller.
    """
    permutation = tuple(range(levels.ndim))
    pairs = walk_levels(levels, top)
    # To swap an axis of length 1 leaves the weights in the same order.
    if levels.ndim > 1 and 1 not in levels.shape[:2]:
        swapped = (1, 0, *permutation[2:])
        swapped_pairs = walk_levels(levels.transpose(swapped), top)
        if _estimate_bytes(swapped_pairs, top) + TRANSPOSE_BYTES < _estimate_bytes(pairs, top):
            permutation = swapped
            pairs = swapped_pairs
    return SymbolSequence(levels.shape, permutation, add_contexts(pairs, top), top)


def _estimate_bytes(pairs: np.ndarray, top: int) -> float:
    """About what pairs take: their entropy, but at least a bit each.

    Pairs of 128 zeros, whole runs, count as a bit each, however rare they are in the tensor: they
    come one behind the other, and behind a run the context model has a prefix code of its own.
    """
    counts = np.bincount(pairs, minlength=count_pairs(top))
    run = find_whole_run(top)
    runs = int(counts[run])
    counts[run] = 0
    counts = counts[counts > 0]
    others = len(pairs) - runs
    information = float((counts * np.log2(others / counts)).sum())
    return (max(others, information) + runs) / 8
