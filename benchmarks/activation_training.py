"""Does training for 8-bit activations help? The keyword spotter with 4-bit weights, both ways.

    python benchmarks/train_fp32.py models/kws_dscnn.py:kws_dscnn ../shared/data/fsdd.npz \\
        --epochs 25 --rate 0.005 --out kws_fp32.pt
    python benchmarks/activation_training.py kws_fp32.pt ../shared/data/fsdd.npz runs

Recipe: ECQx, 4 bit, entropy weight 0.1, Adam at 0.002, 8 epochs, clips shifted at random. A
checkpoint that is there is not trained again. noise: energy of the class scores' difference to the
weight-only file's, against theirs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from integer_kernels import compute_class_scores, compute_noise
from shared import ROOT, make_parser

from ecqx_onnx import api
from ecqx_onnx.checkpoint import load
from ecqx_onnx.data import load_dataset

RECIPE = {
    "bits": 4,
    "entropy_weight": 0.1,
    "epochs": 8,
    "learning_rate": 0.002,
    "augment": "shift_audio",
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("weights", type=Path, help="float weights of the keyword spotter")
    parser.add_argument("data", help="fsdd.npz")
    parser.add_argument(
        "folder", type=Path, help="where the checkpoints go: kws-float32-0.pt, kws-int8-0.pt ..."
    )
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    print(
        "| trained with | seed | weights only | int8, calibrated by min-max | by percentile | as "
        "trained | noise, dB |"
    )
    print("|---|---|---|---|---|---|---|")
    for activations in ("float32", "int8"):
        for seed in range(arguments.seeds):
            path = arguments.folder / f"kws-{activations}-{seed}.pt"
            if not path.exists():
                factory = f"{ROOT}/models/kws_dscnn.py:kws_dscnn"
                options = {**RECIPE, "activations": activations, "seed": seed}
                api.quantize(
                    factory, data=arguments.data, weights=arguments.weights, out=path, **options
                )
            print(
                f"| {activations} activations | {seed} | "
                + " | ".join(measure_files(path, arguments.data))
                + " |",
                flush=True,
            )


def measure_files(path: Path, data: str) -> list[str]:
    """Cells: right answers of each file, then each int8 file's noise."""
    checkpoint = load(path)
    dataset = load_dataset(data, preprocessing=checkpoint.preprocessing)
    ways = [
        {"calibration": dataset, "calibration_method": method}
        for method in ("minmax", "percentile")
    ]
    ways += [{}] if checkpoint.ranges else []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "out.onnx"
        api.convert(checkpoint, file)
        scores = [compute_class_scores(file, dataset.test)]
        for way in ways:
            api.convert(checkpoint, file, activations="int8", force=True, **way)
            scores.append(compute_class_scores(file, dataset.test))
    total = len(dataset.test)
    cells = [f"{int(np.sum(found.argmax(1) == dataset.test.y))} of {total}" for found in scores]
    noise = ", ".join(f"{compute_noise(found, scores[0]):.1f}" for found in scores[1:])
    return [*cells, *["-"] * (4 - len(cells)), noise]


if __name__ == "__main__":
    main()
