"""Does the file still say the same? The only room that runs ONNX models."""

from ecqx_onnx.validation.original import validate_against_original
from ecqx_onnx.validation.report import Check, Latency, ValidationReport
from ecqx_onnx.validation.validator import stored_preprocessing, validate
from ecqx_onnx.validation.whole import check_file

__all__ = [
    "Check",
    "Latency",
    "ValidationReport",
    "check_file",
    "stored_preprocessing",
    "validate",
    "validate_against_original",
]
