"""Write a planned model to a file that gets its name only once it loads.

A plan of what to write goes in; out come the file and a report, which for phones also says what
their accelerators would take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ecqx_onnx_converters import Plan, WriteReport, write

from ecqx_onnx.delivery import ort_file
from ecqx_onnx.errors import CheckFailed, ModelError
from ecqx_onnx.runtime import mobile_tools
from ecqx_onnx.runtime.sessions import open_session


def deliver(
    plan: Plan,
    path: Path | str,
    *,
    metadata: Mapping[str, Any],
    force: bool = False,
    sources: Sequence[Path] = (),
    valid: bool = True,
) -> WriteReport:
    """Write a model as its target loads it, and load it before it gets its name.

    Args:
        plan: what is written, and for which target.
        path: the file to write.
        metadata: what the file's metadata record, JSON values by name.
        force: replace a file that is there.
        sources: files that are read, none of which may be replaced.
        valid: whether onnx's checker has to accept an .onnx file, too.

    Returns:
        The report of what was written.

    Raises:
        FileError: if the file is in the way or cannot be written.
        ModelError: if this onnxruntime, which stands for the target's where that is another, does
            not load the file, or an .ort file gives other outputs. Nothing is left at `path` then.
    """
    path = Path(path)
    target = plan.target
    if target.suffix == ".ort":
        return ort_file.write_ort(plan, path, metadata=metadata, force=force, sources=sources)
    report = write(
        plan,
        path,
        metadata=metadata,
        force=force,
        accept=_require_loading,
        sources=sources,
        valid=valid,
    )
    if not target.accelerators:
        return report
    told = mobile_tools.note_accelerators(path, target.accelerators)
    return replace(report, notes=(*report.notes, *told))


def _require_loading(path: Path) -> None:
    try:
        open_session(path)
    except CheckFailed as error:
        raise ModelError(f"{path.name} was not written: {error}") from None
