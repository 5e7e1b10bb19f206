"""Write a deployment folder: beside its place, then renamed, so that it is whole or absent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ecqx_onnx_converters.graph.outputs import (
    check_name_and_folder,
    remove_leftovers,
    replace_folder_on_success,
)
from ecqx_onnx_converters.serialization.reading import read_weights

from ecqx_onnx import __version__
from ecqx_onnx.data import Split
from ecqx_onnx.deployment.card import CARD, write_card
from ecqx_onnx.deployment.deployed import Deployed
from ecqx_onnx.deployment.filling import copy_templates, copy_web_runtime
from ecqx_onnx.deployment.golden import choose_raw_maker, make_cases
from ecqx_onnx.deployment.manifest import describe_file, describe_node, format_lines, store_case
from ecqx_onnx.deployment.platforms import Platform, find_platform
from ecqx_onnx.deployment.tolerances import (
    compute_preprocessing_tolerance,
    compute_tolerances,
    draw_bound_batches,
)
from ecqx_onnx.errors import CheckFailed, DataError, FileError, OptionError
from ecqx_onnx.inputs.model_copy import copy_model
from ecqx_onnx.inputs.onnx_file import OnnxFile, read_onnx
from ecqx_onnx.preprocessing.preprocessing import Preprocessing
from ecqx_onnx.runtime.decoded_model import decode_model
from ecqx_onnx.runtime.sessions import Session, find_fixed_batch, open_session
from ecqx_onnx.validation import ValidationReport
from ecqx_onnx.validation.checks import has_quantized_activations
from ecqx_onnx.validation.judgement import read_preprocessing
from ecqx_onnx.validation.validator import prepare_samples

if TYPE_CHECKING:
    import torch


FORMAT = "ecqx-onnx deployment"
VERSION = 1
MODEL = "model.onnx"
BOUND_BATCH = 64  # samples of a call, where the graph leaves it open
LONGEST_TITLE = 200  # characters


def deploy(
    onnx_file: Path | str,
    platform: str | Platform,
    folder: Path | str,
    *,
    report: ValidationReport,
    reference: torch.nn.Module | None = None,
    split: Split | None = None,
    labels: Sequence[str] = (),
    data_labels: Sequence[str] = (),
    data_name: str = "",
    title: str = "",
    webgpu: bool = False,
    card: str = "",
    force: bool = False,
) -> Deployed:
    """Write a folder with everything that a platform needs to run a model.

    Args:
        onnx_file: the model.
        platform: such as "web", "android", "ios" or "linux".
        folder: the place of the new folder.
        report: the file's validation, which must have passed.
        reference: PyTorch's model, from which a sharp tolerance is derived; None gives a coarse
            one.
        split: samples for golden inputs; None has them made up.
        labels: the classes' names, instead of the file's.
        data_labels: the classes' names where neither `labels` nor the file has them.
        data_name: what the README calls the data set.
        title: the model's name on page and README; by default the file's.
        webgpu: put the runtime for GPUs into a folder for the web, too.
        card: name of the float model, for a model card; "" for none.
        force: replace a folder that an earlier call wrote.

    Returns:
        What was written.

    Raises:
        CheckFailed: if the validation has not passed.
        FileError: if the folder is in the way or cannot be written.
        InputError: if the platform cannot load the file, or no golden outputs can be made.
    """
    platform = find_platform(platform) if isinstance(platform, str) else platform
    folder = Path(folder)
    _check_place(folder, force)
    file = read_onnx(onnx_file)
    platform.check(file.proto, file.path)
    if not report.ok:
        failed = "; ".join(f"{check.name}: {check.sentence}" for check in report.failures)
        raise CheckFailed(f"{onnx_file}: is not deployed, because its validation fails: {failed}")
    labels = _choose_labels(file, labels, data_labels)
    check_page_options(platform, title, webgpu=webgpu)
    title = " ".join(title.split())
    maker = _Maker(
        file,
        platform,
        reference,
        split,
        labels,
        data_name,
        report,
        title=title,
        webgpu=webgpu,
        card=card,
    )
    with replace_folder_on_success(
        folder, check=lambda: _check_place(folder, force), force=force
    ) as temporary:
        result = maker.write(temporary)
    files = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files.append((path.relative_to(folder).as_posix(), path.stat().st_size))
    return Deployed(folder=folder, files=tuple(files), **result)


def check_page_options(platform: Platform, title: str, *, webgpu: bool) -> None:
    """Refuse a title that no page shows, and a runtime that the platform has no use for.

    Args:
        platform: that is deployed to.
        title: the model's name on page and README.
        webgpu: whether the runtime for GPUs is wanted.

    Raises:
        OptionError: if one of them cannot be had.
    """
    if len(title) > LONGEST_TITLE:
        raise OptionError(
            f"--title has {len(title)} characters, which no page shows; use {LONGEST_TITLE} or less"
        )
    if webgpu and platform.name != "web":
        raise OptionError(
            f"--webgpu is for --to web, and this folder is for {platform.name}; leave it out"
        )


def _check_place(folder: Path, force: bool) -> None:
    """Refuse a place where no folder may be written; removes what killed processes left for it."""
    try:
        check_name_and_folder(folder)
        remove_leftovers(folder)
        if folder.is_symlink():
            if not force:
                raise FileError(
                    f"'{folder}' is a link; choose another name, or replace the link with --force"
                )
            return
        if folder.exists() and not folder.is_dir():
            raise FileError(f"'{folder}' is a file, not a folder; choose another name")
        if not folder.exists():
            return
        if not force:
            raise FileError(
                f"'{folder}' exists already; choose another name or replace it with --force"
            )
        if any(folder.iterdir()) and not _is_deployment(folder):
            raise FileError(
                f"'{folder}' holds files that deploy did not write, so it is not replaced; choose "
                "another name"
            )
    except OSError as error:
        raise FileError(
            f"cannot write '{folder}': {error.strerror or error}; choose another place"
        ) from error


def _is_deployment(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return manifest.get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


@dataclass(frozen=True, eq=False)
class _Maker:
    """Fills a folder. labels: the classes' names. The rest is as `deploy` takes it."""

    file: OnnxFile
    platform: Platform
    reference: torch.nn.Module | None
    split: Split | None
    labels: tuple[str, ...]
    data_name: str
    report: ValidationReport
    title: str
    webgpu: bool
    card: str

    def write(self, folder: Path) -> dict[str, Any]:
        """Write everything into `folder`, which is empty, and return the rest of `Deployed`."""
        session = open_session(self.file.path)
        inputs = [describe_node(node) for node in session.get_inputs()]
        outputs = [describe_node(node) for node in session.get_outputs()]
        # 1. What raw samples are, and golden cases of them.
        preprocessing, split = self._find_preprocessing(session)
        notes = [*self.report.notes, *self._list_gaps(session, preprocessing)]
        if split is None and not _can_make_raw(session, preprocessing):
            preprocessing = None
        cases = make_cases(session, preprocessing, split)
        if not cases:
            raise DataError(
                "the data set holds no sample: there is nothing to make golden outputs of"
            )
        # 2. How closely they must be reproduced.
        input_tolerance = compute_preprocessing_tolerance(preprocessing, cases)
        batches: Iterator[Sequence[np.ndarray]] = iter(())
        if split is not None and preprocessing is not None:
            size = find_fixed_batch(session) or BOUND_BATCH
            batches = draw_bound_batches(split, preprocessing, size)
        tolerances = compute_tolerances(
            session,
            open_session(self.file.path, level="disabled"),
            cases,
            reference=self.reference,
            batches=batches,
            quantized=has_quantized_activations(self.file),
            input_tolerance=input_tolerance,
        )
        for output, tolerance in zip(outputs, tolerances, strict=True):
            output["tolerance"] = tolerance.value
            output["raw_tolerance"] = tolerance.raw
            output["tolerance_from"] = tolerance.how
        # 3. The model's files, and those of the cases.
        model = self.file.with_data()
        decoded = decode_model(model).serialize()
        float32_bytes = None if decoded is None else len(decoded)
        bits = [stored.weight.tensor.bits for stored in read_weights(model)]
        external = copy_model(self.file, folder / MODEL)
        input_names = [entry["name"] for entry in inputs]
        output_names = [entry["name"] for entry in outputs]
        stored_cases = [
            store_case(folder, number, case, input_names, output_names)
            for number, case in enumerate(cases)
        ]
        # 4. The manifest, and what is made of it.
        accuracy = self.report.onnx_accuracy if split is not None else None
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "tool": f"ecqx-onnx {__version__}",
            "name": self.title or self.file.path.stem,
            "platform": self.platform.name,
            "runtime": self.platform.runtime_for(self.file.proto),
            "made_with": self.report.runtime,
            "model": {**describe_file(folder / MODEL), "float32_bytes": float32_bytes},
            "external": [describe_file(path) for path in external],
            "bits": max(bits, default=None),
            "inputs": inputs,
            "outputs": outputs,
            "preprocessing": None,
            "raw": None,
            "labels": list(self.labels),
            "accuracy": None,
            "golden": {"preprocessing_tolerance": input_tolerance, "cases": stored_cases},
        }
        raw = cases[0].raw
        if preprocessing is not None:
            manifest["preprocessing"] = json.loads(preprocessing.to_json())
        if raw is not None:
            manifest["raw"] = {"dtype": raw.dtype.name, "shape": list(raw.shape[1:])}
        if accuracy is not None:
            manifest["accuracy"] = {**accuracy.to_json(), "data": self.data_name}
        if self.platform.name == "web":
            manifest["webgpu"] = self.webgpu
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        (folder / "manifest.json").write_text(text, encoding="utf-8")
        copy_templates(self.platform, folder, manifest, notes)
        if self.card:
            checks = {c.name: c.sentence for c in self.report.checks if c.passed}
            text = write_card(manifest, self.card, checks)
            (folder / CARD).write_text(text, encoding="utf-8")
        if self.platform.name in ("linux", "android"):
            (folder / "golden.txt").write_text(format_lines(manifest), encoding="utf-8")
        if self.platform.name == "web":
            copy_web_runtime(folder, webgpu=self.webgpu)
        return {
            "platform": self.platform.name,
            "model_bytes": self.file.size,
            "float32_bytes": float32_bytes,
            "accuracy": accuracy,
            "tolerances": tolerances,
            "cases": len(cases),
            "notes": tuple(notes),
        }

    def _find_preprocessing(self, session: Session) -> tuple[Preprocessing | None, Split | None]:
        """What makes inputs of raw samples, by the data if there are any; and the data with it."""
        if self.split is None:
            return read_preprocessing(self.file), None
        split, _ = prepare_samples(self.file, self.split, None, session)
        return split.preprocessing, split

    def _list_gaps(self, session: Session, preprocessing: Preprocessing | None) -> Iterator[str]:
        """Sentences on what the folder lacks, and what would help."""
        if preprocessing is None:
            yield (
                "the file records no preprocessing, so runners take only inputs that are ready for "
                "the model"
            )
        elif self.split is None and not _can_make_raw(session, preprocessing):
            yield (
                "the file's preprocessing does not tell what one raw sample looks like; give "
                "--data to have it run"
            )
        if self.split is None:
            yield "golden inputs are made up, and no accuracy is stated: give --data for real ones"
        if self.reference is None:
            yield (
                "the tolerance is coarse: give --against for one that is derived from the PyTorch "
                "model"
            )


def _can_make_raw(session: Session, preprocessing: Preprocessing | None) -> bool:
    """Whether raw samples can be made up."""
    return preprocessing is not None and choose_raw_maker(session, preprocessing) is not None


def _choose_labels(
    file: OnnxFile, labels: Sequence[str], data_labels: Sequence[str]
) -> tuple[str, ...]:
    """The classes' names: those that were given, the file's, or the data's."""
    if labels:
        outputs = [value.type.tensor_type.shape.dim for value in file.proto.graph.output]
        classes = outputs[0][1].dim_value if len(outputs[0]) == 2 else 0
        if classes not in (0, len(labels)):
            raise OptionError(
                f"--labels names {len(labels)} classes, and the model tells {classes} apart; give "
                "one name for each"
            )
        return tuple(labels)
    recorded = file.metadata.get("labels")
    if isinstance(recorded, list) and recorded:
        return tuple(map(str, recorded))
    return tuple(data_labels)
