"""Write a folder that is ready to use on a platform, once the file in it is validated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecqx_onnx.data import Dataset
from ecqx_onnx.deployment import Deployed
from ecqx_onnx.verbs.validate import load_sides

if TYPE_CHECKING:
    from ecqx_onnx.sources.to_checkpoint import Source


def deploy(
    onnx_file: str | Path,
    folder: str | Path,
    *,
    to: str,
    against: Source | None = None,
    data: Any = None,
    factory: str | None = None,
    input_shape: Sequence[int] | None = None,
    trust_pickle: bool = False,
    samples: int | None = None,
    labels: Sequence[str] = (),
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Deployed:
    """Write a folder that is ready for web, android, ios or linux: model, manifest, golden outputs, runner, README.

    The file is validated first (see `validate` for against, data and samples); one that fails is not deployed.
    labels: the classes' names, instead of those that the file (or else the data set) holds.
    """
    from ecqx_onnx import deployment, validation
    from ecqx_onnx.data import load_dataset

    platform = deployment.find_platform(to)
    dataset = load_dataset(data) if isinstance(data, str) else data
    sides, dataset = load_sides(
        against,
        dataset,
        onnx_file=onnx_file,
        factory=factory,
        input_shape=input_shape,
        trust_pickle=trust_pickle,
        samples=samples,
        names=labels,
    )
    report = validation.validate(onnx_file, **sides, latency_runs=0, progress=progress)
    return deployment.deploy(
        onnx_file,
        platform,
        folder,
        report=report,
        reference=sides["reference"],
        split=sides["split"],
        labels=labels,
        data_labels=dataset.labels if isinstance(dataset, Dataset) else (),
        data_name=dataset.name if isinstance(dataset, Dataset) else "the given data",
        force=force,
    )
