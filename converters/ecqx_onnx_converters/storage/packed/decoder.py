"""Packed -> ONNX nodes, initializers and model-local functions that decode it; opset 18 operators only.

Every input is a constant, so a runtime that folds constants holds plain weights after loading. The functions are
straight-line code: no loop, but rounds unrolled into steps, and each step takes all lanes at once. Names are one letter
and tensors have one dimension where that does (no axis attribute): both are bytes in every file.

    d   a group: payload -> levels            a, b   one tensor out of the group's levels
    t   tables that every step reads          s, s8 ..   one step, many steps
    i   tables that contexts read             r, r8 ..   a round: contexts, steps, sums; many rounds
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from ecqx_onnx_converters.storage.packed.codec import Packed
from ecqx_onnx_converters.storage.packed.model import KERNEL_PRIOR, LINE_PRIOR, LOG_SIZE, MASS_LIMIT, SCORES, SLOTS, View
from ecqx_onnx_converters.storage.packed.stream import LOW, STATE_BITS

DOMAIN = "ecqx"
OPSET = 18
FAN = 8  # calls in one of the nested functions
# What a step reads: windows of 24 bits, tables of frequency, slot - start, symbol, missing bits; powers of 2, 4096, axis 0;
# 256 / 2**i and 8. A runtime copies each for every node that reads it, so that one window a bit would cost more than it saves.
STEP = [*"wfgynpkuaz"]
# What every round reads besides: growth of divisors, prior sums, lines, logarithm, score's first slot, mass, 32 * gain.
ROUND = [*STEP, *"ijlqtvh"]


class _Function:
    """Collects the nodes of one FunctionProto."""

    def __init__(self, name: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Sequence[str] = ()):
        self.name, self.inputs, self.outputs, self.attributes = name, list(inputs), list(outputs), list(attributes)
        self.nodes: list[NodeProto] = []
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], str] = {}

    def add(
        self, op: str, inputs: str | Sequence[str], outputs: str | Sequence[str], *, domain: str = "", **attributes: Any
    ) -> None:
        """Names in one string are parted by blanks."""
        ins = inputs.split() if isinstance(inputs, str) else inputs
        outs = outputs.split() if isinstance(outputs, str) else outputs
        self.nodes.append(helper.make_node(op, ins, outs, domain=domain or None, **attributes))

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """The name of a constant; equal ones are written once."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.tobytes(), array.shape)
        if key not in self._constants:
            self._constants[key] = name = f"_{len(self._constants)}"
            if array.dtype == np.int64 and array.ndim <= 1 and array.size < 3:
                self.add("Constant", "", name, **({"value_ints": array.tolist()} if array.ndim else {"value_int": int(array)}))
            else:
                self.add("Constant", "", name, value=numpy_helper.from_array(array))
        return self._constants[key]

    def int32(self, value: Any) -> str:
        return self.constant(value, np.int32)

    def attribute(self, output: str, name: str) -> None:
        """An int64 vector out of the calling node's attribute."""
        node = helper.make_node("Constant", [], [output])
        node.attribute.append(onnx.AttributeProto(name="value_ints", ref_attr_name=name, type=onnx.AttributeProto.INTS))
        self.nodes.append(node)

    def proto(self) -> FunctionProto:
        imports = [helper.make_opsetid("", OPSET)]
        if any(node.domain for node in self.nodes):
            imports.append(helper.make_opsetid(DOMAIN, 1))
        return helper.make_function(DOMAIN, self.name, self.inputs, self.outputs, self.nodes, imports, self.attributes)


def _fill(dtype: Any, value: int) -> TensorProto:
    return numpy_helper.from_array(np.array([value], dtype))


def _tables() -> FunctionProto:
    """(payload uint8, frequencies uint16 [contexts, symbols], states uint16) -> states x and what steps read."""
    f = _Function("t", ["P", "F", "S"], ["x", *STEP])
    f.add("Constant", "", "k", value=numpy_helper.from_array(np.array(SLOTS, np.int32)))
    f.add("Constant", "", "u", value_int=0)
    zero, one, row, flat = f.constant([0]), f.constant([1]), f.constant(1), f.constant([-1])
    # w[b]: the 24 bits of the bytes up to b; the 16 that end before bit p are w[p div 8] div a[p mod 8] mod 2**16
    c256 = f.int32(256)
    f.add("Cast", "P", "A", to=TensorProto.INT32)
    f.add("Slice", ["A", zero, f.constant([-2])], "B")
    f.add("Slice", ["A", one, flat], "C")
    f.add("Slice", ["A", f.constant([2]), f.constant([1 << 40])], "D")
    f.add("Mul", ["B", c256], "E")
    f.add("Add", "E C", "G")
    f.add("Mul", ["G", c256], "H")
    f.add("Add", "H D", "w")
    f.add("Constant", "", "a", value=numpy_helper.from_array(np.array([256 >> r for r in range(8)], np.int32)))
    f.add("Constant", "", "z", value=numpy_helper.from_array(np.array(8, np.int32)))
    f.add("Cast", "S", "M", to=TensorProto.INT32)
    f.add("Add", ["M", f.int32(LOW)], "x")
    # a slot's symbol: how many intervals end at or before it
    f.add("Cast", "F", "N", to=TensorProto.INT32)
    f.add("CumSum", ["N", row], "O")
    f.add("Range", [f.int32(0), "k", f.int32(1)], "Q")
    f.add("Unsqueeze", ["O", f.constant([2])], "R")
    f.add("Less", "Q R", "T")
    f.add("Not", "T", "U")
    f.add("Cast", "U", "V", to=TensorProto.INT32)
    f.add("ReduceSum", ["V", one], "W", keepdims=0)
    f.add("GatherElements", "N W", "X", axis=1)
    f.add("GatherElements", "O W", "Y", axis=1)
    f.add("Sub", "X Y", "Z")
    f.add("Add", "Z Q", "aa")
    f.add("Cast", "W", "b", to=TensorProto.UINT8)
    for table, output in (("X", "f"), ("aa", "g"), ("b", "y")):
        f.add("Reshape", [table, flat], output)
    # n[z]: how many bits take z to 2**16 or more, which is how many of these powers are above z
    f.add("Constant", "", "c", value_ints=[1 << n for n in range(STATE_BITS + 1)])
    f.add("Cast", "c", "p", to=TensorProto.INT32)
    f.add("ConstantOfShape", [f.constant([2 * LOW])], "d", value=_fill(np.int32, 0))
    f.add("Sub", "p p", "e")
    f.add("Sub", ["e", f.int32(1)], "h")
    f.add("ScatterElements", "d c h", "i")
    f.add("CumSum", "i u", "j")
    f.add("Add", ["j", f.int32(STATE_BITS + 1)], "n")
    return f.proto()


def _context_tables() -> FunctionProto:
    """(thresholds uint8, dictionary; rows r, columns c, means b of tensors, 32 * gain g) -> sums U, divisors E, tables."""
    f = _Function("i", ["H", "D", "k", "u"], ["U", "E", *ROUND[len(STEP) :]], [*"rcbg"])
    one, flat, row = f.constant([1]), f.constant([-1]), f.constant(1)
    for name, output in zip("rcbg", "RCBh", strict=True):
        f.attribute(output, name)
    # score -> first slot of its context
    f.add("Cast", "H", "A", to=TensorProto.INT32)
    f.add("Unsqueeze", ["A", row], "F")
    f.add("Range", [f.int32(0), f.int32(SCORES), f.int32(1)], "G")
    f.add("Less", "G F", "I")
    f.add("Not", "I", "J")
    f.add("Cast", "J", "K", to=TensorProto.INT32)
    f.add("ReduceSum", ["K", f.constant([0])], "L", keepdims=0)
    f.add("Mul", "L k", "t")
    # floor(8 log2(j + 8)) - 24
    f.add("Range", [f.constant(value, np.float32) for value in (8, 8 + LOG_SIZE, 1)], "M")
    f.add("Log", "M", "N")
    f.add("Mul", ["N", f.constant(8 / np.log(2), np.float32)], "O")
    f.add("Add", ["O", f.constant(1 / 1024 - 24, np.float32)], "P")
    f.add("Floor", "P", "Q")
    f.add("Cast", "Q", "q", to=TensorProto.INT32)
    # a symbol's mass
    f.add("Cast", "D", "S", to=TensorProto.INT64)
    f.add("Abs", "S", "T")
    f.add("Min", ["T", f.constant(MASS_LIMIT)], "V")
    f.add("ReduceSum", ["V", one], "v", keepdims=0)
    # lines: kernels are numbered first, then all rows, then all columns
    f.add("Mul", "R C", "W")
    f.add("CumSum", "W u", "X")
    f.add("ReduceSum", "W", "Y", keepdims=0)
    f.add("Range", ["u", "Y", row], "Z")
    f.add("Unsqueeze", ["X", row], "a")
    f.add("Less", "Z a", "b")
    f.add("Not", "b", "c")
    f.add("Cast", "c", "d", to=TensorProto.INT64)
    f.add("ReduceSum", ["d", f.constant([0])], "e", keepdims=0)  # the tensor of each kernel
    f.add("Sub", "X W", "g")
    f.add("CumSum", "R u", "m", exclusive=1)
    f.add("CumSum", "C u", "n", exclusive=1)
    f.add("ReduceSum", "R", "o", keepdims=0)
    f.add("ReduceSum", "C", "p", keepdims=0)
    for table, output in zip("gRCBmn", "stuvwx", strict=True):
        f.add("Gather", [table, "e"], output + "0")
    f.add("Sub", "Z s0", "A0")
    f.add("Div", "A0 u0", "A1")
    f.add("Mod", "A0 u0", "A2")
    f.add("Add", "A1 w0", "A3")
    f.add("Add", "A3 Y", "A4")
    f.add("Add", "Y o", "A5")
    f.add("Add", "A2 x0", "A6")
    f.add("Add", "A6 A5", "A7")
    f.add("Concat", "Z A4 A7", "l", axis=0)
    f.add("Add", "A5 p", "A8")
    f.add("Reshape", ["A8", flat], "A9")
    f.add("ConstantOfShape", "A9", "U", value=_fill(np.int64, 0))
    # divisors start at the prior and grow by twice the line's length a round
    f.add("Shape", "Z", "B0")
    f.add("ConstantOfShape", "B0", "B1", value=_fill(np.int64, 1))
    f.add("Concat", "B1 u0 t0", "B2", axis=0)
    f.add("Add", "B2 B2", "i")
    prior = f.constant([[KERNEL_PRIOR], [LINE_PRIOR], [LINE_PRIOR]])
    f.add("Mul", ["B1", prior], "B3")
    f.add("Reshape", ["B3", flat], "E")
    f.add("Mul", "v0 h", "B4")
    f.add("Mul", ["B4", prior], "B5")
    f.add("Div", ["B5", f.constant(32)], "B6")
    f.add("Reshape", ["B6", flat], "j")
    return f.proto()


def _step(*, contexts: bool) -> FunctionProto:
    """(states x int32 [lanes], position o [1], contexts' first slots c [lanes]) -> (states, position, symbols uint8 [lanes])."""
    f = _Function("s", ["x", "o", *(["c"] if contexts else []), *STEP], ["X", "O", "Y"])
    f.add("Mod", "x k", "A" if contexts else "b")
    if contexts:
        f.add("Add", "A c", "b")
    f.add("GatherElements", "y b", "Y")
    f.add("GatherElements", "f b", "d")
    f.add("GatherElements", "g b", "e")
    f.add("Div", "x k", "h")
    f.add("Mul", "d h", "i")
    f.add("Add", "i e", "j")
    f.add("GatherElements", "n j", "l")
    f.add("CumSum", "l u", "m")
    f.add("Add", "m o", "q")
    f.add("Div", "q z", "B")
    f.add("GatherElements", "w B", "C")
    f.add("Mod", "q z", "D")
    f.add("GatherElements", "a D", "E")
    f.add("Div", "C E", "r")
    f.add("GatherElements", "p l", "s")
    f.add("Mod", "r s", "t")
    f.add("Mul", "j s", "v")
    f.add("Add", "v t", "X")
    f.add("ReduceMax", "q", "O")
    return f.proto()


def _parts(count: int) -> list[int]:
    """Sizes of at most FAN callees, all but the last the same power of FAN."""
    part = 1
    while part * FAN < count:
        part *= FAN
    return [part] * (count // part) + ([count % part] if count % part else [])


class _Builder:
    """Writes the functions that one group needs into `known`. Tag parts the functions of groups of different kinds."""

    def __init__(self, packed: Packed, known: dict[str, FunctionProto]):
        self.packed, self.known = packed, known
        self.contexts = packed.contexts > 1

    def tables(self) -> None:
        self.known.setdefault("t", _tables())
        if self.contexts:
            self.known.setdefault("i", _context_tables())

    def steps(self, count: int) -> str:
        """The function of `count` steps: (x, o, first slots [count * lanes] if contexts) -> (x, o, symbols [count * lanes])."""
        name = "s" if self.contexts else "n"
        if count > 1:
            name += f"{count}_{self.packed.lanes}" if self.contexts else str(count)
        if name in self.known:
            return name
        if count == 1:
            proto = _step(contexts=self.contexts)
            proto.name = name
            self.known[name] = proto
            return name
        sizes = _parts(count)
        callees = [self.steps(size) for size in sizes]
        f = _Function(name, ["x", "o", *(["c"] if self.contexts else []), *STEP], ["X", "O", "Y"])
        rows = [f"c{i}" for i in range(len(sizes))] if self.contexts else []
        if rows:
            f.add("Split", ["c", f.constant([size * self.packed.lanes for size in sizes])], rows)
        self._chain(f, callees, ["x", "o"], lambda i: [*rows[i : i + 1], *STEP])
        return self._keep(f)

    def rounds(self, count: int) -> str:
        """The function of `count` rounds: (x, o, sums, divisors) -> (x, o, sums, divisors, symbols int32 [count * kernels])."""
        tag = f"{self.packed.kernels}_{self.packed.lanes}"
        name = f"r{tag}" + (f"x{count}" if count > 1 else "")
        if name in self.known:
            return name
        f = _Function(name, ["x", "o", "U", "E", *ROUND], ["X", "O", "V", "F", "Y"])
        if count > 1:
            callees = [self.rounds(size) for size in _parts(count)]
            self._chain(f, callees, ["x", "o", "U", "E"], lambda i: ROUND)
            return self._keep(f)
        f.add("GatherElements", "U l", "A")
        f.add("Mul", "A h", "B")
        f.add("Add", "B j", "C")
        f.add("Div", "C E", "D")
        f.add("Min", ["D", f.constant(LOG_SIZE - 1)], "G")
        f.add("GatherElements", "q G", "H")
        f.add("Reshape", ["H", f.constant([3, -1])], "J")
        f.add("ReduceSum", ["J", f.constant([0])], "K", keepdims=0)
        f.add("GatherElements", "t K", "L")
        idle = self.packed.steps * self.packed.lanes - self.packed.kernels
        if idle:
            f.add("ConstantOfShape", [f.constant([idle])], "I", value=_fill(np.int32, 0))
            f.add("Concat", "L I", "M", axis=0)
        f.add(self.steps(self.packed.steps), ["x", "o", "M" if idle else "L", *STEP], "X O N", domain=DOMAIN)
        f.add("Cast", "N", "P" if idle else "Y", to=TensorProto.INT32)
        if idle:
            f.add("Slice", ["P", f.constant([0]), f.constant([self.packed.kernels])], "Y")
        f.add("GatherElements", "v Y", "Q")
        f.add("Concat", "Q Q Q", "R", axis=0)
        f.add("ScatterElements", "U l R", "V", reduction="add")
        f.add("Add", "E i", "F")
        return self._keep(f)

    def group(self) -> str:
        """(payload, states, frequencies, dictionary, thresholds) -> int8 levels [rounds, kernels, width] of all tensors."""
        packed = self.packed
        name = f"d{packed.kernels}_{packed.lanes}_{packed.rounds}_{packed.contexts}{'' if packed.signs else 'n'}"
        if name in self.known:
            return name
        self.tables()
        f = _Function(name, [*"PSFD", *(["H"] if self.contexts else [])], ["Y"], [*"rcbg"] if self.contexts else [])
        f.add("t", "P F S", ["x", *STEP], domain=DOMAIN)
        f.add("Constant", "", "o", value=_fill(np.int32, 0))
        if self.contexts:
            call = helper.make_node("i", ["H", "D", "k", "u"], ["U", "E", *ROUND[len(STEP) :]], domain=DOMAIN)
            call.attribute.extend(onnx.AttributeProto(name=n, ref_attr_name=n, type=onnx.AttributeProto.INTS) for n in "rcbg")
            f.nodes.append(call)
            f.add(self.rounds(packed.rounds), ["x", "o", "U", "E", *ROUND], "X O V Z Q", domain=DOMAIN)
        else:
            f.add(self.steps(packed.steps), ["x", "o", *STEP], "X O R", domain=DOMAIN)
            f.add("Cast", "R", "T", to=TensorProto.INT32)
            f.add("Slice", ["T", f.constant([0]), f.constant([packed.kernels * packed.rounds])], "Q")
        if packed.signs:
            self._signs(f)
        else:
            f.add("Gather", "D Q", "Bb")
        f.add("Reshape", ["Bb", f.constant([packed.rounds, packed.kernels, packed.width])], "Y")
        return self._keep(f)

    def tensor(self, view: View) -> str:
        """(levels of the group; attributes v: begin and end of its kernels, s: shape, q: order in memory) -> int8 levels."""
        name = "a" if view.kernels_first else "b"
        if name not in self.known:
            f = _Function(name, ["D"], ["Y"], [*"vs"] if view.kernels_first else [*"vsq"])
            f.attribute("A", "v")
            f.attribute("B", "s")
            f.add("Split", "A", ["C", "E"] if view.kernels_first else ["C", "E", "F"], num_outputs=2 if view.kernels_first else 3)
            f.add("Slice", ["D", "C", "E", f.constant([1])], "G")
            if view.kernels_first:
                f.add("Transpose", "G", "H", perm=[1, 0, 2])
            else:
                f.attribute("I", "q")
                f.add("Reshape", "G I", "J")
                f.add("Transpose", "J", "K", perm=[1, 0, 3, 2])
                f.add("Reshape", ["K", f.constant([-1])], "L")
                f.add("Slice", ["L", f.constant([0]), "F"], "H")
            f.add("Reshape", "H B", "Y")
            self.known[name] = f.proto()
        return name

    def _signs(self, f: _Function) -> None:
        """States X, position O, symbols Q -> signed levels Bb. The raw bits: 16 from each lane's last state, then the rest."""
        f.add("Unsqueeze", ["X", f.constant(1)], "A0")
        f.add("Div", ["A0", f.int32([1 << n for n in range(STATE_BITS - 1, -1, -1)])], "A1")
        f.add("Reshape", ["A1", f.constant([-1])], "A2")
        f.add("Add", ["O", f.int32(1)], "A3")
        f.add("Unsqueeze", ["w", f.constant(1)], "A7")
        f.add("Div", "A7 a", "A8")
        f.add("Reshape", ["A8", f.constant([-1])], "A9")
        f.add("Slice", ["A9", "A3", f.int32([2**31 - 1])], "A4")
        f.add("Concat", "A2 A4", "A5", axis=0)
        f.add("BitwiseAnd", ["A5", f.int32(1)], "A6")
        f.add("Cast", "D", "B0", to=TensorProto.INT32)
        f.add("Reshape", ["B0", f.constant([-1])], "B1")
        f.add("GatherElements", "B1 Q", "B2")
        f.add("Min", ["B2", f.int32(1)], "B3")
        f.add("CumSum", "B3 u", "B4")
        f.add("Sub", ["B4", f.int32(1)], "B5")
        f.add("GatherElements", "A6 B5", "B6")
        f.add("Mul", "B2 B6", "B7")
        f.add("Add", "B7 B7", "B8")
        f.add("Sub", "B2 B8", "B9")
        f.add("Cast", "B9", "Bb", to=TensorProto.INT8)

    def _chain(self, f: _Function, callees: Sequence[str], state: list[str], rest: Any) -> None:
        """Calls one after another, each taking the state that the last one left; their last outputs end to end are Y."""
        final = f.outputs[:-1]
        for i, callee in enumerate(callees):
            after = final if i == len(callees) - 1 else [f"{n}{i}" for n in state] if i == 0 else [f"{n[0]}{i}" for n in state]
            f.add(callee, [*state, *rest(i)], [*after, f"Y{i}"], domain=DOMAIN)
            state = after
        f.add("Concat", [f"Y{i}" for i in range(len(callees))], "Y", axis=0)

    def _keep(self, f: _Function) -> str:
        self.known[f.name] = f.proto()
        return f.name


def functions(groups: Sequence[Packed]) -> list[FunctionProto]:
    """The functions that decode these groups."""
    known: dict[str, FunctionProto] = {}
    for packed in groups:
        if packed.kernels:
            builder = _Builder(packed, known)
            builder.group()
            for view in packed.views:
                if view.weights:
                    builder.tensor(view)
    return list(known.values())


def nodes(packed: Packed, outputs: Sequence[str], *, prefix: str = "ecqx") -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes that produce the INT8 levels under these names (in the order that pack was given), and the initializers they need."""
    builder = _Builder(packed, {})
    views = [view for view in packed.views if view.weights]
    made, initializers = [], []
    levels = f"{prefix}.y"
    if views:
        arrays = {"p": packed.payload, "s": packed.states, "f": packed.frequencies, "d": packed.dictionary}
        lines: dict[str, Any] = {}
        if packed.contexts > 1:
            arrays["h"] = packed.thresholds
            lines = {"r": [v.rows for v in views], "c": [v.columns for v in views], "b": [v.mean for v in views]}
            lines["g"] = [32 * packed.gain]
        initializers = [numpy_helper.from_array(array, f"{prefix}.{name}") for name, array in arrays.items()]
        made.append(helper.make_node(builder.group(), [f"{prefix}.{name}" for name in arrays], [levels], domain=DOMAIN, **lines))
    begin = 0
    for view, output in zip(packed.views, outputs, strict=True):
        if not view.weights:
            initializers.append(numpy_helper.from_array(np.zeros(view.shape, np.int8), output))
            continue
        numbers: dict[str, Any] = {"v": [begin, begin + view.kernels], "s": list(view.shape) or [1]}
        if not view.kernels_first:
            numbers["v"].append(view.weights)
            numbers["q"] = [packed.rounds, view.rows, view.columns, packed.width]
        shaped = output if view.shape else f"{output}.1"
        made.append(helper.make_node(builder.tensor(view), [levels], [shaped], domain=DOMAIN, **numbers))
        if not view.shape:
            made.append(helper.make_node("Squeeze", [shaped], [output]))
        begin += view.kernels
    return made, initializers
