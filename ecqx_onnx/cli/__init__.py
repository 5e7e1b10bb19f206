"""The `ecqx-onnx` command line: parse, call the Python verb, print a table or JSON."""

# Commands stand in the help in the order in which they are registered here.
from ecqx_onnx.cli import compress, quantize, convert, validate, commands, pack  # noqa: F401, I001
from ecqx_onnx.cli.frame import app, main

__all__ = ["app", "main"]
