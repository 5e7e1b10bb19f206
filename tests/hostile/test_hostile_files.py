"""Files of strangers that are no regular files, lie about their size, or start other programs."""

from __future__ import annotations

import io
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecqx_onnx.data import folders, load_dataset, npz
from ecqx_onnx.errors import DataError, FileError, InputError
from ecqx_onnx.inputs.reading import open_regular, read_bytes
from ecqx_onnx.validation.equivalence import load_inputs
from tests.hostile.test_hostile_data import header, npy, read_all, save_members, wav_bytes
from tests.test_data import save_image

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX only")
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
DDS = b"DDS " + struct.pack("<7I", 124, 0x1007, 4, 4, 0, 0, 0) + bytes(96)


def saved_as(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [POSTSCRIPT, DDS, saved_as("tga"), saved_as("pcx"), saved_as("ico"), saved_as("sgi")]
)
def test_only_named_formats_are_opened_whatever_a_file_is_called(tmp_path, content, monkeypatch):
    def start(*arguments: object, **options: object) -> None:
        raise AssertionError(f"a program was started: {arguments}")

    monkeypatch.setattr(subprocess, "Popen", start)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(content)
    with pytest.raises(DataError, match=r"1\.png cannot be read as an image") as refusal:
        read_all(str(tmp_path))
    assert "object at" not in str(refusal.value)
    assert "BufferedReader" not in str(refusal.value)


@needs_pipes
@pytest.mark.parametrize("ending", ["png", "wav"])
def test_a_pipe_among_the_samples_is_not_waited_for(tmp_path, ending):
    (tmp_path / "cat").mkdir()
    os.mkfifo(tmp_path / "cat" / f"1.{ending}")
    with pytest.raises(DataError, match="is a pipe, not a regular file"):
        read_all(str(tmp_path))


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="POSIX only")
@pytest.mark.parametrize("ending", ["png", "wav"])
def test_a_link_to_an_endless_device_among_the_samples_is_not_read(tmp_path, ending):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / f"1.{ending}").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="is a device, not a regular file"):
        read_all(str(tmp_path))


@needs_pipes
def test_arrays_behind_a_pipe_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "data.npz")
    for read in (load_inputs, lambda path: load_dataset(str(path))):
        with pytest.raises(FileError, match="is a pipe, not a regular file"):
            read(tmp_path / "data.npz")


def test_a_name_with_a_zero_byte_and_a_file_that_is_too_large_are_told(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    with pytest.raises(FileError, match="can be no file's name"):
        open_regular("a\0b")
    with pytest.raises(FileError, match="has 5 bytes, and at most 4 are read"):
        read_bytes(tmp_path / "file", most=4)
    assert read_bytes(tmp_path / "file", most=5) == b"12345"


@pytest.mark.parametrize(
    "member",
    [
        npy(header((640_000_000_000,), "<f8")),
        npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': ((((1,\n"),
        npy(b"[" * 9000),
        npy(header((1,), "|O"), b"\x80\x04N."),
        npy(header((10**400,))),
        npy(header((1,) * 300), bytes(4)),
        npy(header((2,), "<U1"), struct.pack("<II", 0x110000, 65)),
        npy(header((0,), "|V99999999999")),
        b"no array at all",
    ],
)
def test_inputs_that_lie_are_refused_before_memory_is_asked_for(tmp_path, member):
    with pytest.raises(FileError, match=r"as an \.npz of the model's inputs"):
        load_inputs(save_members(tmp_path, x=member))


def test_inputs_that_are_honest_are_read_as_numpy_reads_them(tmp_path):
    arrays = {
        "x": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "n": np.int64(3),
        "words": np.array(["a", "éü"]),
    }
    np.savez_compressed(tmp_path / "data.npz", **arrays)
    found = load_inputs(tmp_path / "data.npz")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_bomb_whose_headers_are_honest_is_not_inflated(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "MOST_INFLATED", 10**6)
    bomb = save_members(tmp_path, x=npy(header((10**6,)), bytes(4 * 10**6)))
    with pytest.raises(FileError, match="more than 100 times its own"):
        load_inputs(bomb)


def test_more_arrays_than_anyone_saves_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "MOST_MEMBERS", 3)
    with pytest.raises(FileError, match="holds 4 arrays, more than 3"):
        load_inputs(
            save_members(tmp_path, **{name: npy(header((1,)), bytes(4)) for name in "abcd"})
        )


def test_a_batch_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "LARGEST_BATCH", 100)
    for number in range(8):
        save_image(tmp_path / "test" / "cat" / f"{number}.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(DataError, match="take 192 bytes, more than 100: use a smaller batch size"):
        read_all(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        wav_bytes()[:12] + b"data" + struct.pack("<I", 8) + bytes(8) + wav_bytes()[12:],
        wav_bytes()[:16] + struct.pack("<I", 2**32 - 1) + wav_bytes()[20:],
        wav_bytes()[:4] + struct.pack("<I", 3) + wav_bytes()[8:],
        wav_bytes()[:12] + b"LIST" + struct.pack("<I", 2**31) + wav_bytes()[12:],
        wav_bytes()[:26],
    ],
)
def test_wavs_whose_chunks_lie(tmp_path, content):
    (tmp_path / "yes").mkdir()
    (tmp_path / "yes" / "bad.wav").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.wav"):
        read_all(str(tmp_path))


# Names


@pytest.fixture
def odd_name(tmp_path):
    """A folder of classes whose second one is named in another encoding."""
    save_image(tmp_path / "data" / "cat" / "1.png", np.zeros((4, 4), np.uint8))
    name = os.path.join(os.fsencode(tmp_path / "data"), b"caf\xe9")
    try:
        os.mkdir(name)
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    return tmp_path / "data"


def test_a_class_whose_name_is_not_utf8_is_refused_before_training(odd_name):
    with pytest.raises(DataError, match=r"class folder b'caf\\xe9' .*not UTF-8: rename it"):
        load_dataset(str(odd_name))


def test_a_data_set_whose_own_path_is_not_utf8_has_a_name_that_files_can_hold(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        save_image(folder / "cat" / "1.png", np.zeros((4, 4), np.uint8))
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    assert load_dataset(str(folder)).name.encode("utf-8").endswith(rb"caf\udce9")


@pytest.mark.parametrize("label", ["\ud800", "a" * 1001])
def test_labels_that_no_file_can_hold_are_refused_before_training(tmp_path, label):
    x, y = np.zeros((2, 3), np.float32), np.arange(2)
    np.savez(tmp_path / "data.npz", x=x, y=y, labels=np.array(["a", label]))
    with pytest.raises(InputError, match=r"class 1 of data\.npz has a name"):
        load_dataset(str(tmp_path / "data.npz"))
