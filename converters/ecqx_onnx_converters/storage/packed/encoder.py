"""The packed codec's encoder: int8 levels become entropy-coded bytes that the graph itself decodes.

A runtime folds the decoder while it loads the file (docs/packed-format.md). Packed tensors of a
file share streams and their decoder, so `encode_all` takes them together; `encode` packs a single
one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from onnx import NodeProto, TensorProto, helper

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

# A file's streams, each with the indices of its tensors.
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
        For each weight parts of a graph, or why it cannot be packed. The first that is packed holds
        what all share, so keep all of them or none.
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
    """Pack the tensors of a file into streams.

    Args:
        tensors: int8, none of them empty.
        stages: In which stage each is decoded; None for one stage. What two stages decode has no
            payload in common, even where it shares tables.

    Returns:
        The streams, each with the ascending indices of its tensors; and how often their decoder
        calls its reader, see `choices.choose_calls`.
    """
    # 1. Levels become symbol sequences, and these are grouped.
    top = stream.find_top(tensors)
    sequences = [find_symbol_sequence(levels, top) for levels in tensors]
    streams, compact = arrange(sequences)
    # 2. The length of a lane. For a small file one call fewer than estimated is often better: try.
    size = sum(coding.nbytes for _, coding in streams)
    if stages is not None:
        streams = list(_divide_by_stage(streams, stages))
    calls = choices.choose_calls(size, len(streams), staged=stages is not None)
    candidates = [calls]
    if compact and calls > 1:
        candidates = [calls - 1, calls]
    # 3. Write, and keep what takes fewer bytes.
    written: list[tuple[Streams, int]] = []
    for number in candidates:
        lane_bytes = DIGIT * number
        made: Streams = []
        for members, coding in streams:
            own = [sequences[member] for member in members]
            packed = bitstream.write_stream(own, coding, lane_bytes, compact=compact)
            made.append((members, packed))
        written.append((made, number))
    return min(written, key=_count_written_bytes)


def _count_written_bytes(candidate: tuple[Streams, int]) -> int:
    """Bytes of all that depends on the number of calls."""
    streams, calls = candidate
    cut = sum(len(packed.parts) == 1 and packed.rest > 0 for _, packed in streams)
    payload = sum(packed.nbytes for _, packed in streams)
    return payload + calls * choices.CALL_BYTES + cut * choices.CUT_BYTES


def _divide_by_stage(
    streams: Sequence[tuple[list[int], stream.Coding]], stages: Sequence[int]
) -> Iterator[tuple[list[int], stream.Coding]]:
    """The streams of each stage, stage by stage; those of one coding have the same tables."""
    for stage in range(max(stages) + 1):
        for members, coding in streams:
            own = [member for member in members if stages[member] == stage]
            if own:
                yield own, coding


@dataclass
class _Parts:
    """What becomes a tensor's `Stored`, while it is gathered."""

    nodes: list[NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    nbytes: int = 0


def _encode_streams(tensors: Sequence[tuple[str, np.ndarray]]) -> list[Stored]:
    """Packed streams as parts of a graph, for each weight its own."""
    arrays = [levels for _, levels in tensors]
    # 1. Pieces of the tensors, each decoded in one stage.
    staged = is_staged(arrays)
    pieces = plan_stages(arrays)
    cut = [cut_piece(arrays[piece.tensor], piece) for piece in pieces]
    numbers = [piece.stage for piece in pieces] if staged else None
    streams, calls = pack_all(cut, stages=numbers)
    names = _name_pieces(pieces, [name for name, _ in tensors])
    # 2. What all share goes with the first tensor.
    first = streams[0][1]  # contexts and compactness are the same for all
    functions = onnx_decoder.make_functions(
        calls,
        with_contexts=first.context_model is not stream.ContextModel.PLAIN,
        compact=first.compact,
        staged=staged,
    )
    fresh = (f"{tensors[0][0]}_{index}" for index in count())
    constants: dict[bytes, str] = {}
    shapes: dict[tuple[int, ...], str] = {}
    parts = [_Parts() for _ in tensors]
    waits = [""]
    if staged:
        number = 1 + max(piece.stage for piece in pieces)
        one, parts[0].initializers = onnx_decoder.make_one(fresh, constants)
        waits, parts[0].nodes = onnx_decoder.make_stages(one, number, fresh)
    for members, packed in streams:
        # 3. What a stream's pieces share goes with the first of them.
        own = parts[pieces[members[0]].tensor]
        stage = waits[pieces[members[0]].stage]
        entries = [f"{names[member]}_e" for member in members]
        nodes, initializers, tables = onnx_decoder.make_stream_nodes(
            packed, fresh, entries, constants, stage=stage
        )
        own.nodes.extend(nodes)
        own.initializers.extend(initializers)
        for member, part in zip(members, packed.parts, strict=True):
            # 4. Pieces of the same shape share it.
            own = parts[pieces[member].tensor]
            shape = tuple(part.shape[axis] for axis in part.permutation)
            if shape not in shapes:
                shapes[shape] = f"{names[member]}_s"
                values = np.array(shape, np.int64)
                own.initializers.append(onnx_decoder.make_tensor(shapes[shape], values))
            # 5. The nodes that are a piece's own.
            inputs = [f"{names[member]}_e", *tables, shapes[shape]]
            if staged:
                inputs.append(stage)
            own.nodes.extend(_make_level_nodes(names[member], part, inputs))
            own.nbytes += count_own_bytes(part.entries, packed.slots)
    stored = []
    for index, (name, _) in enumerate(tensors):
        # 6. Slices are joined.
        own = parts[index]
        slices = [member for member, piece in enumerate(pieces) if piece.tensor == index]
        if len(slices) > 1:
            axis = pieces[slices[0]].axis
            whole = [names[member] for member in slices]
            own.nodes.append(helper.make_node("Concat", whole, [name], axis=axis))
        stored.append(
            Stored(
                storage="packed",
                label="packed",
                levels=name,
                type=TensorProto.INT8,
                opset=onnx_decoder.OPSET,
                initializers=tuple(own.initializers),
                nodes=tuple(own.nodes),
                functions=functions,
                own_bytes=own.nbytes,
            )
        )
    return stored


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
    """The call that turns a tensor's entries into levels, and back into the weight's own axes."""
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
        In the tensor's own order of axes or with the first two swapped, whichever is estimated to
        be smaller.
    """
    permutation = tuple(range(levels.ndim))
    pair = walk_levels(levels, top)
    if levels.ndim > 1 and 1 not in levels.shape[:2]:
        swapped = (1, 0, *permutation[2:])
        other = walk_levels(levels.transpose(swapped), top)
        if _estimate_bytes(other, top) + TRANSPOSE_BYTES < _estimate_bytes(pair, top):
            permutation = swapped
            pair = other
    return SymbolSequence(levels.shape, permutation, add_contexts(pair, top), top)


def _estimate_bytes(pair: np.ndarray, top: int) -> float:
    """About what pairs take: their entropy, but at least a bit each.

    Whole runs of zeros come one behind the other, and take a bit each.
    """
    counts = np.bincount(pair, minlength=count_pairs(top))
    run = find_whole_run(top)
    runs = int(counts[run])
    counts[run] = 0
    counts = counts[counts > 0]
    found = len(pair) - runs
    information = float((counts * np.log2(found / counts)).sum())
    return (max(found, information) + runs) / 8
