"""`--bits N` on a step for the tensor or for each row: bytes and error at once, without data.

step_units.py resnet20.onnx images.npz images        x_test of CIFAR-10, normalized
step_units.py minilm.onnx sentences.npz arrays       arrays called like the inputs
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ecqx_onnx.compression.encoding import FileOptions, encode
from ecqx_onnx.compression.model.float_model import load_float_model
from ecqx_onnx.compression.model.weights import Weight, find_weights
from ecqx_onnx.compression.rounding.capped import (
    LONG,
    PERCENTILE,
    fit_steps,
    outermost_level,
    round_to_cancel,
    window_of,
)
from ecqx_onnx.compression.rounding.ordered import Layers, RoundedModel
from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.runtime.runner import Runner

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
UNITS = ("least squares, tensor", "least squares, row", "percentile, tensor", "percentile, row")


def choose_steps(weight: Weight, matrices: np.ndarray, highest: int, unit: str) -> np.ndarray:
    """Steps of one of UNITS."""
    by_row = unit.endswith("row") and weight.step_shape() != ()
    if unit.startswith("least"):
        return fit_steps(matrices, highest, by_row=by_row)
    rows = np.abs(matrices if by_row else matrices.reshape(1, 1, -1))
    share = PERCENTILE if rows.shape[-1] >= LONG else 1.0
    steps = np.quantile(rows, share, axis=-1, keepdims=True) / highest
    return np.maximum(steps, 1e-8).astype(np.float32)


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("kind", choices=("images", "arrays"))
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 5])
    arguments = parser.parse_args()
    graph = load_float_model(arguments.model).graph
    weights, _ = find_weights(graph)
    layers = Layers(graph, weights, {})
    runner = Runner(graph, variable=layers.variable)
    arrays = np.load(arguments.data)
    if arguments.kind == "images":
        preprocessing = Preprocessing("image", scale=255.0, mean=MEAN, std=STD)
        x = preprocessing.apply(arrays["x_test"][:512])
        feeds = [{runner.inputs[0].name: x[start : start + 64]} for start in range(0, 512, 64)]
    else:
        feeds = []
        for start in range(0, 128, 32):
            feeds.append({name: arrays[name][start : start + 32] for name in arrays.files})
    expected = np.concatenate([runner.run(batch)[0] for batch in feeds])
    for bits in arguments.bits:
        highest = outermost_level(bits)
        for unit in UNITS:
            rounded, changed = {}, {}
            for weight in weights:
                matrices = layers.matrices(weight)
                steps = choose_steps(weight, matrices, highest, unit)
                made = round_to_cancel(matrices, steps, highest, window=window_of(weight))
                rounded[weight.name] = made
                changed[weight.name] = weight.from_matrices(made.values)
            options = FileOptions(floats="float16")
            file = encode(layers, RoundedModel(rounded, changed), options, metadata={})
            found = np.concatenate([runner.run(batch, weights=changed)[0] for batch in feeds])
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            print(f"{bits} bits, {unit}: {file.nbytes:,} bytes, error {error:.4f}", flush=True)


if __name__ == "__main__":
    main()
