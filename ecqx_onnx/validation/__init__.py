"""Does the file still say the same? Outputs of any runner become checks and a report.

Names are imported when first used, so that files are checked in an environment without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecqx_onnx.runtime.latency import Latency
    from ecqx_onnx.validation.judgement import read_preprocessing
    from ecqx_onnx.validation.original import validate_against_original
    from ecqx_onnx.validation.report import Check, ValidationReport
    from ecqx_onnx.validation.stored.whole import check_file
    from ecqx_onnx.validation.validator import validate

_HOMES = {
    "Check": "ecqx_onnx.validation.report",
    "Latency": "ecqx_onnx.runtime.latency",
    "ValidationReport": "ecqx_onnx.validation.report",
    "check_file": "ecqx_onnx.validation.stored.whole",
    "read_preprocessing": "ecqx_onnx.validation.judgement",
    "validate": "ecqx_onnx.validation.validator",
    "validate_against_original": "ecqx_onnx.validation.original",
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
    return getattr(import_module(_HOMES[name]), name)
