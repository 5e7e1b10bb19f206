"""A .pt2 exported program in and out, without running a line that its author could have put in.

`torch.export.load` is no sandbox: an archive may hold pickles (torch loads them with weights_only=False), operator names
are looked up with getattr below `torch`, shape expressions go through sympy's eval, and guards through exec. So an
archive is read here as plain zip and JSON first, and refused unless it holds raw tensors, ATen operators and
arithmetic only.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

from ecqx_onnx.errors import FileError

# Operators that a traced network consists of: ATen, control flow, and arithmetic on sizes.
OPERATORS = re.compile(
    r"torch\.ops\.(aten|higher_order|torchvision|prims)\.\w+(\.\w+)?"
    r"|torch\.(sym_\w+|_check\w*)"
    r"|torch\._higher_order_ops\.\w+\.\w+"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|math\.(ceil|floor|trunc|sqrt)"
)
# What torch writes for a size: names, numbers, brackets, arithmetic and keyword flags such as positive=True.
WORD_IN_EXPRESSION = re.compile(r"[A-Za-z_]\w*")
WORDS = re.compile(
    r"[suz]\d+|u\d+|Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Mod|Eq|Ne|Ge|Gt|Le|Lt|And|Or|Not|oo|int_oo|True|False|true|false"
    r"|positive|integer|negative|nonnegative|precision|ceiling|floor"
    r"|FloorDiv|ModularIndexing|CleanDiv|CeilDiv|PythonMod|TruncToInt|FloorToInt|CeilToInt|IntTrueDiv|ToFloat|PowByNatural|Where|Identity"
)
CHARACTERS = re.compile(r"[\w\s+\-*/(),'.<>=&|~%]*")
CONTAINERS = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None}
JSON_LIMIT = 256 * 1024 * 1024  # bytes of one JSON member; a graph of 100 000 nodes takes about 60 MB


def save_program(program: torch.export.ExportedProgram) -> bytes:
    """The program's .pt2 archive, without stack traces (they hold the author's paths)."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node"):
                    node.meta.pop(key, None)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor found")  # blanked weights are one stored zero each: meant so
        torch.export.save(program, buffer)
    return buffer.getvalue()


def load_program(archive: bytes, source: str) -> torch.export.ExportedProgram:
    """The program in a .pt2 archive. `source` names the file in errors. FileError if damaged or not plainly harmless."""
    _inspect(archive, source)
    try:
        program = torch.export.load(io.BytesIO(archive))
    except Exception as error:  # torch raises anything from KeyError to RuntimeError on a damaged archive
        raise FileError(f"{source}: torch.export cannot load this program ({_first_line(error)}); export it again") from error
    program._guards_code = []  # strings for exec(); the inputs are ours, no guard is needed
    return program


def run_module(program: torch.export.ExportedProgram) -> torch.nn.Module:
    """The program as a callable module, guards off."""
    return program.module(check_guards=False)


def _inspect(archive: bytes, source: str) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as members:
            names = members.namelist()
            if not any("/models/" in name and name.endswith(".json") for name in names):
                raise FileError(f"{source}: no exported program in it (no models/*.json); save it with torch.export.save")
            for name in names:
                if name.endswith(".json"):
                    if members.getinfo(name).file_size > JSON_LIMIT:
                        raise FileError(
                            f"{source}: {name} claims {members.getinfo(name).file_size} bytes, more than any real program needs"
                        )
                    _inspect_json(json.loads(members.read(name)), f"{source}: {name}")
                elif "/constants/" in name and "tensor_" not in name:
                    raise FileError(f"{source}: {name} is a pickled object; only raw tensors are loaded")
    except (
        zipfile.BadZipFile,
        json.JSONDecodeError,
        UnicodeDecodeError,
        NotImplementedError,
        RecursionError,
        EOFError,
        OSError,
    ) as error:
        raise FileError(f"{source}: not a readable .pt2 archive ({_first_line(error)}); export it again") from error


def _inspect_json(document: Any, where: str) -> None:
    for key, value in _fields(document):
        if key == "use_pickle" and value is not False:
            raise FileError(
                f"{where} asks for unpickling a tensor; only raw tensors are loaded: export a contiguous CPU model again"
            )
        if key == "target" and isinstance(value, str) and _looks_like_call(value) and not OPERATORS.fullmatch(value):
            raise FileError(f"{where} calls {value!r}, which is no ATen operator; only traced networks are loaded")
        if key == "expr_str" and not _harmless_expression(value):
            raise FileError(f"{where} has the size expression {str(value)[:80]!r}, which is more than arithmetic")
        if key in ("in_spec", "out_spec") and isinstance(value, str) and value:
            for inner, kind in _fields(json.loads(value)):
                if (inner == "type" and kind not in CONTAINERS) or inner == "__enum__":
                    raise FileError(f"{where} takes or returns {kind!r}; only tensors, tuples, lists and dicts are loaded")
                if inner == "context" and isinstance(kind, str) and "__enum__" in kind:
                    raise FileError(
                        f"{where} has an enumeration in its signature; only tensors, tuples, lists and dicts are loaded"
                    )


def _looks_like_call(target: str) -> bool:
    """Everything that torch resolves to an object; any other target stays a string (a tensor's name)."""
    return target.startswith(("torch", "_operator", "math", "#"))


def _harmless_expression(text: Any) -> bool:
    return (
        isinstance(text, str)
        and len(text) < 10_000
        and CHARACTERS.fullmatch(text) is not None
        and not re.search(r"[A-Za-z_)\]'\"]\s*\.", text)  # no attribute access
        and all(WORDS.fullmatch(word) for word in WORD_IN_EXPRESSION.findall(text))
    )


def _fields(document: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of a JSON document, at any depth."""
    pending = [document]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield from item.items()
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
