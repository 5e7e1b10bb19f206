"""Does the file still say the same? Outputs of any runner become checks and a report.

Names are imported when first used: sessions, metrics and delivery work without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecqx_onnx.runtime.latency import Latency
    from ecqx_onnx.validation.judgement import read_preprocessing
    from ecqx_onnx.validation.original import validate_against_original
    from ecqx_onnx.validation.report import Check, ValidationReport
    from ecqx_onnx.validation.validator import validate
    from ecqx_onnx.validation.whole import check_file

_HOMES = {
    "Check": "report",
    "Latency": "report",
    "ValidationReport": "report",
    "check_file": "whole",
    "stored_preprocessing": "validator",
    "validate": "validator",
    "validate_against_original": "original",
}
__all__ = [
    "Check",
    "Latency",
    "ValidationReport",
    "check_file",
    "read_preprocessing",
    "validate",
    "validate_against_original",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ecqx_onnx.validation' has no attribute {name!r}")
    return getattr(import_module(f"ecqx_onnx.validation.{_HOMES[name]}"), name)
