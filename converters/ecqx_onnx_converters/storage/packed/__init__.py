"""int8 levels <-> entropy-coded bytes that the graph itself decodes while a runtime loads it: docs/packed-format.md.

Packed tensors of a file share streams and their decoder, so `encode_all` takes them together; `encode` packs a single one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count

import numpy as np
from onnx import NodeProto, TensorProto, helper

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.graph import tensor_values
from ecqx_onnx_converters.storage import DOMAIN, MAX_WEIGHTS, Contents, Refusal, Stored
from ecqx_onnx_converters.storage.packed import codec, decoder
from ecqx_onnx_converters.storage.packed.codec import Survey
from ecqx_onnx_converters.storage.packed.streams import arrange
from ecqx_onnx_converters.storage.packed.tree import DIGIT
from ecqx_onnx_converters.storage.packed.units import HIGHEST, contextual, size_of, walk, whole_run
from ecqx_onnx_converters.targets import Target

TURN_BYTES = 40  # what a Transpose node costs


def encode(levels: np.ndarray, name: str, target: Target) -> Stored | Refusal:
    return encode_all([(name, levels)], target)[0]


def encode_all(tensors: Sequence[tuple[str, np.ndarray]], target: Target) -> list[Stored | Refusal]:
    """(name, int8 levels) -> how each is stored. The first that is holds what they share, so keep all or none of them."""
    refusals = [_why_not(levels, target) for _, levels in tensors]
    chosen = [tensor for tensor, refusal in zip(tensors, refusals, strict=True) if refusal is None]
    stored = iter(_encode(chosen) if chosen else [])
    return [next(stored) if refusal is None else refusal for refusal in refusals]


def _why_not(levels: np.ndarray, target: Target) -> Refusal | None:
    if not target.decoders:
        return Refusal(f"target '{target.name}' can't have nodes that decode weights")
    if target.max_opset < decoder.OPSET:
        return Refusal(f"its decoder needs opset {decoder.OPSET}, and {target.max_opset} is the highest here")
    if not 0 < levels.size < MAX_WEIGHTS:
        return Refusal(f"a tensor of {levels.size} weights can't be packed")
    extreme = max(int(levels.max()), -int(levels.min()))
    if extreme > HIGHEST:
        return Refusal(f"levels up to {extreme} are more kinds than a byte can name, which ends at {HIGHEST}")
    return None


def pack_all(tensors: Sequence[np.ndarray]) -> tuple[list[tuple[list[int], codec.Packed]], int]:
    """int8 tensors -> their streams, each with the indices of its tensors; and how often their decoder calls its reader."""
    top = codec.top_of(tensors)
    surveys = [survey(levels, top) for levels in tensors]
    streams, compact = arrange(surveys)

    def written(calls: int) -> list[tuple[list[int], codec.Packed]]:
        lane = DIGIT * calls
        return [(members, codec.write([surveys[of] for of in members], how, lane, compact=compact)) for members, how in streams]

    calls = codec.best_calls(sum(how.nbytes for _, how in streams), len(streams))
    if not compact:
        return written(calls), calls
    tried = [(written(near), near) for near in range(max(1, calls - 1), calls + 1)]  # one fewer is often better, for a small file

    def size(way: tuple[list[tuple[list[int], codec.Packed]], int]) -> int:
        streams, calls = way
        cut = sum(len(packed.parts) == 1 and packed.rest > 0 for _, packed in streams)
        return sum(packed.nbytes for _, packed in streams) + calls * codec.CALL_BYTES + cut * codec.CUT_BYTES

    return min(tried, key=size)


def _staged(tensors: Sequence[np.ndarray]) -> bool:
    return sum(levels.size for levels in tensors) >= codec.STAGED_FROM


def _encode(tensors: Sequence[tuple[str, np.ndarray]]) -> list[Stored]:
    streams, calls = pack_all([levels for _, levels in tensors])
    turning, staged = streams[0][1].form is not codec.Form.PLAIN, _staged([levels for _, levels in tensors])
    compact = streams[0][1].compact
    functions = decoder.functions(calls, turning=turning, compact=compact, staged=staged)
    fresh, known, shapes = (f"{tensors[0][0]}_{index}" for index in count()), dict[bytes, str](), dict[tuple[int, ...], str]()
    stage: list[str] = []
    made: list[Stored | None] = [None] * len(tensors)
    for members, packed in streams:
        names = [tensors[member][0] for member in members]
        nodes, initializers, tables = decoder.stream_nodes(packed, fresh, [f"{name}_e" for name in names], known)
        if staged and not stage:
            stage = [next(fresh)]
            one = nodes[0].input[2 + decoder.ONE]
            nodes.extend(decoder.stage_nodes(one, stage[0], fresh))
        for member, name, part in zip(members, names, packed.parts, strict=True):
            shape = tuple(part.shape[axis] for axis in part.order)
            if shape not in shapes:
                shapes[shape] = f"{name}_s"
                initializers.append(decoder.tensor(f"{name}_s", np.array(shape, np.int64)))
            levels = f"{name}_t" if part.turned else name
            own = [helper.make_node(decoder.TENSOR, [f"{name}_e", *tables, shapes[shape], *stage], [levels], domain=DOMAIN)]
            if part.turned:
                own.append(helper.make_node("Transpose", [levels], [name], perm=np.argsort(part.order).tolist()))
            made[member] = Stored(
                "packed", "packed", name, TensorProto.INT8, decoder.OPSET, tuple(initializers), (), (*nodes, *own), functions,
                own_bytes=_own_bytes(part.entries, packed.slots),
            )  # fmt: skip
            initializers, nodes = [], []
    return [stored for stored in made if stored is not None]


def _own_bytes(entries: int, slots: int) -> int:
    """A tensor's stretch of the payload."""
    return -(-entries // slots)


def survey(levels: np.ndarray, top: int) -> Survey:
    """In the tensor's own order of axes or with the first two swapped, whichever distances and values say less."""
    order = tuple(range(levels.ndim))
    pair = walk(levels, top)
    if levels.ndim > 1 and 1 not in levels.shape[:2]:
        swapped = (1, 0, *order[2:])
        other = walk(levels.transpose(swapped), top)
        if _pair_bytes(other, top) + TURN_BYTES < _pair_bytes(pair, top):
            order, pair = swapped, other
    return Survey(levels.shape, order, contextual(pair, top), top)


def _pair_bytes(pair: np.ndarray, top: int) -> float:
    """About. A word takes a bit at least; runs of zeros come together, and take no more."""
    counts, run = np.bincount(pair, minlength=size_of(top)), whole_run(top)
    runs, counts[run] = int(counts[run]), 0
    counts = counts[counts > 0]
    found = len(pair) - runs
    return (max(found, float((counts * np.log2(found / counts)).sum())) + runs) / 8


def decode(name: str, contents: Contents) -> np.ndarray:
    node, order = _tensor_node(name, contents)
    stream, begins = _stream(node, contents)
    shape = tuple(_sizes(node.input[3], contents).tolist())
    if not 0 < math.prod(shape) < MAX_WEIGHTS:
        raise FileError(f"packed tensor '{name}' has shape {list(shape)}; the ONNX file is damaged")
    begin, end = begins[node.input[0]]
    advances, values = (_values(table, contents) for table in node.input[1:3])
    levels = codec.place(stream[begin:end], advances, values, math.prod(shape)).reshape(shape)
    if order is not None:
        if sorted(order) != list(range(levels.ndim)):
            raise FileError(f"packed tensor '{name}' is transposed by {order}; the ONNX file is damaged")
        levels = np.ascontiguousarray(levels.transpose(order))
    return levels


def stored_bytes(name: str, contents: Contents) -> int:
    node, _ = _tensor_node(name, contents)
    stream, begins = _stream(node, contents)
    begin, end = begins[node.input[0]]
    payload = contents.initializers[_makers(node, contents)[0].input[0]]
    return _own_bytes(end - begin, len(stream) // max(1, math.prod(payload.dims)))


def _tensor_node(name: str, contents: Contents) -> tuple[NodeProto, list[int] | None]:
    """The node of a packed tensor, and the axes by which its outcome is transposed."""
    node, order = contents.makers[name], None
    if node.op_type == "Transpose" and not node.domain:
        order = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), [])
        node = contents.makers[node.input[0]]
    if node.domain != DOMAIN or node.op_type != decoder.TENSOR or len(node.input) not in (4, 5):
        raise FileError(
            f"packed tensor '{name}' is made by {node.op_type} of {len(node.input)} inputs, not by its decoder;"
            " the ONNX file is damaged"
        )
    return node, order


def _makers(node: NodeProto, contents: Contents) -> tuple[NodeProto, NodeProto | None]:
    """What makes the entries that a tensor's node reads: D, and Split where others have a share in them."""
    maker, split = contents.makers[node.input[0]], None
    if maker.op_type == "Split" and not maker.domain:
        maker, split = contents.makers[maker.input[0]], maker
    if maker.op_type not in (decoder.DECODE, decoder.DECODE_BEFORE) or maker.domain != DOMAIN:
        raise FileError(f"the packed entries '{node.input[0]}' aren't made by their decoder; the ONNX file is damaged")
    if len(maker.input) < 2 or (split is not None and len(split.input) != 2):
        raise FileError(f"the decoder of the packed entries '{node.input[0]}' lacks inputs; the ONNX file is damaged")
    return maker, split


def _stream(node: NodeProto, contents: Contents) -> tuple[np.ndarray, dict[str, tuple[int, int]]]:
    """All entries that the tensor's group holds (decoded once), and begin and end of each tensor's own, by name."""
    maker, split = _makers(node, contents)
    key = maker.output[0]
    if key not in contents.cache:
        payload, bits, *constants = (_values(value, contents) for value in maker.input)
        version, slots, turns = _told(constants)
        after = None
        if turns is not None:
            after = np.where(turns > 0, 1, 2) if version < 3 else codec.next_nodes(turns)
        if bits.dtype != np.uint8:
            raise FileError(f"the tree of the packed weights has type {bits.dtype}; the ONNX file is damaged")
        if version > 2 and (payload.ndim != 2 or len(payload) % DIGIT):
            raise FileError(f"the payload of the packed weights has shape {list(payload.shape)}; the ONNX file is damaged")
        bits = codec.unpack_tree(bits) if version > 3 else np.unpackbits(bits.reshape(-1))
        stream = codec.decode(payload.T if version < 3 else payload, bits, slots, after)
        if split is None:
            contents.cache[key] = stream, {key: (0, len(stream))}
            return contents.cache[key]
        sizes = _sizes(split.input[1], contents)
        if sizes.sum() != len(stream) or len(sizes) != len(split.output):
            raise FileError(f"the packed entries are cut into parts of {sizes.tolist()[:9]}; the ONNX file is damaged")
        ends = np.cumsum(sizes)
        cuts = {output: (int(end - size), int(end)) for output, end, size in zip(split.output, ends, sizes, strict=True)}
        contents.cache[key] = stream, cuts
    return contents.cache[key]


def _told(constants: Sequence[np.ndarray]) -> tuple[int, int, np.ndarray | None]:
    """What D reads behind payload and tree -> the format (1 and 2 alike: 2), slots, and turns."""
    for version, slots, known in decoder.all_constants():
        if _same(constants[: len(known)], known) and len(constants) <= len(known) + 1:
            return version, slots, (constants[len(known)] if len(constants) > len(known) else None)
    raise FileError(
        "the decoder of the packed weights has other constants than those of docs/packed-format.md; the file is damaged"
    )


def _same(ones: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> bool:
    return len(ones) == len(others) and all(
        one.dtype == other.dtype and np.array_equal(one, other) for one, other in zip(ones, others, strict=True)
    )


def _sizes(name: str, contents: Contents) -> np.ndarray:
    sizes = _values(name, contents)
    if sizes.dtype != np.int64 or sizes.ndim != 1 or sizes.min(initial=0) < 0:
        raise FileError(f"the sizes '{name}' of packed weights are {sizes.dtype} {list(sizes.shape)}; the ONNX file is damaged")
    return sizes


def _values(name: str, contents: Contents) -> np.ndarray:
    return tensor_values(contents.initializers[name])
