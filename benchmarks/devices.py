"""The same files on several devices: accuracy, agreement, time and memory, side by side.

    python benchmarks/devices.py ../shared/data         # everything: results/DATE-devices.md
    python benchmarks/devices.py ../shared/data --network kws --variant int8 --device web

What was measured is kept under --kept, by the file's checksum and the device, and not measured
again; --fresh does it anew, --again keeps the run with the shorter latency, for machines that do
other things as well. ResNet-20 takes about 10 minutes a file under emulation, so that everything
from scratch takes about 45 minutes.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared import ROOT, describe_run, make_parser, name_results

from ecqx_onnx import api
from ecqx_onnx.validation.devices.job import compute_sha256
from ecqx_onnx.validation.outputs.metrics import Proportion

TIME_LIMIT = 7200.0  # seconds; emulation is slow, and slower on a busy machine
DEVICES = ("local", "web", "arm64")


@dataclass(frozen=True)
class Network:
    """checkpoint, data: `{data}` stands for the folder of data sets. what: of which images or
    sounds the rows speak.

    rounded: float weights which, rounded to 5 bits, take the checkpoint's place for integer
    kernels, as those take no codebook.
    """

    title: str
    what: str
    checkpoint: str
    data: str
    factory: str | None = None
    rounded: str | None = None


NETWORKS = {
    "lenet5": Network(
        "LeNet-5",
        "MNIST, 10 000 test images",
        f"{ROOT}/models/lenet5_mnist_4bit.pt",
        "{data}/mnist.npz",
    ),
    "resnet20": Network(
        "ResNet-20",
        (
            "CIFAR-10, 1017 of the official test images; ternary by EC2T, for int8 the float "
            "network rounded to 5 bits"
        ),
        "{data}/checkpoints/resnet20_cifar10_ec2t_ternary64.pt",
        "{data}/cifar10_lossless_part.npz",
        f"{ROOT}/models/resnet20.py:resnet20",
        "{data}/checkpoints/resnet20_cifar10_fp32.pt",
    ),
    "kws": Network(
        "DS-CNN",
        "spoken digits (FSDD), 300 test clips",
        f"{ROOT}/models/kws_dscnn_fsdd_4bit.pt",
        "{data}/fsdd.npz",
    ),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"storage": "dense"},
    "packed": {"storage": "packed"},
    "int8": {"storage": "dense", "activations": "int8"},
}


@dataclass(frozen=True)
class Row:
    """What one device made of one file. report: as `validate --json` prints it."""

    network: str
    variant: str
    device: str
    report: dict[str, Any]

    @property
    def accuracy(self) -> Proportion:
        return Proportion(
            self.report["onnx_accuracy"]["hits"], self.report["onnx_accuracy"]["total"]
        )


def measure(
    network: str,
    variant: str,
    devices: Sequence[str],
    data: Path,
    kept: Path,
    *,
    fresh: bool,
    again: bool,
) -> list[Row]:
    """Converts, and runs on each device that has not been measured with this very file."""
    net, options = NETWORKS[network], dict(VARIANTS[variant])
    if "activations" in options:
        options["calibration"] = net.data.format(data=data)
    checkpoint: Any = net.checkpoint.format(data=data)
    if net.rounded and "activations" in options:
        checkpoint = api.as_checkpoint(net.rounded.format(data=data), factory=net.factory, bits=5)
    out = kept / f"{network}-{variant}.onnx"
    api.convert(checkpoint, out, factory=net.factory, force=True, **options)
    rows = []
    for device in devices:
        place = kept / f"{network}-{variant}-{device}-{compute_sha256(out)[:16]}.json"
        before = json.loads(place.read_text()) if place.exists() and not fresh else None
        if before is None or again:
            sides = {
                "against": checkpoint,
                "factory": net.factory,
                "data": net.data.format(data=data),
            }
            table = api.validate_on([device], out, **sides, time_limit=TIME_LIMIT)
            for trouble in table.troubles:
                raise SystemExit(trouble.sentence)
            found = table.to_json()[0]
            if before is None or found["latency_seconds"] < before["latency_seconds"]:
                place.write_text(json.dumps(found))
        rows.append(Row(network, variant, device, json.loads(place.read_text())))
        print(_format_cells(rows[-1]), flush=True)
    return rows


def format_markdown(rows: Sequence[Row]) -> str:
    heads = (
        "file",
        "bytes",
        "device",
        "accuracy (95 %)",
        "PyTorch's class",
        "largest difference",
        "load",
        "latency",
        "memory",
    )
    lines = []
    for name, net in NETWORKS.items():
        mine = [row for row in rows if row.network == name]
        if mine:
            lines += [
                f"## {net.title}: {net.what}",
                "",
                f"| {' | '.join(heads)} |",
                "|---" * len(heads) + "|",
            ]
            lines += [f"| {' | '.join(_format_cells(row))} |" for row in mine]
            lines += ["", *_judge_rows(mine), ""]
    return "\n".join(lines)


def _format_cells(row: Row) -> tuple[str, ...]:
    report, latency = row.report, row.report["latency_seconds"]
    same, memory = report["agreement"], report["peak_memory_bytes"]
    ratio = f"{report['latency_ratio']:.2f} x float" if latency else ""
    return (
        row.variant,
        f"{report['bytes']:,}".replace(",", " "),
        row.device,
        str(row.accuracy),
        f"{same['hits']} of {same['total']}",
        f"{report['largest_difference']:.1e}",
        f"{1e3 * report['load_seconds']:.1f} ms",
        ratio if row.device == "arm64" else f"{1e3 * latency:.3f} ms, {ratio}" if latency else "",
        f"{memory / 2**20:.1f} MiB" if memory else "",
    )


def _judge_rows(rows: Sequence[Row]) -> list[str]:
    """Weight-only files: every class is PyTorch's. Quantised activations: each device's accuracy in
    the interval of local's."""
    exact = [row for row in rows if row.variant != "int8"]
    lines = []
    if exact:
        good = all(row.report["ok"] and row.report["agreement"]["share"] == 1.0 for row in exact)
        lines.append(
            "Weight-only files: "
            f"{'every class is PyTorch’s on every device' if good else 'SOME CLASS DIFFERS'}."
        )
    home = next(
        (row.accuracy for row in rows if (row.variant, row.device) == ("int8", "local")), None
    )
    for row in (row for row in rows if row.variant == "int8" and row.device != "local" and home):
        low, high = home.interval
        inside = "within" if low <= row.accuracy.share <= high else "OUTSIDE"
        lines.append(
            f"int8 on {row.device}: {100 * row.accuracy.share:.2f} %, {inside} the interval of "
            f"local's ({home})."
        )
    return lines


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "data",
        type=Path,
        help="the folder with mnist.npz, cifar10_lossless_part.npz, fsdd.npz, checkpoints/",
    )
    parser.add_argument("--network", action="append", choices=list(NETWORKS))
    parser.add_argument("--variant", action="append", choices=list(VARIANTS))
    parser.add_argument("--device", action="append", help="as for `ecqx-onnx validate`")
    parser.add_argument(
        "--kws",
        type=Path,
        help="a trained checkpoint of the keyword spotter; by default the one in models/",
    )
    parser.add_argument("--kept", type=Path, default=ROOT / "build" / "devices")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument(
        "--out", type=Path, help="by default benchmarks/results/DATE-devices.md if whole"
    )
    arguments = parser.parse_args()
    arguments.kept.mkdir(parents=True, exist_ok=True)
    if arguments.kws:
        NETWORKS["kws"] = replace(NETWORKS["kws"], checkpoint=str(arguments.kws))
    rows: list[Row] = []
    for network in arguments.network or NETWORKS:
        for variant in arguments.variant or VARIANTS:
            devices = arguments.device or DEVICES
            more = {"fresh": arguments.fresh, "again": arguments.again}
            rows += measure(network, variant, devices, arguments.data, arguments.kept, **more)
    table = format_markdown(rows)
    print(table)
    whole = not (arguments.network or arguments.variant or arguments.device)
    out = arguments.out or (name_results("devices") if whole else None)
    if out:
        title = "# The same file on a computer, in a browser and on an emulated ARM board"
        run = describe_run("python benchmarks/devices.py ../shared/data")
        runtimes = _list_runtimes(rows)
        out.write_text(f"{title}\n\n{run}\n\n{HEAD}{runtimes}\n\n{table}", encoding="utf-8")


HEAD = """Each row is one run of `ecqx-onnx validate FILE
--against CHECKPOINT --data DATA --device DEVICE` over the whole test set. *PyTorch's class*:
samples to which both give the same class. Latency is one sample on one thread, the file and its
decoded float model (of int8: the float model) in turn, on a machine that did other things as well;
of several runs the one with the shortest latency is shown. Under emulation all times are the
emulator's. docs/devices.md says what is measured how.

"""


def _list_runtimes(rows: Sequence[Row]) -> str:
    runtimes = {row.device: row.report["runtime"] for row in rows}
    return (
        "\n".join(f"- {device}: {runtime}" for device, runtime in runtimes.items())
        + f"\n- host: {platform.machine()}"
    )


if __name__ == "__main__":
    main()
