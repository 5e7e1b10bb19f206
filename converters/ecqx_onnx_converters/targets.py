"""What each runtime can hold: a frozen table. A written file never needs more than its target has.

The facts were measured with onnxruntime 1.17 ... 1.32; the tests pin those that this table states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    """One row of the table.

    max_opset: highest opset the runtime has kernels for.
    dense_types: integer TensorProto types a weight may have.
    sparse: sparse_initializer of INT8 values can be loaded.
    decoders: weights may come out of nodes that decode them (digits, packed): the runtime folds these while loading.
    dequantize: the form used when the user leaves the choice, "folded" or "standard".
    no_integers: why it cannot run a file with quantised activations; empty if it can.
    """

    name: str
    runs_on: str
    max_opset: int
    dense_types: frozenset[int]
    sparse: bool
    decoders: bool
    dequantize: str
    no_integers: str = ""

    def ir_version(self, opset: int) -> int:
        return IR_OF_OPSET.get(opset, 8 if opset <= 18 else 9)


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        # Opset 28 DequantizeLinear has no kernel in 1.32, so never above 25.
        Target("onnxruntime", "onnxruntime >= 1.24 on CPU", 25, INT8_TYPES | INT4_TYPES | INT2_TYPES, True, True, "folded"),
        Target("onnxruntime-1.17", "onnxruntime >= 1.17 on CPU", 18, INT8_TYPES, True, True, "folded"),
        Target("qdq", "tools that want standard DequantizeLinear", 21, INT8_TYPES | INT4_TYPES, False, False, "standard"),
    )
}


def find_target(name: str) -> Target:
    if name not in TARGETS:
        raise OptionError(f"there is no target '{name}'; choose one of {', '.join(TARGETS)}")
    return TARGETS[name]
