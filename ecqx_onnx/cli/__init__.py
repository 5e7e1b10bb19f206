"""The `ecqx-onnx` command line: parse, call the Python verb, print a table or JSON."""

from ecqx_onnx.cli import compress  # noqa: F401 - registers its command
from ecqx_onnx.cli.commands import main
from ecqx_onnx.cli.frame import app

__all__ = ["app", "main"]
