"""Do relevances help? Plain ECQ and ECQx on the demo's digits, compared at equal shares of zeros.

For each seed: a float network, then both methods at several entropy weights, best epoch by a
validation split. Accuracy on the held-out digits is interpolated linearly between the runs to the
same share of zeros, and the difference taken seed by seed.
Run: python benchmarks/ecq_against_ecqx.py [seeds] (about 2 minutes a seed on one core)
"""

import copy
import statistics
import sys

import torch
from scipy import stats
from shared import interpolate_accuracy

from ecqx_onnx import api
from ecqx_onnx.data import load_dataset
from ecqx_onnx.demo import demo
from ecqx_onnx.demo import model as demo_model
from ecqx_onnx.quantization import train

METHODS = {"ECQ": None, "ECQx": "epsilon_plus_flat"}
ENTROPY_WEIGHTS = (0.05, 0.1, 0.2, 0.4, 0.8)
ZEROS = (0.6, 0.7, 0.8, 0.9)


def train_curve(float_model, dataset, relevance, seed) -> list[dict[str, float]]:
    """Zeros, and accuracy on the test split in %, one point for each entropy weight."""
    points = []
    for entropy_weight in ENTROPY_WEIGHTS:
        model = copy.deepcopy(float_model)
        options = {"bits": 4, "entropy_weight": entropy_weight, "relevance": relevance}
        trained = train(
            model, dataset, epochs=demo.EPOCHS, batch_size=demo.BATCH, seed=seed, **options
        )
        points.append(
            {
                "zeros": trained.quantizer.zeros,
                "accuracy": 100 * api.accuracy(model, dataset.test).share,
            }
        )
    return points


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    torch.set_num_threads(1)
    dataset = load_dataset(demo.DATA).with_preprocessing(demo_model.PREPROCESSING)
    differences: dict[float, list[float]] = {zeros: [] for zeros in ZEROS}
    values: dict[tuple[str, float], list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = demo_model.digits_cnn()
        demo.train_float(model, dataset, None, seed=seed)
        curves = {
            name: train_curve(model, dataset, relevance, seed)
            for name, relevance in METHODS.items()
        }
        for name, points in curves.items():
            shown = [(round(p["zeros"], 3), round(p["accuracy"], 2)) for p in points]
            print(seed, name, shown, file=sys.stderr)
        for zeros in ZEROS:
            found = {
                name: interpolate_accuracy(points, "zeros", zeros)
                for name, points in curves.items()
            }
            if None not in found.values():
                differences[zeros].append(found["ECQx"] - found["ECQ"])
                for name, value in found.items():
                    values.setdefault((name, zeros), []).append(value)
    print("| zeros | seeds | ECQ, % | ECQx, % | difference, points (95 %) |\n|---|---|---|---|---|")
    for zeros, found in differences.items():
        if len(found) < 3:
            print(f"| {zeros:.0%} | {len(found)} | too few curves reach it | | |")
            continue
        half = stats.t.ppf(0.975, len(found) - 1) * statistics.stdev(found) / len(found) ** 0.5
        means = [statistics.mean(values[name, zeros]) for name in METHODS]
        print(
            f"| {zeros:.0%} | {len(found)} | {means[0]:.2f} | {means[1]:.2f} | "
            f"{statistics.mean(found):+.2f} ± {half:.2f} |"
        )


if __name__ == "__main__":
    main()
