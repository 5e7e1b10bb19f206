"""Is a file whole? Nothing else is needed: no checkpoint, no data, no inference.

A single flipped bit of packed weights often decodes to other weights without a word from the
runtime. So every checksum in the file is computed anew: of the levels as our reader decodes them
and as the runtime does, and of all else as it lies there.
"""

from __future__ import annotations

from pathlib import Path

from ecqx_onnx_converters.storage import DOMAIN

from ecqx_onnx.errors import CheckFailed
from ecqx_onnx.inputs.onnx_file import OnnxFile, read_onnx
from ecqx_onnx.runtime.sessions import describe_runtime, open_session
from ecqx_onnx.validation import checks
from ecqx_onnx.validation.judgement import check_stored_weights, decode_or_report
from ecqx_onnx.validation.report import Check, ValidationReport


def check_file(path: Path | str) -> ValidationReport:
    """Asks a file all that can be asked of it alone.

    Args:
        path: Of the .onnx file, whoever wrote it; one of someone else's has no checksums, and the
            report says so.

    Returns:
        A report with the checks "format", "load", "contents" and "weights"; its `ok` says whether
        the file is whole.

    Raises:
        InputError: The file is missing, no ONNX model, or so damaged that it can't be read.
    """
    file = read_onnx(path)
    found = [checks.check_format(file)]
    try:
        for level in ("all", "disabled"):
            open_session(file.path, level=level)
        sentence = f"{describe_runtime()} loads it with all optimisations and with none"
        found.append(Check("load", True, None, None, sentence))
    except CheckFailed as error:
        found.append(Check("load", False, None, None, str(error)))
        return ValidationReport(str(path), describe_runtime(), file.size, 0, tuple(found))
    found += _check_whole_contents(file)
    return ValidationReport(str(path), describe_runtime(), file.size, 0, tuple(found))


def _check_whole_contents(file: OnnxFile) -> list[Check]:
    if not file.metadata:
        if any(function.domain == DOMAIN for function in file.proto.functions):
            sentence = (
                "the graph decodes weights as ecqx-onnx's files do, but has lost its metadata, "
                "and all checksums with it"
            )
            return [Check("contents", False, None, None, sentence)]
        sentence = (
            "the file was not written by ecqx-onnx and has no checksums: damage that still loads "
            "is not seen"
        )
        return [Check("contents", None, None, None, sentence)]
    found: list[Check] = []
    model = file.with_data()
    decoded = decode_or_report(model, found)
    return found if decoded is None else [*found, *check_stored_weights(model, decoded, ())]
