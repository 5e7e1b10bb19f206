"""How many bytes do a network's integers take? Entropy, packed, NNCodec, xz and zip side by side.

Payload: packed arrays only. Decoder: what the file holds besides (functions, nodes, names), before
any float parameter. NNCodec, where installed: its own bitstream on the same integers, exact.
Run: make bench-size

`python benchmarks/packed_size.py whole`: files of the same networks as `convert` writes them,
against NNCodec's bitstream for the same integers plus the file's float parameters, steps included,
as they are; and the packed payload (stream, tree, tables) over entropy and NNCodec. The
LeNet-300-100s that are not synthetic are those of models/. With checkpoints as arguments (python
benchmarks/packed_size.py model.pt …): the same of these.
"""

import lzma
import math
import sys
import time
import zipfile
from collections.abc import Callable
from functools import partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from ecqx_onnx_converters.storage.packed import encode_all, pack_all
from ecqx_onnx_converters.storage.packed.reference_decoder import unpack_stream
from ecqx_onnx_converters.targets import find_target

DATA = Path(__file__).parents[1].parent / "shared" / "data" / "checkpoints"
MODELS = Path(__file__).parents[1] / "models"
TRAINED = {
    "LeNet-300-100, 4 bit": "lenet_300_100_mnist_4bit.pt",
    "LeNet-300-100, 2 bit": "lenet_300_100_mnist_2bit.pt",
}
Tensors = list[np.ndarray]


def load_weights(name: str) -> dict[str, np.ndarray]:
    import torch

    state = torch.load(DATA / name, map_location="cpu", weights_only=True)
    return {
        key: value.numpy()
        for key, value in state.get("state_dict", state).items()
        if value.ndim in (2, 4)
    }


def load_ec2t_resnet20() -> Tensors:
    weights = load_weights("resnet20_cifar10_ec2t_ternary64.pt").values()
    return [np.sign(w).astype(np.int8) for w in weights if len(np.unique(w)) <= 3]


def round_resnet20() -> Tensors:
    steps = {
        key: np.quantile(np.abs(w), 0.999) / 7
        for key, w in load_weights("resnet20_cifar10_fp32.pt").items()
    }
    return [
        np.clip(np.round(w / steps[key]), -7, 7).astype(np.int8)
        for key, w in load_weights("resnet20_cifar10_fp32.pt").items()
    ]


def draw_laplacian(
    shape: tuple[int, ...], zeros: float, generator: np.random.Generator, *, uneven: bool
) -> np.ndarray:
    """4-bit levels of Laplacian weights whose spread varies over rows and columns if uneven."""
    w = generator.laplace(size=shape)
    if uneven:
        w *= np.exp(0.3 * generator.normal(size=(shape[0], 1))) * np.exp(
            0.5 * generator.normal(size=(1, shape[1]))
        )
    return np.clip(np.round(w / (2 * np.quantile(np.abs(w), zeros))), -7, 7).astype(np.int8)


def draw_lenet_300_100() -> Tensors:
    generator = np.random.default_rng(1)
    shapes = [((300, 784), 0.95), ((100, 300), 0.9), ((10, 100), 0.6)]
    return [draw_laplacian(shape, zeros, generator, uneven=True) for shape, zeros in shapes]


def draw_vgg16() -> Tensors:
    generator = np.random.default_rng(2)
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convs = [(o, i, 3, 3) for i, o in pairwise(widths)]
    return [draw_laplacian(shape, 0.85, generator, uneven=False) for shape in [*convs, (10, 512)]]


def load_trained(name: str) -> Tensors:
    from ecqx_onnx import load

    return [tensor.levels for tensor in load(MODELS / name).tensors]


def compute_entropy_bytes(tensors: Tensors) -> float:
    total = 0.0
    for levels in tensors:
        counts = np.unique(levels, return_counts=True)[1]
        total -= float((counts * np.log2(counts / levels.size)).sum()) / 8
    return total


def measure_nncodec_bytes(tensors: Tensors) -> float:
    """The arithmetic coder of NNCodec with its contexts optimised, tensor by tensor; nan where it
    is not installed."""
    try:
        from nncodec.extensions import deepCABAC
    except ImportError:
        return math.nan
    total = 0
    for levels in tensors:
        best = math.inf
        for scan_order in range(5 if levels.ndim > 1 else 1):
            encoder = deepCABAC.Encoder()
            encoder.initCtxModels(10, 1)
            skip = np.array([levels.ndim > 1 and not row.any() for row in levels], np.int32)
            off = (deepCABAC.HdspMode(0), np.zeros(0, np.int8))
            encoder.encodeLayer(levels.astype(np.int32), 0, scan_order, 1, 0, 1, skip, *off, 0, 0)
            best = min(best, len(encoder.finish()))
        total += best
    return total


def measure_payload_bytes(tensors: Tensors) -> int:
    return sum(packed.nbytes for _, packed in pack_all(tensors)[0])


def compare_whole_files(sources: dict[str, Any]) -> None:
    """sources: by name, what `convert.convert` takes, and its example input (None for a
    checkpoint)."""
    import tempfile

    from ecqx_onnx_converters import read_weights

    from ecqx_onnx import api
    from ecqx_onnx.inspection import inspect

    heads = (".onnx", "NNCodec", "floats", "sum", "ratio", "payload", "/entropy", "/NNCodec")
    print(" " * 40 + "".join(f"{head:>9s}" for head in heads) + "   (bytes)")
    for name, (source, example) in sources.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.onnx"
            size = api.convert(source, out, example=example).nbytes
            parts = inspect(out).parts
            tensors = [stored.weight.tensor.levels for stored in read_weights(out)]
        coded, payload = measure_nncodec_bytes(tensors), measure_payload_bytes(tensors)
        floats = parts.get("float parameters", 0) + parts.get("steps and codebooks", 0)
        whole = coded + floats
        files = f"{size:9d}{coded:9.0f}{floats:9d}{whole:9.0f}{size / whole:9.3f}"
        ratios = f"{payload / compute_entropy_bytes(tensors):9.3f}{payload / coded:9.3f}"
        print(f"{name[-40:]:40s}{files}{payload:9d}{ratios}")


def make_network(factory: str, tensors: Tensors | None, state: str = "") -> tuple[Any, Any]:
    """(the model with these levels as its weights, times 0.02, or with a checkpoint's; an example
    input)"""
    import torch

    from ecqx_onnx.sources.loading import apply_state, load_factory, load_state

    torch.manual_seed(0)
    loaded = load_factory(str(MODELS / factory))
    if state:
        apply_state(loaded.model, load_state(DATA / state), state)
    else:
        weights = [parameter for parameter in loaded.model.parameters() if parameter.ndim in (2, 4)]
        with torch.no_grad():
            for parameter, levels in zip(weights, tensors or [], strict=True):
                parameter.copy_(torch.from_numpy(levels.astype(np.float32) * np.float32(0.02)))
    return loaded.model.eval(), torch.zeros(2, *(loaded.input_shape or ()))


def main() -> None:
    if sys.argv[1:] and all(argument.endswith(".pt") for argument in sys.argv[1:]):
        return compare_whole_files({path: (Path(path), None) for path in sys.argv[1:]})
    if sys.argv[1:] == ["whole"]:
        return compare_whole_files(
            {
                "EC2T ternary ResNet-20": make_network(
                    "resnet20.py:resnet20", None, "resnet20_cifar10_ec2t_ternary64.pt"
                ),
                "ResNet-20, 4 bit": make_network("resnet20.py:resnet20", round_resnet20()),
                "LeNet-300-100, synthetic": make_network(
                    "lenet_300_100.py:lenet_300_100", draw_lenet_300_100()
                ),
                **{name: (MODELS / file, None) for name, file in TRAINED.items()},
                "VGG16, random": make_network("vgg16.py:vgg16", draw_vgg16()),
            }
        )
    nets: dict[str, Callable[[], Tensors]] = {
        "EC2T ternary ResNet-20": load_ec2t_resnet20,
        "ResNet-20, 4 bit": round_resnet20,
        "LeNet-300-100, synthetic": draw_lenet_300_100,
        **{name: partial(load_trained, file) for name, file in TRAINED.items()},
        "VGG16, random": draw_vgg16,
    }
    heads = ["weights", "zeros", "entropy", "packed", "decoder", "NNCodec", "xz", "zip", "M/s"]
    print(
        " " * 25
        + "".join(f"{head:>9s}" for head in heads)
        + "   (bytes; right of entropy: shares of it; M/s: best of 3)"
    )
    for name, make in nets.items():
        if len(sys.argv) > 1 and sys.argv[1] not in name:
            continue
        if make in (load_ec2t_resnet20, round_resnet20) and not DATA.exists():
            print(f"{name:26s}skipped: {DATA} is missing")
            continue
        tensors = make()
        entropy = compute_entropy_bytes(tensors)
        spent = []
        for _ in range(3):
            begin = time.process_time()
            streams, _ = pack_all(tensors)
            spent.append(time.process_time() - begin)
        speed = sum(levels.size for levels in tensors) / 1e6 / min(spent)
        for members, packed in streams:
            if any(
                not np.array_equal(a, tensors[i])
                for a, i in zip(unpack_stream(packed), members, strict=True)
            ):
                sys.exit(f"{name}: the levels did not come back")
        payload = sum(packed.nbytes for _, packed in streams)
        stored = encode_all(
            [(f"w{i}", levels) for i, levels in enumerate(tensors)], find_target("onnxruntime")
        )
        parts = [*stored[0].functions]
        for one in stored:
            parts += [*one.initializers, *one.nodes]
        container = sum(part.ByteSize() for part in parts) - payload
        raw = b"".join(levels.tobytes() for levels in tensors)
        archive = BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
            file.writestr("w", raw)
        columns = [
            payload,
            container,
            measure_nncodec_bytes(tensors),
            len(lzma.compress(raw, preset=9)),
            len(archive.getvalue()),
        ]
        weights, zeros = sum(t.size for t in tensors), sum(int((t == 0).sum()) for t in tensors)
        coded = "".join(f"{column / entropy:9.3f}" for column in columns[2:])
        head = f"{name:25s}{weights:9d}{zeros / weights:9.3f}{entropy:9.0f}"
        print(f"{head}{columns[0] / entropy:9.3f}{columns[1]:9d}{coded}{speed:9.1f}")
    return None


if __name__ == "__main__":
    main()
