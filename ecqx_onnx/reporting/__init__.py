"""The report: an HTML page about a quantized checkpoint, in one file."""

from ecqx_onnx.reporting.page import Written, write_report

__all__ = ["Written", "write_report"]
