"""Are weights of low relevance those that a ternary ResNet-20 can do without? Zeroes some of them.

    python benchmarks/zeroing.py --share 0.1 --seeds 0 1 2

It needs row ecq-ternary-longer of `results.py resnet20`, and trains nothing. All weights that are
not zero have the same size Δ in their layer, so that their relevances alone tell them apart. A
share of them is zeroed in each layer: those of the lowest or the highest relevance |r|, of the
smallest |gradient times weight|, or any. Accuracy on the first test images (JPEG), with the
network's own BatchNorm statistics and with new ones from training images.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from shared import ROOT, format_interval, make_parser
from torch import Tensor, nn

import ecqx_onnx
from ecqx_onnx.data import load_dataset
from ecqx_onnx.data.augmentation import crop_and_flip
from ecqx_onnx.quantization.relevance.relevance import Relevances
from ecqx_onnx.sources.loading import load_factory

MODEL, DATA = f"{ROOT}/models/resnet20.py:resnet20", f"{ROOT}/benchmarks/cifar10_mixed.py:jpeg_test"
ROW, BATCHES, BATCH = "ecq-ternary-longer", 12, 128
Batches = list[tuple[Tensor, Tensor]]


def compute_scores(
    model: nn.Module, weights: dict[str, Tensor], batches: Batches, seed: int
) -> dict[str, dict[str, Tensor]]:
    """What decides -> a number for each weight; the lowest are zeroed."""
    relevances = Relevances(model, list(weights), composite="epsilon_plus_flat")
    R = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    gradient = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    parameters = dict(model.named_parameters())
    for x, y in batches:
        for name, found in relevances(x, y, weights).items():
            R[name] += found.abs()
        found = torch.autograd.grad(
            F.cross_entropy(model(x), y), [parameters[name] for name in weights]
        )
        for name, slope in zip(weights, found, strict=True):
            gradient[name] += slope
    generator = torch.Generator().manual_seed(seed)
    return {
        "none of them": {},
        "any": {
            name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()
        },
        "lowest relevance": R,
        "highest relevance": {name: -found for name, found in R.items()},
        "smallest gradient times weight": {
            name: (gradient[name] * weight).abs() for name, weight in weights.items()
        },
    }


def zero_share(weight: Tensor, score: Tensor, share: float) -> Tensor:
    """The weight without this share of its non-zero entries, those of the lowest score."""
    flat = weight.flatten().clone()
    occupied = flat.nonzero().flatten()
    flat[occupied[score.flatten()[occupied].argsort()[: round(share * len(occupied))]]] = 0
    return flat.view_as(weight)


@torch.no_grad()
def with_new_statistics(model: nn.Module, batches: Batches) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
    model.train()
    for x, _ in batches:
        model(x)
    return model.eval()


@torch.no_grad()
def measure_accuracy(model: nn.Module, batches: Batches) -> float:
    """In %."""
    return (
        100
        * sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
        / sum(len(y) for _, y in batches)
    )


def take_batches(split: Iterator[tuple[np.ndarray, np.ndarray]], count: int) -> Batches:
    return [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in islice(split, count)]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--share", type=float, default=0.1, help="of each layer's weights that are not zero"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=1000, help="of the test set")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_dataset(DATA, preprocessing=load_factory(MODEL).preprocessing)
    tested = take_batches(dataset.test.batches(500), -(-arguments.images // 500))
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in arguments.seeds:
        checkpoint = ecqx_onnx.load(ROOT / "runs" / f"resnet20-{ROW}-{seed}.pt")
        weights = {
            tensor.name: torch.from_numpy(tensor.dequantize()) for tensor in checkpoint.tensors
        }
        model = load_factory(MODEL).model
        model.load_state_dict({**checkpoint.state, **weights})
        model.eval()
        seen = take_batches(
            dataset.training.batches(
                BATCH, shuffle=np.random.default_rng(seed), augment=crop_and_flip
            ),
            BATCHES,
        )
        parameters = dict(model.named_parameters())
        for name, score in compute_scores(model, weights, seen, seed).items():
            for each, value in score.items():
                parameters[each].data.copy_(zero_share(weights[each], value, arguments.share))
            found.setdefault(name, []).append(
                (
                    measure_accuracy(model, tested),
                    measure_accuracy(with_new_statistics(model, seen), tested),
                )
            )
            print(f"seed {seed}, {name}: {found[name][-1]}", flush=True)
    print(
        f"{arguments.share:.0%} of the weights that are not zero; accuracy in %, "
        f"{arguments.images} images, mean ± 95 %"
    )
    for name, pairs in found.items():
        own = format_interval([pair[0] for pair in pairs])
        new = format_interval([pair[1] for pair in pairs])
        print(f"| {name} | {own} | {new} |")


if __name__ == "__main__":
    main()
