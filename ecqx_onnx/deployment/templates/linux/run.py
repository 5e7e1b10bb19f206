"""The model of this folder, checked and used from Python.

Needs numpy and onnxruntime; pillow for images.

python3 run.py             the self-check: golden inputs in, outputs compared with the golden ones;
                           exit status 1 if they differ
python3 run.py FILE        the prediction for one image, .wav or .npy (raw, as the data set has it)
python3 run.py --json ...  the same as JSON
"""

import argparse
import ctypes
import hashlib
import json
import os
import sys
import time
import wave
from pathlib import Path

# onnxruntime 1.32 leaves a device id and a database in the home folder and reports its use. It
# reads this at import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent
# Seconds: faster models run several times per measurement, so that the clock does not matter.
SHORTEST = 1e-3


def trim_heap():
    """Give back what loading has left free in the heap, where the C library has a call for it."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


class Model:
    def __init__(self, folder=HERE):
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        _, whole, sentence = self._check_file()
        if not whole:  # a runtime may load damaged weights without a word
            raise ValueError(f"{sentence}; deploy it again")
        start = time.perf_counter()
        path = str(folder / self.manifest["model"]["file"])
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.load_seconds = time.perf_counter() - start
        trim_heap()
        first = (
            self.manifest["inputs"][0]["shape"][0] if self.manifest["inputs"][0]["shape"] else None
        )
        self.batch = first or 1

    def run(self, inputs):
        """Arrays in the order of the manifest's inputs -> arrays in the order of its outputs."""
        names = [entry["name"] for entry in self.manifest["inputs"]]
        return self.session.run(
            [entry["name"] for entry in self.manifest["outputs"]], dict(zip(names, inputs))
        )

    def predict(self, raw):
        """One raw sample (or a batch of them) -> the model's outputs."""
        if self.manifest["raw"] is None:
            raise SystemExit(
                "this model's manifest holds no preprocessing: give `run` inputs that are ready "
                "for the model"
            )
        shape = tuple(self.manifest["raw"]["shape"])
        raw = np.asarray(raw)
        raw = raw[None] if raw.shape == shape else raw
        if raw.shape[1:] != shape:
            raise SystemExit(
                f"a raw sample has shape {list(raw.shape)}, and the model's is {list(shape)}"
            )
        if self.manifest["inputs"][0]["shape"][0]:
            raw = np.repeat(raw[:1], self.batch, axis=0)
        return self.run([preprocess(raw, self.manifest["preprocessing"])])

    def load(self, entry):
        data = (self.folder / entry["file"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ValueError(f"{entry['file']} was changed: its sha256 is not the manifest's")
        dtype = np.dtype(entry["dtype"])
        return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype).reshape(entry["shape"])

    def self_check(self):
        """[(name, passed, sentence)]"""
        checks = [self._check_file()]
        questions = [("outputs", False)]
        if self.manifest["raw"] is not None:
            checks.append(self._guarded("preprocessing", self._check_preprocessing))
            questions.append(("raw to output", True))
        return checks + [
            self._guarded(name, lambda raw=raw: self._check_outputs(raw)) for name, raw in questions
        ]

    def _guarded(self, name, check):
        try:
            return (name, *check())
        except (OSError, ValueError) as error:
            return name, False, str(error)

    def _check_file(self):
        for entry in [self.manifest["model"], *self.manifest["external"]]:
            if (
                hashlib.sha256((self.folder / entry["file"]).read_bytes()).hexdigest()
                != entry["sha256"]
            ):
                return (
                    "file",
                    False,
                    f"{entry['file']} was changed: its sha256 is not the manifest's",
                )
        return "file", True, "the model is the one that was deployed"

    def _check_preprocessing(self):
        worst = 0.0
        for case in self.manifest["golden"]["cases"]:
            found = preprocess(self.load(case["raw"]), self.manifest["preprocessing"])
            worst = max(worst, difference(found, self.load(case["inputs"][0])))
        limit = self.manifest["golden"]["preprocessing_tolerance"]
        return worst <= limit, f"largest difference of inputs {worst:.1e}, allowed {limit:.1e}"

    def _check_outputs(self, from_raw):
        worst, same, total = [0.0] * len(self.manifest["outputs"]), 0, 0
        for case in self.manifest["golden"]["cases"]:
            inputs = [self.load(entry) for entry in case["inputs"]]
            if from_raw:
                inputs = [preprocess(self.load(case["raw"]), self.manifest["preprocessing"])]
            wanted = [self.load(entry) for entry in case["outputs"]]
            found = self.run(inputs)
            worst = [max(old, difference(a, b)) for old, a, b in zip(worst, found, wanted)]
            if is_classes(wanted[0]) and found[0].shape == wanted[0].shape:
                same += int((found[0].argmax(1) == wanted[0].argmax(1)).sum())
                total += len(wanted[0])
        limits = [
            entry["raw_tolerance" if from_raw else "tolerance"]
            for entry in self.manifest["outputs"]
        ]
        classes = f"same class for {same} of {total}, " if total else ""
        shown = ", ".join(f"{a:.1e} (allowed {b:.1e})" for a, b in zip(worst, limits))
        return all(
            a <= b for a, b in zip(worst, limits)
        ), f"{classes}largest difference of outputs {shown}"

    def latency(self, runs=50):
        """Median seconds of one inference on one thread."""
        inputs = [self.load(entry) for entry in self.manifest["golden"]["cases"][0]["inputs"]]

        def seconds(count):
            start = time.perf_counter()
            for _ in range(count):
                self.run(inputs)
            return (time.perf_counter() - start) / count

        inner = max(1, round(SHORTEST / max(1e-6, seconds(3))))
        return float(np.median([seconds(inner) for _ in range(runs)]))


def is_classes(output):
    return output.ndim == 2 and output.shape[1] >= 2 and output.dtype.kind == "f"


def difference(a, b):
    if a.shape != b.shape:
        return float("inf")
    return float(
        np.nan_to_num(np.abs(a.astype(np.float64) - b.astype(np.float64)), nan=np.inf).max(
            initial=0.0
        )
    )


# ---- raw samples -> the model's input, float32 after each step ----


def preprocess(raw, settings):
    """raw: [N, ...]. x = raw / scale; waveforms may become spectra; x = (x - mean) / std"""
    if settings["kind"] == "indices":
        return raw.astype(np.int64)
    if settings["kind"] == "image":
        raw = raw[:, None] if raw.ndim == 3 else raw.transpose(0, 3, 1, 2)
    x = np.ascontiguousarray(raw, dtype=np.float32)
    if settings["scale"] != 1:
        x = x / np.float32(settings["scale"])
    if settings["kind"] == "waveform":
        x = (spectra(x, settings["spectrum"]) if settings["spectrum"] else x)[:, None]
    for values, change in ((settings["mean"], np.subtract), (settings["std"], np.divide)):
        if values:
            values = np.asarray(values, np.float32)
            if len(values) > 1 and not settings["spectrum"]:
                values = values.reshape(1, -1, *(1,) * (x.ndim - 2))
            x = change(x, values)
    return x


def spectra(waves, s):
    """[N, samples] in [-1, 1] -> log-mel energies or MFCCs, float32 [N, frames, bands]."""
    count = 1 + (waves.shape[1] - s["frame_length"]) // s["hop"]
    framed = waves[:, (np.arange(count) * s["hop"])[:, None] + np.arange(s["frame_length"])]
    window = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(s["frame_length"]) / s["frame_length"])
    power = np.abs(np.fft.rfft(framed * window, n=s["fft_length"])) ** 2
    low, high = (2595.0 * np.log10(1.0 + s[edge] / 700.0) for edge in ("low_hz", "high_hz"))
    corners = 700.0 * (10.0 ** (np.linspace(low, high, s["mel_bands"] + 2) / 2595.0) - 1.0)
    left, centre, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    bins = np.arange(s["fft_length"] // 2 + 1) * (s["sample_rate"] / s["fft_length"])
    filters = np.maximum(
        0.0, np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
    )
    values = np.log(power @ filters.T + s["floor"])
    if s["coefficients"]:
        m = s["mel_bands"]
        transform = np.sqrt(2.0 / m) * np.cos(
            np.pi * np.arange(m)[:, None] * (np.arange(m)[None] + 0.5) / m
        )
        transform[0] /= np.sqrt(2.0)
        values = values @ transform[: s["coefficients"]].T
    return values.astype(np.float32)


# ---- files -> raw samples ----


def read_raw(path, manifest):
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if manifest["raw"] is None:
        raise SystemExit(
            "this model's manifest holds no preprocessing: give `Model.run` inputs that are ready "
            "for the model"
        )
    shape, kind = manifest["raw"]["shape"], manifest["preprocessing"]["kind"]
    if kind == "image":
        return read_image(path, shape, manifest["preprocessing"]["scale"])
    if kind == "waveform":
        return read_wav(path, shape[0], manifest["preprocessing"]["spectrum"])
    raise SystemExit(
        f"{path.name}: a model for inputs of kind '{kind}' takes .npy files of shape {shape}"
    )


def read_image(path, shape, scale):
    from PIL import Image

    height, width, channels = (*shape, 1)[:3]
    image = Image.open(path).convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):  # the largest middle part with the wanted aspect
        zoom = min(image.width / width, image.height / height)
        left, top = (image.width - width * zoom) / 2, (image.height - height * zoom) / 2
        box = (
            left,
            top,
            min(image.width, left + width * zoom),
            min(image.height, top + height * zoom),
        )
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(image, np.uint8).reshape(shape)
    return np.round(pixels * (scale / 255)).astype(np.uint8) if 1 < scale < 255 else pixels


def read_wav(path, samples, spectrum):
    with wave.open(str(path), "rb") as file:
        if file.getsampwidth() != 2 or file.getnchannels() != 1:
            raise SystemExit(f"{path.name} is not 16 bit mono: convert it first")
        if spectrum and file.getframerate() != spectrum["sample_rate"]:
            raise SystemExit(
                f"{path.name} has {file.getframerate()} Hz where {spectrum['sample_rate']} are "
                "expected: resample it"
            )
        found = np.frombuffer(file.readframes(samples), "<i2")
    raw = np.zeros(samples, np.int16)
    raw[: len(found)] = found
    return raw


def top(model, outputs, count=5):
    """[(label, probability)] of the first sample; None for a model that tells no classes apart."""
    if not is_classes(outputs[0]):
        return None
    scores = outputs[0][0].astype(np.float64)
    if scores.min() < 0 or abs(scores.sum() - 1) > 1e-3:
        scores = np.exp(scores - scores.max())
        scores /= scores.sum()
    labels = model.manifest["labels"]
    return [
        (labels[i] if i < len(labels) else f"class {i}", float(scores[i]))
        for i in np.argsort(-scores)[:count]
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        model = Model()
    except Exception as error:  # whatever the runtime throws: the file does not load
        print(
            f"FAILED: the model does not load: {' '.join(str(error).split())[:300]}",
            file=sys.stderr,
        )
        return 1
    if arguments.file:
        if not arguments.file.is_file():
            raise SystemExit(f"{arguments.file}: no such file")
        try:
            raw = read_raw(arguments.file, model.manifest)
        except (OSError, ValueError, EOFError, ImportError, wave.Error) as error:
            raise SystemExit(f"{arguments.file}: cannot be read: {error}") from None
        outputs = model.predict(raw)
        found = top(model, outputs)
        if arguments.json:
            print(json.dumps({"top": found, "outputs": [output[0].tolist() for output in outputs]}))
        elif found is None:
            print(
                "\n".join(
                    f"{e['name']}: {output}"
                    for e, output in zip(model.manifest["outputs"], outputs)
                )
            )
        else:
            print("\n".join(f"{probability:7.2%}  {label}" for label, probability in found))
        return 0
    checks = model.self_check()
    passed = all(ok for _, ok, _ in checks)
    size = sum(entry["bytes"] for entry in [model.manifest["model"], *model.manifest["external"]])
    floats = model.manifest["model"]["float32_bytes"] or 0
    latency = model.latency() if passed else None
    if arguments.json:
        found = [{"name": name, "ok": ok, "sentence": sentence} for name, ok, sentence in checks]
        times = {"latency_seconds": latency, "load_seconds": model.load_seconds}
        print(json.dumps({"ok": passed, "checks": found, **times, "bytes": size}))
        return 0 if passed else 1
    for name, ok, sentence in checks:
        print(f"{'ok    ' if ok else 'FAILED'}  {name}: {sentence}")
    print(
        f"size      {size} bytes"
        + (
            f", {floats / size:.1f}x smaller than float32 ({floats})"
            if floats > 1.05 * size
            else ""
        )
    )
    print(f"load      {1e3 * model.load_seconds:.1f} ms, onnxruntime {onnxruntime.__version__}")
    if latency is not None:
        print(f"latency   {1e3 * latency:.3f} ms, one thread")
    print(
        "PASSED"
        if passed
        else "FAILED: this machine does not compute what was computed when the folder was made"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
