"""int8 levels <-> entropy-coded bytes that the graph itself decodes while a runtime loads it: docs/packed-format.md.

Packed tensors of a file share streams and their decoder, so `encode_all` takes them together; `encode` packs a single one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np
from onnx import TensorProto, helper

from ecqx_onnx_converters.refusal import Refusal
from ecqx_onnx_converters.storage import DOMAIN, MAX_WEIGHTS, Stored
from ecqx_onnx_converters.storage.packed import bitstream, choices, onnx_decoder, stream
from ecqx_onnx_converters.storage.packed.grouping import arrange
from ecqx_onnx_converters.storage.packed.huffman import DIGIT
from ecqx_onnx_converters.storage.packed.reader import count_own_bytes
from ecqx_onnx_converters.storage.packed.stream import SymbolSequence
from ecqx_onnx_converters.storage.packed.symbols import (
    HIGHEST,
    add_contexts,
    count_pairs,
    find_whole_run,
    walk_levels,
)
from ecqx_onnx_converters.targets import Target

TRANSPOSE_BYTES = 40  # what a Transpose node costs


def encode(levels: np.ndarray, name: str, target: Target) -> Stored | Refusal:
    return encode_all([(name, levels)], target)[0]


def encode_all(tensors: Sequence[tuple[str, np.ndarray]], target: Target) -> list[Stored | Refusal]:
    """(name, int8 levels) -> how each is stored. The first that is holds what they share, so keep all or none of them."""
    refusals = [refuse_packing(levels, target) for _, levels in tensors]
    chosen = [tensor for tensor, refusal in zip(tensors, refusals, strict=True) if refusal is None]
    stored = iter(encode_streams(chosen) if chosen else [])
    return [next(stored) if refusal is None else refusal for refusal in refusals]


def refuse_packing(levels: np.ndarray, target: Target) -> Refusal | None:
    if not target.decoders:
        return Refusal(f"target '{target.name}' can't have nodes that decode weights")
    if target.max_opset < onnx_decoder.OPSET:
        return Refusal(
            f"its decoder needs opset {onnx_decoder.OPSET}, and {target.max_opset} is the highest here"
        )
    if not 0 < levels.size < MAX_WEIGHTS:
        return Refusal(f"a tensor of {levels.size} weights can't be packed")
    extreme = max(int(levels.max()), -int(levels.min()))
    if extreme > HIGHEST:
        return Refusal(
            f"levels up to {extreme} are more kinds than a byte can name, which ends at {HIGHEST}"
        )
    return None


def pack_all(tensors: Sequence[np.ndarray]) -> tuple[list[tuple[list[int], stream.Packed]], int]:
    """int8 tensors -> their streams, each with the indices of its tensors; and how often their decoder calls its reader."""
    top = stream.find_top(tensors)
    sequences = [find_symbol_sequence(levels, top) for levels in tensors]
    streams, compact = arrange(sequences)

    def written(calls: int) -> list[tuple[list[int], stream.Packed]]:
        lane = DIGIT * calls
        return [
            (
                members,
                bitstream.write_stream(
                    [sequences[of] for of in members], coding, lane, compact=compact
                ),
            )
            for members, coding in streams
        ]

    calls = choices.choose_calls(sum(coding.nbytes for _, coding in streams), len(streams))
    if not compact:
        return written(calls), calls
    tried = [
        (written(near), near) for near in range(max(1, calls - 1), calls + 1)
    ]  # one fewer is often better, for a small file

    def size(candidate: tuple[list[tuple[list[int], stream.Packed]], int]) -> int:
        streams, calls = candidate
        cut = sum(len(packed.parts) == 1 and packed.rest > 0 for _, packed in streams)
        return (
            sum(packed.nbytes for _, packed in streams)
            + calls * choices.CALL_BYTES
            + cut * choices.CUT_BYTES
        )

    return min(tried, key=size)


def is_staged(tensors: Sequence[np.ndarray]) -> bool:
    return sum(levels.size for levels in tensors) >= choices.STAGED_FROM


def encode_streams(tensors: Sequence[tuple[str, np.ndarray]]) -> list[Stored]:
    streams, calls = pack_all([levels for _, levels in tensors])
    with_contexts, staged = (
        streams[0][1].context_model is not stream.ContextModel.PLAIN,
        is_staged([levels for _, levels in tensors]),
    )
    compact = streams[0][1].compact
    functions = onnx_decoder.make_functions(
        calls, with_contexts=with_contexts, compact=compact, staged=staged
    )
    fresh, known, shapes = (
        (f"{tensors[0][0]}_{index}" for index in count()),
        dict[bytes, str](),
        dict[tuple[int, ...], str](),
    )
    stage: list[str] = []
    made: list[Stored | None] = [None] * len(tensors)
    for members, packed in streams:
        names = [tensors[member][0] for member in members]
        nodes, initializers, tables = onnx_decoder.make_stream_nodes(
            packed, fresh, [f"{name}_e" for name in names], known
        )
        if staged and not stage:
            stage = [next(fresh)]
            one = nodes[0].input[2 + onnx_decoder.ONE]
            nodes.extend(onnx_decoder.make_stage_nodes(one, stage[0], fresh))
        for member, name, part in zip(members, names, packed.parts, strict=True):
            shape = tuple(part.shape[axis] for axis in part.permutation)
            if shape not in shapes:
                shapes[shape] = f"{name}_s"
                initializers.append(
                    onnx_decoder.make_tensor(f"{name}_s", np.array(shape, np.int64))
                )
            levels = f"{name}_t" if part.permuted else name
            own = [
                helper.make_node(
                    onnx_decoder.TENSOR,
                    [f"{name}_e", *tables, shapes[shape], *stage],
                    [levels],
                    domain=DOMAIN,
                )
            ]
            if part.permuted:
                own.append(
                    helper.make_node(
                        "Transpose", [levels], [name], perm=np.argsort(part.permutation).tolist()
                    )
                )
            made[member] = Stored(
                "packed", "packed", name, TensorProto.INT8, onnx_decoder.OPSET, tuple(initializers), (), (*nodes, *own),
                functions,
                own_bytes=count_own_bytes(part.entries, packed.slots),
            )  # fmt: skip
            initializers, nodes = [], []
    return [stored for stored in made if stored is not None]


def find_symbol_sequence(levels: np.ndarray, top: int) -> SymbolSequence:
    """In the tensor's own order of axes or with the first two swapped, whichever distances and values say less."""
    permutation = tuple(range(levels.ndim))
    pair = walk_levels(levels, top)
    if levels.ndim > 1 and 1 not in levels.shape[:2]:
        swapped = (1, 0, *permutation[2:])
        other = walk_levels(levels.transpose(swapped), top)
        if estimate_bytes(other, top) + TRANSPOSE_BYTES < estimate_bytes(pair, top):
            permutation, pair = swapped, other
    return SymbolSequence(levels.shape, permutation, add_contexts(pair, top), top)


def estimate_bytes(pair: np.ndarray, top: int) -> float:
    """About. A word takes a bit at least; runs of zeros come together, and take no more."""
    counts, run = np.bincount(pair, minlength=count_pairs(top)), find_whole_run(top)
    runs, counts[run] = int(counts[run]), 0
    counts = counts[counts > 0]
    found = len(pair) - runs
    return (max(found, float((counts * np.log2(found / counts)).sum())) + runs) / 8
