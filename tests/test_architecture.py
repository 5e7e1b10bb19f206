"""Imports run one way, from room to room, and torch is loaded only where PyTorch models are
handled."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).parents[1]
BASES = {"ecqx_onnx": ROOT, "ecqx_onnx_converters": ROOT / "converters"}
MOST_FILES = 12  # of a room itself; more lie in its sub-rooms

# Rooms from the lowest to the highest: each may import those of the rows above it, and itself.
ROOMS = (
    ("errors",),
    ("tensors",),
    ("options", "preprocessing", "rendering"),
    ("inputs",),
    ("data",),
    ("quantization", "runtime"),
    ("checkpoint", "trainers"),
    ("inspection", "recognition"),
    ("validation",),
    ("sources",),
    ("compression",),
    ("delivery", "deployment", "reporting", "doctor"),
    ("verbs",),
    ("api",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
CONVERTERS = (
    ("refusal", "targets"),
    ("graph", "matching"),
    ("storage",),
    ("dequantization", "foreign"),
    ("passes", "planning"),
    ("serialization",),
)


def module_of(path):
    parts = (
        path.relative_to(ROOT / "converters" if "converters" in path.parts else ROOT)
        .with_suffix("")
        .parts
    )
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_shipped(path):
    """Copied to users or devices, never imported."""
    return "templates" in path.parts or "runners" in path.parts


FILES = [
    path
    for name, base in BASES.items()
    for path in sorted((base / name).rglob("*.py"))
    if not is_shipped(path)
]
MODULES = {module_of(path): path for path in FILES}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}


def imported(module):
    """Full names of what the module imports anywhere: in functions and under TYPE_CHECKING as
    well."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def users(package):
    return {
        module
        for module in MODULES
        if any(n == package or n.startswith(package + ".") for n in imported(module))
    }


def room_of(module, package):
    """The room's name: the first part behind the package's."""
    return (module.removeprefix(package).lstrip(".") or "__init__").split(".")[0]


def test_no_file_imports_another_in_a_circle():
    edges = {
        module: {name for name in imported(module) if name in MODULES and name != module}
        for module in MODULES
    }
    state = {}

    def visit(module, way):
        if state.get(module) == "done":
            return
        assert module not in way, f"a circle: {' -> '.join([*way[way.index(module) :], module])}"
        for name in sorted(edges[module]):
            visit(name, [*way, module])
        state[module] = "done"

    for module in MODULES:
        visit(module, [])


@pytest.mark.parametrize(
    ("package", "rows"), [("ecqx_onnx", ROOMS), ("ecqx_onnx_converters", CONVERTERS)]
)
def test_rooms_import_only_rooms_below_them(package, rows):
    height = {room: number for number, row in enumerate(rows) for room in row}
    for module in MODULES:
        if not f"{module}.".startswith(f"{package}."):
            continue
        room = room_of(module, package)
        if room == "__init__":  # public names
            continue
        assert room in height, (
            f"{module} lies in a room that has no place in this test: give it one"
        )
        for name in imported(module):
            if name in MODULES and name.startswith(f"{package}."):
                other = room_of(name, package)
                assert other == room or height[other] < height[room], (
                    f"{module} imports {name}, which lies above it"
                )


def test_the_converters_know_tensors_and_errors_only():
    for module in (m for m in MODULES if m.startswith("ecqx_onnx_converters")):
        for name in imported(module):
            top = name.split(".")[0]
            assert top not in ("torch", "onnxruntime", "zennit", "typer", "rich"), (
                f"{module} imports {name}"
            )
            assert top != "ecqx_onnx" or name in ("ecqx_onnx.errors", "ecqx_onnx.tensors"), (
                f"{module} imports {name}"
            )


def test_only_errors_tensors_and_faces_lie_at_the_top():
    found = {path.name for path in (ROOT / "ecqx_onnx").glob("*.py")}
    assert found == {"__init__.py", "__main__.py", "api.py", "errors.py", "tensors.py"}


def test_api_is_a_face():
    functions = [
        node.name for node in TREES["ecqx_onnx.api"].body if isinstance(node, ast.FunctionDef)
    ]
    assert set(functions) <= {"__getattr__", "__dir__"}


def test_no_room_has_many_files_beside_its_sub_rooms():
    folders = defaultdict(list)
    for path in FILES:
        if path.name != "__init__.py":
            folders[path.parent].append(path)
    for folder, files in folders.items():
        assert len(files) <= MOST_FILES, (
            f"{folder.relative_to(ROOT)} has {len(files)} files: give it sub-rooms"
        )


def test_no_file_is_called_utils():
    assert not [path for path in FILES if path.stem in ("utils", "helpers", "common", "misc")]


def test_every_module_begins_with_a_sentence():
    for module, tree in TREES.items():
        assert ast.get_docstring(tree), f"{module} has no docstring"


def test_zennit_is_known_to_one_room_and_its_import_to_one_file():
    assert users("zennit")
    assert all(module.startswith("ecqx_onnx.quantization.") for module in users("zennit"))


def test_onnxruntime_is_known_to_runtime_only():
    assert users("onnxruntime")
    assert all(module.startswith("ecqx_onnx.runtime.") for module in users("onnxruntime"))


def test_torch_onnx_has_one_user():
    found = [
        module
        for module, path in MODULES.items()
        if "torch.onnx.export(" in path.read_text(encoding="utf-8")
    ]
    assert found == ["ecqx_onnx.checkpoint.export"]


def test_tensors_and_errors_need_numpy_only():
    allowed = ("__future__", "math", "collections", "dataclasses", "numpy", "ecqx_onnx.errors")
    for module in ("ecqx_onnx.tensors", "ecqx_onnx.errors"):
        assert all(name.startswith(allowed) for name in imported(module))


def test_the_old_paths_of_public_names_still_work():
    from ecqx_onnx import api, checkpoint, inspection, preprocessing

    assert callable(api.convert)
    assert callable(checkpoint.load)
    assert callable(inspection.inspect)
    assert callable(preprocessing.Preprocessing)


BLOCKED = """
    import sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("torch", "torchvision", "zennit", "onnxscript"):
                raise ImportError(f"{name} is not there")

    sys.meta_path.insert(0, Blocked())
    from ecqx_onnx.cli import main

    sys.argv = ["ecqx-onnx", *sys.argv[1:]]
    main()
"""


@pytest.fixture(scope="module")
def quantized_file(tmp_path_factory):
    """A foreign .onnx file: one MatMul whose weight is dequantized from sparse INT8."""
    generator = np.random.default_rng(0)
    levels = generator.integers(-7, 8, (64, 32)).astype(np.int8)
    levels[generator.random(levels.shape) < 0.7] = 0
    nodes = [
        helper.make_node("DequantizeLinear", ["levels", "step"], ["weight"]),
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "one_layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 32])],
        [
            numpy_helper.from_array(levels, "levels"),
            numpy_helper.from_array(np.float32(0.01), "step"),
        ],
    )
    path = tmp_path_factory.mktemp("foreign") / "foreign.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path
    )
    return path


def test_what_needs_no_pytorch_runs_without_it(quantized_file):
    folder = quantized_file.parent
    packed, unpacked = folder / "packed.onnx", folder / "unpacked.onnx"
    path = ":".join(entry for entry in sys.path if entry)
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    for arguments in (
        ["targets"],
        ["doctor"],
        ["inspect", quantized_file],
        ["pack", quantized_file, packed],
        ["inspect", packed],
        ["unpack", packed, unpacked],
        ["validate", packed, "--against", quantized_file],
    ):
        command = [sys.executable, "-c", textwrap.dedent(BLOCKED), *map(str, arguments), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{arguments[0]}: {done.stderr[-600:]}"


@pytest.mark.parametrize(
    "package", [module for module, path in MODULES.items() if path.name == "__init__.py"]
)
def test_every_name_that_a_room_offers_is_there(package):
    room = importlib.import_module(package)
    missing = [name for name in getattr(room, "__all__", ()) if not hasattr(room, name)]
    assert not missing
