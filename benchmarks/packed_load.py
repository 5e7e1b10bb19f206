"""What does loading a packed file cost, against the float model? Load time and peak memory.

Each in a fresh process. Weights: 4-bit levels at 0.94 bit a weight (80 % forced zeros), as 20 conv
layers and as one tensor. Times are the least of five processes; of peaks the least and the largest,
and both over the float model's least.
Run: python benchmarks/packed_load.py [million weights] [another Python, with its onnxruntime]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from ecqx_onnx_converters.storage import DOMAIN
from ecqx_onnx_converters.storage.packed import encode_all
from ecqx_onnx_converters.targets import find_target
from onnx import TensorProto, helper, numpy_helper

LOAD = """
import json, sys, time
import onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
begin, cpu = time.perf_counter(), time.process_time()
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        peak = int(line.split()[1]) / 1024
print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak}))
"""


def make_levels(shape: tuple[int, ...], seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    w = np.clip(np.round(generator.laplace(size=shape) * 1.4), -7, 7)
    return (w * (generator.random(shape) < 0.2)).astype(np.int8)


def make_network(weights: list[np.ndarray], *, packed: bool) -> onnx.ModelProto:
    """Each weight feeds a convolution of its own over a one-pixel image."""
    initializers = [numpy_helper.from_array(np.float32(0.02), "step")]
    made, protos, x = [], [], "x"
    if packed:
        stored = encode_all(
            [(f"q{i}", w) for i, w in enumerate(weights)], find_target("onnxruntime")
        )
        for one in stored:
            made += one.nodes
            initializers += one.initializers
        protos = list(stored[0].functions)
    for i, w in enumerate(weights):
        if packed:
            made.append(helper.make_node("Cast", [f"q{i}"], [f"f{i}"], to=TensorProto.FLOAT))
            made.append(helper.make_node("Mul", [f"f{i}", "step"], [f"w{i}"]))
        else:
            initializers.append(
                numpy_helper.from_array(w.astype(np.float32) * np.float32(0.02), f"w{i}")
            )
        made.append(helper.make_node("Conv", [x, f"w{i}"], [f"x{i}"], pads=[1, 1, 1, 1]))
        x = f"x{i}"
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, weights[0].shape[1], 4, 4])
    graph = helper.make_graph(
        made, "g", [image], [helper.make_empty_tensor_value_info(x)], initializers
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, functions=protos, opset_imports=imports, ir_version=8)


RUNS = 5


def measure(model: onnx.ModelProto, folder: Path, python: str) -> dict[str, float]:
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    command = [python, "-c", LOAD, str(path)]
    runs = [
        json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        for _ in range(RUNS)
    ]
    least = {key: min(run[key] for run in runs) for key in runs[0]}
    return {"file": path.stat().st_size / 1e6, "largest": max(run["peak"] for run in runs)} | least


def main() -> None:
    million = float(sys.argv[1]) if len(sys.argv) > 1 else 10
    python = sys.argv[2] if len(sys.argv) > 2 else sys.executable
    side = int((million * 1e6 / 20 / 9) ** 0.5) // 16 * 16  # whole NCHWc blocks
    nets = {"20 layers": [make_levels((side, side, 3, 3), i) for i in range(20)]}
    side = int((million * 1e6 / 9) ** 0.5) // 16 * 16
    nets["one tensor"] = [make_levels((side, side, 3, 3), 0)]
    heads = f"{'MB':>8s}{'load s':>8s}{'cpu s':>8s}{'peak MB':>11s}"
    print(f"{'':24s}{heads}{'x float':>12s}{'M weights/s':>13s}")
    with tempfile.TemporaryDirectory() as folder:
        for name, weights in nets.items():
            plain = measure(make_network(weights, packed=False), Path(folder), python)
            tight = measure(make_network(weights, packed=True), Path(folder), python)
            speed = sum(w.size for w in weights) / 1e6 / max(1e-9, tight["cpu"] - plain["cpu"])
            ratios = f"{tight['peak'] / plain['peak']:.2f}-{tight['largest'] / plain['peak']:.2f}"
            for kind, row, last in (
                ("float", plain, ""),
                ("packed", tight, f"{ratios:>12s}{speed:13.1f}"),
            ):
                peaks = f"{row['peak']:.0f}-{row['largest']:.0f}"
                times = f"{row['wall']:8.2f}{row['cpu']:8.2f}"
                print(f"{name + ', ' + kind:24s}{row['file']:8.2f}{times}{peaks:>11s}{last}")


if __name__ == "__main__":
    main()
