"""A checkpoint -> a self-contained HTML page about it."""

from ecqx_onnx.reporting.page import Written, write_report

__all__ = ["Written", "write_report"]
