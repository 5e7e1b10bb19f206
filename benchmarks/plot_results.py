"""Draws accuracy against bytes: LeNet-5 on MNIST, quantised at several bits and entropy weights, real .onnx bytes.

python benchmarks/plot_results.py fp32.pt mnist.npz docs/accuracy_against_bytes.png
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ecqx_onnx import api
from ecqx_onnx.data import load_dataset
from ecqx_onnx.loading import load_model

MODELS = Path(__file__).parents[1] / "models"
ENTROPY_WEIGHTS = (0.0, 0.1, 0.2, 0.4, 0.8)


def main(weights: str, data: str, picture: str) -> None:
    loaded = load_model(weights, factory=f"{MODELS}/lenet5.py:lenet5")
    test = load_dataset(data, preprocessing=loaded.preprocessing).test
    figure, axes = plt.subplots(figsize=(6.4, 4))
    with tempfile.TemporaryDirectory() as folder:
        for bits in (2, 3, 4, 5):
            points = []
            for gamma in ENTROPY_WEIGHTS:
                made = api.as_checkpoint(weights, factory=f"{MODELS}/lenet5.py:lenet5", bits=bits, entropy_weight=gamma)
                nbytes = api.convert(made, Path(folder) / f"{bits}-{gamma}.onnx").nbytes
                points.append((nbytes / 1000, 100 * api.accuracy(made.module(), test).share))
                print(f"{bits} bit, entropy weight {gamma}: {nbytes} bytes, {points[-1][1]:.2f} %", flush=True)
            axes.plot(*zip(*points, strict=True), "o-", label=f"{bits} bit, no training")
        trained = MODELS / "lenet5_mnist_4bit.pt"
        nbytes = api.convert(trained, Path(folder) / "trained.onnx").nbytes
        accuracy = api.accuracy(api.as_checkpoint(trained).module(), test).share
        print(f"trained with ECQx, 4 bit: {nbytes} bytes, {100 * accuracy:.2f} %")
        axes.plot(nbytes / 1000, 100 * accuracy, "k*", markersize=13, label="4 bit, trained with ECQx")
    fp32 = 100 * api.accuracy(loaded.model, test).share
    axes.axhline(fp32, color="grey", linewidth=0.8)
    axes.text(axes.get_xlim()[1], fp32, f" float32, {61706 * 4 / 1000:.0f} kB", va="center", fontsize=8, color="grey")
    axes.set(xlabel=".onnx file, kB", ylabel="accuracy on 10 000 test images, %", title="LeNet-5 on MNIST")
    axes.set_ylim(95, 99.6)
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
