"""What does `pack` make of files that people really have? Bytes, time, memory, and outputs.

Each file: bytes as it is, packed, and of both under zip, xz and brotli; load in fresh processes,
one thread (least of three; peak over that of a bare process); latency of both in turns in one
process; outputs compared bit by bit at two levels of optimization. And the encoder's speed against
an earlier commit's.
Run: make bench-pack    (python benchmarks/pack.py [--write] [--only WORD] [--skip WORD])
"""

from __future__ import annotations

import json
import lzma
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from pack_models import CACHE, fetch_files, make_models
from shared import ROOT, describe_run, make_parser, name_results

from ecqx_onnx.verbs.pack import pack

EARLIER = "cb0f082"
PROCESSES = 3
SLOW_ABOVE = 8_000_000  # bytes; brotli's highest quality takes minutes there
RUN = """
import json, resource, sys, time
import numpy, onnxruntime
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
bare = peak()
begin = time.process_time()
onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(json.dumps({"cpu": time.process_time() - begin, "peak": peak() - bare}))
"""
SPEED = """
import sys, time
import numpy as np
sys.path.insert(0, sys.argv[1])
from ecqx_onnx_converters.storage.packed import pack_all
generator = np.random.default_rng(0)
tensors = []
for spread in (0.7, 2.0, 20.0):
    drawn = np.rint(generator.laplace(size=(1000, 1000), scale=spread))
    tensors.append(np.clip(drawn, -122, 122).astype(np.int8))
pack_all([tensors[0][:100]])
begin = time.process_time()
pack_all(tensors)
print(time.process_time() - begin)
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One file. Sizes in bytes, cpu in seconds, peaks in bytes over a bare process; None: not
    measured. identical: at no optimization and at all; latency: packed over original."""

    source: str
    name: str
    original: int
    packed: int
    zipped: int
    xz: int
    brotli: int | None
    brotli_packed: int | None
    cpu: tuple[float, float]
    peaks: tuple[int, int]
    latency: float | None
    identical: str
    reason: str
    integers: bool


def measure(source: str, path: Path, folder: Path) -> Row:
    """Pack a file, and measure it before and after."""
    out = folder / "packed.onnx"
    report = pack(path, out, force=True)
    before = path.read_bytes()
    after = out.read_bytes()
    loads = [[_load(file) for _ in range(PROCESSES)] for file in (path, out)]
    latency, identical = None, "not run"
    if report.equivalence is not None and report.equivalence.original_first:
        latency, identical = _compare(path, out, report.equivalence.original_first)
    elif report.written is None:
        latency, identical = 1.0, "same file"
    return Row(
        source=source,
        name=path.name,
        original=len(before),
        packed=len(after),
        zipped=len(zlib.compress(before, 9)),
        xz=len(lzma.compress(before, preset=6)),
        brotli=_count_brotli(before),
        brotli_packed=_count_brotli(after),
        cpu=tuple(min(load["cpu"] for load in own) for own in loads),
        peaks=tuple(min(load["peak"] for load in own) for own in loads),
        latency=latency,
        identical=identical,
        reason=report.reason,
        integers=_holds_integers(path),
    )


def _load(path: Path) -> dict[str, float]:
    command = [sys.executable, "-c", RUN, str(path)]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def _count_brotli(content: bytes) -> int | None:
    try:
        import brotli
    except ImportError:
        return None
    return len(brotli.compress(content, quality=11 if len(content) < SLOW_ABOVE else 9))


def _holds_integers(path: Path) -> bool:
    """Whether most of the file's bytes are 8-bit or narrower integers."""
    import onnx

    narrow = 0
    for tensor in onnx.load(path).graph.initializer:
        if onnx.TensorProto.DataType.Name(tensor.data_type) in NARROW:
            narrow += tensor.ByteSize()
    return narrow > path.stat().st_size / 2


NARROW = ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2")


def _compare(one: Path, other: Path, inputs: tuple[np.ndarray, ...]) -> tuple[float, str]:
    """Latency of the other over the one's, and how alike their outputs are."""
    import onnxruntime

    def open_session(path: Path, level: str) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    said = []
    latency = 1.0
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        sessions = [open_session(path, level) for path in (one, other)]
        named = {value.name: x for value, x in zip(sessions[0].get_inputs(), inputs, strict=False)}
        feeds = [
            {value.name: named[value.name] for value in session.get_inputs()}
            for session in sessions
        ]
        pairs = [session.run(None, feed) for session, feed in zip(sessions, feeds, strict=True)]
        differences = []
        for before, after in zip(*pairs, strict=True):
            if not np.array_equal(before, after, equal_nan=before.dtype.kind == "f"):
                gap = np.abs(np.subtract(after, before, dtype=np.float64)).max()
                differences.append(gap / max(np.abs(before).max(), 1e-30))
        said.append(f"{max(differences):.0e}" if differences else "yes")
        if level == "ORT_ENABLE_ALL":
            latency = _time_in_turns(sessions, feeds)
    return latency, ", ".join(said)


def _time_in_turns(sessions: list, feeds: list) -> float:
    """The second session's time over the first one's: the median of many pairs."""
    ratios = []
    end = time.perf_counter() + 3.0
    while time.perf_counter() < end or len(ratios) < 9:
        times = []
        for session, feed in zip(sessions, feeds, strict=True):
            begin = time.process_time()
            for _ in range(3):
                session.run(None, feed)
            times.append(time.process_time() - begin)
        ratios.append(times[1] / max(times[0], 1e-9))
    return statistics.median(ratios)


def measure_speed(commit: str) -> list[float]:
    """CPU seconds of an earlier encoder over today's, on the same levels, five times in turns."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["git", "archive", commit, "converters", "ecqx_onnx"]
        content = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=BytesIO(content)) as archive:
            archive.extractall(folder, filter="data")
        ratios = []
        for _ in range(5):
            seconds = []
            for root in (Path(folder), ROOT):
                code = [sys.executable, "-c", SPEED, str(root / "converters")]
                paths = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
                made = subprocess.run(code, capture_output=True, check=True, env=paths)
                seconds.append(float(made.stdout))
            ratios.append(seconds[0] / seconds[1])
        return sorted(ratios)


def _say(value: float | None, form: str = ",") -> str:
    return "-" if value is None else format(value, form)


def list_lines(rows: list[Row]) -> list[str]:
    """The table, and what it says of all files of integers together."""
    lines = [
        "| file | original | packed | packed / original | zip | xz | brotli | packed, brotli |"
        " packed / brotli | packed, brotli / brotli | load s | peak MB | latency | identical |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        wire = None if row.brotli is None else row.packed / row.brotli
        both = None if row.brotli is None else (row.brotli_packed or 0) / row.brotli
        lines.append(
            f"| {row.source}: {row.name} | {row.original:,} | {row.packed:,}"
            f" | {row.packed / row.original:.3f} | {row.zipped:,} | {row.xz:,}"
            f" | {_say(row.brotli)} | {_say(row.brotli_packed)} | {_say(wire, '.3f')}"
            f" | {_say(both, '.3f')} | {row.cpu[0]:.2f} -> {row.cpu[1]:.2f}"
            f" | {row.peaks[0] / 1e6:.0f} -> {row.peaks[1] / 1e6:.0f}"
            f" | {_say(row.latency, '.3f')} | {row.identical} |"
        )
    integers = [row for row in rows if row.integers]
    original = sum(row.original for row in integers)
    packed = sum(row.packed for row in integers)
    lines += ["", f"{len(integers)} files of integers together: {packed / original:.3f}."]
    wires = [row.packed / row.brotli for row in integers if row.brotli]
    boths = [row.brotli_packed / row.brotli for row in integers if row.brotli and row.brotli_packed]
    if wires:
        lines[-1] += (
            f" In the median packed / brotli {statistics.median(wires):.3f}, packed and brotli"
            f" / brotli {statistics.median(boths):.3f}."
        )
    latencies = [row.latency for row in integers if row.latency is not None]
    lines[-1] += f" Latency {min(latencies):.2f} to {max(latencies):.2f}."
    copied = [row for row in rows if row.reason]
    if copied:
        lines += ["", "Copied unchanged:", ""]
        lines += [f"- {row.name}: {row.reason}" for row in copied]
    return lines


def main() -> None:
    """All of it, row by row."""
    parser = make_parser(__doc__)
    parser.add_argument("--write", action="store_true", help="into benchmarks/results/DATE-pack.md")
    parser.add_argument("--only", default="", help="files whose package or name has this in it")
    parser.add_argument("--skip", help="files whose package or name has this in it are left out")
    parser.add_argument("--speed", default=EARLIER, help="commit of the encoder to compare with")
    arguments = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = [*fetch_files(), *make_models(folder)]
        for source, path in files:
            name = f"{source} {path.name}"
            skipped = arguments.skip is not None and arguments.skip in name
            if arguments.only in name and not skipped:
                rows.append(measure(source, path, folder))
                print(rows[-1], flush=True)
    ratios = measure_speed(arguments.speed)
    lines = list_lines(rows)
    lines += [
        "",
        f"Encoding: {statistics.median(ratios):.2f} times the speed of commit {arguments.speed}'s"
        f" encoder ({ratios[0]:.2f} to {ratios[-1]:.2f} in five turns), 3 million weights.",
    ]
    text = "\n".join(lines)
    print(text)
    if arguments.write:
        title = f"# Pack: files that people have\n\n{describe_run('make bench-pack')}\n\n{HEAD}\n\n"
        name_results("pack").write_text(title + text + "\n", encoding="utf-8")


HEAD = f"""Packages by name from pip and npm, into `{CACHE.name}` in the cache;
models that onnxruntime's quantizers make in the run. Bytes; load: CPU seconds, least of three fresh
processes; peak over a bare process; latency: packed over original, median of pairs in turns, all
optimizations; identical: outputs bit by bit without optimizations, and with all (else the largest
difference over the largest output). Brotli at quality 11, 9 from 8 MB on. Zip is deflate at 9."""

if __name__ == "__main__":
    main()
