"""Plan -> file, loaded once before anyone relies on it; without torch for .onnx files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ecqx_onnx_converters import Plan, WriteReport, write

from ecqx_onnx.errors import CheckFailed, ModelError
from ecqx_onnx.validation.sessions import open_session


def write_file(plan: Plan, path: Path, *, metadata: Mapping[str, Any]) -> WriteReport:
    """Writes the file that the plan's target loads. ModelError if onnxruntime does not."""
    if plan.target.suffix == ".ort" or plan.target.accelerators:
        from ecqx_onnx.validation.delivery import deliver

        return deliver(plan, path, metadata=metadata)
    return write(plan, path, metadata=metadata, accept=_load)


def _load(path: Path) -> None:
    try:
        open_session(path, threads=1)
    except CheckFailed as error:
        raise ModelError(f"{path.name} was not written: {error}") from None
