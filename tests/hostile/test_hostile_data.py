"""Data sets that are damaged, that lie about themselves, or that hold what cannot be: each is
refused with one clear sentence."""

import io
import struct
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecqx_onnx.data import load_dataset
from ecqx_onnx.errors import DataError, FileError, InputError
from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.preprocessing.spectrum import Spectrum
from tests.test_data import save_image, save_wav

X, Y = np.zeros((10, 3), np.float32), np.arange(10) % 3


def refusal(
    spec: object, *, preprocessing: Preprocessing | None = None, kind: type[InputError] = DataError
) -> str:
    """The one sentence with which the data set is refused, at the latest when its batches are
    read."""
    with pytest.raises(InputError) as caught:
        read_all(str(spec), preprocessing)
    assert type(caught.value) is kind, caught.value
    assert caught.value.exit_status == 2
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert ": " in sentence  # what is wrong: what to do
    return sentence


def read_all(spec: str, preprocessing: Preprocessing | None = None) -> None:
    dataset = load_dataset(spec, preprocessing=preprocessing)
    for split in (dataset.train, dataset.test):
        if split is not None:
            list(split.batches(4))


def save(path: Path, **arrays: object) -> Path:
    np.savez(path / "data.npz", **arrays)  # type: ignore[arg-type]
    return path / "data.npz"


def npy(header: bytes, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    size = struct.pack("<H" if version[0] == 1 else "<I", len(header))
    return b"\x93NUMPY" + version + size + header + data


def header(shape: object, descr: str = "<f4") -> bytes:
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()


def save_members(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path / "data.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path / "data.npz"


# What the arrays hold


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({}, "no 'x'"),
        ({"images": X, "classes": Y}, "no 'x'"),
        ({"x": X}, "no 'y'"),
        ({"y": Y}, "no 'x'"),
        ({"x_train": X, "y_train": Y}, "no 'x_test'"),
        ({"x_train": X, "x_test": X, "y_test": Y}, "no 'y_train'"),
        ({"x": X[:0], "y": Y[:0]}, "empty"),
        (
            {"x_train": X[:0], "y_train": Y[:0], "x_test": X, "y_test": Y},
            "x_train in data.npz is empty",
        ),
        ({"x": X, "y": Y[:9]}, "10 samples in 'x' and 9 labels"),
        ({"x": X, "y": Y - 1}, "label -1 in row 0"),
        ({"x": X, "y": np.where(Y == 2, 10**9, Y)}, "label 1000000000 in row 2"),
        ({"x": X, "y": np.full(10, 2**63 + 1, np.uint64)}, "label 9223372036854775809"),
        ({"x": X, "y": Y, "labels": np.array(["a", "b"])}, "label 2 in row 2"),
        ({"x": X, "y": Y, "labels": np.zeros(3)}, "labels in data.npz"),
        ({"x": X, "y": Y.astype(float)}, "labels must be integers"),
        ({"x": X, "y": Y.astype(str)}, "labels must be integers"),
        ({"x": X, "y": np.eye(10, dtype=int)}, "argmax"),
        ({"x": X, "y": np.int64(3)}, "labels must be integers"),
        ({"x": np.float32(1), "y": Y[:1]}, "x in data.npz"),
        ({"x": np.zeros(10, np.float32), "y": Y}, "x in data.npz"),
        ({"x": np.zeros((10, 0), np.float32), "y": Y}, "x in data.npz"),
        ({"x": np.zeros((10, 4, 4), np.int64), "y": Y}, "save images as uint8"),
        ({"x": np.full((10, 4), "word"), "y": Y}, "x in data.npz"),
        ({"x": np.where(X == 0, np.nan, X), "y": Y}, "NaN or infinity in sample"),
        ({"x": np.where(np.arange(10)[:, None] == 7, np.inf, X), "y": Y}, "sample 7"),
        ({"x": X, "y": Y, "is_test": np.zeros(10, bool)}, "marks no sample"),
        ({"x": X, "y": Y, "is_test": np.ones(9, bool)}, "is_test"),
        ({"x": X, "y": Y, "is_test": np.ones(10, int)}, "is_test"),
        ({"x_train": X, "y_train": Y, "x_test": X[:, :2], "y_test": Y}, "make them alike"),
        (
            {"x_train": X, "y_train": Y, "x_test": X.astype(np.float64), "y_test": Y},
            "make them alike",
        ),
    ],
)
def test_arrays_that_are_no_labelled_data_set(tmp_path, arrays, says):
    sentence = refusal(save(tmp_path, **arrays))
    assert says in sentence
    assert "data.npz" in sentence


@pytest.mark.parametrize(
    ("jpeg", "offsets", "says"),
    [
        (b"\xff\xd8\xff", [0, 3], "image 0"),
        (b"", [0, 0], "offsets"),
        (None, [0, 10**12], "offsets"),
        (None, [0, -5, 10], "offsets"),
        (None, [5], "offsets"),
        (None, None, "no 'offset_test'"),
    ],
)
def test_jpeg_arrays_that_lie(tmp_path, jpeg, offsets, says):
    if jpeg is None:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "jpeg")
        jpeg = buffer.getvalue()
    arrays = {"jpeg_test": np.frombuffer(jpeg, np.uint8), "y_test": np.array([0])}
    assert says in refusal(
        save(tmp_path, **arrays, **({} if offsets is None else {"offset_test": np.array(offsets)}))
    )


# What the file is


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 100,
        b"PK\x03\x04",
        b"\x93NUMPY",
        b"PK\x05\x06" + b"\xff" * 18,
        bytes(range(256)) * 9,
    ],
)
def test_files_that_are_no_npz(tmp_path, content):
    (tmp_path / "data.npz").write_bytes(content)
    assert "data.npz" in refusal(tmp_path / "data.npz", kind=FileError)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_npz(tmp_path, share):
    file = save(tmp_path, x=np.random.default_rng(0).normal(size=(100, 9)), y=np.arange(100))
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    refusal(file, kind=FileError)


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bytes_are_refused_or_harmless(tmp_path, seed):
    generator = np.random.default_rng(seed)
    file = save(tmp_path, x=generator.normal(size=(20, 4)).astype(np.float32), y=np.arange(20))
    data = np.frombuffer(file.read_bytes(), np.uint8).copy()
    data[generator.integers(0, len(data), 8)] = generator.integers(0, 256, 8)
    file.write_bytes(data.tobytes())
    with suppress(InputError):  # any other error fails the test
        read_all(str(file))


@pytest.mark.parametrize(
    ("member", "says"),
    [
        (npy(header((10**12,))), "claims"),
        (npy(header((2**62, 2**62)), b"\x00" * 64), "claims"),
        (npy(header((-1,)), b"\x00" * 64), "claims"),
        (npy(header((10, 3)), b"\x00" * 119), "claims"),
        (npy(header((10, 3)), b"\x00" * 121), "claims"),
        (npy(header((1,), "|O"), b"\x80\x04N."), "only numbers"),
        (npy(header((1,), "<M8[s]"), b"\x00" * 8), "only numbers"),
        (npy(header((1,), "|V8"), b"\x00" * 8), "only numbers"),
        (npy(header("__import__('os')")), "damaged header"),
        (npy(b"{'descr': '<f4'}\n"), "damaged header"),
        (npy(b"(" * 5000), "damaged header"),
        (npy(b"\xff" * 50), "damaged header"),
        (npy(header((1,)), version=b"\x03\x00"), "damaged header"),
        (npy(header((1,)), version=b"\x09\x00"), "damaged header"),
        (b"", "damaged header"),
        (b"\x93NUMPY\x01\x00\xff\xff", "damaged header"),
    ],
)
def test_headers_that_lie(tmp_path, member, says):
    labels = io.BytesIO()
    np.save(labels, Y)
    assert says in refusal(save_members(tmp_path, x=member, y=labels.getvalue()), kind=FileError)


def test_a_zip_entry_that_claims_gigabytes_asks_for_no_memory(tmp_path):
    claimed = 2**31
    file = save_members(tmp_path, x=npy(header((claimed // 4 - 19,)), b"\x00" * 1000), y=b"")
    data = bytearray(file.read_bytes())
    central = data.index(b"PK\x01\x02")
    data[central + 24 : central + 28] = struct.pack("<I", claimed)
    file.write_bytes(bytes(data))
    assert "than the whole file could hold" in refusal(file, kind=FileError)


def test_a_compressed_bomb_is_read_no_further_than_its_header_claims(tmp_path):
    bomb = npy(header((4,)), b"\x00" * 50_000_000)
    assert "claims 16 bytes" in refusal(save_members(tmp_path, x=bomb, y=b""), kind=FileError)


def test_an_encrypted_or_oddly_compressed_entry_is_refused(tmp_path):
    file = save(tmp_path, x=X, y=Y)
    original = file.read_bytes()
    for offset, value in ((8, 1), (10, 99)):  # flag bit 0: encrypted; compression method 99
        data = bytearray(original)
        central = data.index(b"PK\x01\x02")
        data[central + offset] = value
        file.write_bytes(bytes(data))
        refusal(file, kind=FileError)


def test_a_wrong_checksum_is_noticed(tmp_path):
    file = save(tmp_path, x=np.full((10, 3), 5, np.float32), y=Y)
    data = file.read_bytes()
    file.write_bytes(data.replace(struct.pack("<f", 5), struct.pack("<f", 6), 1))
    refusal(file, kind=FileError)


# What is not there


@pytest.mark.parametrize(
    "spec",
    [
        "nothing.npz",
        "no/such/folder",
        "",
        "sklearn",
        "photo.png",
        "nothing.py:data",
        "nothing.py:",
        ":",
        "\x00.npz",
        "a" * 5000,
    ],
)
def test_data_that_does_not_exist(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal(spec, kind=FileError)


def test_a_data_set_that_scikit_learn_has_and_we_do_not():
    assert "sklearn:digits" in refusal("sklearn:iris")


def test_a_folder_called_npz_and_a_file_without_ending(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").write_text("x")
    assert "folder.npz" in refusal(
        tmp_path / "folder.npz"
    )  # read as a folder of classes, and it has none
    assert "file" in refusal(tmp_path / "file", kind=FileError)


# Folders


def test_folders_without_classes_or_files(tmp_path):
    assert "subfolders" in refusal(tmp_path)
    (tmp_path / "cat").mkdir()
    assert "no images" in refusal(tmp_path)
    (tmp_path / "cat" / "notes.txt").write_text("x")
    assert "no images" in refusal(tmp_path)


def test_a_train_folder_without_a_test_folder(tmp_path):
    save_image(tmp_path / "train" / "cat" / "1.png", np.zeros((4, 4), np.uint8))
    assert "no test/" in refusal(tmp_path)


def test_an_empty_test_folder(tmp_path):
    save_image(tmp_path / "train" / "cat" / "1.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "test" / "cat").mkdir(parents=True)
    assert "empty" in refusal(tmp_path)


def test_images_beside_wavs(tmp_path):
    save_image(tmp_path / "a" / "1.png", np.zeros((4, 4), np.uint8))
    save_wav(tmp_path / "b" / "1.wav", np.zeros(4))
    assert "images and wavs" in refusal(tmp_path)


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + size
        + chunk(b"IDAT", zlib.compress(b"\x00" * 10))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an image",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"\xff\xd8\xff\xe0",
        b"BM" + b"\xff" * 60,
        b"II*\x00" + b"\xff" * 60,
        b"P5 99999 99999 255\n",
        png_that_claims(4, 4),
        png_that_claims(30_000, 30_000),
        png_that_claims(9000, 9000),
        png_that_claims(0, 0),
    ],
)
def test_damaged_images(tmp_path, content):
    for number in range(8):
        save_image(tmp_path / "cat" / f"{number}.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "cat" / "bad.png").write_bytes(content)
    assert "bad.png" in refusal(tmp_path)


def test_an_image_larger_than_the_limit_is_not_decoded(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "bad.png").write_bytes(png_that_claims(9000, 9000))
    assert "9000x9000 pixels" in refusal(tmp_path)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated_images(tmp_path, share):
    save_image(
        tmp_path / "cat" / "bad.jpg",
        np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8),
    )
    data = (tmp_path / "cat" / "bad.jpg").read_bytes()
    (tmp_path / "cat" / "bad.jpg").write_bytes(data[: int(share * len(data))])
    assert "bad.jpg" in refusal(tmp_path)


def test_images_of_two_sizes_and_of_floats(tmp_path):
    save_image(tmp_path / "cat" / "1.png", np.zeros((4, 4), np.uint8))
    save_image(tmp_path / "cat" / "2.png", np.zeros((4, 5), np.uint8))
    assert "image_shape" in refusal(tmp_path)
    (tmp_path / "cat" / "2.png").unlink()
    save_image(tmp_path / "cat" / "2.tif", np.zeros((4, 4), np.float32))
    assert "pixel format" in refusal(tmp_path)


def test_a_folder_called_like_an_image(tmp_path):
    save_image(tmp_path / "cat" / "1.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "cat" / "2.png").mkdir()
    assert "2.png" in refusal(tmp_path)


def wav_bytes(
    *,
    channels: int = 1,
    bits: int = 16,
    rate: int = 8000,
    kind: int = 1,
    claimed: int = 8,
    data: bytes = bytes(8),
) -> bytes:
    block = channels * bits // 8
    form = struct.pack(
        "<HHIIHH", kind, channels, rate, rate * block & 0xFFFFFFFF, block & 0xFFFF, bits
    )
    body = (
        b"WAVE"
        + b"fmt "
        + struct.pack("<I", 16)
        + form
        + b"data"
        + struct.pack("<I", claimed)
        + data
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"RIFF",
        b"\x00" * 99,
        wav_bytes()[:30],
        wav_bytes(channels=65),
        wav_bytes(bits=12),
        wav_bytes(kind=6, bits=8),
        wav_bytes(channels=0),
        wav_bytes(bits=0),
        wav_bytes(kind=3),
        wav_bytes(rate=0),
        wav_bytes(rate=2**32 - 1),
        wav_bytes(rate=44100),
    ],
)
def test_damaged_or_other_wavs(tmp_path, content):
    spectrum = Spectrum(8000, frame_length=256, hop=160, fft_length=256, mel_bands=40)
    (tmp_path / "yes").mkdir()
    (tmp_path / "yes" / "bad.wav").write_bytes(content)
    assert "bad.wav" in refusal(
        tmp_path, preprocessing=Preprocessing("waveform", spectrum=spectrum)
    )


def test_a_wav_that_claims_gigabytes_is_read_as_what_it_is(tmp_path):
    (tmp_path / "test" / "yes").mkdir(parents=True)
    (tmp_path / "test" / "yes" / "1.wav").write_bytes(
        wav_bytes(claimed=2**32 - 2, data=b"\x05\x00\x06\x00\x07")
    )
    ((x, _),) = load_dataset(
        str(tmp_path), preprocessing=Preprocessing("waveform", samples=4)
    ).test.batches(1)
    assert x.tolist() == [[[5, 6, 0, 0]]]


# The user's own function


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        ("def data(): return 5", DataError, "returns int"),
        ("def data(): return {}", DataError, "no 'x'"),
        (
            "def data(): return {'x': [[1.0], [2.0]], 'y': [0.5, 1.5]}",
            DataError,
            "labels must be integers",
        ),
        ("def data(): return {'x': [[1.0], [2.0, 3.0]], 'y': [0, 1]}", DataError, "data.py:data"),
        ("def data(): return {'x': [object()], 'y': [0]}", DataError, "data.py:data"),
        ("def data(): 1 / 0", DataError, "ZeroDivisionError"),
        ("def data(needed): pass", DataError, "TypeError"),
        ("data = 5", FileError, "no function"),
        ("def other(): pass", FileError, "no function"),
        ("def data(:", FileError, "SyntaxError"),
        ("import no_such_module", FileError, "ModuleNotFoundError"),
    ],
)
def test_functions_that_give_no_data(tmp_path, code, kind, says):
    (tmp_path / "data.py").write_text(code)
    assert says in refusal(f"{tmp_path}/data.py:data", kind=kind)


def test_a_preprocessing_made_for_other_data(tmp_path):
    file = save(tmp_path, x=X, y=Y)
    assert "needs uint8" in refusal(file, preprocessing=Preprocessing("image", scale=255.0))
