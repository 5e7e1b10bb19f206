"""Write a folder that is ready to use on a platform, once the file in it is validated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecqx_onnx.deployment import Deployed
from ecqx_onnx.options.deploy import DeployOptions
from ecqx_onnx.options.input_shape import InputShape
from ecqx_onnx.options.option import check_limits, refuse_unknown_options
from ecqx_onnx.validation.references.onnx_reference import OnnxReference
from ecqx_onnx.verbs.reference import (
    load_evaluation_data,
    load_reference,
    load_samples_or_split,
)

if TYPE_CHECKING:
    from ecqx_onnx.sources.to_checkpoint import Source


@refuse_unknown_options
def deploy(
    onnx_file: str | Path,
    folder: str | Path,
    *,
    to: str,
    against: Source | None = None,
    data: Any = None,
    factory: str | None = None,
    input_shape: InputShape | None = None,
    trust_pickle: bool = False,
    samples: int | None = None,
    labels: Sequence[str] = (),
    title: str = "",
    webgpu: bool = False,
    card: str = "",
    strict: bool = True,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Deployed:
    """Write a folder with model, manifest, golden outputs, a runner that checks itself, README.

    Args:
        onnx_file: the file to deploy; it is validated first, and one that fails is not deployed.
        folder: the folder to write.
        to: the platform: web, android, ios or linux.
        against: what the file was converted from, which makes the tolerance sharp; or the float
            .onnx file that it was compressed from.
        data: a data set's name, a Dataset or a Split, for golden inputs and the expected accuracy;
            beside a float .onnx file also unlabelled, which the validation takes.
        factory: FILE.py:FACTORY, the network of a state dict.
        input_shape: of one input without the batch, where FILE.py has no INPUT_SHAPE.
        trust_pickle: unpickle a module, which runs its author's code.
        samples: use only so many of the data; at least 1.
        labels: the classes' names, instead of those that the file (or else the data set) holds.
        title: the model's name on page and README; by default the file's.
        webgpu: add onnxruntime's WebGPU build to a folder for the web; the page uses it where a GPU
            is found, it passes the self-check and is faster.
        card: the float model's name, such as "owner/resnet20"; writes MODEL_CARD.md, which has it
            as its base model.
        strict: refuse a state dict that lacks weights, or has others.
        force: replace the folder if it exists.
        progress: called with (samples done, samples in all).

    Returns:
        What was written: files, tolerances, accuracy and notes.

    Raises:
        InputError: if something given can't be used, or the platform can't load the file.
        CheckFailed: if the file's validation failed.

    Example:
        ecqx_onnx.deploy("lenet5.onnx", "lenet5_web", to="web", against="lenet5.pt")
    """
    from ecqx_onnx import deployment, validation
    from ecqx_onnx.data import load_dataset

    platform = deployment.find_platform(to)
    deployment.check_page_options(platform, title, webgpu=webgpu)
    deployment.check_base_model(card)
    check_limits(DeployOptions, samples=samples)
    reference = load_reference(
        against,
        factory=factory,
        input_shape=input_shape,
        trust_pickle=trust_pickle,
        strict=strict,
        onnx_file=onnx_file,
    )
    if isinstance(reference.module, OnnxReference):
        evaluation = load_samples_or_split(data, onnx_file, reference, samples=samples)
    else:
        dataset = load_dataset(data) if isinstance(data, str) else data
        evaluation = load_evaluation_data(
            dataset, onnx_file, samples=samples, labels=labels or reference.labels
        )
    report = validation.validate(
        onnx_file,
        reference=reference.module,
        tensors=reference.tensors,
        float_reference=reference.is_float,
        float_model=reference.float_model,
        class_names=bool(reference.labels),
        split=evaluation.split,
        samples=evaluation.samples,
        notes=evaluation.notes,
        latency_runs=0,
        progress=progress,
    )
    return deployment.deploy(
        onnx_file,
        platform,
        folder,
        report=report,
        # The golden outputs are the file's own; a float file says nothing of their rounding.
        reference=None if isinstance(reference.module, OnnxReference) else reference.module,
        split=evaluation.split,
        labels=labels,
        data_labels=evaluation.labels,
        data_name=evaluation.name,
        title=title,
        webgpu=webgpu,
        card=card,
        force=force,
    )
