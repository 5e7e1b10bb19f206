"""Imports run one way: cli > validation, checkpoint, export, quantization > tensors, errors."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [*sorted((ROOT / "ecqx_onnx").rglob("*.py")), *sorted((ROOT / "converters").rglob("*.py"))]
FILES = [file for file in FILES if "templates" not in file.parts]  # copied into folders for users, never imported


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def users(package):
    return {str(f.relative_to(ROOT)) for f in FILES if any(n == package or n.startswith(package + ".") for n in imported(f))}


def test_the_converters_know_tensors_and_errors_only():
    for file in (f for f in FILES if "converters" in f.parts):
        for name in imported(file):
            top = name.split(".")[0]
            assert top not in ("torch", "onnxruntime", "zennit", "typer", "rich"), f"{file.name} imports {name}"
            if top == "ecqx_onnx":
                assert name.startswith(("ecqx_onnx.errors", "ecqx_onnx.tensors")), f"{file.name} imports {name}"


def test_zennit_is_known_to_one_room_and_its_import_to_one_file():
    assert all(user.startswith("ecqx_onnx/quantization/") for user in users("zennit"))


def test_onnxruntime_is_known_to_validation_and_to_the_calibration_of_activations_only():
    assert users("onnxruntime")
    rooms = ("ecqx_onnx/validation/", "ecqx_onnx/calibration.py", "ecqx_onnx/compression/runner.py")
    assert all(user.startswith(rooms) for user in users("onnxruntime"))


def test_torch_onnx_has_one_user():
    assert "torch.onnx.export(" in (ROOT / "ecqx_onnx/export.py").read_text()
    assert [f.name for f in FILES if "torch.onnx.export(" in f.read_text()] == ["export.py"]


@pytest.mark.parametrize("room", ["quantization", "validation", "data"])
def test_rooms_do_not_know_the_command_line(room):
    for file in (ROOT / "ecqx_onnx" / room).rglob("*.py"):
        assert not any(name in ("ecqx_onnx.cli", "ecqx_onnx.api", "ecqx_onnx.tables") for name in imported(file)), file


def test_tensors_and_errors_need_numpy_only():
    for name in ("tensors.py", "errors.py"):
        allowed = ("__future__", "math", "collections", "dataclasses", "numpy", "ecqx_onnx.errors")
        assert all(n.startswith(allowed) for n in imported(ROOT / "ecqx_onnx" / name))
