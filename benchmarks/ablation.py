"""What does each choice of the recipe bring? LeNets on MNIST, one option changed at a time.

    python benchmarks/ablation.py          # all variants: 3 seeds, 4 entropy weights, about a day
    python benchmarks/ablation.py --epochs 2 --samples 20000 --variants default ECQ "rho 4"

Each variant is trained from the same float networks at several entropy weights. A run lands in
runs/ablation.jsonl and is not done again. Accuracy is interpolated between the runs of a seed to
the same share of zeros, or to the same bits per weight, and the difference to the default taken
seed by seed. Since it decides on defaults, it is the accuracy on the last 10 000 of MNIST's
training images, which no network has seen. --also changes options of all variants, the default as
well. Composites differ in their rules for convolutions only, so try them with --model lenet5.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from shared import (
    ROOT,
    RUNS,
    compute_half_width,
    format_interval,
    interpolate_accuracy,
    make_parser,
)
from train_fp32 import train as train_float

from ecqx_onnx import api
from ecqx_onnx.data import load_dataset
from ecqx_onnx.quantization import quantizer, train
from ecqx_onnx.quantization.levels import assignment
from ecqx_onnx.quantization.levels.assignment import LEAST_RELEVANCE, find_critical_exponents
from ecqx_onnx.quantization.relevance.relevance import Relevances
from ecqx_onnx.sources.loading import load_factory
from ecqx_onnx.tensors import Scale

DATA = f"{ROOT}/benchmarks/mnist_validation.py:mnist_validation"

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "ECQ": {"relevance": None},
    "gradient absolute": {"gradient": "absolute"},
    # by kΔ with its sign: ascent where it is negative; see `change_training`
    "gradient signed": {"gradient": "absolute"},
    **{
        f"band -{keep} +{prune}": {"keep": keep, "prune": prune}
        for keep, prune in ((0, 0), (0.1, 0), (0, 0.1), (0.2, 0.2))
    },
    **{f"refresh {k}": {"refresh_every": k} for k in (1, 2, 4, 16)},
    **{f"rho {rho}": {"rho": float(rho)} for rho in (1.5, 4)},
    **{f"start {start}": {"start": start} for start in ("probability", "ones")},
    **{f"memory {memory}": {"relevance_memory": memory} for memory in (0.0, 0.99)},
    **{f"relevance until {share}": {"relevance_until": share} for share in (0.4, 0.7)},
    **{
        f"composite {name}": {"relevance": name}
        for name in ("epsilon_plus", "epsilon_alpha2_beta1_flat", "epsilon_gamma_box")
    },
    # taken on the quantised network, not on the background weights; see `change_training`
    "relevance at the levels": {},
    # relevances take no weight to zero that plain ECQ would not; see `change_training`
    "relevance keeps only": {},
    **{f"step {rule}": {"step": rule} for rule in ("percentile", "least_squares", "learned")},
    "step per channel": {"granularity": "channel"},
}

Point = dict[str, float]
"""zeros, bits (per weight: entropy of the levels, and 32 for each step), accuracy in %."""


@contextmanager
def change_training(variant: str) -> Iterator[None]:
    """What no option of the package does, while a variant of this name trains."""

    def compute_signed_factor(weight: Any) -> torch.Tensor:
        value = weight.quantized()
        return torch.where(value != 0, value, torch.ones_like(value)).to(weight.parameter.dtype)

    def find_exponents_that_keep(
        rows, R, step, levels, cost, zero_cost, rho, exponent, chosen
    ) -> int:
        zeros = find_critical_exponents(
            rows, R, step, levels, cost, zero_cost, rho, exponent, chosen
        )
        # Plain ECQ takes zero at ρ R^β = 1 or above, β <= ln ρ / -ln R: a weight whose critical
        # exponent lies beyond stays.
        exponent[exponent > math.log(rho) / -R.clamp(LEAST_RELEVANCE, 1 - 1e-6).log()] = torch.inf
        return zeros

    def share_levels(self: Relevances, background: Any) -> None:
        share(
            self,
            {
                name: parameter
                for name, parameter in self.model.named_parameters()
                if name in background
            },
        )

    share = Relevances._share_values
    patches = {
        "relevance at the levels": mock.patch.object(Relevances, "_share_values", share_levels),
        "gradient signed": mock.patch.object(
            quantizer._Weight, "gradient_factor", compute_signed_factor
        ),
        "relevance keeps only": mock.patch.object(
            assignment, "find_critical_exponents", find_exponents_that_keep
        ),
    }
    with patches.get(variant, nullcontext()):
        yield


def train_variant(
    variant: str,
    entropy_weight: float,
    seed: int,
    float_model: torch.nn.Module,
    dataset: Any,
    how: dict[str, Any],
) -> Point:
    model = copy.deepcopy(float_model)
    options = {
        "bits": how["bits"],
        "entropy_weight": entropy_weight,
        "epochs": how["epochs"],
        "batch_size": 128,
    }
    options |= {**how.get("also", {}), **VARIANTS[variant]}
    with change_training(variant):
        trained = train(model, dataset, validation=0.0, seed=seed, device="cpu", **options)
    made = trained.quantizer
    tensors = made.tensors()
    steps = sum(tensor.meaning.step.size for tensor in tensors if isinstance(tensor.meaning, Scale))
    for_steps = 32 * steps / sum(tensor.size for tensor in tensors)
    accuracy = 100 * api.accuracy(model, dataset.test).share
    return {"zeros": made.zeros, "bits": made.bits_per_weight + for_steps, "accuracy": accuracy}


def load_float_network(how: dict[str, Any], dataset: Any, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = load_factory(f"{ROOT}/models/{how['model']}.py:{how['model']}").model
    path = RUNS / f"ablation-{how['model']}-{how['samples']}-{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        train_float(
            model,
            dataset.training,
            epochs=10,
            rate=2e-3,
            decay=1e-2,
            seed=seed,
            augment=None,
            bfloat16=False,
        )
        torch.save(model.state_dict(), path)
    return model


def format_table(curves: dict[str, dict[int, list[Point]]], places: list[tuple[str, float]]) -> str:
    """Markdown: each variant's accuracy at these places, and its difference to the default, seed by
    seed; bold beyond chance.

    places: (axis, value on it). n: how many seeds' curves reach the place.
    """
    headings = [
        f"{value:.0%} zeros" if axis == "zeros" else f"{value:g} bits per weight"
        for axis, value in places
    ]
    columns = []
    for heading in headings:
        columns += ["n", f"accuracy at {heading}, %", "against the default, points"]
    lines = ["| variant | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for variant, by_seed in curves.items():
        cells = []
        for axis, value in places:
            default = {
                seed: interpolate_accuracy(points, axis, value)
                for seed, points in curves.get("default", {}).items()
            }
            found = {
                seed: interpolate_accuracy(points, axis, value) for seed, points in by_seed.items()
            }
            reached = {seed: accuracy for seed, accuracy in found.items() if accuracy is not None}
            pairs = [
                accuracy - here
                for seed, accuracy in reached.items()
                if (here := default.get(seed)) is not None
            ]
            mean = format_interval(list(reached.values())) if reached else "no curve reaches it"
            shown = format_interval(pairs) if pairs and variant != "default" else ""
            beyond = len(pairs) > 1 and abs(sum(pairs) / len(pairs)) > compute_half_width(pairs)
            cells += [str(len(reached)), mean, f"**{shown}**" if shown and beyond else shown]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME"
    )
    parser.add_argument("--model", default="lenet_300_100", choices=["lenet_300_100", "lenet5"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--entropy-weights", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--samples", type=int, default=50_000, help="of the 50 000 training images")
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.91], help="compare there")
    parser.add_argument(
        "--at-bits", type=float, nargs="+", default=[0.52], help="and at so many bits per weight"
    )
    parser.add_argument(
        "--also",
        type=json.loads,
        metavar="JSON",
        help='options of all variants, such as {"step": "learned"}',
    )
    parser.add_argument("--only", choices=["print"], help="train nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    RUNS.mkdir(exist_ok=True)
    log = RUNS / "ablation.jsonl"
    how = {name: getattr(arguments, name) for name in ("model", "bits", "epochs", "samples")} | {
        "test": "validation"
    }
    how |= {"also": arguments.also} if arguments.also else {}
    done = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        entry = json.loads(line)
        done[entry["key"]] = entry["point"]
    if arguments.only is None:
        module = load_factory(f"{ROOT}/models/{how['model']}.py:{how['model']}")
        dataset = load_dataset(DATA, preprocessing=module.preprocessing)
        dataset = dataset.__class__(
            dataset.name, dataset.training.take(how["samples"]), dataset.test, dataset.labels
        )
    curves: dict[str, dict[int, list[Point]]] = {variant: {} for variant in arguments.variants}
    for seed in range(
        arguments.seeds
    ):  # seed by seed, so that a stopped benchmark has whole comparisons
        for variant in arguments.variants:
            for entropy_weight in arguments.entropy_weights:
                key = json.dumps([how, variant, entropy_weight, seed])
                if key not in done and arguments.only is None:
                    point = train_variant(
                        variant,
                        entropy_weight,
                        seed,
                        load_float_network(how, dataset, seed),
                        dataset,
                        how,
                    )
                    with log.open("a") as file:
                        file.write(json.dumps({"key": key, "point": point}) + "\n")
                    print(
                        variant,
                        entropy_weight,
                        f"seed {seed}:",
                        {k: round(v, 4) for k, v in point.items()},
                        flush=True,
                    )
                    done[key] = point
                if key in done:
                    curves[variant].setdefault(seed, []).append(done[key])
    runs = 0
    for by_seed in curves.values():
        runs += sum(map(len, by_seed.values()))
    print(
        f"\n{how['model']}, {how['bits']} bit, {how['epochs']} epochs, {how['samples']} samples, "
        f"{runs} runs; mean ± 95 %\n"
    )
    places = [("zeros", value) for value in arguments.zeros]
    places += [("bits", value) for value in arguments.at_bits]
    print(format_table(curves, places))


if __name__ == "__main__":
    main()
