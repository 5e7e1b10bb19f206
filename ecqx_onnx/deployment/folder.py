"""Write a deployment folder: beside its place, then renamed, so that it is whole or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
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
from ecqx_onnx.deployment.deployed import Deployed
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
from ecqx_onnx.validation.devices.setup import WEB_FILES, set_up
from ecqx_onnx.validation.judgement import read_preprocessing
from ecqx_onnx.validation.validator import prepare_samples

if TYPE_CHECKING:
    import torch


FORMAT = "ecqx-onnx deployment"
VERSION = 1
MODEL = "model.onnx"
BOUND_BATCH = 64  # samples of a call, where the graph leaves it open
TEXT = (".md", ".txt")  # templates that are filled in; all others are copied as they are


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
    maker = _Maker(file, platform, reference, split, labels, data_name, report)
    with replace_folder_on_success(
        folder, check=lambda: _check_place(folder, force), force=force
    ) as temporary:
        result = maker.write(temporary)
    files = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files.append((path.relative_to(folder).as_posix(), path.stat().st_size))
    return Deployed(folder=folder, files=tuple(files), **result)


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
            "name": self.file.path.stem,
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
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        (folder / "manifest.json").write_text(text, encoding="utf-8")
        self._copy_templates(folder, manifest, notes)
        if self.platform.name in ("linux", "android"):
            (folder / "golden.txt").write_text(format_lines(manifest), encoding="utf-8")
        if self.platform.name == "web":
            (folder / "runtime").mkdir()
            for name in WEB_FILES:
                shutil.copyfile(set_up("web") / name, folder / "runtime" / name)
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

    def _copy_templates(self, folder: Path, manifest: dict[str, Any], notes: Sequence[str]) -> None:
        """The runner and the README; texts are filled in with the manifest's values."""
        tolerances = []
        for output in manifest["outputs"]:
            name = _quote_markdown(output["name"])
            tolerances.append(f"- {name}: {output['tolerance']:.3g}, {output['tolerance_from']}")
        values = {
            "name": _quote_markdown(manifest["name"]),
            "tool": manifest["tool"],
            "runtime": manifest["runtime"],
            "least": manifest["runtime"].split()[1],
            "made_with": manifest["made_with"],
            "bytes": f"{manifest['model']['bytes']:,}",
            "sha256": manifest["model"]["sha256"],
            "accuracy": _describe_accuracy(manifest["accuracy"]),
            "cases": str(len(manifest["golden"]["cases"])),
            "tolerances": "\n".join(tolerances),
            "notes": "".join(f"\n- Note: {note}." for note in notes),
        }
        for template in self.platform.templates:
            if template.suffix in TEXT:
                text = Template(template.read_text(encoding="utf-8")).substitute(values)
                (folder / template.name).write_text(text, encoding="utf-8")
            else:
                shutil.copyfile(template, folder / template.name)


def _can_make_raw(session: Session, preprocessing: Preprocessing | None) -> bool:
    """Whether raw samples can be made up."""
    return preprocessing is not None and choose_raw_maker(session, preprocessing) is not None


def _describe_accuracy(found: dict[str, Any] | None) -> str:
    """The accuracy in the README's words, whose sentence begins before them."""
    if not found:
        return "was not measured (no data was given)"
    share = f"{100 * found['share']:.2f} %"
    interval = f"{100 * found['low']:.2f} to {100 * found['high']:.2f}, 95 % interval"
    return f"{share} ({interval}, {found['total']} samples of {_quote_markdown(found['data'])})"


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


def _quote_markdown(text: str) -> str:
    """As Markdown code, whatever it holds."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"
