"""Plan -> an .ort file for minimal builds, loaded back and compared; a file -> what accelerators of phones would take of it.

Both are onnxruntime's own tools: convert_onnx_models_to_ort and the mobile usability checker.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ecqx_onnx_converters import Plan, WriteReport, write
from ecqx_onnx_converters.graph.outputs import (
    check_output,
    derive_path,
    open_temporary_folder,
    replace_on_success,
)
from ecqx_onnx_converters.serialization.report import WrittenTensor

from ecqx_onnx.errors import CheckFailed, ModelError
from ecqx_onnx.runtime.mobile_tools import convert_to_ort
from ecqx_onnx.runtime.sessions import make_synthetic_inputs, open_session, run
from ecqx_onnx.validation.bounds import derive_bound
from ecqx_onnx.validation.checks import check_optimization

SAMPLES = 4
LONG_NAME = 200  # bytes
OPERATORS = "required_operators_and_types.config"


def write_ort(
    plan: Plan,
    path: Path,
    *,
    metadata: Mapping[str, Any],
    force: bool = False,
    sources: Sequence[Path] = (),
) -> WriteReport:
    """`path`, and beside it <name>.required_operators_and_types.config, from which a minimal onnxruntime is built.

    ModelError, and no file, if the .ort file cannot be loaded back or says something else than the .onnx that it came from.
    """
    operators = derive_path(path.with_suffix(""), f".{OPERATORS}")
    check_output(path, force=force)
    check_output(operators, force=force)
    with (
        replace_on_success(path, force=force, beside=[operators], sources=sources) as temporary,
        open_temporary_folder() as folder,
    ):
        stem = (
            path.stem if len(path.name.encode(errors="surrogateescape")) < LONG_NAME else "model"
        )  # tools lengthen names
        source = folder / f"{stem}.onnx"
        report = write(plan, source, metadata=metadata)
        convert_to_ort(source, folder)
        shutil.move(folder / f"{stem}.ort", temporary)
        lines = (folder / f"{stem}.{OPERATORS}").read_text(encoding="utf-8").splitlines()
        text = "".join(
            f"{line}\n" for line in lines if not line.startswith("#")
        )  # comments hold paths
        temporary.with_name(operators.name).write_text(text, encoding="utf-8")
        require_equal_outputs(temporary, source, path.name)
        size = temporary.stat().st_size
    rows = tuple(
        mark_as_float(row) if row.dequantization == "folded" else row for row in report.tensors
    )
    inflated = ", ".join(row.name for row in rows if row.dequantization == "folded")
    notes = [f"{operators.name}: what a minimal build needs (build.py --include_ops_by_config)"]
    notes += (
        [f"as float32 in the file, since DequantizeLinear cannot express them: {inflated}"]
        if inflated
        else []
    )
    return replace(report, path=path, nbytes=size, tensors=rows, notes=tuple(notes))


def mark_as_float(row: WrittenTensor) -> WrittenTensor:
    """The converter folds what folds."""
    return replace(row, storage="float32", nbytes=4 * math.prod(row.shape))


def require_equal_outputs(written: Path, source: Path, name: str) -> None:
    """Loaded back from what the disk holds; the converter reports success for files that do not load."""
    try:
        loaded, wanted = open_session(written), open_session(source)
        inputs = make_synthetic_inputs(wanted, batch=SAMPLES)
        bounds = [derive_bound(output, None) for output in run(wanted, inputs)]
    except CheckFailed as error:
        raise ModelError(f"{name} was not written: {error}") from None
    check = check_optimization(loaded, wanted, inputs, bounds)
    if not check.passed:
        raise ModelError(
            f"{name} was not written: its outputs differ by {check.measured} from those of the same model as .onnx; "
            "use --target onnxruntime"
        )
