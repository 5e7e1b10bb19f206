"""Integer kernels against the float model and onnxruntime's quantize_static, in one table.

    python benchmarks/integer_kernels.py ../shared/data   # benchmarks/results/DATE-integer.md
    python benchmarks/integer_kernels.py ../shared/data --only "ResNet-20" --checkpoint resnet20.pt

Columns: bytes, accuracy, latency. Each network twice: as it was trained, with 8-bit weights; and on
4-bit weights, which quantize_static gets as floats. All files of a network get the same calibration
data (512 training samples; min-max, and percentile where accuracy is measured). They are timed in
turn in one process on one thread, batch 1, and the smallest of the repeats counts. quantize_static:
QDQ, weights int8 per channel, activations uint8, after its own pre-processing. It rounds the class
scores to 256 values as well, so that some samples have two highest ones: where n classes share the
highest score, a right one among them counts 1/n, whatever their order.
noise: energy of the class scores' difference to the float model's, against theirs.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from ecqx_onnx_converters import FloatGraph
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from shared import ROOT, make_parser

from ecqx_onnx import api
from ecqx_onnx.checkpoint.export import export
from ecqx_onnx.data import Dataset, Split, load_dataset
from ecqx_onnx.inputs.user_code import load_function
from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.quantization.relevance.zennit_import import import_zennit
from ecqx_onnx.runtime.sessions import count_executed_operators
from ecqx_onnx.sources.loading import apply_state, load_factory, load_state

SAMPLES = 512
FLOAT_ROUNDING = -110.0  # decibels
FLOAT_KERNELS = (
    "Conv",
    "FusedConv",
    "Gemm",
    "FusedGemm",
    "MatMul",
    "Add",
    "Mul",
    "Relu",
    "Clip",
    "DequantizeLinear",
    "MaxPool",
)


@dataclass(frozen=True, eq=False)
class Case:
    """One network with its data. labelled: accuracy means something."""

    name: str
    model: torch.nn.Module
    dataset: Dataset
    labeled: bool


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "data", type=Path, help="folder with mnist.npz, cifar10_jpeg.npz, fsdd.npz and checkpoints/"
    )
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument(
        "--kws", help="float weights of the keyword spotter; without them it has random ones"
    )
    parser.add_argument(
        "--checkpoint", help="a checkpoint of ours that stands for the 4-bit network of --only"
    )
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="of timing, per network and float model"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(
        f"# Integer kernels: measured\n{__doc__}\nonnxruntime {onnxruntime.__version__}, "
        f"{describe_processor()}\n"
    )
    headings = (
        "network",
        "file",
        "bytes",
        "accuracy",
        "agreement with float",
        "noise, dB",
        "latency, ms",
        "x float",
    )
    print("| " + " | ".join((*headings, "float operators executed")) + " |")
    print("|---" * (len(headings) + 1) + "|")
    for case in make_cases(arguments.data, arguments.only, arguments.kws):
        for bits in (8, 4):
            measure(case, bits, arguments.seconds, arguments.checkpoint if bits == 4 else None)


def describe_processor() -> str:
    """Its name, and whether it multiplies 8-bit integers in one go."""
    try:
        lines = dict(
            line.split(":", 1)
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if ":" in line
        )
    except OSError:
        return platform.processor()
    fields = {name.strip(): value.strip() for name, value in lines.items()}
    vnni = "with" if "vnni" in fields.get("flags", "") else "without"
    return f"{fields.get('model name', platform.machine())}, {vnni} VNNI"


def make_cases(data: Path, only: str, kws: str | None) -> Iterator[Case]:
    """Those asked for, one at a time."""
    makers: dict[str, Callable[[str], Case]] = {
        "LeNet-5, MNIST": lambda name: load_trained(
            name, "lenet5", data / "mnist.npz", data / "checkpoints/lenet5_mnist_fp32.pt"
        ),
        "ResNet-20, CIFAR-10, JPEG": lambda name: load_trained(
            name,
            "resnet20",
            data / "cifar10_jpeg.npz",
            data / "checkpoints/resnet20_cifar10_fp32.pt",
        ),
        "ResNet-20, four times as wide, random weights": lambda name: make_random(
            name, load_function(f"{ROOT}/models/resnet20.py:ResNet20")(width=64), (3, 32, 32)
        ),
        "keyword spotter, FSDD" if kws else "keyword spotter, random weights": lambda name: (
            load_trained(name, "kws_dscnn", data / "fsdd.npz", Path(kws))
            if kws
            else make_random(
                name, load_factory(f"{ROOT}/models/kws_dscnn.py:kws_dscnn").model, (1, 49, 40)
            )
        ),
        "MobileNetV2, random weights": lambda name: make_random(
            name, make_mobilenet(), (3, 224, 224)
        ),
    }
    for name, make in makers.items():
        if only in name:
            yield make(name)


def load_trained(name: str, factory: str, data: Path, weights: Path) -> Case:
    loaded = load_factory(f"{ROOT}/models/{factory}.py:{factory}")
    apply_state(loaded.model, load_state(weights), weights)
    return Case(
        name, loaded.model.eval(), load_dataset(str(data), preprocessing=loaded.preprocessing), True
    )


def make_random(name: str, model: torch.nn.Module, shape: tuple[int, ...]) -> Case:
    """Random weights, with BatchNorm statistics that fit them."""
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((64, *shape)).astype(np.float32), np.arange(64) % 10
    with torch.no_grad():
        for batch in torch.from_numpy(x).split(16):
            model.train()(batch)
    arrays = {"x_train": x, "y_train": y, "x_test": x, "y_test": y}
    return Case(
        name,
        model.eval(),
        Dataset.from_arrays("random", arrays, preprocessing=Preprocessing("array")),
        False,
    )


def make_mobilenet() -> torch.nn.Module:
    import_zennit()  # helps torchvision beside a CPU-only torch
    from torchvision.models import mobilenet_v2

    return mobilenet_v2(weights=None)


def measure(case: Case, bits: int, seconds: float, checkpoint: str | None) -> None:
    """Prints the rows of one network at one precision of weights."""
    calibration = case.dataset.train or case.dataset.test
    x, _ = next(case.dataset.test.batches(2))
    example, preprocessing = torch.from_numpy(x), case.dataset.preprocessing
    if checkpoint is None:
        ours = api.as_checkpoint(
            copy.deepcopy(case.model), bits=bits, example=example, preprocessing=preprocessing
        )
    else:
        ours = api.as_checkpoint(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        names = NAMES if case.labeled else NAMES[:4]
        files = {name: Path(folder) / f"{index}.onnx" for index, name in enumerate(names)}
        if bits == 8:
            whole = export(case.model, example).graph
        else:  # the 4-bit network as floats
            placed = {weight.name: weight.dequantize() for weight in ours.matching.found}
            whole = FloatGraph(ours.graph.proto, {**ours.graph.weights, **placed})
        onnx.save(whole.to_model(), files["float"])
        api.convert(ours, files["ours, weights only"])
        options = {
            "activations": "int8",
            "calibration": calibration,
            "calibration_samples": SAMPLES,
        }
        report = api.convert(ours, files["ours, int8"], **options)
        quantize_statically(
            files["float"],
            files["quantize_static"],
            calibration.take(SAMPLES),
            CalibrationMethod.MinMax,
        )
        if case.labeled:
            api.convert(
                ours, files["ours, int8, percentile"], calibration_method="percentile", **options
            )
            by = CalibrationMethod.Percentile
            quantize_statically(
                files["float"], files["quantize_static, percentile"], calibration.take(SAMPLES), by
            )
        times = measure_latencies(list(files.values()), x[:1], seconds)
        scores = {
            name: compute_class_scores(file, case.dataset.test) for name, file in files.items()
        }
        said = {name: found.argmax(1) for name, found in scores.items()}
        hits = {
            name: compute_share_right(found, case.dataset.test.y) for name, found in scores.items()
        }
        for (name, file), took in zip(files.items(), times, strict=True):
            right = f"{100 * float(hits[name].mean()):.2f}" if case.labeled else "-"
            same = f"{100 * float((said[name] == said['float']).mean()):.2f}"
            ran = count_executed_operators(file, (x[:1],))
            floats = (
                ", ".join(f"{ran[kernel]} {kernel}" for kernel in FLOAT_KERNELS if ran[kernel])
                if "float" not in name
                else ""
            )
            network = f"{case.name}, {bits} bit weights"
            moved = compute_noise(scores[name], scores["float"])
            noise = f"{moved:.1f}" if moved > FLOAT_ROUNDING else "-"
            cells = (
                f"{file.stat().st_size}",
                right,
                same,
                noise,
                f"{1e3 * took:.3f}",
                f"{took / times[0]:.2f}",
                floats or "-",
            )
            print(f"| {network} | {name} | " + " | ".join(cells) + " |", flush=True)
        for way in ("", ", percentile") if case.labeled else ():
            difference = 100 * (
                hits[f"ours, int8{way}"] - hits[f"quantize_static{way}"]
            )  # sample by sample
            half = 1.96 * difference.std() / len(difference) ** 0.5
            cell = f"{difference.mean():+.2f} ± {half:.2f} points (95 %, paired)"
            print(
                f"| {network} | ours, int8{way}, less quantize_static{way} | | {cell} | | | | | |",
                flush=True,
            )
        for node in report.stays:
            print(
                (
                    f"| {network} | ours stays float | {node.operator} {node.name}: {node.reason} "
                    "| | | | | | |"
                ),
                flush=True,
            )


NAMES = (
    "float",
    "ours, weights only",
    "ours, int8",
    "quantize_static",
    "ours, int8, percentile",
    "quantize_static, percentile",
)


def quantize_statically(source: Path, path: Path, split: Split, method: CalibrationMethod) -> None:
    """onnxruntime's recipe: pre-process, then QDQ with weights per channel."""

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            name = (
                onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"])
                .get_inputs()[0]
                .name
            )
            self.feeds = ({name: x} for x, _ in split.batches(64))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    prepared = path.with_suffix(".prepared.onnx")
    with contextlib.redirect_stdout(io.StringIO()):
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        settings = {
            "quant_format": QuantFormat.QDQ,
            "per_channel": True,
            "calibrate_method": method,
        }
        extra = {"CalibTensorRangeSymmetric": False}
        quantize_static(prepared, path, Reader(), extra_options=extra, **settings, **types)


def open_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def compute_class_scores(path: Path, split: Split) -> np.ndarray:
    """What the file gives each class of each sample."""
    runner = open_session(path)
    name = runner.get_inputs()[0].name
    return np.concatenate([runner.run(None, {name: x})[0] for x, _ in split.batches(64)])


def compute_share_right(scores: np.ndarray, y: np.ndarray) -> np.ndarray:
    """1 where the right class has the highest score alone, 1/n where it shares it with n - 1
    others, else 0."""
    highest = scores == scores.max(1, keepdims=True)
    return highest[np.arange(len(y)), y] / highest.sum(1)


def compute_noise(scores: np.ndarray, wanted: np.ndarray) -> float:
    """Energy of the difference against that of the wanted scores, each less its mean over the
    classes, in decibels."""
    error, signal = (values - values.mean(1, keepdims=True) for values in (scores - wanted, wanted))
    return 10 * float(np.log10(max(np.square(error).sum() / np.square(signal).sum(), 1e-15)))


def measure_latencies(paths: list[Path], x: np.ndarray, seconds: float) -> list[float]:
    """Smallest time of one inference, in seconds, of each file; they take turns."""
    runners = [open_session(path) for path in paths]
    feeds = [{runner.get_inputs()[0].name: x} for runner in runners]
    best = [float("inf")] * len(paths)
    for runner, feed in zip(runners, feeds, strict=True):
        for _ in range(5):
            runner.run(None, feed)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for index, (runner, feed) in enumerate(zip(runners, feeds, strict=True)):
            start = time.perf_counter()
            runner.run(None, feed)
            best[index] = min(best[index], time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
