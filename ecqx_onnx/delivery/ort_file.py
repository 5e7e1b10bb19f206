"""Write .ort files for minimal builds of onnxruntime, and compare them with the same .onnx files.

The conversion is onnxruntime's own: convert_onnx_models_to_ort.
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
from ecqx_onnx.validation.checks import check_optimization
from ecqx_onnx.validation.outputs.bounds import derive_bound

SAMPLES = 4
LONG_NAME = 200  # bytes; onnxruntime's tools lengthen names, which file systems limit
OPERATORS = "required_operators_and_types.config"


def write_ort(
    plan: Plan,
    path: Path,
    *,
    metadata: Mapping[str, Any],
    force: bool = False,
    sources: Sequence[Path] = (),
) -> WriteReport:
    """Write an .ort file, and beside it the list of operators for a minimal onnxruntime.

    The list is called <name>.required_operators_and_types.config.

    Args:
        plan: what is written.
        path: the .ort file.
        metadata: what the file's metadata record, JSON values by name.
        force: replace files that are there.
        sources: files that are read, none of which may be replaced.

    Returns:
        The report of what was written. Weights that DequantizeLinear cannot express are floats in
        the file, and a note names them.

    Raises:
        FileError: if a file is in the way or cannot be written.
        ModelError: if the .ort file cannot be loaded back, or gives other outputs than the .onnx
            that it came from. No file is left then.
    """
    operators = derive_path(path.with_suffix(""), f".{OPERATORS}")
    check_output(path, force=force)
    check_output(operators, force=force)
    with (
        replace_on_success(path, force=force, beside=[operators], sources=sources) as temporary,
        open_temporary_folder() as folder,
    ):
        is_short = len(path.name.encode(errors="surrogateescape")) < LONG_NAME
        stem = path.stem if is_short else "model"
        source = folder / f"{stem}.onnx"
        report = write(plan, source, metadata=metadata)
        convert_to_ort(source, folder)
        shutil.move(folder / f"{stem}.ort", temporary)
        lines = (folder / f"{stem}.{OPERATORS}").read_text(encoding="utf-8").splitlines()
        # Comments hold paths of this machine.
        text = "".join(f"{line}\n" for line in lines if not line.startswith("#"))
        temporary.with_name(operators.name).write_text(text, encoding="utf-8")
        _require_equal_outputs(temporary, source, path.name)
        size = temporary.stat().st_size
    notes = [f"{operators.name}: what a minimal build needs (build.py --include_ops_by_config)"]
    rows: list[WrittenTensor] = []
    inflated: list[str] = []
    for row in report.tensors:
        if row.dequantization == "folded":  # onnxruntime's converter folds what folds
            inflated.append(row.name)
            row = replace(row, storage="float32", nbytes=4 * math.prod(row.shape))
        rows.append(row)
    if inflated:
        notes.append(
            "as float32 in the file, since DequantizeLinear cannot express them: "
            + ", ".join(inflated)
        )
    return replace(report, path=path, nbytes=size, tensors=tuple(rows), notes=tuple(notes))


def _require_equal_outputs(written: Path, source: Path, name: str) -> None:
    """ModelError unless the written file gives the outputs of `source` for made-up inputs.

    It is loaded back from the disk: onnxruntime's converter reports success for files that do not
    load.
    """
    try:
        loaded = open_session(written)
        wanted = open_session(source)
        inputs = make_synthetic_inputs(wanted, batch=SAMPLES)
        bounds = [derive_bound(output, None) for output in run(wanted, inputs)]
    except CheckFailed as error:
        raise ModelError(f"{name} was not written: {error}") from None
    check = check_optimization(loaded, wanted, inputs, bounds)
    if not check.passed:
        raise ModelError(
            f"{name} was not written: its outputs differ by {check.measured} from those of the "
            "same model as .onnx; use --target onnxruntime"
        )
