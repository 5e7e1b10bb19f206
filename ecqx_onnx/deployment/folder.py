"""(.onnx file, platform, data, PyTorch model) -> the folder, written beside its place and renamed: whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
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
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ecqx_onnx import __version__
from ecqx_onnx.data import Split
from ecqx_onnx.deployment.golden import (
    Case,
    Tolerance,
    choose_raw_maker,
    compute_preprocessing_tolerance,
    compute_tolerances,
    draw_bound_batches,
    find_element_type,
    make_cases,
)
from ecqx_onnx.deployment.platforms import Platform, find_platform
from ecqx_onnx.errors import CheckFailed, DataError, FileError, OptionError
from ecqx_onnx.inputs.model_copy import copy_model
from ecqx_onnx.inputs.onnx_file import OnnxFile, read_onnx
from ecqx_onnx.preprocessing.spectrum import Spectrum
from ecqx_onnx.runtime.decoded_model import decode_model
from ecqx_onnx.runtime.sessions import find_fixed_batch, open_session
from ecqx_onnx.validation import ValidationReport
from ecqx_onnx.validation.checks import has_quantized_activations
from ecqx_onnx.validation.devices.setup import WEB_FILES, set_up
from ecqx_onnx.validation.judgement import read_preprocessing
from ecqx_onnx.validation.metrics import Proportion
from ecqx_onnx.validation.validator import prepare_samples

if TYPE_CHECKING:
    import torch


FORMAT = "ecqx-onnx deployment"
VERSION = 1
MODEL = "model.onnx"
TEXT = (".md", ".txt")  # templates that are filled in; all others are copied as they are


@dataclass(frozen=True)
class Deployed:
    """What was written. files: (name, bytes). notes: what a user should know, one sentence each."""

    folder: Path
    platform: str
    files: tuple[tuple[str, int], ...]
    model_bytes: int
    float32_bytes: int | None
    accuracy: Proportion | None
    tolerances: tuple[Tolerance, ...]
    cases: int
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        return sum(size for _, size in self.files)

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "platform": self.platform,
            "bytes": self.size,
            "model_bytes": self.model_bytes,
            "float32_bytes": self.float32_bytes,
            "accuracy": self.accuracy.to_json() if self.accuracy else None,
            "golden_cases": self.cases,
            "tolerances": [asdict(tolerance) for tolerance in self.tolerances],
            "files": dict(self.files),
            "notes": list(self.notes),
        }

    def render(self) -> RenderableType:
        table = Table(title=f"{self.folder}: ready for {self.platform}", title_justify="left")
        table.add_column("file", overflow="fold")
        table.add_column("bytes", justify="right")
        golden = [size for name, size in self.files if name.startswith("golden/")]
        for name, size in self.files:
            if not name.startswith("golden/"):
                table.add_row(Text(name), f"{size:,}")
        table.add_row(f"golden/ ({self.cases} cases)", f"{sum(golden):,}")
        lines: list[RenderableType] = [table]
        lines += [Text(f"note: {note}", style="yellow") for note in self.notes]
        accuracy = f"; expected accuracy {self.accuracy}" if self.accuracy else ""
        lines.append(
            Text(
                f"{self.folder}: {self.size:,} bytes, the model {self.model_bytes:,}{accuracy}; see README.md",
                style="bold",
            )
        )
        return Group(*lines)


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
    """report: the file's validation, which must have passed (CheckFailed). reference: makes the tolerance sharp.

    split: real golden inputs instead of made-up ones. labels: instead of the file's; data_labels: where both hold none.
    InputError if the platform cannot load the file, no golden outputs can be made, or the folder is in the way.
    """
    platform = find_platform(platform) if isinstance(platform, str) else platform
    folder = Path(folder)
    check_place(folder, force)
    file = read_onnx(onnx_file)
    platform.check(file.proto, file.path)
    if not report.ok:
        failed = "; ".join(f"{check.name}: {check.sentence}" for check in report.failures)
        raise CheckFailed(f"{onnx_file}: is not deployed, because its validation fails: {failed}")
    maker = _Maker(
        file,
        platform,
        reference,
        split,
        choose_labels(file, labels, data_labels),
        data_name,
        report,
    )
    with replace_folder_on_success(
        folder, check=lambda: check_place(folder, force), force=force
    ) as temporary:
        result = maker.write(temporary)
    files = tuple(
        (path.relative_to(folder).as_posix(), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )
    return Deployed(folder=folder, files=files, **result)


def check_place(folder: Path, force: bool) -> None:
    """Refuses a place where no folder may be written; removes what killed processes left for it."""
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
        if any(folder.iterdir()) and not is_deployment(folder):
            raise FileError(
                f"'{folder}' holds files that deploy did not write, so it is not replaced; choose another name"
            )
    except OSError as error:
        raise FileError(
            f"cannot write '{folder}': {error.strerror or error}; choose another place"
        ) from error


def is_deployment(folder: Path) -> bool:
    try:
        return (
            json.loads((folder / "manifest.json").read_text(encoding="utf-8")).get("format")
            == FORMAT
        )
    except (OSError, ValueError, AttributeError):
        return False


@dataclass(frozen=True, eq=False)
class _Maker:
    file: OnnxFile
    platform: Platform
    reference: torch.nn.Module | None
    split: Split | None
    labels: tuple[str, ...]
    data_name: str
    report: ValidationReport

    def write(self, folder: Path) -> dict[str, Any]:
        """Everything into `folder`, which is empty. -> the values of `Deployed`, but folder and files."""
        session, plain = (
            open_session(self.file.path),
            open_session(self.file.path, level="disabled"),
        )
        inputs, outputs = (
            [describe_node(node) for node in nodes]
            for nodes in (session.get_inputs(), session.get_outputs())
        )
        notes = list(self.report.notes)
        preprocessing, split = read_preprocessing(self.file), self.split
        if split is not None:
            split, _ = prepare_samples(self.file, split, None, session)
            preprocessing = split.preprocessing
        if preprocessing is None:
            notes.append(
                "the file records no preprocessing, so runners take only inputs that are ready for the model"
            )
        elif split is None and choose_raw_maker(session, preprocessing) is None:
            notes.append(
                "the file's preprocessing does not tell what one raw sample looks like; give --data to have it run"
            )
            preprocessing = None
        if split is None:
            notes.append(
                "golden inputs are made up, and no accuracy is stated: give --data for real ones"
            )
        if self.reference is None:
            notes.append(
                "the tolerance is coarse: give --against for one that is derived from the PyTorch model"
            )
        cases = make_cases(session, preprocessing, split)
        if not cases:
            raise DataError(
                "the data set holds no sample: there is nothing to make golden outputs of"
            )
        batches: Iterator[Sequence[np.ndarray]] = iter(())
        if split is not None and preprocessing is not None:
            batches = draw_bound_batches(split, preprocessing, find_fixed_batch(session) or 64)
        input_tolerance = compute_preprocessing_tolerance(preprocessing, cases)
        found = compute_tolerances(
            session,
            plain,
            cases,
            reference=self.reference,
            batches=batches,
            quantized=has_quantized_activations(self.file),
            input_tolerance=input_tolerance,
        )
        model = self.file.with_data()
        twin = decode_model(model).serialize()
        weights = read_weights(model)
        accuracy = self.report.onnx_accuracy if split is not None else None
        names = [entry["name"] for entry in inputs], [entry["name"] for entry in outputs]
        external = copy_model(self.file, folder / MODEL)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "tool": f"ecqx-onnx {__version__}",
            "name": self.file.path.stem,
            "platform": self.platform.name,
            "runtime": self.platform.runtime_for(self.file.proto),
            "made_with": self.report.runtime,
            "model": {
                **copy_file(folder / MODEL),
                "float32_bytes": None if twin is None else len(twin),
            },
            "external": [copy_file(path) for path in external],
            "bits": find_widest_bits(weights),
            "inputs": inputs,
            "outputs": [
                {
                    **output,
                    "tolerance": tolerance.value,
                    "raw_tolerance": tolerance.raw,
                    "tolerance_from": tolerance.how,
                }
                for output, tolerance in zip(outputs, found, strict=True)
            ],
            "preprocessing": None if preprocessing is None else json.loads(preprocessing.to_json()),
            "raw": None
            if cases[0].raw is None
            else {"dtype": cases[0].raw.dtype.name, "shape": list(cases[0].raw.shape[1:])},
            "labels": list(self.labels),
            "accuracy": None
            if accuracy is None
            else {**accuracy.to_json(), "data": self.data_name},
            "golden": {
                "preprocessing_tolerance": input_tolerance,
                "cases": [
                    store_case(folder, number, case, *names) for number, case in enumerate(cases)
                ],
            },
        }
        (folder / "manifest.json").write_text(
            json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8"
        )
        self._copy_templates(folder, manifest, notes)
        if self.platform.name in ("linux", "android"):
            (folder / "golden.txt").write_text(format_manifest_lines(manifest), encoding="utf-8")
        if self.platform.name == "web":
            (folder / "runtime").mkdir()
            for name in WEB_FILES:
                shutil.copyfile(set_up("web") / name, folder / "runtime" / name)
        return {
            "platform": self.platform.name,
            "model_bytes": self.file.size,
            "float32_bytes": manifest["model"]["float32_bytes"],
            "accuracy": accuracy,
            "tolerances": found,
            "cases": len(cases),
            "notes": tuple(notes),
        }

    def _copy_templates(self, folder: Path, manifest: dict[str, Any], notes: Sequence[str]) -> None:
        accuracy = "was not measured (no data was given)"
        if found := manifest["accuracy"]:
            interval = f"{100 * found['low']:.2f} to {100 * found['high']:.2f}, 95 % interval"
            accuracy = f"{100 * found['share']:.2f} % ({interval}, {found['total']} samples of {quote_markdown(found['data'])})"
        tolerances = [
            f"- {quote_markdown(o['name'])}: {o['tolerance']:.3g}, {o['tolerance_from']}"
            for o in manifest["outputs"]
        ]
        values = {
            "name": quote_markdown(manifest["name"]),
            "tool": manifest["tool"],
            "runtime": manifest["runtime"],
            "least": manifest["runtime"].split()[1],
            "made_with": manifest["made_with"],
            "bytes": f"{manifest['model']['bytes']:,}",
            "sha256": manifest["model"]["sha256"],
            "accuracy": accuracy,
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


def copy_file(path: Path) -> dict[str, Any]:
    """What the manifest says of a file that was copied into the folder."""
    with path.open("rb") as copy:
        digest = hashlib.file_digest(copy, "sha256").hexdigest()
    return {"file": path.name, "sha256": digest, "bytes": path.stat().st_size}


def store_case(
    folder: Path, number: int, case: Case, inputs: Sequence[str], outputs: Sequence[str]
) -> dict[str, Any]:
    """The case's arrays as raw little-endian files, and what the manifest says of them."""
    stem = f"golden/{number:02d}"

    def arrays(
        kind: str, names: Sequence[str], values: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        return [
            store_array(folder, f"{stem}.{kind}{i}.bin", names[i], value)
            for i, value in enumerate(values)
        ]

    return {
        "raw": None
        if case.raw is None
        else store_array(folder, f"{stem}.raw.bin", "raw", case.raw),
        "inputs": arrays("input", inputs, case.inputs),
        "outputs": arrays("output", outputs, case.outputs),
        "labels": list(case.labels),
    }


def store_array(folder: Path, file: str, name: str, array: np.ndarray) -> dict[str, Any]:
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    return {
        "name": name,
        "file": file,
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "sha256": digest,
    }


def describe_node(node: Any) -> dict[str, Any]:
    """An input or output of the graph; null is a free length."""
    shape = [length if isinstance(length, int) else None for length in node.shape]
    return {"name": node.name, "dtype": find_element_type(node), "shape": shape}


def format_manifest_lines(manifest: dict[str, Any]) -> str:
    """What a runner without a JSON parser needs of the manifest: fields between tabs."""
    model, preprocessing = manifest["model"], manifest["preprocessing"] or {}
    rows: list[list[Any]] = [["# manifest.json in lines"]]
    rows.append(
        ["model", model["file"], model["bytes"], model["float32_bytes"] or 0, model["sha256"]]
    )
    rows += [["external", entry["file"], entry["sha256"]] for entry in manifest["external"]]
    rows += [["input", entry["name"]] for entry in manifest["inputs"]]
    rows += [
        ["output", entry["name"], repr(entry["tolerance"]), repr(entry["raw_tolerance"])]
        for entry in manifest["outputs"]
    ]
    rows.append(["preprocessing_tolerance", repr(manifest["golden"]["preprocessing_tolerance"])])
    rows += [["label", label] for label in manifest["labels"]]
    if preprocessing:
        rows += [["kind", preprocessing["kind"]], ["scale", repr(preprocessing["scale"])]]
        rows += [
            [key, *map(repr, preprocessing[key])] for key in ("mean", "std") if preprocessing[key]
        ]
        if preprocessing["spectrum"]:
            rows.append(
                ["spectrum", *(preprocessing["spectrum"][field.name] for field in fields(Spectrum))]
            )
    if manifest["raw"]:
        rows.append(["raw", "x".join(map(str, manifest["raw"]["shape"]))])
    for case in manifest["golden"]["cases"]:
        rows.append(["case"])
        for kind, entries in (
            ("raw", [case["raw"]] if case["raw"] else []),
            ("input", case["inputs"]),
            ("output", case["outputs"]),
        ):
            for entry in entries:
                shape = "x".join(map(str, entry["shape"]))
                rows.append(
                    [f"golden_{kind}", entry["file"], entry["dtype"], shape, entry["sha256"]]
                )
    return "".join("\t".join(" ".join(str(field).split()) for field in row) + "\n" for row in rows)


def choose_labels(
    file: OnnxFile, labels: Sequence[str], data_labels: Sequence[str]
) -> tuple[str, ...]:
    outputs = [value.type.tensor_type.shape.dim for value in file.proto.graph.output]
    if (
        labels
        and len(outputs[0]) == 2
        and (classes := outputs[0][1].dim_value) not in (0, len(labels))
    ):
        raise OptionError(
            f"--labels names {len(labels)} classes, and the model tells {classes} apart; give one name for each"
        )
    recorded = file.metadata.get("labels")
    return tuple(labels) or (
        tuple(map(str, recorded)) if isinstance(recorded, list) and recorded else tuple(data_labels)
    )


def find_widest_bits(weights: Sequence[Any]) -> int | None:
    """The widest of the quantised weights; None where there are none of ours."""
    return max((stored.weight.tensor.bits for stored in weights), default=None)


def quote_markdown(text: str) -> str:
    """As Markdown code, whatever it holds."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"
