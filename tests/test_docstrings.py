"""Public functions say what they take, what they return and what they raise."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [*sorted((ROOT / "ecqx_onnx").rglob("*.py")), *sorted((ROOT / "converters").rglob("*.py"))]
FILES = [path for path in FILES if not {"templates", "runners"} & set(path.parts)]
SPECIAL = {
    "__init__",
    "__post_init__",
    "__len__",
    "__getitem__",
    "__getattr__",
    "__dir__",
    "__call__",
    "__enter__",
    "__exit__",
}


def decorators(node):
    return {ast.unparse(each).split("(")[0].split(".")[-1] for each in node.decorator_list}


def public_functions(tree):
    """(name, node, whether it is a method) of functions and methods without a leading
    underscore."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith(
            "_"
        ):
            yield node.name, node, False
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(
                    inner, ast.FunctionDef | ast.AsyncFunctionDef
                ) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner, True


def arguments_of(node, is_method):
    found = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    if is_method and "staticmethod" not in decorators(node):
        found = found[1:]
    return [each.arg for each in found] + [
        each.arg for each in (node.args.vararg, node.args.kwarg) if each
    ]


def returns_something(node):
    return node.returns is not None and ast.unparse(node.returns) not in (
        "None",
        "NoReturn",
        "Never",
    )


def raises_something(node):
    """Whether a `raise` of its own, not of a function inside it, stands there with an error."""
    waiting, found = list(node.body), False
    while waiting:
        each = waiting.pop()
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            continue
        found |= isinstance(each, ast.Raise) and each.exc is not None
        waiting.extend(ast.iter_child_nodes(each))
    return found


def missing_in(node, is_method):
    """What the docstring of a public function lacks."""
    text = ast.get_docstring(node) or ""
    if not text:
        return ["a docstring"]
    lacks = []
    if decorators(node) & {"property", "cached_property", "overload", "setter", "fixture"}:
        return lacks
    if {"command", "callback", "register_command"} & decorators(
        node
    ):  # of the command line: the text is the help, and options have their own
        return lacks
    names = arguments_of(node, is_method)
    if names and "Args:" not in text:
        lacks.append("Args")
    elif names:
        section = text.split("Args:", 1)[1]
        lacks += [
            f"Args: {name}"
            for name in names
            if f"{name}:" not in section and f"{name} (" not in section
        ]
    if returns_something(node) and not ("Returns:" in text or "Yields:" in text):
        lacks.append("Returns")
    if raises_something(node) and "Raises:" not in text:
        lacks.append("Raises")
    return lacks


def find_missing():
    found = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, node, is_method in public_functions(tree):
            lacks = missing_in(node, is_method)
            if lacks:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}: {', '.join(lacks)}")
        for node in tree.body:
            if (
                isinstance(node, ast.ClassDef)
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: a docstring")
    return found


def test_public_functions_say_what_they_take_return_and_raise():
    found = find_missing()
    shown = "\n".join(found[:20])
    assert not found, f"public docstrings that lack something:\n{shown}"


def test_every_module_begins_with_one_plain_sentence():
    """On one line, and in words: no "(graph, weights) -> the graph"."""
    odd = []
    for path in FILES:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first = text.split("\n\n")[0]
        plain = first.endswith((".", ":", "?")) and "->" not in first and "\n" not in first
        if path.read_text(encoding="utf-8").strip() and not plain:
            odd.append(f"{path.relative_to(ROOT)}: {first!r}")
    assert not odd, "\n".join(odd)


if __name__ == "__main__":
    print("\n".join(find_missing()))
