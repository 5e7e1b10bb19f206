"""Read in a module's code which of its parameters its forward multiplies with what flows through.

A Quantizer that is given no example cannot trace its model. It knows torch's own layers; of other
modules it reads the source: `x @ self.weight`, `F.linear(x, self.up.t())`, `torch.addmm(self.bias,
x, self.weight)`, `for w in self.experts: x = x @ w`. A parameter counts where an operator of
`weights.MULTIPLIED` gets it, through views and plain assignments. Nothing is run. What the code
hands to functions elsewhere is not followed: an example finds it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch.nn as nn

from ecqx_onnx.quantization.weights import MULTIPLIED, VIEWS

# Attributes of a tensor that hold the same values.
ATTRIBUTES = frozenset(["T", "mT", "data"])
# Functions of Python that hand on what they loop over.
PAIRED = "zip"
COUNTED = "enumerate"
# Methods of a container that hand on its entries; the entry is the last of each pair.
CONTAINED = frozenset(["values", "items", "parameters"])
# Scaling or centering a weight is no other weight.
SCALINGS = (ast.Mult, ast.Div, ast.Sub)


def find_multiplied(module: nn.Module) -> Mapping[str, int]:
    """The parameters that the code of a module's class multiplies.

    Args:
        module: any module; it is only looked at.

    Returns:
        Attribute of the module, dotted ("weight", "up.weight"), -> axis of its output channels,
        negative ones counted from the end. Empty where the source cannot be had.
    """
    kind: Any = type(module)
    return _read_class(kind)


@cache
def _read_class(kind: Any) -> Mapping[str, int]:
    """Attribute -> axis, of the methods that instances of this class run."""
    found: dict[str, int] = {}
    known: set[str] = set()
    for place in kind.__mro__:
        if place is nn.Module:
            break
        for name, method in vars(place).items():
            # What a subclass replaces does not run, and constructors only make weights.
            is_new = name not in known
            known.add(name)
            if is_new and callable(method) and not name.startswith("__"):
                for attribute, axis in _read_method(method):
                    found.setdefault(attribute, axis)
    return found


def _read_method(method: object) -> list[tuple[str, int]]:
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(method)))  # type: ignore[arg-type]
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError, ValueError):  # no source, or not by itself
        return []
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    if not functions or not functions[0].args.args:
        return []
    reader = _Reader(functions[0].args.args[0].arg)
    # Twice: a loop may use what is assigned further down.
    for _ in range(2):
        for statement in functions[0].body:
            reader.visit(statement)
    return reader.found


class _Reader(ast.NodeVisitor):
    """Follows the attributes of `self` through one method.

    held: local name -> the attributes that it may stand for.
    """

    def __init__(self, own: str) -> None:
        self.own = own
        self.held: dict[str, frozenset[str]] = {}
        self.found: list[tuple[str, int]] = []

    # Where names come from

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self._bind(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
            self._bind(node.target, node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self._bind(node.target, node.value)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self._bind_entries(node.target, node.iter)
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.visit(node.iter)
        self._bind_entries(node.target, node.iter)
        for condition in node.ifs:
            self.visit(condition)

    def _visit_made(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp) -> None:
        for generator in node.generators:  # before what is made of it
            self.visit(generator)
        self.visit(node.elt)

    visit_ListComp = visit_GeneratorExp = visit_SetComp = _visit_made  # noqa: N815

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            names = self._attributes_of(value)
            self.held[target.id] = self.held.get(target.id, frozenset()) | names
            return
        if not isinstance(target, ast.Tuple | ast.List):
            return
        several = isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
        for place, inner in enumerate(target.elts):
            self._bind(inner, value.elts[place] if several else value)  # type: ignore[attr-defined]

    def _bind_entries(self, target: ast.expr, iterated: ast.expr) -> None:
        """for TARGET in ITERATED, through zip, enumerate and a container's items."""
        called = iterated.func if isinstance(iterated, ast.Call) else None
        name = called.id if isinstance(called, ast.Name) else ""
        arguments = iterated.args if isinstance(iterated, ast.Call) else []
        is_pair = isinstance(target, ast.Tuple) and bool(target.elts)
        if name == PAIRED and is_pair:
            for inner, argument in zip(target.elts, arguments, strict=False):  # type: ignore[attr-defined]
                self._bind_entries(inner, argument)
        elif name == COUNTED and is_pair and arguments:
            self._bind_entries(target.elts[-1], arguments[0])  # type: ignore[attr-defined]
        elif isinstance(called, ast.Attribute) and called.attr in CONTAINED:
            inner = target.elts[-1] if is_pair else target  # type: ignore[attr-defined]
            self._bind(inner, called.value)
        else:
            self._bind(target, iterated)

    # What an expression is

    def _attributes_of(self, node: ast.expr) -> frozenset[str]:
        """The attributes that an expression has the values of, views and scalings aside."""
        path = self._path_of(node)
        if path:
            return frozenset([path])
        if isinstance(node, ast.Name):
            return self.held.get(node.id, frozenset())
        if isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            return self._attributes_of(node.value)
        if isinstance(node, ast.Subscript):
            return self._attributes_of(node.value)
        if isinstance(node, ast.IfExp):
            return self._attributes_of(node.body) | self._attributes_of(node.orelse)
        if isinstance(node, ast.BinOp) and isinstance(node.op, SCALINGS):
            first = self._attributes_of(node.left)
            if isinstance(node.op, ast.Mult) and (first or isinstance(node.left, ast.Constant)):
                return first | self._attributes_of(node.right)
            return first  # x * self.gain is no weight
        if isinstance(node, ast.Call):
            return self._attributes_of_call(node)
        return frozenset()

    def _attributes_of_call(self, node: ast.Call) -> frozenset[str]:
        if not isinstance(node.func, ast.Attribute) or node.func.attr not in VIEWS:
            return frozenset()
        of_method = self._attributes_of(node.func.value)
        if of_method or not node.args:
            return of_method
        first = node.args[0]  # torch.transpose(self.weight, 0, 1), torch.stack([self.a, self.b])
        parts = first.elts if isinstance(first, ast.Tuple | ast.List) else [first]
        named = [self._attributes_of(part) for part in parts]
        return frozenset().union(*named)

    def _path_of(self, node: ast.expr) -> str:
        """ "up.weight" of self.up.weight; "" for what is no attribute of self."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            if node.attr in ATTRIBUTES:
                return ""
            parts.append(node.attr)
            node = node.value
        is_own = isinstance(node, ast.Name) and node.id == self.own
        return ".".join(reversed(parts)) if is_own else ""

    # Where they are multiplied

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.MatMult):
            self._take("matmul", {0: node.left, 1: node.right})
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = _name_of_call(node)
        if name in MULTIPLIED:
            self._take(name, dict(self._operands_of(name, node)))
        self.generic_visit(node)

    def _operands_of(self, name: str, node: ast.Call) -> Iterator[tuple[int, ast.expr]]:
        """(position, operand) as the operator counts them, whichever spelling called it."""
        assert isinstance(node.func, ast.Attribute | ast.Name)
        first = 0
        # x.matmul(w) has x before the dot; torch.matmul(x, w) a module's name.
        if isinstance(node.func, ast.Attribute) and self._is_value(node.func.value):
            yield 0, node.func.value
            first = 1
        for place, argument in enumerate(node.args):
            if name == "einsum" and place >= 1:
                yield 1, argument
            else:
                yield first + place, argument
        for keyword in node.keywords:
            if keyword.arg in ("weight", "other", "mat2"):
                yield 1, keyword.value

    def _is_value(self, node: ast.expr) -> bool:
        """Whether a dot follows a tensor, not a package."""
        if isinstance(node, ast.Name):
            return node.id not in ("torch", "F", "functional", "np")
        if isinstance(node, ast.Attribute) and not self._path_of(node):
            return node.attr not in ("functional", "ops", "aten")
        return True

    def _take(self, name: str, operands: Mapping[int, ast.expr]) -> None:
        for position, axis in MULTIPLIED[name].items():
            if position not in operands:
                continue
            operand = operands[position]
            parts = operand.elts if isinstance(operand, ast.Tuple | ast.List) else [operand]
            for part in parts:
                for attribute in sorted(self._attributes_of(part)):
                    self.found.append((attribute, 0 if axis is None else axis))


def _name_of_call(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""
