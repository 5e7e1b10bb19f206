"""A picture of accuracy against real .onnx bytes; each point is a recipe with its 95 % interval.

    python benchmarks/plot_results.py lenet5 docs/accuracy_against_bytes.png
    python benchmarks/plot_results.py kws docs/accuracy_against_bytes_kws.png

It draws what `python benchmarks/results.py TABLE` left in runs/. A table that starts from one float
network also gets what its levels are worth without any training, at several bits and entropy
weights.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from results import TABLES, Results, measure_onnx_bytes
from shared import ROOT, RUNS, compute_half_width, make_parser

from ecqx_onnx import api
from ecqx_onnx.data import load_dataset
from ecqx_onnx.sources.loading import load_model

ENTROPY_WEIGHTS = (0.0, 0.1, 0.2, 0.4, 0.8)


def plot_untrained(table: Results, axes: Any) -> None:
    """Curves of the float network's weights, rounded to levels and nothing else."""
    assert isinstance(table.start, str)  # asked before
    factory = str(ROOT / table.model)
    test = load_dataset(
        table.data, preprocessing=load_model(table.start, factory=factory).preprocessing
    ).test
    with tempfile.TemporaryDirectory() as folder:
        for bits in (2, 3, 4, 5):
            points = []
            for gamma in ENTROPY_WEIGHTS:
                made = api.as_checkpoint(
                    table.start, factory=factory, bits=bits, entropy_weight=gamma
                )
                nbytes = api.convert(made, Path(folder) / f"{bits}-{gamma}.onnx").nbytes
                points.append((nbytes / 1000, 100 * api.accuracy(made.module(), test).share))
                print(
                    f"{bits} bit, entropy weight {gamma}: {nbytes} bytes, {points[-1][1]:.2f} %",
                    flush=True,
                )
            axes.plot(
                *zip(*points, strict=True),
                ".:",
                linewidth=1,
                color=f"{(bits - 1) / 5}",
                label=f"{bits} bit, no training",
            )


def plot_trained(name: str, table: Results, axes: Any) -> float:
    """The rows of the table that lie in runs/, those of one method and bit width joined; returns
    the float accuracy, in %."""
    methods: dict[str, list[tuple[float, float, float]]] = {}
    floats = []
    for row in table.rows:
        files = [
            file
            for seed in table.seeds
            if (file := RUNS / f"{name}-{row.name}-{seed}.json").exists()
        ]
        if not files:
            continue
        results = [json.loads(file.read_text()) for file in files]
        accuracies = [100 * result["accuracy"]["test"] for result in results]
        floats += [100 * result["float"]["test"] for result in results]
        nbytes = sum(
            measure_onnx_bytes(file.with_suffix(".pt"), floats="float32") for file in files
        ) / len(files)
        point = (nbytes / 1000, sum(accuracies) / len(accuracies), compute_half_width(accuracies))
        print(
            f"{row.name}: {nbytes:.0f} bytes, {point[1]:.2f} ± {point[2]:.2f} %, {len(files)} seeds"
        )
        methods.setdefault("-".join(row.name.split("-")[:2]), []).append(point)
    for method, points in methods.items():
        kilobytes, accuracy, spread = zip(*sorted(points), strict=True)
        label = method.replace("ecqx-", "ECQx ").replace("ecq-", "ECQ ").replace("bit", " bit")
        axes.errorbar(
            kilobytes, accuracy, yerr=spread, fmt="s-", markersize=4, capsize=3, label=label
        )
    return sum(floats) / len(floats)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("picture", type=Path)
    parser.add_argument("--title", help="default: the model's and the data's file names")
    parser.add_argument(
        "--from", dest="lowest", type=float, help="lower end of the accuracies, in %%"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = TABLES[arguments.table]
    figure, axes = plt.subplots(figsize=(7, 4.4))
    if isinstance(table.start, str):
        plot_untrained(table, axes)
    fp32 = plot_trained(arguments.table, table, axes)
    axes.axhline(fp32, color="black", linewidth=0.8, linestyle="--", label="float32")
    axes.set(
        xlabel=".onnx file, kB",
        ylabel="accuracy on the test set, %",
        title=arguments.title
        or f"{Path(table.model.split(':')[0]).stem}, {Path(table.data.split(':')[0]).stem}",
    )
    if arguments.lowest is not None:
        axes.set_ylim(arguments.lowest, 100 + (100 - arguments.lowest) / 20)
    axes.legend(fontsize=8, loc="upper right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
