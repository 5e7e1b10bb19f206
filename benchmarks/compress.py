"""`compress` on ResNet-20 and MiniLM-L6: bytes, quality, CPU seconds and peak memory, one table.

compress.py resnet20 --shared ../shared/data
compress.py file minilm.onnx sentences.npz --bits 2.4 2.8 3.6
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ecqx_onnx.compression.result import CompressResult
from ecqx_onnx.verbs.compress import compress

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = ("78k", "66k", "50k")
DRAWS = 3
SAMPLES = 512


def write_resnet20(checkpoint: Path, path: Path) -> None:
    """The public checkpoint as an .onnx file."""
    import sys

    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
    from resnet20 import ResNet20

    state = torch.load(checkpoint, weights_only=True, map_location="cpu")["state_dict"]
    network = ResNet20()
    network.load_state_dict(
        {name.removeprefix("module."): value for name, value in state.items()}, strict=False
    )
    write_network(network.eval(), np.zeros((2, 3, 32, 32), np.float32), path)


def write_network(network: Any, example: np.ndarray, path: Path) -> None:
    """A classifier of one input as an .onnx file, its batch free."""
    import torch

    torch.onnx.export(
        network,
        (torch.from_numpy(example),),
        str(path),
        dynamo=True,
        opset_version=18,
        input_names=["x"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )


def measure_resnet20(shared: Path, folder: Path) -> None:
    """Three draws of unlabelled samples for each size."""
    model = folder / "resnet20.onnx"
    write_resnet20(shared / "checkpoints" / "resnet20_cifar10_fp32.pt", model)
    images = np.load(shared / "cifar10_lossless_part.npz")
    for draw in range(DRAWS):
        order = np.random.RandomState(draw).permutation(len(images["x_train"]))[:SAMPLES]
        data = {
            "x_train": images["x_train"][order],
            "x_test": images["x_test"],
            "y_test": images["y_test"],
        }
        for size in SIZES:
            options = {"max_bytes": size, "mean": MEAN, "std": STD, "seed": draw}
            show(f"draw {draw}, {size}", model, data, folder, **options)


def show(label: str, model: Path, data: Any, folder: Path, **options: Any) -> CompressResult:
    """One run as a line."""
    start = time.process_time()
    out = folder / "out.onnx"
    result = compress(model, out, data=data, floats="float16", force=True, **options)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    quality = result.verdict.quality
    parts = [f"{label}: {result.report.nbytes:,} bytes", f"{result.chosen.bits_per_weight:.3f} b/w"]
    if quality.agreement is not None:
        parts.append(f"agreement {100 * quality.agreement.share:.2f}")
    if quality.accuracy is not None:
        parts.append(f"accuracy {100 * quality.accuracy.share:.2f}")
    parts.append(f"cosine {quality.outputs[0].cosine:.4f}, error {quality.error:.4f}")
    parts.append(f"{seconds:.0f} CPU s, peak {peak} MB")
    print(", ".join(parts), flush=True)
    return result


def measure_curve(model: Path, data: Path, factory: str, folder: Path) -> None:
    """`convert --bits` of a PyTorch network, and `compress` to the same bytes."""
    import ecqx_onnx
    from ecqx_onnx.validation.references.float_distance import FloatBounds

    arrays = np.load(data)
    held_out = {"x_test": arrays["x_test"], "y_test": arrays["y_test"]}
    order = np.random.RandomState(0).permutation(len(arrays["x_train"]))[:SAMPLES]
    samples = {"x_train": arrays["x_train"][order], **held_out}
    np.savez(folder / "held_out.npz", **held_out)
    for bits in (2, 3, 4, 5):
        out = folder / "bits.onnx"
        options = {"factory": factory, "floats": "float16", "force": True}
        written = ecqx_onnx.convert(model, out, bits=bits, **options)
        bounds = FloatBounds(max_error=1.0)
        held = str(folder / "held_out.npz")
        report = ecqx_onnx.validate(
            out, against=model, factory=factory, data=held, float_bounds=bounds, latency_runs=0
        )
        same = 100 * report.agreement.share
        right = 100 * report.onnx_accuracy.share
        print(
            f"--bits {bits}: {written.nbytes:,} bytes, agreement {same:.2f}, accuracy {right:.2f}"
        )
        show(
            "compress", model, samples, folder, max_bytes=written.nbytes, factory=factory,
            samples=10_000,
        )  # fmt: skip


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    resnet = kinds.add_parser("resnet20")
    resnet.add_argument("--shared", type=Path, default=Path("../shared/data"))
    curve = kinds.add_parser("curve")
    curve.add_argument("model", type=Path)
    curve.add_argument("data", type=Path)
    curve.add_argument("factory")
    file = kinds.add_parser("file")
    file.add_argument("model", type=Path)
    file.add_argument("data")
    file.add_argument("--bits", type=float, nargs="+", default=[2.4, 2.8, 3.6])
    file.add_argument("--samples", type=int, default=SAMPLES)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if arguments.kind == "resnet20":
            measure_resnet20(arguments.shared, Path(place))
            return
        if arguments.kind == "curve":
            measure_curve(arguments.model, arguments.data, arguments.factory, Path(place))
            return
        for bits in arguments.bits:
            options = {"bits_per_weight": bits, "samples": arguments.samples}
            show(f"{bits} bits", arguments.model, arguments.data, Path(place), **options)


if __name__ == "__main__":
    main()
