"""A platform's name -> what its folder holds, which runtime it runs on, and whether that runtime can load a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from ecqx_onnx_converters.graph.graph import list_graphs
from ecqx_onnx_converters.targets import INT2_TYPES, INT4_TYPES, OPSET_OF_TYPE, Target, find_target
from onnx import TensorProto

from ecqx_onnx.errors import ModelError, OptionError
from ecqx_onnx.validation.devices.setup import WEB_VERSION

TEMPLATES = Path(__file__).parent / "templates"
FIRST_WITH_INT2, FIRST_WITH_INT4 = "1.24", "1.23"  # onnxruntime whose Cast takes them
# Opset 18 came with 1.14, but 1.17 is the oldest that files were tried with.
FIRST_WITH_OPSET = {20: "1.17", 21: "1.18", 22: "1.20", 23: "1.23", 24: "1.24", 25: "1.24"}


@dataclass(frozen=True)
class Platform:
    """runtime: in words; "{least}" is the oldest onnxruntime that loads the file. external: weights may lie in a second file."""

    name: str
    target: str
    runtime: str
    external: bool

    @property
    def templates(self) -> tuple[Path, ...]:
        return tuple(sorted(path for path in (TEMPLATES / self.name).iterdir() if path.is_file()))

    def runtime_for(self, proto: onnx.ModelProto) -> str:
        return self.runtime.format(least=find_oldest_runtime(proto))

    def check(self, proto: onnx.ModelProto, where: Path) -> None:
        """ModelError, with the reason, if the platform's runtime cannot load the file."""
        reason = next(list_refusals(proto, find_target(self.target)), None)
        if (
            reason is None
            and not self.external
            and any(tensor.data_location == TensorProto.EXTERNAL for tensor in list_tensors(proto))
        ):
            reason = "its weights lie in a second file, and the runner loads one"
        if reason is not None:
            raise ModelError(
                f"{where}: cannot be loaded on {self.name}: {reason}; convert the model for that platform"
            )


PLATFORMS: Mapping[str, Platform] = {
    platform.name: platform
    for platform in (
        Platform("web", "onnxruntime-web", f"onnxruntime-web {WEB_VERSION}, wasm", external=True),
        Platform("android", "onnxruntime", "onnxruntime-android {least} or later", external=False),
        Platform("ios", "onnxruntime", "onnxruntime-objc {least} or later", external=False),
        Platform("linux", "onnxruntime", "onnxruntime {least} or later", external=True),
    )
}


def find_platform(name: str) -> Platform:
    if name not in PLATFORMS:
        raise OptionError(
            f"there is no platform '{name}' to deploy to; choose one of {', '.join(PLATFORMS)}"
        )
    return PLATFORMS[name]


def find_oldest_runtime(proto: onnx.ModelProto) -> str:
    """The first onnxruntime, "1.24", that has the opset and the types of the file."""
    kinds = {tensor.data_type for tensor in list_tensors(proto)}
    needed = [
        FIRST_WITH_OPSET[min(max(FIRST_WITH_OPSET), max(min(FIRST_WITH_OPSET), find_opset(proto)))]
    ]
    needed += [FIRST_WITH_INT2] if kinds & INT2_TYPES else []
    needed += [FIRST_WITH_INT4] if kinds & INT4_TYPES else []
    return max(needed, key=lambda version: tuple(map(int, version.split("."))))


def find_opset(proto: onnx.ModelProto) -> int:
    return max(
        (entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")),
        default=0,
    )


def list_refusals(proto: onnx.ModelProto, target: Target) -> Iterator[str]:
    opset = find_opset(proto)
    if opset > target.max_opset:
        yield f"it is of opset {opset}, and the runtime has kernels up to {target.max_opset}"
    if proto.ir_version > (highest := target.ir_version(target.max_opset)):
        yield f"its ONNX format is of version {proto.ir_version}, and the runtime reads up to {highest}"
    for tensor in list_tensors(proto):
        if tensor.data_type in OPSET_OF_TYPE and tensor.data_type not in target.dense_types:
            yield f"'{tensor.name}' holds {TensorProto.DataType.Name(tensor.data_type)}, which the runtime does not load"
    for graph in list_graphs(proto.graph):
        for sparse in graph.sparse_initializer:
            if not target.sparse:
                yield f"'{sparse.values.name}' is a sparse initializer, which the runtime does not load"


def list_tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    for graph in list_graphs(proto.graph):
        yield from graph.initializer
        yield from (sparse.values for sparse in graph.sparse_initializer)
