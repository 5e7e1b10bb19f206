"""Packed -> ONNX nodes, initializers and model-local functions that give its tensors back.

Every input of these nodes is a constant, so that a runtime folds them while loading. onnxruntime keeps all that it folds until
it is done: what counts is bytes of node outputs, per byte of the payload and per weight. Names are short because each is
written at every call; constants are initializers because a Constant node takes twice their bytes.

    Decode (payload p, tree b, constants[, turns t]) -> entries, uint8 [all]    tables (three times c), then all steps: r calls s,
                                                                             q calls r, o calls q
    s (weights w, states n, entries m, bytes b, states x)       a step of every lane: i = 256 x + b; x' = n[i], entries = m[i]
    Levels (entries e, advances a, values v, shape s[, stage w]) -> int8 tensor

A large file is decoded in two stages, so that what the first leaves behind is gone before levels become floats: the shape that
Levels ends with waits for `stage_nodes`, a Scan over one zero, which no runtime folds. But its output's shape is constant, and
known once the first stage is folded; then the Scan is dead.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto, helper

from ecqx_onnx_converters.storage import DOMAIN
from ecqx_onnx_converters.storage.packed.codec import Form, Packed
from ecqx_onnx_converters.storage.packed.tree import DIGIT

OPSET = 18
DECODE, TENSOR = "Decode", "Levels"
STAGED_FROM = 1 << 20  # weights of a file; fewer leave some megabytes behind at most, and the stage takes 150 bytes


def functions(radices: Sequence[int], *, turning: bool, staged: bool) -> tuple[FunctionProto, ...]:
    """radices: see `codec.best_radices`; turning: the streams have two contexts; staged: two stages."""
    chain = [_chain(name, callee, radix) for (callee, name), radix in zip(pairwise("srqo"), radices, strict=False)]
    return (_step(), *chain, _compose(), _decode(chain[-1].name, turning), _tensor(staged))


def stream_nodes(
    packed: Packed, names: Iterator[str], entries: Sequence[str], known: dict[bytes, str]
) -> tuple[list[NodeProto], list[TensorProto], tuple[str, str]]:
    """Nodes that make the entries of each part under the names `entries`; initializers; names of advances and values.

    known: names of constants that the file has, by `tensor` without a name; those that are new are added.
    """
    inputs, initializers = [], []
    for values in (packed.payload, packed.bits.reshape(-1, 1)):
        initializers.append(tensor(next(names), values))
        inputs.append(initializers[-1].name)
    for values in constants(packed.slots):
        key = tensor("", values).SerializeToString(deterministic=True)
        if key not in known:
            known[key] = next(names)
            initializers.append(tensor(known[key], values))
        inputs.append(known[key])
    advances, values = (tensor(next(names), of) for of in (packed.advances, packed.values))
    if packed.form is not Form.PLAIN:
        inputs.append((values if packed.form is Form.SIGNS else advances).name)
    lengths = [part.entries for part in packed.parts]
    sizes, stream, rest = next(names), next(names), next(names)
    behind = packed.payload.size * packed.slots - sum(lengths)
    initializers += [advances, values, tensor(sizes, np.array([*lengths, behind], np.int64))]
    nodes = [
        helper.make_node(DECODE, inputs, [stream], domain=DOMAIN),
        helper.make_node("Split", [stream, sizes], [*entries, rest]),
    ]
    return nodes, initializers, (advances.name, values.name)


def stage_nodes(one: str, stage: str, names: Iterator[str]) -> Iterator[NodeProto]:
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


def tensor(name: str, values: np.ndarray) -> TensorProto:
    """int64 as a list: small numbers take one byte, not eight."""
    if values.dtype == np.int64:
        return TensorProto(name=name, data_type=TensorProto.INT64, dims=values.shape, int64_data=values.reshape(-1).tolist())
    kind = helper.np_dtype_to_tensor_dtype(values.dtype)
    return TensorProto(name=name, data_type=kind, dims=values.shape, raw_data=values.tobytes())


def constants(slots: int) -> list[np.ndarray]:
    """What Decode reads beside payload and tree, in the order of its inputs."""
    return [
        1 << np.arange(7, -1, -1, dtype=np.uint8),  # c: each bit of a byte
        np.array([[255], [1], [1]], np.uint8),  # w: of x, x and b in 256 x + b
        np.array(0),  # f: an axis
        np.array([-1]),  # h: one dimension
        np.array([-1, 2]),  # i: inner nodes, both children
        np.array([1, -1, 2]),  # g: the same, of one bit
        np.array([slots, DIGIT // slots, -1]),  # j: bits of a slot
        np.array([1]),  # k: an axis, and a number
    ]


def _node(text: str, **attributes: Any) -> NodeProto:
    """'Op a b -> c d'; an operator's name of one letter is a function of ours."""
    left, _, right = text.partition("->")
    operation, *inputs = left.split()
    return helper.make_node(operation, inputs, right.split(), domain=DOMAIN if len(operation) == 1 else None, **attributes)


def _function(name: str, inputs: str, outputs: str, nodes: Sequence[NodeProto]) -> FunctionProto:
    imports = [helper.make_opsetid("", OPSET)]
    if any(node.domain for node in nodes):
        imports.append(helper.make_opsetid(DOMAIN, 1))
    return helper.make_function(DOMAIN, name, inputs.split(), outputs.split(), list(nodes), imports)


def _step() -> FunctionProto:
    """bytes b, inner nodes x, uint8 [lanes, 1] -> inner nodes z, entries y uint8 [lanes, 1, slots].

    256 x + b is 255 x + x + b: a product of bytes is int32 at once, where Cast and Add would leave twice as much behind.
    """
    nodes = [
        _node("Concat x x b -> c", axis=1),
        _node("MatMulInteger c w -> d"),
        _node("Gather n d -> z"),
        _node("Gather m d -> y"),
    ]
    return _function("s", "w n m b x", "z y", nodes)


def _chain(name: str, callee: str, radix: int) -> FunctionProto:
    """The callee radix times, on as many parts of the columns of b; all entries side by side."""
    letters = [letter for letter in string.ascii_letters + string.digits if letter not in "wnmbxyz"]
    columns, states, outputs = (letters[k * radix : (k + 1) * radix] for k in range(3))
    states = ["x", *states[1:], "z"]
    nodes = [_node(f"Split b -> {' '.join(columns)}", axis=1, num_outputs=radix)]
    for k in range(radix):
        nodes.append(_node(f"{callee} w n m {columns[k]} {states[k]} -> {states[k + 1]} {outputs[k]}"))
    nodes.append(_node(f"Concat {' '.join(outputs)} -> y", axis=1))
    return _function(name, "w n m b x", "z y", nodes)


def _compose() -> FunctionProto:
    """Tables of k bits -> of 2 k bits: states n int64 [inner, 2^k], leaves met m uint8 [k, inner, 2^k], one row for each bit."""
    nodes = [
        _node("Gather n n -> a"),
        _node("Flatten a -> y"),
        _node("Gather m n -> c", axis=1),
        _node("Constant -> d", value_ints=[3]),
        _node("Unsqueeze m d -> e"),
        _node("Shape c -> f"),
        _node("Expand e f -> g"),
        _node("Concat g c -> h", axis=0),
        _node("Constant -> i", value_ints=[0, 0, -1]),
        _node("Reshape h i -> z"),
    ]
    return _function("c", "n m", "y z", nodes)


def _decode(callee: str, turning: bool) -> FunctionProto:
    """payload p uint8 [lanes, bytes of a lane], tree b uint8 [bytes, 1], `constants`[, turns t] -> entries y uint8 [all]."""
    after = [_node("Mul G I -> K")]  # which inner node; 0: the root, after a leaf
    if turning:  # 1 after a leaf whose t is positive, 2 after another
        after = [
            _node("Cast t -> a", to=TensorProto.INT64),
            _node("Less a k -> d"),
            _node("Cast d -> e", to=TensorProto.INT64),
            _node("Add e k -> l"),
            _node("Gather l J -> o"),
            _node("Where C o I -> K"),
        ]
    nodes = [
        _node("BitwiseAnd b c -> A"),
        _node("Cast A -> B", to=TensorProto.BOOL),
        _node("Reshape B h -> C"),
        _node("Cast C -> F", to=TensorProto.INT64),  # 1: a leaf
        _node("Sub k F -> G"),  # 1: an inner node
        _node("CumSum F f -> H"),
        _node("CumSum G f -> I"),
        _node("Mul F H -> J"),  # which leaf, from 1; 0: none
        *after,
        _node("Cast J -> L", to=TensorProto.UINT8),
        _node("Reshape K i -> M"),
        _node("Reshape L g -> O"),
        _node("c M O -> P Q"),
        _node("c P Q -> R S"),
        _node("c R S -> T U"),
        _node("Cast T -> V", to=TensorProto.UINT8),
        _node("Reshape V h -> n"),
        _node("Reshape U j -> W"),
        _node("ReduceMax W k -> X", keepdims=0),
        _node("Transpose X -> m"),
        _node("ReduceMin p k -> Y"),
        _node("BitwiseXor Y Y -> x"),  # every lane starts from the root
        _node(f"{callee} w n m p x -> z Z"),
        _node("Reshape Z h -> y"),
    ]
    return _function(DECODE, "p b c w f h i g j k t" if turning else "p b c w f h i g j k", "y", nodes)


def _tensor(staged: bool) -> FunctionProto:
    """entries e uint8 -> y int8 of shape s: the value of each is added where all advances so far lead."""
    last = [_node("Mul s w -> r"), _node("Reshape o r -> y")] if staged else [_node("Reshape o s -> y")]
    nodes = [
        _node("Cast e -> f", to=TensorProto.INT32),
        _node("Cast a -> b", to=TensorProto.INT32),
        _node("Gather b f -> g"),
        _node("Constant -> h", value_int=0),
        _node("CumSum g h -> i"),
        _node("Gather v f -> j"),
        _node("ReduceProd s -> m"),
        _node("ConstantOfShape m -> n", value=TensorProto(data_type=TensorProto.INT8, dims=[1], raw_data=b"\0")),
        _node("ScatterElements n i j -> o", reduction="add"),
        *last,
    ]
    return _function(TENSOR, "e a v s w" if staged else "e a v s", "y", nodes)
