"""What does a file cost at load, at sizes that people ship? Bytes, CPU seconds and megabytes.

Networks of random weights, rounded to Gaussian levels of at most 4 bits with a step for each
channel, loaded by onnxruntime on one thread in a fresh process. CPU seconds are the least of the
runs; of megabytes, each less those of the process before it, the median: the peak while loading,
what is kept, and what is left once `malloc_trim` has given the heap's free pages back.

    python benchmarks/load_memory.py                    ResNet-50 as float, dense and at 2 bits
    python benchmarks/load_memory.py --all              also MiniLM and ViT-B, and other rates
    python benchmarks/load_memory.py --python PYTHON    with another onnxruntime
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from ecqx_onnx_converters import FloatGraph, make_plan, write
from load_shapes import NETWORKS, Network
from shared import make_parser

LOAD = """
import ctypes, json, sys, time
import onnxruntime as ort

def read(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) / 1024

options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
before = read("VmRSS")
begin = time.process_time()
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
cpu = time.process_time() - begin
peak, kept = read("VmHWM"), read("VmRSS")
ctypes.CDLL(None).malloc_trim(0)
found = {"cpu": cpu, "peak": peak, "kept": kept, "trimmed": read("VmRSS")}
print(json.dumps({key: value - before * (key != "cpu") for key, value in found.items()}))
"""
# Steps of the grid in standard deviations of the weights, by the bits that a packed weight then
# takes.
STEPS = {"1.13": 2.3, "2.0": 1.16, "3.25": 0.475, "3.5": 0.395}
QUICK = (("resnet50", ("2.0", "1.13")),)
ALL = (
    ("resnet50", ("3.25", "2.0", "1.13")),
    ("minilm", ("3.5", "2.0")),
    ("vit", ("3.25", "2.0")),
)
HEADINGS = ("network", "weights", "MB", "b/w", "cpu s", "peak", "kept", "trimmed", "peak/float")
WIDTHS = (9, 28, 8, 6, 7, 7, 7, 8, 11)


def measure(path: Path, python: str, runs: int) -> Mapping[str, float]:
    """Load a file in processes of their own.

    Args:
        path: of the model.
        python: the interpreter, whose onnxruntime loads it.
        runs: how often.

    Returns:
        cpu in seconds, the least; peak, kept and trimmed in MiB, medians.
    """
    command = [python, "-c", LOAD, str(path)]
    found = []
    for _ in range(runs):
        done = subprocess.run(command, capture_output=True, check=True)
        found.append(json.loads(done.stdout))
    row = {key: statistics.median(one[key] for one in found) for key in found[0]}
    row["cpu"] = min(one["cpu"] for one in found)
    return row


def write_row(cells: Sequence[str]) -> None:
    """Print one line of the table.

    Args:
        cells: one for each heading.
    """
    print(" ".join(f"{cell:>{width}s}" for cell, width in zip(cells, WIDTHS, strict=True)))


def main() -> None:
    """Print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--all", action="store_true", help="all networks and rates: minutes")
    parser.add_argument("--only", choices=sorted(NETWORKS), help="one network")
    parser.add_argument("--python", default=sys.executable, help="an interpreter")
    parser.add_argument("--runs", type=int, default=3, help="processes for each file")
    options = parser.parse_args()
    write_row(HEADINGS)
    for name, rates in ALL if options.all or options.only else QUICK:
        if options.only not in (None, name):
            continue
        baseline: Mapping[str, float] = {}
        for rate in rates:
            network = Network(STEPS[rate])
            model = NETWORKS[name](network)
            size = sum(weight.tensor.size for weight in network.weights)
            kinds = ("packed",) if baseline else ("float", "dense", "packed")
            for kind in kinds:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "model.onnx"
                    if kind == "float":
                        onnx.save(model, path)
                    else:
                        graph = FloatGraph.from_model(model)
                        write(make_plan(graph, network.match(), storage=kind), path)
                    nbytes = path.stat().st_size
                    row = measure(path, options.python, options.runs)
                baseline = baseline or row
                label = {"float": "float", "dense": "INT4 dense"}.get(
                    kind, f"packed, for {rate} b/w"
                )
                write_row(
                    (
                        name,
                        f"{size / 1e6:.1f} M, {label}",
                        f"{nbytes / 1e6:.1f}",
                        f"{8 * nbytes / size:.2f}",
                        f"{row['cpu']:.2f}",
                        f"{row['peak']:.0f}",
                        f"{row['kept']:.0f}",
                        f"{row['trimmed']:.0f}",
                        f"{row['peak'] / baseline['peak']:.2f}",
                    )
                )


if __name__ == "__main__":
    main()
