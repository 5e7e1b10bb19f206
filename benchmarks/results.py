"""Accuracy against bytes: trains what a table misses, writes real .onnx files, prints the table.

    python benchmarks/results.py lenet300               # what lies in runs/ is not done again
    python benchmarks/results.py lenet300 --only print

A run is one row of a table and one seed: it starts from the float network of that seed, trains with
the row's options, and takes the weights of the last epoch: nothing is chosen on the test set. Its
results are in runs/TABLE-ROW-SEED.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from shared import (
    ROOT,
    RUNS,
    SHARED_DATA,
    format_interval,
    interpolate_accuracy,
    make_parser,
)
from train_fp32 import train as train_float

import ecqx_onnx
from ecqx_onnx import api
from ecqx_onnx.data import load_dataset
from ecqx_onnx.data.augmentation import crop_and_flip, shift_audio, shift_images
from ecqx_onnx.quantization.training import emulates_bfloat16
from ecqx_onnx.sources.loading import apply_state, load_factory, load_state


@dataclass(frozen=True)
class Row:
    """One recipe. options: those of `quantization.train` and the Quantizer. after: the row whose
    network it goes on from.

    data: what it trains on, where that isn't the table's.
    """

    name: str
    options: Mapping[str, Any]
    after: str = ""
    data: str = ""


@dataclass(frozen=True)
class Results:
    """One table. start: a float state dict, or how `train_fp32.train` makes one for each seed.

    compared: a row, and the rows of another method whose accuracy is interpolated to its zeros, and
    to its entropy bytes.
    """

    model: str
    data: str
    rows: tuple[Row, ...]
    start: str | Mapping[str, Any]
    tests: Mapping[str, str] = field(default_factory=dict)  # more test sets, by name
    seeds: tuple[int, ...] = (0, 1, 2)
    compared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


TO_THE_END = {
    "relevance": "epsilon_plus_flat",
    "relevance_until": 1.0,
}  # what was the default when these rows were trained
KWS_FLOAT = {"epochs": 25, "rate": 5e-3, "augment": "shift_audio"}
KWS_4BIT = {
    "bits": 4,
    "entropy_weight": 0.1,
    "epochs": 8,
    "learning_rate": 2e-3,
    "augment": shift_audio,
}
KWS_ROWS = (
    Row("ecqx-4bit", {**KWS_4BIT, **TO_THE_END}),
    Row("ecq-4bit", {**KWS_4BIT, "relevance": None}),
    Row("ecq-4bit-020", {**KWS_4BIT, "relevance": None, "entropy_weight": 0.2}),
)
ECQX_AT_EQUAL_ZEROS = {**TO_THE_END, "refresh_every": 16, "keep": 0.01, "prune": 0.01}
LENET300 = {
    **{"bits": 2, "step": "learned", "size_exponent": 0.4, "entropy_ramp": 0.5, "relevance": None},
    **{
        "epochs": 40,
        "batch_size": 256,
        "learning_rate": 3e-3,
        "augment": partial(shift_images, most=1),
    },
}
KWS_COMPARED = {"ecqx-4bit": ("ecq-4bit", "ecq-4bit-020")}
LENET5 = {
    **{
        "size_exponent": 0.4,
        "entropy_ramp": 0.5,
        "epochs": 8,
        "batch_size": 128,
        "learning_rate": 2e-3,
        "relevance": None,
    },
    **{"step": "learned", "augment": partial(shift_images, most=1)},
}

BFLOAT16 = not emulates_bfloat16("cpu")  # the published rows were trained with it
TERNARY = {
    **{"bits": 2, "step": "learned", "size_exponent": 0.5, "batch_size": 128, "distillation": 0.5},
    **{
        "precision": "bfloat16" if BFLOAT16 else "float32",
        "relevance": None,
        "augment": crop_and_flip,
    },
}
ENDS_4BIT = {"*": 2, "conv1.weight": 4, "linear.weight": 4}
LAYER1_4BIT = {**ENDS_4BIT, "layer1.*": 4}
FROM_PUBLIC = {"entropy_ramp": 0.5, "epochs": 10, "distillation": 1.0}
TERNARY_AFTER = {**TERNARY, "entropy_ramp": 0.3, "epochs": 3, "learning_rate": 7e-4}


def make_row(shared: Mapping[str, Any], name: str) -> Row:
    """The row that its name tells: METHOD-BITSbit-100γ, and a rule for the step where it isn't the
    shared one."""
    method, bits, weight, *step = name.split("-")
    options = {**shared, "bits": int(bits.removesuffix("bit")), "entropy_weight": int(weight) / 100}
    if method == "ecqx":
        options |= TO_THE_END
    return Row(name, options | ({"step": step[0]} if step else {}))


TABLES: dict[str, Results] = {
    "lenet5": Results(
        "models/lenet5.py:lenet5",
        f"{SHARED_DATA}/mnist.npz",
        rows=tuple(
            make_row(LENET5, name)
            for name in (
                "ecq-4bit-020",
                "ecq-4bit-030",
                "ecqx-4bit-030",
                "ecq-2bit-020",
                "ecq-2bit-030",
                "ecqx-2bit-030",
            )
        ),
        start=f"{SHARED_DATA}/checkpoints/lenet5_mnist_fp32.pt",
        compared={
            "ecqx-4bit-030": ("ecq-4bit-020", "ecq-4bit-030"),
            "ecqx-2bit-030": ("ecq-2bit-020", "ecq-2bit-030"),
        },
    ),
    "lenet5-choice": Results(
        "models/lenet5.py:lenet5",
        f"{ROOT}/benchmarks/mnist_validation.py:mnist_validation",
        rows=tuple(
            make_row({**LENET5, "epochs": 5}, name)
            for name in (
                *(
                    "ecq-4bit-030",
                    "ecq-2bit-030",
                    "ecq-4bit-030-auto",
                    "ecqx-4bit-030",
                    "ecqx-2bit-030",
                    "ecq-4bit-045",
                ),
                *("ecq-2bit-045", "ecqx-4bit-030-auto"),
            )
        ),
        start={"epochs": 6},
        seeds=(0,),
    ),
    "lenet300": Results(
        "models/lenet_300_100.py:lenet_300_100",
        f"{SHARED_DATA}/mnist.npz",
        rows=(
            Row("ecq-2bit-055", {**LENET300, "entropy_weight": 0.55}),
            Row("ecq-2bit-070", {**LENET300, "entropy_weight": 0.7, "epochs": 25}),
            Row(
                "ecqx-2bit-070",
                {**LENET300, "entropy_weight": 0.7, "epochs": 25, **ECQX_AT_EQUAL_ZEROS},
            ),
            *(
                Row(
                    f"ecq-4bit-0{γ}",
                    {**LENET300, "bits": 4, "entropy_weight": γ / 100, "epochs": 8},
                )
                for γ in (15, 30)
            ),
            *(
                Row(
                    f"ecq-4bit-0{γ}-long",
                    {**LENET300, "bits": 4, "entropy_weight": γ / 100, "epochs": 20},
                )
                for γ in (34, 38, 41)
            ),
        ),
        start={"epochs": 15},
    ),
    "kws": Results(
        "models/kws_dscnn.py:kws_dscnn",
        f"{SHARED_DATA}/fsdd.npz",
        KWS_ROWS,
        KWS_FLOAT,
        compared=KWS_COMPARED,
    ),
    "kws-unseen": Results(
        "models/kws_dscnn.py:kws_dscnn",
        f"{ROOT}/benchmarks/fsdd_unseen_speaker.py:fsdd_unseen_speaker",
        KWS_ROWS,
        {**KWS_FLOAT, "epochs": 12},
        compared=KWS_COMPARED,
    ),
    "resnet20": Results(
        "models/resnet20.py:resnet20",
        f"{ROOT}/benchmarks/cifar10_mixed.py:lossless_test",
        rows=(
            Row(
                "ecq-ternary",
                {**TERNARY, "entropy_weight": 0.16, "entropy_ramp": 0.53, "epochs": 5},
            ),
            Row(
                "ecq-ternary-small",
                {**TERNARY, "entropy_weight": 0.2, "entropy_ramp": 0.53, "epochs": 3},
            ),
            Row(
                "ecq-ternary-long",
                {**TERNARY, "entropy_weight": 0.19, "entropy_ramp": 0.5, "epochs": 11},
            ),
            Row(
                "ecq-ternary-longer",
                {**TERNARY, "entropy_weight": 0.19, "entropy_ramp": 0.5, "epochs": 24},
            ),
            Row(
                "ecq-ends-4bit",
                {
                    **TERNARY,
                    "bits": ENDS_4BIT,
                    "entropy_weight": 0.18,
                    "entropy_ramp": 0.5,
                    "epochs": 11,
                },
            ),
            *(
                Row(
                    name,
                    {**TERNARY_AFTER, "entropy_weight": weight, **relevance},
                    after="ecq-ternary-longer",
                )
                for name, weight, relevance in (
                    ("ecqx-after-025", 0.25, TO_THE_END),
                    ("ecqx-narrow-025", 0.25, {**TO_THE_END, "keep": 0.01, "prune": 0.01}),
                    ("ecqx-rest-025", 0.25, {"relevance": "epsilon_plus_flat"}),
                    ("ecq-after-020", 0.20, {}),
                    ("ecq-after-030", 0.30, {}),
                    ("ecq-after-060", 0.60, {}),
                )
            ),
            Row(
                "ecq-ternary-sparser",
                {**TERNARY_AFTER, "entropy_weight": 0.3, "entropy_ramp": 0.5},
                after="ecq-ternary-long",
            ),
            Row(
                "ecq-ternary-rest",
                {**TERNARY, "entropy_weight": 0.19, "epochs": 3, "learning_rate": 3e-4},
                after="ecq-ternary-long",
                data=f"{ROOT}/benchmarks/cifar10_mixed.py:lossless_thrice",
            ),
            Row(
                "ecq-ternary-48kb",
                {**TERNARY, "entropy_weight": 0.28, "entropy_ramp": 0.3, "epochs": 10},
                after="ecq-ternary-long",
                data=f"{ROOT}/benchmarks/cifar10_mixed.py:lossless_thrice",
            ),
        ),
        start={
            **{
                "weights": f"{SHARED_DATA}/checkpoints/resnet20_cifar10_fp32.pt",
                "epochs": 2,
                "rate": 1e-3,
                "bfloat16": BFLOAT16,
            },
            "augment": "crop_and_flip",
        },
        tests={"jpeg": f"{ROOT}/benchmarks/cifar10_mixed.py:jpeg_test"},
        compared=dict.fromkeys(
            ("ecqx-after-025", "ecqx-narrow-025", "ecqx-rest-025"),
            ("ecq-after-020", "ecq-after-030", "ecq-after-060"),
        ),
    ),
    "resnet20-public": Results(
        "models/resnet20.py:resnet20",
        f"{ROOT}/benchmarks/cifar10_mixed.py:lossless_thrice",
        rows=(
            Row(
                "ecq-ends-4bit",
                {**TERNARY, "bits": ENDS_4BIT, "entropy_weight": 0.21, **FROM_PUBLIC},
            ),
            *(
                Row(name, {**TERNARY, "bits": LAYER1_4BIT, "entropy_weight": γ, **FROM_PUBLIC})
                for name, γ in (("ecq-layer1-4bit", 0.21), ("ecq-layer1-4bit-030", 0.3))
            ),
        ),
        start=f"{SHARED_DATA}/checkpoints/resnet20_cifar10_fp32.pt",
        tests={"jpeg": f"{ROOT}/benchmarks/cifar10_mixed.py:jpeg_test"},
    ),
    "resnet20-lossless": Results(
        "models/resnet20.py:resnet20",
        f"{ROOT}/benchmarks/cifar10_mixed.py:lossless_thrice",
        rows=(
            Row(
                "ecq-ternary-016",
                {**TERNARY, "entropy_weight": 0.16, "entropy_ramp": 0.5, "epochs": 12},
            ),
        ),
        start={
            **{
                "weights": f"{SHARED_DATA}/checkpoints/resnet20_cifar10_fp32.pt",
                "epochs": 8,
                "rate": 1e-3,
                "bfloat16": BFLOAT16,
            },
            "augment": "crop_and_flip",
        },
        tests={"jpeg": f"{ROOT}/benchmarks/cifar10_mixed.py:jpeg_test"},
    ),
}


def prepare_float_weights(name: str, table: Results, seed: int) -> Path:
    """The float network that the runs of this seed start from."""
    if isinstance(table.start, str):
        return Path(table.start)
    path = RUNS / f"{name}-float-{seed}.pt"
    if not path.exists():
        torch.manual_seed(seed)
        loaded = load_factory(str(ROOT / table.model))
        if "weights" in table.start:
            apply_state(loaded.model, load_state(table.start["weights"]), table.start["weights"])
        options = {"rate": 2e-3, "decay": 1e-2, "augment": None, "bfloat16": False} | dict(
            table.start
        )
        options.pop("weights", None)
        model = loaded.model.to(memory_format=torch.channels_last)
        train_float(
            model,
            load_dataset(table.data, preprocessing=loaded.preprocessing).training,
            seed=seed,
            **options,
        )
        torch.save(model.state_dict(), path)
    return path


def save_quantized_weights(name: str, row: str, seed: int) -> Path:
    """What another row ended with, as a state dict of floats."""
    checkpoint = ecqx_onnx.load(RUNS / f"{name}-{row}-{seed}.pt")
    path = RUNS / f"{name}-{row}-{seed}-weights.pt"
    torch.save(
        dict(checkpoint.state)
        | {t.name: torch.from_numpy(t.dequantize()) for t in checkpoint.tensors},
        path,
    )
    return path


def train_row(name: str, table: Results, row: Row, seed: int) -> None:
    """Train, and write what came out to runs/."""
    result_file = RUNS / f"{name}-{row.name}-{seed}.json"
    if result_file.exists():
        return
    checkpoint, start = result_file.with_suffix(".pt"), time.perf_counter()
    made = api.quantize(
        str(ROOT / table.model),
        data=row.data or table.data,
        weights=save_quantized_weights(name, row.after, seed)
        if row.after
        else prepare_float_weights(name, table, seed),
        out=checkpoint,
        seed=seed,
        force=True,
        resume=True,
        validation=0.0,
        progress=_make_printer(f"{name} {row.name} seed {seed}"),
        **row.options,
    )
    accuracies = {"test": (made.before.share, made.after.share)}
    if row.after:  # the float network is not what this run started from
        accuracies["test"] = _measure_accuracies(name, table, seed, checkpoint, table.data)
    for test, data in table.tests.items():
        accuracies[test] = _measure_accuracies(name, table, seed, checkpoint, data)
    floats = _count_float_parameters(table, made.tensors)
    entropy = sum(tensor.entropy * tensor.size for tensor in made.tensors) / 8
    result = {
        "float": {test: before for test, (before, _) in accuracies.items()},
        "accuracy": {test: after for test, (_, after) in accuracies.items()},
        "zeros": made.zeros,
        "bits_per_weight": made.bits_per_weight,
        "layers": {
            t.name: {"zeros": t.zeros, "entropy_bytes": t.entropy * t.size / 8, "size": t.size}
            for t in made.tensors
        },
        "entropy_bytes": entropy + 4 * floats,
        "float_bytes": 4 * (floats + sum(tensor.size for tensor in made.tensors)),
        "seconds": time.perf_counter() - start,
        "history": [record.accuracy for record in made.history],
    }
    result_file.write_text(json.dumps(result, indent=1))


def _make_printer(title: str) -> Any:
    shown = -1

    def show(done: int, total: int, text: str) -> None:
        nonlocal shown
        if done * 10 // total > shown or done == total:
            shown = done * 10 // total
            print(f"{title}: {text}", flush=True)

    return show


def _measure_accuracies(
    name: str, table: Results, seed: int, checkpoint: Path, data: str
) -> tuple[float, float]:
    """(float, quantised) on another test set."""
    loaded = load_factory(str(ROOT / table.model))
    weights = prepare_float_weights(name, table, seed)
    apply_state(loaded.model, load_state(weights), weights)
    split = load_dataset(data, preprocessing=loaded.preprocessing).test
    return api.accuracy(loaded.model, split).share, api.accuracy(
        api.as_checkpoint(checkpoint).module(), split
    ).share


def _count_float_parameters(table: Results, tensors: Any) -> int:
    names = {tensor.name for tensor in tensors}
    model = load_factory(str(ROOT / table.model)).model
    return sum(
        parameter.numel() for name, parameter in model.named_parameters() if name not in names
    )


def measure_onnx_bytes(path: Path, **options: Any) -> int:
    """Bytes of the .onnx file, written beside the checkpoint."""
    out = path.with_name(path.stem + "".join(f"-{value}" for value in options.values()) + ".onnx")
    if not out.exists() or out.stat().st_mtime < path.stat().st_mtime:
        api.convert(path, out, force=True, **options)
    return out.stat().st_size


def compute_differences(
    name: str, table: Results, row: str, others: tuple[str, ...], axis: str, test: str
) -> list[float]:
    """Points of accuracy on `test` by which `row` lies above the others' curve where axis has its
    value, seed by seed."""

    def load_point(row: str, seed: int) -> dict[str, float]:
        result = json.loads((RUNS / f"{name}-{row}-{seed}.json").read_text())
        return {"accuracy": 100 * result["accuracy"][test], axis: result[axis]}

    found = []
    for seed in table.seeds:
        if all((RUNS / f"{name}-{each}-{seed}.json").exists() for each in (row, *others)):
            own = load_point(row, seed)
            there = interpolate_accuracy(
                [load_point(other, seed) for other in others], axis, own[axis]
            )
            found += [] if there is None else [own["accuracy"] - there]
    return found


def show_compared(name: str, table: Results, console: Console) -> None:
    printed = Table(title="Paired differences in points of accuracy, mean ± 95 %")
    for heading in (
        "recipe",
        "against",
        "test",
        "seeds",
        "at equal zeros",
        "seeds",
        "at equal entropy bytes",
    ):
        printed.add_column(heading, justify="right")
    for row, others in table.compared.items():
        for test in ("test", *table.tests):
            by_axis = (
                compute_differences(name, table, row, others, axis, test)
                for axis in ("zeros", "entropy_bytes")
            )
            columns = [
                text
                for found in by_axis
                for text in (
                    str(len(found)),
                    format_interval(found) if found else "outside the curve",
                )
            ]
            printed.add_row(row, ", ".join(others), test, *columns)
    console.print(printed)


def show(name: str, table: Results, console: Console) -> None:
    tests = ("test", *table.tests)
    printed = Table(title=f"{name}: {table.model}, {table.data}")
    columns = (
        "recipe",
        "seeds",
        "zeros, %",
        "entropy + float32 rest, bytes",
        "smaller",
        ".onnx, bytes",
        "smaller",
    )
    for heading in (
        *columns,
        "with float16",
        "smaller",
        *(f"{t}: float, %" for t in tests),
        *(f"{t}, %" for t in tests),
        "lost",
    ):
        printed.add_column(heading, justify="right")
    for row in table.rows:
        files = [RUNS / f"{name}-{row.name}-{seed}.json" for seed in table.seeds]
        results = [json.loads(file.read_text()) for file in files if file.exists()]
        if not results:
            continue
        made = [file.with_suffix(".pt") for file in files if file.exists()]

        def mean(key: str, results: list[dict[str, Any]] = results) -> float:
            return sum(result[key] for result in results) / len(results)

        onnx, half = (
            sum(measure_onnx_bytes(path, floats=floats) for path in made) / len(made)
            for floats in ("float32", "float16")
        )
        printed.add_row(
            *(
                row.name,
                str(len(results)),
                format_interval([100 * r["zeros"] for r in results]),
                f"{mean('entropy_bytes'):.0f}",
            ),
            *(
                f"{mean('float_bytes') / mean('entropy_bytes'):.1f}x",
                f"{onnx:.0f}",
                f"{mean('float_bytes') / onnx:.1f}x",
            ),
            *(f"{half:.0f}", f"{mean('float_bytes') / half:.1f}x"),
            *(format_interval([100 * r["float"][test] for r in results]) for test in tests),
            *(format_interval([100 * r["accuracy"][test] for r in results]) for test in tests),
            format_interval([100 * (r["float"]["test"] - r["accuracy"]["test"]) for r in results]),
        )
    console.print(printed)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("--only", help="a row's name, or `print`")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of one training; with 1, several can run side by side",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    RUNS.mkdir(exist_ok=True)
    table = TABLES[arguments.table]
    for seed in arguments.seeds or table.seeds:
        for row in table.rows:
            if arguments.only in (None, row.name):
                train_row(arguments.table, table, row, seed)
    show(arguments.table, table, Console(width=200))
    if table.compared:
        show_compared(arguments.table, table, Console(width=200))


if __name__ == "__main__":
    main()
