"""MiniLM-L6 compressed by `compress` and by others, one table: bytes, cosine, load, latency.

sentence_peers.py ours minilm.onnx sentences.npz --draws 3     rates of one draw share statistics
sentence_peers.py peers minilm.onnx sentences.npz              onnxruntime's quantizers

The last 160 sentences are held out; of the others each draw takes 512: 448 for statistics, 64 for
the search. The cosine is that of the pooled, normalized embeddings to the float model's.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from ecqx_onnx.compression.encoding import FileOptions
from ecqx_onnx.compression.model.biases import with_biases
from ecqx_onnx.compression.model.float_model import load_float_model
from ecqx_onnx.compression.model.weights import find_weights
from ecqx_onnx.compression.rounding.ordered import Layers
from ecqx_onnx.compression.search.bounds import make_bounds
from ecqx_onnx.compression.search.points import PointMaker
from ecqx_onnx.compression.search.samples import InputSpec, Samples, load_samples
from ecqx_onnx.compression.search.search import search
from ecqx_onnx.delivery.delivery import deliver
from ecqx_onnx.runtime.runner import Runner

HELD_OUT, USED, SEARCHED, BATCH = 160, 512, 64, 32
RATES = (2.45, 2.8, 3.6)


def measure_file(path: Path, feeds: list[dict[str, np.ndarray]], expected: np.ndarray) -> str:
    """Cosine, load and latency of a file, one thread."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 4
    start = time.process_time()
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    load = time.process_time() - start
    found = np.concatenate([session.run(None, batch)[0] for batch in feeds])
    times = []
    for _ in range(3):
        start = time.process_time()
        session.run(None, feeds[0])
        times.append(time.process_time() - start)
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1)
    nearest = (nearest_of(found) == nearest_of(expected)).mean()
    return (
        f"{path.stat().st_size:,} bytes, cosine {cosines.mean():.4f}, same nearest sentence"
        f" {100 * nearest:.0f} %, load {load:.2f} s, latency of {BATCH} {1e3 * min(times):.0f} ms"
    )


def nearest_of(vectors: np.ndarray) -> np.ndarray:
    """Which other sentence each one is nearest to."""
    likeness = vectors @ vectors.T / np.linalg.norm(vectors, axis=1)
    np.fill_diagonal(likeness, -np.inf)
    return likeness.argmax(1)


def held_out(samples: Samples) -> list[dict[str, np.ndarray]]:
    """The last sentences, in batches."""
    last = samples.pick(np.arange(len(samples) - HELD_OUT, len(samples)))
    return [dict(batch) for batch in last.feeds(BATCH)]


def measure_ours(model: Path, data: str, draws: int, folder: Path) -> None:
    """Three rates of each draw."""
    graph = load_float_model(model).graph
    weights, _ = find_weights(graph)
    graph, biases = with_biases(graph, weights)
    layers = Layers(graph, weights, biases)
    runner = Runner(graph)
    samples = load_samples(data, [InputSpec.of(node) for node in runner.inputs])
    feeds = held_out(samples)
    expected = np.concatenate([runner.run(batch)[0] for batch in feeds])
    del runner
    for draw in range(draws):
        start = time.process_time()
        order = np.random.RandomState(draw).permutation(len(samples) - HELD_OUT)[:USED]
        options = FileOptions(floats="float16")
        maker = PointMaker(
            layers,
            samples.pick(np.sort(order[SEARCHED:])),
            samples.pick(np.sort(order[:SEARCHED])),
            batch=BATCH,
            classes=None,
            options=options,
            metadata={},
            threads=1,
            say=lambda text: None,
        )
        maker.measure()
        print(f"draw {draw}: statistics {time.process_time() - start:.0f} CPU s", flush=True)
        for rate in RATES:
            start = time.process_time()
            bounds = make_bounds(max_bytes=int(rate * maker.entries / 8))  # of the whole file
            found = search(maker.make, bounds, entries=maker.entries)
            made = found.chosen
            seconds = time.process_time() - start
            path = folder / "ours.onnx"
            deliver(made.encoded.plan, path, metadata={}, force=True)
            whole = 8 * path.stat().st_size / maker.entries
            bits = f"{made.point.bits_per_weight:.3f} coded, {whole:.3f} file bits a weight"
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            line = measure_file(path, feeds, expected)
            print(
                f"draw {draw}, {rate}: {bits}, {line}, {seconds:.0f} CPU s, peak {peak} MB",
                flush=True,
            )


def measure_peers(model: Path, data: str, folder: Path, only_gptq: bool) -> None:
    """quantize_dynamic, and MatMulNBits of 4 bits in blocks of 32."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    runner = Runner(load_float_model(model).graph)
    samples = load_samples(data, [InputSpec.of(node) for node in runner.inputs])
    feeds = held_out(samples)
    expected = np.concatenate([runner.run(batch)[0] for batch in feeds])
    path = folder / "peer.onnx"
    measure_gptq(model, samples, feeds, expected, path)
    if only_gptq:
        return
    print("float:", measure_file(model, feeds, expected), flush=True)
    for per_channel in (False, True):
        start = time.process_time()
        quantize_dynamic(model, path, per_channel=per_channel, weight_type=QuantType.QInt8)
        seconds = time.process_time() - start
        line = measure_file(path, feeds, expected)
        print(f"quantize_dynamic int8, per_channel={per_channel}: {line}, {seconds:.0f} CPU s")
    kinds = {"nearest": DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True)}
    kinds["nearest, Gather too"] = DefaultWeightOnlyQuantConfig(
        block_size=32, is_symmetric=True, op_types_to_quantize=("MatMul", "Gather")
    )
    for name, config in kinds.items():
        start = time.process_time()
        quantizer = MatMulNBitsQuantizer(onnx.load(model), algo_config=config)
        quantizer.process()
        quantizer.model.save_model_to_file(str(path), False)
        seconds = time.process_time() - start
        line = measure_file(path, feeds, expected)
        print(f"MatMulNBits 4 bits, block 32, {name}: {line}, {seconds:.0f} CPU s", flush=True)


def measure_gptq(
    model: Path,
    samples: Samples,
    feeds: list[dict[str, np.ndarray]],
    expected: np.ndarray,
    path: Path,
) -> None:
    """onnxruntime's GPTQ in blocks of 32, on 64 sentences."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        GPTQWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    # Its reader is copied and read by `for`: a list does, a CalibrationDataReader does not.
    sentences = [dict(batch) for batch in samples.take(64).feeds(1)]
    start = time.process_time()
    try:
        config = GPTQWeightOnlyQuantConfig(calibration_data_reader=sentences)  # type: ignore
        quantizer = MatMulNBitsQuantizer(
            onnx.load(model), block_size=32, is_symmetric=True, algo_config=config
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(path), False)
    except Exception as error:  # whatever it raises
        print(f"GPTQ: does not run here ({type(error).__name__}: {error})")
        return
    seconds = time.process_time() - start
    print(f"MatMulNBits GPTQ: {measure_file(path, feeds, expected)}, {seconds:.0f} CPU s")


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("ours", "peers", "gptq"))
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("--draws", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if arguments.kind == "ours":
            measure_ours(arguments.model, arguments.data, arguments.draws, Path(place))
        else:
            measure_peers(arguments.model, arguments.data, Path(place), arguments.kind == "gptq")


if __name__ == "__main__":
    main()
