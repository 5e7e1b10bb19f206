"""What each runtime can load: a frozen table, which no written file goes beyond.

The facts were measured with onnxruntime 1.17 ... 1.32; the tests pin those that this table states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx import TensorProto

from ecqx_onnx.errors import OptionError

INT8_TYPES = frozenset({TensorProto.INT8, TensorProto.UINT8})
INT4_TYPES = frozenset({TensorProto.INT4, TensorProto.UINT4})
INT2_TYPES = frozenset({TensorProto.INT2, TensorProto.UINT2})

# The first opset whose Cast and DequantizeLinear take the type.
OPSET_OF_TYPE: Mapping[int, int] = {
    **dict.fromkeys(INT8_TYPES, 10),
    **dict.fromkeys(INT4_TYPES, 21),
    **dict.fromkeys(INT2_TYPES, 25),
}
# The IR version that came with each opset; 8 is the first with model-local functions.
IR_OF_OPSET = {21: 10, 22: 10, 23: 11, 24: 12, 25: 13}


@dataclass(frozen=True)
class Target:
    """One row of the table: a runtime, and what its files may hold.

    Attributes:
        name: What the user calls it.
        runs_on: The runtime and its versions, in words.
        max_opset: Highest opset the runtime has kernels for.
        dense_types: Integer TensorProto types a weight may have.
        sparse: Whether a sparse_initializer of INT8 values can be loaded.
        decoders: Whether weights may come out of nodes that decode them (digits, packed); the
            runtime folds these while loading.
        dequantize: The form used when the user leaves the choice, "folded" or "standard".
        only: Why it cannot have the other form (a weight that DequantizeLinear can't express is
            folded all the same); "" if it can.
        suffix: Of the files that it loads, which are onnxruntime's own format where it is ".ort".
        one_sample: Whether batches have the fixed size 1, as accelerators want no free lengths.
        accelerators: Execution providers that should take the graph, by the names of
            onnxruntime's usability checker.
        no_integers: Why it cannot run a file with quantized activations; "" if it can.
    """

    name: str
    runs_on: str
    max_opset: int
    dense_types: frozenset[int]
    sparse: bool
    decoders: bool
    dequantize: str
    only: str = ""
    suffix: str = ".onnx"
    one_sample: bool = False
    accelerators: tuple[str, ...] = ()
    no_integers: str = ""

    def ir_version(self, opset: int) -> int:
        """Finds the IR version that files of an opset declare.

        Args:
            opset: Of the standard domain.

        Returns:
            8, the first with local functions, up to opset 18; else the one of IR_OF_OPSET, or 9.
        """
        if opset <= 18:
            return 8
        return IR_OF_OPSET.get(opset, 9)


ALL_TYPES = INT8_TYPES | INT4_TYPES | INT2_TYPES
NO_DEQUANTIZE = (
    "its accelerators take float graphs, and the weights are floats once the runtime has folded "
    "them"
)
NO_INTEGERS = (
    "its accelerators take float graphs, and would leave integer kernels to the CPU; use --target "
    "onnxruntime"
)

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        # Opset 28 DequantizeLinear has no kernel in 1.32, so never above 25.
        Target(
            "onnxruntime",
            "onnxruntime >= 1.24 on CPU",
            25,
            ALL_TYPES,
            sparse=True,
            decoders=True,
            dequantize="folded",
        ),
        Target(
            "onnxruntime-1.17",
            "onnxruntime >= 1.17 on CPU",
            18,
            INT8_TYPES,
            sparse=True,
            decoders=True,
            dequantize="folded",
        ),
        Target(
            "onnxruntime-web",
            "onnxruntime-web >= 1.30, WebAssembly",
            25,
            ALL_TYPES,
            sparse=True,
            decoders=True,
            dequantize="folded",
        ),
        # Converters to .ort fold what folds, so that folded weights lie there as floats; INT4 and
        # INT2 give files that onnxruntime 1.28 to 1.32 cannot load.
        Target(
            "onnxruntime-mobile",
            "minimal builds of onnxruntime, not older than the one that converts",
            18,
            INT8_TYPES,
            sparse=False,
            decoders=False,
            dequantize="standard",
            only="folded weights would lie in an .ort file as floats",
            suffix=".ort",
        ),
        # The checker of the accelerators does not look at opsets; 18 is the lowest that torch
        # exports.
        Target(
            "coreml",
            "onnxruntime >= 1.17 for iOS and macOS, CoreML",
            18,
            INT8_TYPES,
            sparse=True,
            decoders=True,
            dequantize="folded",
            only=NO_DEQUANTIZE,
            one_sample=True,
            no_integers=NO_INTEGERS,
            accelerators=("CoreML NeuralNetwork", "CoreML MLProgram"),
        ),
        Target(
            "nnapi",
            "onnxruntime >= 1.17 for Android, NNAPI",
            18,
            INT8_TYPES,
            sparse=True,
            decoders=True,
            dequantize="folded",
            only=NO_DEQUANTIZE,
            one_sample=True,
            no_integers=NO_INTEGERS,
            accelerators=("NNAPI",),
        ),
        Target(
            "qdq",
            "tools that want standard DequantizeLinear",
            21,
            INT8_TYPES | INT4_TYPES,
            sparse=False,
            decoders=False,
            dequantize="standard",
        ),
    )
}


def check_name(path: Path | str, target: str) -> None:
    """Refuses a name that does not end as the target's files do; runtimes and commands go by it.

    Args:
        path: The file to write.
        target: A key of TARGETS.

    Raises:
        OptionError: For another suffix, and for an unknown target.
    """
    path = Path(path)
    suffix = find_target(target).suffix
    if path.suffix.lower() != suffix:
        raise OptionError(
            f"{path}: target '{target}' loads {suffix} files; name it {path.with_suffix(suffix)}"
        )


def find_target(name: str) -> Target:
    """Finds a target by its name.

    Args:
        name: A key of TARGETS.

    Returns:
        Its row of the table.

    Raises:
        OptionError: If there is none; lists those that there are.
    """
    if name not in TARGETS:
        raise OptionError(f"there is no target '{name}'; choose one of {', '.join(TARGETS)}")
    return TARGETS[name]
