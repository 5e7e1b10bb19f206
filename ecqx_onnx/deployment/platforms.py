"""Platforms to deploy to: what each folder holds, and which files its runtime can load."""

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
# The first onnxruntime whose Cast takes them.
FIRST_WITH_INT2 = "1.24"
FIRST_WITH_INT4 = "1.23"
# Opset 18 came with 1.14, but 1.17 is the oldest that files were tried with.
FIRST_WITH_OPSET = {20: "1.17", 21: "1.18", 22: "1.20", 23: "1.23", 24: "1.24", 25: "1.24"}


@dataclass(frozen=True)
class Platform:
    """A platform to deploy to.

    Attributes:
        name: what --to calls it.
        target: the converters' target whose runtime it has.
        runtime: in words; "{least}" stands for the oldest onnxruntime that loads a file.
        external: whether weights may lie in a second file.
    """

    name: str
    target: str
    runtime: str
    external: bool

    @property
    def folder(self) -> Path:
        """Where its templates lie."""
        return TEMPLATES / self.name

    @property
    def templates(self) -> tuple[Path, ...]:
        """The files that every folder for this platform gets, by their names in it, sorted."""
        names = []
        for path in self.folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                names.append(path.relative_to(self.folder))
        return tuple(sorted(names))

    def runtime_for(self, proto: onnx.ModelProto) -> str:
        """Say which runtime loads a file.

        Args:
            proto: the model.

        Returns:
            Words such as "onnxruntime 1.18 or later".
        """
        return self.runtime.format(least=find_oldest_runtime(proto))

    def check(self, proto: onnx.ModelProto, where: Path) -> None:
        """Check that the platform's runtime can load a file.

        Args:
            proto: the model.
            where: its file, for the error message.

        Raises:
            ModelError: with the reason, if it cannot.
        """
        reason = next(_list_refusals(proto, find_target(self.target)), None)
        if reason is None and not self.external and _has_external_data(proto):
            reason = "its weights lie in a second file, and the runner loads one"
        if reason is not None:
            raise ModelError(
                f"{where}: cannot be loaded on {self.name}: {reason}; convert the model for that "
                "platform"
            )


_ALL = (
    Platform("web", "onnxruntime-web", f"onnxruntime-web {WEB_VERSION}, wasm", external=True),
    Platform("android", "onnxruntime", "onnxruntime-android {least} or later", external=False),
    Platform("ios", "onnxruntime", "onnxruntime-objc {least} or later", external=False),
    Platform("linux", "onnxruntime", "onnxruntime {least} or later", external=True),
)
PLATFORMS: Mapping[str, Platform] = {platform.name: platform for platform in _ALL}


def find_platform(name: str) -> Platform:
    """Find a platform by its name.

    Args:
        name: such as "web".

    Returns:
        The platform.

    Raises:
        OptionError: if there is none of this name.
    """
    if name not in PLATFORMS:
        raise OptionError(
            f"there is no platform '{name}' to deploy to; choose one of {', '.join(PLATFORMS)}"
        )
    return PLATFORMS[name]


def find_oldest_runtime(proto: onnx.ModelProto) -> str:
    """Find the oldest onnxruntime that has the opset and the types of a file.

    Args:
        proto: the model.

    Returns:
        A version such as "1.24".
    """
    opset = min(max(FIRST_WITH_OPSET), max(min(FIRST_WITH_OPSET), _find_opset(proto)))
    needed = [FIRST_WITH_OPSET[opset]]
    types = {tensor.data_type for tensor in _list_tensors(proto)}
    if types & INT2_TYPES:
        needed.append(FIRST_WITH_INT2)
    if types & INT4_TYPES:
        needed.append(FIRST_WITH_INT4)
    return max(needed, key=_split_version)


def _split_version(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _find_opset(proto: onnx.ModelProto) -> int:
    """The version of ONNX's own operators, 0 where a model has none."""
    entries = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    return max(entries, default=0)


def _list_refusals(proto: onnx.ModelProto, target: Target) -> Iterator[str]:
    """Reasons why the target's runtime does not load the model."""
    opset = _find_opset(proto)
    if opset > target.max_opset:
        yield f"it is of opset {opset}, and the runtime has kernels up to {target.max_opset}"
    highest = target.ir_version(target.max_opset)
    if proto.ir_version > highest:
        yield (
            f"its ONNX format is of version {proto.ir_version}, and the runtime reads up to "
            f"{highest}"
        )
    for tensor in _list_tensors(proto):
        if tensor.data_type in OPSET_OF_TYPE and tensor.data_type not in target.dense_types:
            held = TensorProto.DataType.Name(tensor.data_type)
            yield f"'{tensor.name}' holds {held}, which the runtime does not load"
    if target.sparse:
        return
    for graph in list_graphs(proto.graph):
        for sparse in graph.sparse_initializer:
            name = sparse.values.name
            yield f"'{name}' is a sparse initializer, which the runtime does not load"


def _has_external_data(proto: onnx.ModelProto) -> bool:
    return any(tensor.data_location == TensorProto.EXTERNAL for tensor in _list_tensors(proto))


def _list_tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    """All initializers, those of subgraphs and the values of sparse ones too."""
    for graph in list_graphs(proto.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield sparse.values
