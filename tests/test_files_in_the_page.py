"""Image and sound files give the same raw samples in Python and in the page of `deploy --to web`,
bit for bit.

The page's own modules run in a headless Chromium; without one, what Python makes of the files is
compared with what the files should look like.
"""

import functools
import http.server
import json
import os
import shutil
import signal
import struct
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ecqx_onnx
from ecqx_onnx.data.images import decode_image
from ecqx_onnx.data.waves import read_wav
from ecqx_onnx.errors import DataError
from ecqx_onnx.validation.devices.browser import FLAGS, NAMES

TEMPLATES = Path(ecqx_onnx.__file__).parent / "deployment" / "templates" / "web"
PAGE = """<!doctype html><script type="module">
import { imageToRaw, readImage, readSound } from './inputs.js';
const found = {};
for (const { name, shape } of await (await fetch('files.json')).json()) {
  const file = new File([await (await fetch(name)).blob()], name);
  const manifest = { raw: { shape }, preprocessing: { scale: 255 } };
  try {
    const raw = name.endsWith('.wav')
      ? await readSound(file, manifest)
      : imageToRaw(await readImage(file), manifest, false);
    found[name] = Array.from(raw);
  } catch (error) { found[name] = String(error); }
}
await fetch('found', { method: 'POST', body: JSON.stringify(found) });
</script>"""


# Files


def ramp(*shape, dtype=np.uint8):
    values = np.arange(int(np.prod(shape))) * 2654435761 % 2**32
    return (values >> (32 - 8 * np.dtype(dtype).itemsize)).astype(dtype).reshape(shape)


def smooth(height, width):
    """A picture that JPEG keeps well: uint8 [H, W, 3]."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack(
        [rows * 255 // height, columns * 255 // width, (rows + columns) % 256], -1
    ).astype(np.uint8)


def save_turned(path, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(smooth(16, 24)).save(path, exif=exif, **options)


def make_images(folder):
    opacity, gray = np.meshgrid(np.arange(256), np.arange(256))
    every = np.stack([gray, 255 - gray, gray, opacity], -1).astype(np.uint8)
    Image.fromarray(every).save(folder / "alpha.png")
    Image.fromarray(every[..., [0, 3]], "LA").save(folder / "gray_alpha.png")
    Image.fromarray(every[:64, :64]).save(folder / "alpha.webp", lossless=True, exact=True)
    palette = Image.fromarray(ramp(12, 12) % 4, "P")
    palette.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 9, 9, 9])
    palette.save(folder / "palette.png", transparency=bytes([0, 128, 255, 255]))
    palette.save(folder / "palette.gif", transparency=2)
    Image.fromarray(ramp(12, 12, 3)).save(folder / "key.png", transparency=(200, 0, 1))
    Image.fromarray(ramp(9, 9)).save(folder / "gray_key.png", transparency=int(ramp(9, 9)[3, 3]))
    Image.fromarray(ramp(16, 16, dtype=np.uint16)).save(folder / "gray16.png")
    (folder / "color16.png").write_bytes(png_of_16_bits(ramp(8, 8, 3, dtype=np.uint16), color=2))
    (folder / "color_alpha16.png").write_bytes(
        png_of_16_bits(ramp(8, 8, 4, dtype=np.uint16), color=6)
    )
    (folder / "gray_alpha16.png").write_bytes(
        png_of_16_bits(ramp(8, 8, 2, dtype=np.uint16), color=4)
    )
    for orientation in range(1, 9):
        save_turned(folder / f"turned{orientation}.jpg", orientation, quality=95, subsampling=0)
    save_turned(folder / "turned_subsampled.jpg", 6, quality=85)
    save_turned(folder / "turned.webp", 6, lossless=True)  # which browsers do not turn
    save_turned(folder / "turned.png", 6)
    Image.fromarray(smooth(20, 30)).save(folder / "resized.png")
    Image.fromarray(ramp(10, 10) % 2 * 255).convert("1").save(folder / "one_bit.png")


def png_of_16_bits(pixels, *, color):
    """A PNG by hand: Pillow writes none of 16 bits but gray ones. [ISO/IEC 15948]"""
    import zlib

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def wav(data, *, kind=1, bits=16, channels=1, extensible=False, rate=8000, junk=b""):
    block = channels * bits // 8
    form = struct.pack(
        "<HHIIHH", 0xFFFE if extensible else kind, channels, rate, rate * block, block, bits
    )
    if extensible:
        form += (
            struct.pack("<HHIH", 22, bits, 0, kind)
            + b"\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71"
        )
    body = b"WAVE" + junk + b"fmt " + struct.pack("<I", len(form)) + form
    body += b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def in_24_bits(values):
    return b"".join(struct.pack("<i", int(value))[:3] for value in values)


WAVE = np.round(np.sin(np.arange(64) * 0.37) * 30000)
WIDE = np.round(np.sin(np.arange(64) * 0.37) * 8388000)
WAVS = {
    "pcm16": wav(WAVE.astype("<i2").tobytes()),
    "pcm8": wav(ramp(64).tobytes(), bits=8),
    "pcm24": wav(in_24_bits(WIDE), bits=24),
    "pcm32": wav((WIDE * 256).astype("<i4").tobytes(), bits=32),
    "float32": wav((WAVE / 32768 * 1.2).astype("<f4").tobytes(), kind=3, bits=32),
    "float64": wav((WAVE / 32768).astype("<f8").tobytes(), kind=3, bits=64),
    "stereo": wav(np.stack([WAVE, WAVE[::-1]], 1).astype("<i2").tobytes(), channels=2),
    "stereo24": wav(in_24_bits(np.stack([WIDE, WIDE[::-1]], 1).ravel()), bits=24, channels=2),
    "extensible": wav(WAVE.astype("<i2").tobytes(), extensible=True),
    "extensible_float": wav(
        (WAVE / 32768).astype("<f4").tobytes(), kind=3, bits=32, extensible=True
    ),
    "three": wav(
        ramp(96, dtype=np.uint16).tobytes(), channels=3, junk=b"LIST\x03\x00\x00\x00abc\x00"
    ),
}
SAMPLES = 40


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    make_images(folder)
    for name, content in WAVS.items():
        (folder / f"{name}.wav").write_bytes(content)
    return folder


# Without a browser


def test_pictures_are_turned_as_people_see_them(files):
    upright = decode_image(files / "turned1.jpg", shape=None, where="a test").astype(int)
    for orientation in range(2, 9):
        with Image.open(files / f"turned{orientation}.jpg") as image:
            stored = np.asarray(image)
        seen = decode_image(files / f"turned{orientation}.jpg", shape=None, where="a test")
        assert seen.shape == (upright.shape if orientation < 5 else (24, 16, 3))
        assert sorted(seen.ravel()) == sorted(stored.ravel())
    quarter = decode_image(files / "turned6.jpg", shape=None, where="a test").astype(int)
    np.testing.assert_array_equal(quarter, np.rot90(upright, -1))  # 6: a quarter turn clockwise


def test_damaged_exif_data_are_no_reason_to_refuse_a_picture(tmp_path):
    Image.fromarray(smooth(4, 4)).save(
        tmp_path / "odd.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff"
    )
    assert decode_image(tmp_path / "odd.jpg", shape=None, where="a test").shape == (4, 4, 3)


def test_transparent_places_are_white_and_half_transparent_ones_between(files):
    seen = decode_image(files / "alpha.png", shape=None, where="a test")
    assert (seen[:, 0] == 255).all()
    np.testing.assert_array_equal(seen[:, 255, 0], np.arange(256))
    assert seen[0, 64, 0] == 191
    palette = decode_image(files / "palette.png", shape=None, where="a test")
    index = ramp(12, 12) % 4
    assert (palette[index == 0] == 255).all()
    assert (palette[index == 2] == (0, 200, 0)).all()
    assert (palette[index == 1] == (227, 127, 127)).all()


def test_of_16_bits_the_upper_eight_count(files):
    gray = decode_image(files / "gray16.png", shape=None, where="a test")
    np.testing.assert_array_equal(gray[..., 0], ramp(16, 16, dtype=np.uint16) >> 8)
    color = decode_image(files / "color16.png", shape=None, where="a test")
    np.testing.assert_array_equal(color, ramp(8, 8, 3, dtype=np.uint16) >> 8)


@pytest.mark.parametrize("name", ["pcm24", "pcm32", "float64", "extensible", "extensible_float"])
def test_wavs_of_every_width_hold_the_same_sound(files, name):
    expected = read_wav(files / "pcm16.wav", most=64)[1].astype(int)
    rate, found = read_wav(files / f"{name}.wav", most=64)
    assert (rate, found.dtype, len(found)) == (8000, np.int16, 64)
    scale = WIDE / 256 / 32768 if name in ("pcm24", "pcm32") else WAVE / 32768
    np.testing.assert_array_equal(found, np.floor(scale * 32768 + 0.5))
    assert name not in ("extensible", "float64") or (found == expected).all()


def test_stereo_becomes_the_mean_of_its_channels_and_loud_floats_are_clipped(files):
    mean = np.floor((WAVE + WAVE[::-1]) / 2 + 0.5)
    np.testing.assert_array_equal(read_wav(files / "stereo.wav", most=64)[1], mean)
    assert read_wav(files / "float32.wav", most=64)[1].max() == 32767


def test_only_the_wanted_samples_are_read(files):
    assert len(read_wav(files / "stereo.wav", most=10)[1]) == 10


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (wav(bytes(8), kind=6, bits=8), "A-law"),
        (wav(bytes(12), bits=12), "12 bit"),
        (wav(np.array([0.5, np.nan], "<f4").tobytes(), kind=3, bits=32), "NaN"),
        (wav(bytes(8))[:40], "too early"),
    ],
)
def test_other_wavs_are_refused_by_what_they_hold(tmp_path, content, says):
    (tmp_path / "other.wav").write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_wav(tmp_path / "other.wav", most=8)


# With a browser


class Site(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and takes what the page found."""

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        self.server.found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        self.server.arrived.set()


def seen_by_the_page(folder, wanted, profile):
    """{file: raw samples, or why there are none}."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    for module in ("inputs.js", "preprocessing.js"):
        shutil.copy(TEMPLATES / module, folder / module)
    (folder / "index.html").write_text(PAGE)
    (folder / "files.json").write_text(
        json.dumps([{"name": n, "shape": s} for n, s in wanted.items()])
    )
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Site, directory=str(folder))
    )
    server.arrived = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    command = [program, *FLAGS, "--no-sandbox", f"--user-data-dir={profile}", url]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    browser = subprocess.Popen(command, start_new_session=True, **silent)
    try:
        assert server.arrived.wait(60), "the page found nothing within a minute"
        return server.found
    finally:
        os.killpg(browser.pid, signal.SIGTERM)
        browser.wait()
        server.shutdown()
        server.server_close()


def test_the_page_reads_the_same_samples_from_every_file(files, tmp_path):
    wanted, expected = {}, {}
    for path in sorted(files.iterdir()):
        if path.suffix == ".wav":
            samples = np.zeros(SAMPLES, np.int16)
            read = read_wav(path, most=SAMPLES)[1]
            samples[: len(read)] = read
            wanted[path.name], expected[path.name] = [SAMPLES], samples
            continue
        own = decode_image(path, shape=None, where=path.name)
        shape = (7, 11, own.shape[2]) if path.stem == "resized" else own.shape
        wanted[path.name] = list(shape)
        expected[path.name] = decode_image(path, shape=shape, where=path.name, resize=True)
    assert len(wanted) > 30
    found = seen_by_the_page(files, wanted, tmp_path / "profile")
    differ = {}
    for name, values in expected.items():
        if found[name] != values.ravel().tolist():
            apart = (
                found[name]
                if isinstance(found[name], str)
                else np.abs(np.array(found[name]) - values.ravel())
            )
            differ[name] = (
                apart
                if isinstance(apart, str)
                else f"{(apart > 0).sum()} of {apart.size}, up to {apart.max()}"
            )
    assert differ == {}
