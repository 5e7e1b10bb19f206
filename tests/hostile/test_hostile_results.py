"""Results that come back from devices of others: nothing is copied, waited for or believed
unseen."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ecqx_onnx.errors import FileError, OptionError
from ecqx_onnx.validation.devices import validate_on
from ecqx_onnx.validation.devices.devices import Folder, _unpack_results
from tests.fuzz.readers.device_results import make_model, make_seeds

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX only")


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("honest")
    with zipfile.ZipFile(io.BytesIO(make_seeds()[0])) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def results(honest, tmp_path):
    return Path(shutil.copytree(honest, tmp_path / "results"))


def judge(folder: Path):
    return validate_on(Folder(folder), make_model(), latency_runs=2)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_honest_results_are_read_where_they_lie(results):
    report = judge(results)
    assert report.ok
    assert report.runtime.startswith("onnxruntime")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\ufeff{}", "\0", "NaN"]
)
def test_json_that_is_deep_or_none_is_refused(results, text):
    (results / "result.json").write_text(text, encoding="utf-8")
    with pytest.raises(FileError, match=r"result\.json"):
        judge(results)


@pytest.mark.parametrize(
    "changes",
    [
        {"runtime": "x" * 1001},
        {"runtime": 7},
        {"batches": {"0": []}},
        {"batches": ["ab"]},
        {"batches": [None]},
        {"operators": {"MatMul": -1}},
        {"operators": {"MatMul": 10**400}},
        {"operators": {"x" * 2000: 1}},
        {"latency": {"seconds": float("nan"), "runs": 3}},
        {"latency": {"seconds": -1, "runs": 3}},
        {"latency": {"seconds": 1, "runs": 1.5}},
        {"latency": {"seconds": None, "runs": 3}},
        {"latency": [1, 2]},
        {"load_seconds": float("inf")},
        {"load_seconds": "1"},
        {"peak_memory": True},
        {"peak_memory": 2**60},
        {"plain": "text"},
    ],
)
def test_fields_that_no_runner_writes_are_refused(results, changes):
    edit(results, **changes)
    with pytest.raises(FileError, match="is damaged"):
        judge(results)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"file": "outputs/\0"}, "outside of the job's folder"),
        ({"file": "/etc/passwd"}, "outside of the job's folder"),
        ({"file": "outputs/../../x"}, "outside of the job's folder"),
        ({"file": 5}, "not described"),
        ({"file": "x" * 2000}, "not described"),
        ({"file": "outputs/" + "x" * 300}, "cannot be"),
        ({"file": "outputs"}, "is a folder"),
        ({"dtype": "i4,i4"}, "not described"),
        ({"dtype": "V99999999999"}, "not described"),
        ({"dtype": "complex64"}, "not described"),
        ({"shape": "23"}, "not described"),
        ({"shape": [2.0, 3.0]}, "not described"),
        ({"shape": [1] * 100}, "not described"),
        ({"shape": [2**31, 3]}, "claims"),
        ({"sha256": None}, "changed or cut short"),
    ],
)
def test_an_output_that_is_described_as_no_runner_does_is_refused(results, changes, says):
    raw = json.loads((results / "result.json").read_text())
    raw["batches"][0][0].update(changes)
    edit(results, batches=raw["batches"])
    with pytest.raises(FileError, match=says):
        judge(results)


@needs_pipes
@pytest.mark.parametrize("what", ["result.json", "outputs/00000.0.bin"])
def test_a_pipe_among_the_results_is_not_waited_for(results, what):
    (results / what).unlink()
    os.mkfifo(results / what)
    with pytest.raises(FileError, match="pipe"):
        judge(results)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="POSIX only")
@pytest.mark.parametrize("what", ["result.json", "outputs/00000.0.bin"])
def test_a_link_out_of_the_results_is_not_followed(results, what):
    (results / what).unlink()
    (results / what).symlink_to("/dev/zero")
    with pytest.raises(FileError, match="link"):
        judge(results)


def test_links_in_a_circle_are_told(results):
    path = results / "outputs" / "00000.0.bin"
    path.unlink()
    path.symlink_to(path.name)
    with pytest.raises(FileError, match="cannot be found behind its links"):
        judge(results)


def test_a_huge_file_among_the_results_is_neither_copied_nor_read(results, tmp_path):
    with (results / "outputs" / "00000.0.bin").open("r+b") as file:
        file.truncate(10**12)
    with (results / "outputs" / "other.bin").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(FileError, match="changed or cut short"):
        judge(results)


def test_a_job_is_not_written_through_links(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.json").symlink_to(tmp_path / "mine")
    with pytest.raises(FileError, match="is a link"):
        judge(tmp_path / "job")
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_job_is_not_written_among_other_things(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(OptionError, match="holds other things than a job"):
        judge(tmp_path)


def archive_of(*members: tuple[str, dict[str, object], bytes]) -> io.BytesIO:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, fields, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))
    file.seek(0)
    return file


def test_an_archive_of_results_is_unpacked(tmp_path):
    members = (
        ("result.json", {}, b"{}"),
        ("outputs", {"type": tarfile.DIRTYPE}, b""),
        ("./outputs/0.bin", {}, b"1"),
    )
    _unpack_results(archive_of(*members), tmp_path)
    assert (tmp_path / "outputs" / "0.bin").read_bytes() == b"1"


@pytest.mark.parametrize(
    "member",
    [
        ("../x", {}, b"1"),
        ("/tmp/x", {}, b"1"),
        ("model.onnx", {}, b"1"),
        ("outputs/a/b", {}, b"1"),
        ("outputs/..", {}, b""),
        ("result.json", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, b""),
        ("result.json", {"type": tarfile.LNKTYPE, "linkname": "job.json"}, b""),
        ("result.json", {"type": tarfile.FIFOTYPE}, b""),
        ("result.json", {"type": tarfile.CHRTYPE}, b""),
    ],
)
def test_an_archive_of_anything_else_is_refused(member, tmp_path):
    with pytest.raises(ValueError, match="it holds"):
        _unpack_results(archive_of(member), tmp_path)
    assert not list(tmp_path.iterdir())


def test_outputs_of_every_type_that_a_graph_can_declare_have_a_name_here():
    from ecqx_onnx.runtime.sessions import NUMPY_TYPES
    from ecqx_onnx.validation.devices.job import OUTPUT_TYPES

    # Texts do not travel: such an output is refused, as any other of a type without a name.
    names = {np.dtype(kind).name for kind in NUMPY_TYPES.values()} - {"object"}
    assert names <= set(OUTPUT_TYPES)
