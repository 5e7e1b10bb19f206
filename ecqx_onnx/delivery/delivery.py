"""Plan -> the file that its target loads, loaded before it gets its name; and what the target's own tools say of it."""

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
) -> WriteReport:
    """Nothing is left at `path` that this onnxruntime, which stands for the target's where that is another, does not load.

    sources: files that are read, none of which is replaced. ModelError if it does not load or says something else there.
    """
    path, target = Path(path), plan.target
    if target.suffix == ".ort":
        return ort_file.write_ort(plan, path, metadata=metadata, force=force, sources=sources)
    report = write(
        plan, path, metadata=metadata, force=force, accept=require_loading, sources=sources
    )
    if not target.accelerators:
        return report
    return replace(report, notes=mobile_tools.note_accelerators(path, target.accelerators))


def require_loading(path: Path) -> None:
    try:
        open_session(path)
    except CheckFailed as error:
        raise ModelError(f"{path.name} was not written: {error}") from None
