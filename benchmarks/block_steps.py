"""What is the unit of a step for: the tensor, a row, or a block of a row's inputs?

block_steps.py minilm.onnx sentences.npz

For some matrices of a float .onnx: error feedback on steps of each unit, at the step that gives
about the same coded bits (entropy of the levels, and two bytes for each step). Printed is the
layer's relative output error, sqrt(tr E H Eᵀ / tr W H Wᵀ).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ecqx_onnx.compression.model.float_model import load_float_model
from ecqx_onnx.compression.model.weights import find_weights
from ecqx_onnx.compression.rounding.moments import MomentKey, collect_moments, unique_keys
from ecqx_onnx.compression.rounding.rounding import factorize
from ecqx_onnx.compression.search.allocation import entropy
from ecqx_onnx.compression.search.samples import InputSpec, load_samples
from ecqx_onnx.runtime.runner import Runner

RATES = (2.0, 3.0)
SENTENCES = 128
HIGHEST = 127


def unit_of(rows: np.ndarray, columns: int | None) -> np.ndarray:
    """[rows, columns] of units: the deviation of each block, or of the whole tensor for None."""
    if columns is None:
        return np.full(rows.shape, np.sqrt((rows**2).mean()))
    units = np.empty(rows.shape)
    for start in range(0, rows.shape[1], columns):
        part = rows[:, start : start + columns]
        units[:, start : start + columns] = np.sqrt((part**2).mean(axis=1, keepdims=True))
    return np.maximum(units, 1e-3 * np.sqrt((rows**2).mean()))


def widen(rows: np.ndarray, steps: np.ndarray, columns: int | None) -> np.ndarray:
    """Steps within which no weight lies beyond int8: of its block, or of its row."""
    width = columns or rows.shape[1]
    for start in range(0, rows.shape[1], width):
        part = slice(start, start + width)
        peaks = np.abs(rows[:, part]).max(axis=1, keepdims=True) / (HIGHEST - 2)
        steps[:, part] = np.maximum(steps[:, part], peaks)
    return steps


def feed_back(rows: np.ndarray, steps: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Levels, column by column, each with a step of its own."""
    factor, order, _ = factorize(hessian, 0.01)
    work, wide = rows[:, order].astype(np.float64), steps[:, order]
    levels = np.empty(work.shape)
    for j in range(work.shape[1]):
        levels[:, j] = np.rint(work[:, j] / wide[:, j])
        error = (work[:, j] - levels[:, j] * wide[:, j]) / factor[j, j]
        work[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    back = np.empty_like(levels)
    back[:, order] = levels
    return back


def measure(rows: np.ndarray, hessian: np.ndarray, rate: float, columns: int | None) -> str:
    """Bits and error at the step that comes nearest to the rate."""
    units = unit_of(rows, columns)
    width = columns or rows.size
    steps_bits = 16 * (rows.size / width) / rows.size
    low, high = -5.0, 3.0
    for _ in range(7):
        middle = (low + high) / 2
        steps = widen(rows, units * 2.0**middle, columns)
        levels = feed_back(rows, steps, hessian)
        bits = entropy(levels) + steps_bits
        low, high = (middle, high) if bits > rate else (low, middle)
    error = levels * steps - rows
    moved = np.einsum("ij,jk,ik->", error, hessian, error)
    whole = np.einsum("ij,jk,ik->", rows, hessian, rows)
    return f"{bits:.3f} bits, error {np.sqrt(moved / whole):.4f}"


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("--every", type=int, default=12, help="of the graph's matrices")
    arguments = parser.parse_args()
    graph = load_float_model(arguments.model).graph
    matrices = [w for w in find_weights(graph)[0] if w.kind == "matrix_transposed" and w.watched]
    chosen = matrices[1 :: arguments.every]
    runner = Runner(graph, values=[str(key.product.value) for key in unique_keys(chosen)])
    samples = load_samples(
        arguments.data, [InputSpec.of(node) for node in runner.inputs], samples=SENTENCES
    )
    moments = collect_moments(runner, chosen, samples.feeds(32), samples=SENTENCES)
    for weight in chosen:
        key = MomentKey.of(weight)
        assert key is not None
        hessian = moments[key].shrunk().blocks[0][0]
        rows = weight.to_matrices(graph.weights[weight.name])[0].astype(np.float64)
        for rate in RATES:
            parts = [f"{weight.name} {list(rows.shape)} at {rate:g}:"]
            units = {"tensor": None, "row": rows.shape[1], "128": 128, "64": 64, "32": 32}
            for name, columns in units.items():
                parts.append(f"{name} {measure(rows, hessian, rate, columns)};")
            print(" ".join(parts), flush=True)


if __name__ == "__main__":
    main()
