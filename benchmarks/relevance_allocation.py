"""Relevance's fair trial: whose sensitivities share the bits of a network out best?

Every method gives a_l, the weight of a layer's squared step in the output's error; allocation,
rounding and rates are the same for all. Printed is what the logits of the test images moved by.

    none          the same step in standard deviations for all weights
    perturbation  squared error of the logits when that weight alone is rounded
    Fisher        sum of E[g²] over the entries, g of the log-likelihood of the model's class
    LRP |r|       sum of |relevance| over the entries (epsilon-plus-flat, the model's class)
    LRP r²        sum of relevance²
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import lenet5
from compress import MEAN, SAMPLES, STD, write_network
from resnet20 import ResNet20

from ecqx_onnx.compression.model.biases import with_biases
from ecqx_onnx.compression.model.float_model import load_float_model
from ecqx_onnx.compression.model.weights import find_weights
from ecqx_onnx.compression.rounding.moments import collect_moments, unique_keys
from ecqx_onnx.compression.rounding.ordered import Layers, round_in_order
from ecqx_onnx.compression.rounding.units import choose_unit
from ecqx_onnx.compression.search.allocation import (
    allocate,
    entropy,
    find_dial,
    measure_rate,
)
from ecqx_onnx.compression.search.sensitivity import measure_sensitivity
from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.quantization.relevance.relevance import Relevances
from ecqx_onnx.runtime.runner import Runner

RATES = (2.2, 1.8, 1.4)
PROBED = 128


def relevance_slopes(network: torch.nn.Module, x: torch.Tensor, names: list[str]) -> dict:
    """({name: Σ|r|}, {name: Σr²}) over single images."""
    background = {
        name: value.detach() for name, value in network.named_parameters() if name in names
    }
    relevances = Relevances(network, names, composite="epsilon_plus_flat")
    absolute = dict.fromkeys(names, 0.0)
    square = dict.fromkeys(names, 0.0)
    target = network(x).argmax(1)
    for start in range(0, len(x), 8):
        part = slice(start, start + 8)
        found = relevances(x[part], target[part], background)
        for name, r in found.items():
            absolute[name] += float(r.abs().sum())
            square[name] += float((r.double() ** 2).sum())
    return {"LRP |r|": absolute, "LRP r²": square}


def fisher_slopes(network: torch.nn.Module, x: torch.Tensor, names: list[str]) -> dict[str, float]:
    """Sum over entries of E[g²]·w², which is free of BatchNorm's factor as a step in deviations
    is."""
    parameters = {name: p for name, p in network.named_parameters() if name in names}
    total = dict.fromkeys(names, 0.0)
    for image in x:
        scores = torch.log_softmax(network(image[None]), 1)
        gradients = torch.autograd.grad(scores.max(), list(parameters.values()))
        for (name, parameter), g in zip(parameters.items(), gradients, strict=True):
            unit = float((parameter.detach() ** 2).mean())
            total[name] += float((g**2).sum()) * unit
    return total


def report(layers: Layers, slopes: Mapping[str, Mapping[str, float]], feeds, test, labels) -> None:
    """One line for each method and rate."""
    units = {w.name: choose_unit(w, layers.matrices(w)) for w in layers.weights}
    curves = [measure_rate(w.name, layers.matrices(w), units[w.name]) for w in layers.weights]
    entries = sum(curve.size for curve in curves)
    runner = Runner(layers.graph, variable=layers.variable)

    def logits(changed=None):
        return np.concatenate([runner.run(batch, weights=changed)[0] for batch in test])

    expected = logits()
    for rate in RATES:
        for method, values in slopes.items():
            dial = find_dial(curves, values, rate * entries)
            multiples = allocate(curves, values, dial)
            steps = {name: units[name] * np.float32(m) for name, m in multiples.items()}
            model = round_in_order(layers, steps, feeds)
            found = logits(model.changed)
            bits = sum(entropy(r.levels) * r.levels.size for r in model.rounded.values())
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            same = 100 * (found.argmax(1) == expected.argmax(1)).mean()
            right = 100 * (found.argmax(1) == labels).mean()
            print(
                f"{method:13} {bits / entries:.3f} b/w  error {error:.4f}  agreement {same:.2f}"
                f"  accuracy {right:.2f}",
                flush=True,
            )


@dataclass(frozen=True, eq=False)
class Trial:
    """A float network with its data, as it takes them: x, and held_out with its labels."""

    network: torch.nn.Module
    x: np.ndarray
    held_out: np.ndarray
    labels: np.ndarray


def load_resnet20(shared: Path, draw: int) -> Trial:
    """The public checkpoint, and lossless images."""
    images = np.load(shared / "cifar10_lossless_part.npz")
    order = np.random.RandomState(draw).permutation(len(images["x_train"]))[:SAMPLES]
    preprocessing = Preprocessing("image", scale=255.0, mean=MEAN, std=STD)
    checkpoint = shared / "checkpoints" / "resnet20_cifar10_fp32.pt"
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")["state_dict"]
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    network = ResNet20()
    network.load_state_dict(plain, strict=False)
    x = preprocessing.apply(images["x_train"][order])
    return Trial(network.eval(), x, preprocessing.apply(images["x_test"]), images["y_test"])


def load_lenet5(shared: Path, draw: int) -> Trial:
    """The float checkpoint, and MNIST."""
    images = np.load(shared / "mnist.npz")
    order = np.random.RandomState(draw).permutation(len(images["x_train"]))[:SAMPLES]
    network = lenet5.lenet5()
    checkpoint = shared / "checkpoints" / "lenet5_mnist_fp32.pt"
    network.load_state_dict(torch.load(checkpoint, weights_only=True, map_location="cpu"))
    x = lenet5.PREPROCESSING.apply(images["x_train"][order])
    held_out = lenet5.PREPROCESSING.apply(images["x_test"])
    return Trial(network.eval(), x, held_out, images["y_test"])


NETWORKS = {"resnet20": load_resnet20, "lenet5": load_lenet5}


def main() -> None:
    """`relevance_allocation.py resnet20 --shared ../shared/data --draw 0`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=tuple(NETWORKS), nargs="?", default="resnet20")
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"))
    parser.add_argument("--draw", type=int, default=0)
    arguments = parser.parse_args()
    trial = NETWORKS[arguments.network](arguments.shared, arguments.draw)
    network, x, held_out = trial.network, trial.x, trial.held_out
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "network.onnx"
        write_network(network, x[:2], path)
        graph = load_float_model(path).graph
    weights, _ = find_weights(graph)
    layers = Layers(*with_biases(graph, weights)[:1], weights, with_biases(graph, weights)[1])
    feeds = [{"x": x[start : start + 32]} for start in range(0, len(x), 32)]
    test = [{"x": held_out[start : start + 128]} for start in range(0, len(held_out), 128)]
    values = [str(key.product.value) for key in unique_keys(weights)]
    runner = Runner(layers.graph, variable=layers.variable, values=values)
    moments = collect_moments(runner, weights, feeds, samples=len(x))
    units = {w.name: choose_unit(w, layers.matrices(w)) for w in weights}
    names = [w.name for w in weights]
    probe = torch.from_numpy(x[:PROBED])
    slopes: dict[str, Mapping[str, float]] = {
        "none": {w.name: float(w.size) for w in weights},
        "perturbation": measure_sensitivity(layers, units, moments, runner, feeds[:4]),
        "Fisher": fisher_slopes(network, probe, names),
        **relevance_slopes(network, probe, names),
    }
    report(layers, slopes, feeds, test, trial.labels)


if __name__ == "__main__":
    main()
