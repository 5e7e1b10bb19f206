"""Packed -> ONNX nodes, initializers and model-local functions that give its tensors back.

Every input of these nodes is a constant, so that a runtime folds them while loading. onnxruntime keeps all that it folds until
it is done: what counts is bytes of node outputs, per byte of the payload and per weight. Names are short because each is
written at every call; constants are initializers because a Constant node takes twice their bytes.

    r (table n, digits b, states x)         reads 8 rows of digits: i = x + b; x' = n[i]. Gives all i, and the last x'
    D (payload p, tree b, constants[, turns t]) -> entries, int32 or uint8 [all]
                                            r reads the bits of all 256 bytes from all inner nodes, by the table of the tree, and
                                            so makes the table of bytes; by that it reads the payload, all lanes at once
    Levels (entries e, advances a, values v, shape s[, stage w]) -> int8 tensor

In a small file bytes count more than memory at load: its functions leave out what makes arrays smaller (`Packed.compact`).
A large file is decoded in two stages, so that what the first leaves behind is gone before levels become floats: the shape that
Levels ends with waits for `make_stage_nodes`, a Scan over one zero, which no runtime folds. But its output's shape is
constant, and
known once the first stage is folded; then the Scan is dead.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Iterator, Sequence
from itertools import islice, product
from typing import Any

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto, helper

from ecqx_onnx_converters.storage import DOMAIN
from ecqx_onnx_converters.storage.packed.huffman import DIGIT
from ecqx_onnx_converters.storage.packed.stream import ContextModel, Packed

OPSET = 18
DECODE, TENSOR = "D", "Levels"
DECODE_BEFORE = "Decode"  # up to format 3
ONE = 7  # which of the constants of a file that isn't compact is [1]


def make_functions(
    calls: int, *, with_contexts: bool, compact: bool, staged: bool
) -> tuple[FunctionProto, ...]:
    """calls: see `choices.choose_calls`; with_contexts: the streams have several contexts; compact: see `Packed`; staged: two
    stages."""
    return (make_reader(), make_decode(calls, with_contexts, compact), make_levels(compact, staged))


def make_stream_nodes(
    packed: Packed, names: Iterator[str], entries: Sequence[str], known: dict[bytes, str]
) -> tuple[list[NodeProto], list[TensorProto], tuple[str, str]]:
    """Nodes that make the entries of each part under the names `entries`; initializers; names of advances and values.

    known: names of constants that the file has, by `make_tensor` without a name; those that are new are added.
    """
    inputs, initializers = [], []
    for values in (packed.payload, packed.bits):
        initializers.append(make_tensor(next(names), values))
        inputs.append(initializers[-1].name)
    for values in make_constants(packed.slots, packed.compact):
        key = make_tensor("", values).SerializeToString(deterministic=True)
        if key not in known:
            known[key] = next(names)
            initializers.append(make_tensor(known[key], values))
        inputs.append(known[key])
    advances, values = (make_tensor(next(names), of) for of in (packed.advances, packed.values))
    if packed.context_model is not ContextModel.PLAIN:
        inputs.append((values if packed.context_model is ContextModel.SIGNS else advances).name)
    initializers += [advances, values]
    lengths, outputs = [part.entries for part in packed.parts], list(entries)
    if packed.rest:
        lengths.append(packed.rest)
        outputs.append(next(names))
    nodes = [helper.make_node(DECODE, inputs, outputs[:1], domain=DOMAIN)]
    if len(outputs) > 1:
        stream, sizes = next(names), next(names)
        nodes[0].output[:] = [stream]
        nodes.append(helper.make_node("Split", [stream, sizes], outputs))
        initializers.append(make_tensor(sizes, np.array(lengths, np.int64)))
    return nodes, initializers, (advances.name, values.name)


def make_stage_nodes(one: str, stage: str, names: Iterator[str]) -> Iterator[NodeProto]:
    """one: [1], a constant. -> stage: [1] as well, but constant only after all that is so at first."""
    length, zero, same = next(names), next(names), next(names)
    value = (
        helper.make_tensor_value_info("a", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("b", TensorProto.FLOAT, None),
    )
    body = helper.make_graph([helper.make_node("Neg", ["a"], ["b"])], "s", [value[0]], [value[1]])
    yield helper.make_node("Mul", [one, one], [length])
    yield helper.make_node("ConstantOfShape", [length], [zero])
    yield helper.make_node("Scan", [zero], [same], num_scan_inputs=1, body=body)
    yield helper.make_node("Shape", [same], [stage])


def make_tensor(name: str, values: np.ndarray) -> TensorProto:
    """Integers as a list where that is shorter: small numbers take one byte, and negative ones ten."""
    kind = helper.np_dtype_to_tensor_dtype(values.dtype)
    stored = TensorProto(name=name, data_type=kind, dims=values.shape, raw_data=values.tobytes())
    if values.dtype not in (np.int32, np.int64):
        return stored
    listed = TensorProto(name=name, data_type=kind, dims=values.shape)
    (listed.int32_data if values.dtype == np.int32 else listed.int64_data).extend(
        values.reshape(-1).tolist()
    )
    return min(listed, stored, key=TensorProto.ByteSize)


def make_constants(slots: int, compact: bool) -> list[np.ndarray]:
    """What D reads beside payload and tree, in the order of its inputs."""
    always = [
        1
        << np.arange(7, -1, -1, dtype=np.int32).reshape(
            -1, 1
        ),  # c: by what a byte is divided for each of its bits
        np.array(0, np.int32),  # f: an axis, and the first state
        np.array(1, np.int32),  # a: from one byte to the next
        np.array(2, np.int32),  # d: from one state to the next
        np.array(128, np.int32),  # e: from a state to its place in the table of bytes
        np.array(256, np.int32),  # g: behind the last byte
        np.array([-1]),  # h: one dimension
    ]
    if compact:
        return [*always, np.array([0, 2])]  # k: axes
    return [
        *always,
        np.array([1]),
        np.array([slots, DIGIT // slots, -1]),
    ]  # k: an axis; j: bits of a slot


def list_known_constants() -> Iterator[tuple[int, int, list[np.ndarray]]]:
    """Format (1 and 2 alike: 2), slots, and the constants, of all files that can be read."""
    yield 4, DIGIT, make_constants(DIGIT, compact=True)
    powers = 1 << np.arange(7, -1, -1)
    for slots in (2, 4, 8):
        yield 4, slots, make_constants(slots, compact=False)
        numbers, parts = map(np.array, (0, 1, 2, 128, 256)), np.array([slots, DIGIT // slots, -1])
        yield (
            3,
            slots,
            [
                powers.reshape(-1, 1),
                np.array([-1]),
                parts,
                *numbers,
                np.array(0, np.int32),
                np.array([1]),
            ],
        )
        before = [powers.astype(np.uint8), np.array([[255], [1], [1]], np.uint8)]
        yield (
            2,
            slots,
            [*before, *map(np.array, (0, [-1], [-1, 2], [1, -1, 2])), parts, np.array([1])],
        )


def make_node(text: str, **attributes: Any) -> NodeProto:
    """'Op a b -> c d'; an operator's name of one letter is a function of ours."""
    left, _, right = text.partition("->")
    operation, *inputs = left.split()
    return helper.make_node(
        operation,
        inputs,
        right.split(),
        domain=DOMAIN if len(operation) == 1 else None,
        **attributes,
    )


def make_function(
    name: str, inputs: str, outputs: str, nodes: Sequence[NodeProto]
) -> FunctionProto:
    imports = [helper.make_opsetid("", OPSET)]
    if any(node.domain for node in nodes):
        imports.append(helper.make_opsetid(DOMAIN, 1))
    return helper.make_function(DOMAIN, name, inputs.split(), outputs.split(), list(nodes), imports)


def list_free_names(taken: Collection[str]) -> Iterator[str]:
    """Letters that aren't taken, then pairs of letters."""
    yield from (letter for letter in "_" + string.ascii_letters if letter not in taken)
    yield from ("".join(pair) for pair in product(string.ascii_letters, repeat=2))


def make_reader() -> FunctionProto:
    """table n [all], digits b [8, columns], states x that fit a row -> the last states z, and y: indices of all rows, one below
    the other."""
    names = list_free_names(taken="nbxyz")
    digits, indices, states = (list(islice(names, DIGIT)) for _ in range(3))
    states = ["x", *states[1:], "z"]
    nodes = [make_node(f"Split b -> {' '.join(digits)}", num_outputs=DIGIT)]
    for k in range(DIGIT):
        nodes.append(make_node(f"Add {states[k]} {digits[k]} -> {indices[k]}"))
        nodes.append(make_node(f"Gather n {indices[k]} -> {states[k + 1]}"))
    nodes.append(make_node(f"Concat {' '.join(indices)} -> y", axis=0))
    return make_function("r", "n b x", "z y", nodes)


def make_decode(calls: int, with_contexts: bool, compact: bool) -> FunctionProto:
    """payload p uint8 [8 * calls, lanes], tree b uint8 [bytes], `make_constants`[, turns t] -> entries y [all].

    A state is an inner node's number, times 2 where it is added to a bit, and times 256 where it is added to a byte.
    """
    turn = []
    if with_contexts:  # to inner node 2, 3 or 4 by the sign of a leaf's t
        turn = [
            make_node("Sign t -> l"),
            make_node("CastLike l a -> m"),
            make_node("Add a m -> o"),
            make_node("Add d o -> q"),
            make_node("Gather q J -> s"),
            make_node("Mul F s -> u"),
            make_node("Add u K -> r"),
        ]
    automaton = [
        make_node("CastLike b a -> A"),
        make_node("Div A c -> B"),
        make_node("Mod B d -> C"),
        make_node("Reshape C h -> F"),  # 1: a leaf
        make_node("Sub a F -> G"),  # 1: an inner node
        make_node("CumSum F f -> H"),
        make_node("CumSum G f -> I"),
        make_node("Mul F H -> J"),  # which leaf, from 1; 0: none
        make_node("Mul G I -> K"),  # which inner node; 0: the root, behind a leaf
        *turn,
        make_node("Add r r -> n" if with_contexts else "Add K K -> n"),
        make_node("Size n -> L"),
        make_node("CastLike L a -> E"),
        make_node("Range f E d -> M"),
        make_node("Unsqueeze M k -> x"),  # all states
        make_node("Range f g a -> N"),
        make_node("Div N c -> O"),
        make_node("Mod O d -> P"),  # the bits of all bytes
        make_node("r n P x -> Q R"),
        make_node("Mul Q e -> X"),
        make_node("Reshape X h -> Z"),
    ]
    if compact:  # an entry for each bit
        table = [make_node("Gather J R -> T"), make_node("Flatten T -> V")]
    else:
        table = [
            make_node("CastLike J p -> S"),
            make_node("Gather S R -> T"),
            make_node("Reshape T j -> U"),
            make_node("ReduceMax U k -> V"),
        ]
    table.append(make_node("Transpose V -> W"))  # entries of each byte read from each state
    inputs = "p b c f a d e g h k" + " j" * (not compact) + " t" * with_contexts
    taken = {name for node in (*automaton, *table) for name in (*node.input, *node.output)}
    names = list_free_names(taken={*inputs.split(), *taken, "v", "w", "z", "D", "y"})
    states, digits, indices = (list(islice(names, calls)) for _ in range(3))
    states = ["f", *states]
    reading = [
        make_node("CastLike p a -> v"),
        make_node(f"Split v -> {' '.join(digits)}", num_outputs=calls),
        *(
            make_node(f"r Z {digits[k]} {states[k]} -> {states[k + 1]} {indices[k]}")
            for k in range(calls)
        ),
        make_node(f"Concat {' '.join(indices)} -> w", axis=0),
        make_node("Transpose w -> z"),
        make_node("Gather W z -> D"),
        make_node("Reshape D h -> y"),
    ]
    return make_function(DECODE, inputs, "y", [*automaton, *table, *reading])


def make_levels(compact: bool, staged: bool) -> FunctionProto:
    """entries e -> y int8 of shape s: the value of each is added where all advances so far lead."""
    last = (
        [make_node("Mul s w -> r"), make_node("Reshape o r -> y")]
        if staged
        else [make_node("Reshape o s -> y")]
    )
    if compact:
        entries, first = "e", [make_node("CastLike a e -> b")]
    else:
        entries, first = (
            "f",
            [
                make_node("Cast e -> f", to=TensorProto.INT32),
                make_node("Cast a -> b", to=TensorProto.INT32),
            ],
        )
    nodes = [
        *first,
        make_node(f"Gather b {entries} -> g"),
        make_node("ReduceProd s -> m"),
        make_node("Size m -> l"),
        make_node("Neg l -> h"),  # an axis: -1
        make_node("CumSum g h -> i"),
        make_node(f"Gather v {entries} -> j"),
        make_node(
            "ConstantOfShape m -> n",
            value=TensorProto(data_type=TensorProto.INT8, dims=[1], raw_data=b"\0"),
        ),
        make_node("ScatterElements n i j -> o", reduction="add"),
        *last,
    ]
    return make_function(TENSOR, "e a v s w" if staged else "e a v s", "y", nodes)
