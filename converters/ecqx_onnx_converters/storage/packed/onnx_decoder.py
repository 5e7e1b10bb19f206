"""Makes the ONNX nodes, initializers and functions that decode a packed stream at load.

Every input of these nodes is a constant, so that a runtime folds them while loading. onnxruntime
keeps all that it folds until it is done: what counts is bytes of node outputs, per byte of the
payload and per weight. Names are short because each is written at every call; constants are
initializers because a Constant node takes twice their bytes.

    r (table n, digits b, states x) -> all indices y, last states z
        reads 8 rows of digits: i = x + b; x' = n[i]
    D (payload p, tree b, constants[, stage i][, context signs t]) -> entries, int32 or uint8 [all]
        r reads the bits of all 256 bytes from all inner nodes, by the table of the tree, and so
        makes the table of bytes; by that it reads the payload, all lanes at once
    Levels (entries e, advances a, values v, shape s[, stage w]) -> int8 tensor

In a small file bytes count more than memory at load: its functions leave out what makes arrays
smaller (`Packed.compact`). A large file is decoded in several stages (stages.py): what the streams
of one need waits for a number that `make_stages` makes, the length of what a Scan gives, which no
runtime folds. But that length is constant, and known once the stage before is folded and gone; then
the Scan is dead.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Iterator, Mapping, Sequence
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


def make_functions(
    calls: int, *, with_contexts: bool, compact: bool, staged: bool
) -> tuple[FunctionProto, ...]:
    """Make the model-local functions that all packed tensors of a file call.

    Args:
        calls: How often D calls r, see `choices.choose_calls`.
        with_contexts: Whether the streams have several contexts.
        compact: See `Packed`.
        staged: Whether the file is decoded in several stages.

    Returns:
        r, D and Levels.
    """
    decode = _make_decode(calls, with_contexts=with_contexts, compact=compact, staged=staged)
    return (_make_reader(staged=staged), decode, _make_levels(compact=compact, staged=staged))


def make_stream_nodes(
    packed: Packed,
    names: Iterator[str],
    entries: Sequence[str],
    known: dict[bytes, str],
    *,
    stage: str = "",
) -> tuple[list[NodeProto], list[TensorProto], tuple[str, str]]:
    """Make the nodes that decode one stream.

    Args:
        packed: The arrays of the stream.
        names: Names that are free in the graph.
        entries: What the entries of each of its tensors shall be called.
        known: Names of constants that the file has, by `make_tensor` without a name; those that are
            new are added.
        stage: Name of the number 1 that is known in the stream's own stage, see `make_stages`; ""
            in a file of one stage.

    Returns:
        Nodes that make the entries; initializers; and the names of advances and values.
    """
    initializers: list[TensorProto] = []

    def share(values: np.ndarray) -> str:
        """The name of a constant that the file holds once."""
        key = make_tensor("", values).SerializeToString(deterministic=True)
        if key not in known:
            known[key] = next(names)
            initializers.append(make_tensor(known[key], values))
        return known[key]

    # 1. The inputs of D: payload, tree, constants, and what contexts are told by.
    initializers.append(make_tensor(next(names), packed.payload))
    inputs = [initializers[0].name, share(packed.bits)]
    for constant in _make_constants(packed.slots, packed.compact):
        inputs.append(share(constant))
    if stage:
        inputs.append(stage)
    advances = share(packed.advances)
    values_table = share(packed.values)
    if packed.context_model is ContextModel.SIGNS:
        inputs.append(values_table)
    elif packed.context_model is ContextModel.STEADY and packed.has_corrections:
        assert packed.context_signs is not None  # as it is for all streams with contexts
        inputs.append(share(packed.context_signs))
    elif packed.context_model is ContextModel.STEADY:
        inputs.append(advances)
    # 2. The outputs: of each tensor, and what is left over at the end.
    lengths = [part.entries for part in packed.parts]
    outputs = list(entries)
    if packed.rest:
        lengths.append(packed.rest)
        outputs.append(next(names))
    nodes = [helper.make_node(DECODE, inputs, outputs[:1], domain=DOMAIN)]
    # 3. A Split where several tensors, or a tensor and a rest, share the stream.
    if len(outputs) > 1:
        stream = next(names)
        sizes = next(names)
        nodes[0].output[:] = [stream]
        nodes.append(helper.make_node("Split", [stream, sizes], outputs))
        initializers.append(make_tensor(sizes, np.array(lengths, np.int64)))
    return nodes, initializers, (advances, values_table)


def make_one(names: Iterator[str], known: dict[bytes, str]) -> tuple[str, list[TensorProto]]:
    """Make the number 1 that the first stage does not wait for.

    Args:
        names: Names that are free in the graph.
        known: See `make_stream_nodes`.

    Returns:
        The name of [1], int64, and its initializer.
    """
    one = np.array([1])
    name = next(names)
    known[make_tensor("", one).SerializeToString(deterministic=True)] = name
    return name, [make_tensor(name, one)]


def make_stages(one: str, count: int, names: Iterator[str]) -> tuple[list[str], list[NodeProto]]:
    """Make numbers 1, each of which is known only once all that waits for the one before is folded.

    Args:
        one: Name of the constant [1], int64, which is the first.
        count: How many stages there are.
        names: Names that are free in the graph.

    Returns:
        Their names, one for each stage; and the nodes that make them.
    """
    stages = [one]
    nodes: list[NodeProto] = []
    while len(stages) < count:
        length, zero, same, stage = islice(names, 4)
        element = helper.make_tensor_value_info("a", TensorProto.FLOAT, None)
        negated = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
        negation = helper.make_node("Neg", ["a"], ["b"])
        body = helper.make_graph([negation], "s", [element], [negated])
        # A product, since newer runtimes see through what only rearranges shapes, and would know
        # all numbers of the chain at once.
        nodes.append(helper.make_node("ReduceProd", [stages[-1]], [length]))
        nodes.append(helper.make_node("ConstantOfShape", [length], [zero]))
        nodes.append(helper.make_node("Scan", [zero], [same], num_scan_inputs=1, body=body))
        nodes.append(helper.make_node("Shape", [same], [stage]))
        stages.append(stage)
    return stages, nodes


def is_stage(name: str, makers: Mapping[str, NodeProto]) -> bool:
    """Tell whether a value is a number 1 for which a stage waits.

    Args:
        name: An input of D.
        makers: The nodes of the file by what they make.

    Returns:
        Whether it is made by Shape of Scan, as `make_stages` does it.
    """
    for operator in ("Shape", "Scan"):
        node = makers.get(name)
        if node is None or node.op_type != operator or node.domain or len(node.input) != 1:
            return False
        name = node.input[0]
    return True


def make_tensor(name: str, values: np.ndarray) -> TensorProto:
    """Make an initializer in the form of fewer bytes.

    As a list, a small number takes one byte and a negative one ten.

    Args:
        name: What it shall be called.
        values: Any type and shape.

    Returns:
        int32 and int64 as a list where that is shorter, all else raw.
    """
    element_type = helper.np_dtype_to_tensor_dtype(values.dtype)
    stored = TensorProto(
        name=name, data_type=element_type, dims=values.shape, raw_data=values.tobytes()
    )
    if values.dtype not in (np.int32, np.int64):
        return stored
    listed = TensorProto(name=name, data_type=element_type, dims=values.shape)
    numbers = values.reshape(-1).tolist()
    if values.dtype == np.int32:
        listed.int32_data.extend(numbers)
    else:
        listed.int64_data.extend(numbers)
    return min(listed, stored, key=TensorProto.ByteSize)


def _make_constants(slots: int, compact: bool) -> list[np.ndarray]:
    """What D reads beside payload and tree, in the order of its inputs."""
    divisors = 1 << np.arange(7, -1, -1, dtype=np.int32)
    always = [
        divisors.reshape(-1, 1),  # c: by what a byte is divided for each of its bits
        np.array(0, np.int32),  # f: an axis, and the first state
        np.array(1, np.int32),  # a: from one byte to the next
        np.array(2, np.int32),  # d: from one state to the next
        np.array(128, np.int32),  # e: from a state to its place in the table of bytes
        np.array(256, np.int32),  # g: behind the last byte
        np.array([-1]),  # h: one dimension
    ]
    if compact:
        return [*always, np.array([0, 2])]  # k: axes
    axis = np.array([1])  # k
    parts = np.array([slots, DIGIT // slots, -1])  # j: bits of a slot
    return [*always, axis, parts]


def list_known_constants() -> Iterator[tuple[int, int, list[np.ndarray]]]:
    """List the constants of all files that can be read.

    Returns:
        Format (1 and 2 alike: 2), slots, and the constants in the order of D's inputs.
    """
    yield 4, DIGIT, _make_constants(DIGIT, compact=True)
    powers = 1 << np.arange(7, -1, -1)
    for slots in (2, 4, 8):
        yield 4, slots, _make_constants(slots, compact=False)
        parts = np.array([slots, DIGIT // slots, -1])
        numbers = [np.array(number) for number in (0, 1, 2, 128, 256)]
        first = [powers.reshape(-1, 1), np.array([-1]), parts]
        yield 3, slots, [*first, *numbers, np.array(0, np.int32), np.array([1])]
        bytes_first = [powers.astype(np.uint8), np.array([[255], [1], [1]], np.uint8)]
        shapes = [np.array(shape) for shape in (0, [-1], [-1, 2], [1, -1, 2])]
        yield 2, slots, [*bytes_first, *shapes, parts, np.array([1])]


def _make_node(text: str, **attributes: Any) -> NodeProto:
    """'Op a b -> c d'; an operator's name of one letter is a function of ours."""
    left, _, right = text.partition("->")
    operation, *inputs = left.split()
    domain = DOMAIN if len(operation) == 1 else None
    return helper.make_node(operation, inputs, right.split(), domain=domain, **attributes)


def _make_function(
    name: str, inputs: str, outputs: str, nodes: Sequence[NodeProto]
) -> FunctionProto:
    """A model-local function that imports what its nodes need."""
    imports = [helper.make_opsetid("", OPSET)]
    if any(node.domain for node in nodes):
        imports.append(helper.make_opsetid(DOMAIN, 1))
    return helper.make_function(DOMAIN, name, inputs.split(), outputs.split(), list(nodes), imports)


def _list_free_names(taken: Collection[str]) -> Iterator[str]:
    """Letters that aren't taken, then pairs of letters."""
    for letter in "_" + string.ascii_letters:
        if letter not in taken:
            yield letter
    for first, second in product(string.ascii_letters, repeat=2):
        yield first + second


def _make_reader(*, staged: bool) -> FunctionProto:
    """r: table n [all], digits b [8, columns], states x that fit a row.

    Gives the last states z, and y: the indices of all rows, one below the other. In a file of
    several stages digits are of any integer type.
    """
    names = _list_free_names(taken="nbxyz")
    digits = list(islice(names, DIGIT))
    indices = list(islice(names, DIGIT))
    states = list(islice(names, DIGIT))
    states = ["x", *states[1:], "z"]
    nodes = []
    rows = "b"
    if staged:
        rows = next(names)
        nodes.append(_make_node(f"CastLike b n -> {rows}"))
    nodes.append(_make_node(f"Split {rows} -> {' '.join(digits)}", num_outputs=DIGIT))
    for k in range(DIGIT):
        nodes.append(_make_node(f"Add {states[k]} {digits[k]} -> {indices[k]}"))
        nodes.append(_make_node(f"Gather n {indices[k]} -> {states[k + 1]}"))
    nodes.append(_make_node(f"Concat {' '.join(indices)} -> y", axis=0))
    return _make_function("r", "n b x", "z y", nodes)


def _make_decode(calls: int, *, with_contexts: bool, compact: bool, staged: bool) -> FunctionProto:
    """D: payload p uint8 [8 * calls, lanes], tree b uint8 [bytes], constants[, stage i][, context
    signs t].

    Gives the entries y [all]. A state is an inner node's number, times 2 where it is added to a
    bit, and times 256 where it is added to a byte. In a file of several stages payload and tree
    take a shape that waits for the number i.
    """
    tree = "b"
    waiting = []
    if staged:
        tree = "bb"
        waiting = [
            _make_node("Shape b -> ba"),
            _make_node("Mul ba i -> bc"),
            _make_node("Reshape b bc -> bb"),
            _make_node("Shape p -> pa"),
            _make_node("Mul pa i -> pc"),
            _make_node("Reshape p pc -> pb"),
        ]
    # 1. With contexts: to inner node 2, 3 or 4 by the sign of a leaf's t.
    lead = []
    if with_contexts:
        lead = [
            _make_node("Sign t -> l"),
            _make_node("CastLike l a -> m"),
            _make_node("Add a m -> o"),
            _make_node("Add d o -> q"),
            _make_node("Gather q J -> s"),
            _make_node("Mul F s -> u"),
            _make_node("Add u K -> r"),
        ]
    next_node = "r" if with_contexts else "K"
    # 2. The table of the tree, and with it the table of bytes.
    automaton = [
        *waiting,
        _make_node(f"CastLike {tree} a -> A"),
        _make_node("Div A c -> B"),
        _make_node("Mod B d -> C"),
        _make_node("Reshape C h -> F"),  # 1: a leaf
        _make_node("Sub a F -> G"),  # 1: an inner node
        _make_node("CumSum F f -> H"),
        _make_node("CumSum G f -> I"),
        _make_node("Mul F H -> J"),  # which leaf, from 1; 0: none
        _make_node("Mul G I -> K"),  # which inner node; 0: the root, behind a leaf
        *lead,
        _make_node(f"Add {next_node} {next_node} -> n"),
        _make_node("Size n -> L"),
        _make_node("CastLike L a -> E"),
        _make_node("Range f E d -> M"),
        _make_node("Unsqueeze M k -> x"),  # all states
        _make_node("Range f g a -> N"),
        _make_node("Div N c -> O"),
        _make_node("Mod O d -> P"),  # the bits of all bytes
        _make_node("r n P x -> Q R"),
        _make_node("Mul Q e -> X"),
        _make_node("Reshape X h -> Z"),
    ]
    # 3. The entries of each byte read from each state.
    if compact:  # one for each bit
        table = [_make_node("Gather J R -> T"), _make_node("Flatten T -> V")]
    else:
        table = [
            _make_node("CastLike J p -> S"),
            _make_node("Gather S R -> T"),
            _make_node("Reshape T j -> U"),
            _make_node("ReduceMax U k -> V"),
        ]
    table.append(_make_node("Transpose V -> W"))
    # 4. The payload, 8 bytes of every lane a call.
    inputs = "p b c f a d e g h k" + " j" * (not compact) + " i" * staged + " t" * with_contexts
    taken = {*inputs.split(), "v", "w", "z", "D", "y"}
    for node in (*automaton, *table):
        taken.update(node.input)
        taken.update(node.output)
    names = _list_free_names(taken)
    states = ["f", *islice(names, calls)]
    digits = list(islice(names, calls))
    indices = list(islice(names, calls))
    calls_of_reader = [
        _make_node(f"r Z {digits[k]} {states[k]} -> {states[k + 1]} {indices[k]}")
        for k in range(calls)
    ]
    first = [_make_node(f"Split pb -> {' '.join(digits)}", num_outputs=calls)]
    if not staged:
        first = [
            _make_node("CastLike p a -> v"),
            _make_node(f"Split v -> {' '.join(digits)}", num_outputs=calls),
        ]
    reading = [
        *first,
        *calls_of_reader,
        _make_node(f"Concat {' '.join(indices)} -> w", axis=0),
        _make_node("Transpose w -> z"),
        _make_node("Gather W z -> D"),
        _make_node("Reshape D h -> y"),
    ]
    return _make_function(DECODE, inputs, "y", [*automaton, *table, *reading])


def _make_levels(*, compact: bool, staged: bool) -> FunctionProto:
    """Levels: entries e -> y int8 of shape s.

    The value of each symbol is added where all advances so far lead.
    """
    if compact:
        entries = "e"
        first = [_make_node("CastLike a e -> b")]
    else:
        entries = "f"
        first = [
            _make_node("Cast e -> f", to=TensorProto.INT32),
            _make_node("Cast a -> b", to=TensorProto.INT32),
        ]
    shape = "s"
    if staged:
        shape = "r"
        first.append(_make_node("Mul s w -> r"))
    zero = TensorProto(data_type=TensorProto.INT8, dims=[1], raw_data=b"\0")
    nodes = [
        *first,
        _make_node(f"Gather b {entries} -> g"),
        _make_node(f"ReduceProd {shape} -> m"),
        _make_node("Size m -> l"),
        _make_node("Neg l -> h"),  # an axis: -1
        _make_node("CumSum g h -> i"),
        _make_node(f"Gather v {entries} -> j"),
        _make_node("ConstantOfShape m -> n", value=zero),
        _make_node("ScatterElements n i j -> o", reduction="add"),
        _make_node(f"Reshape o {shape} -> y"),
    ]
    inputs = "e a v s w" if staged else "e a v s"
    return _make_function(TENSOR, inputs, "y", nodes)
