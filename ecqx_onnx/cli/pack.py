"""The commands `ecqx-onnx pack` and `ecqx-onnx unpack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ecqx_onnx.cli.arguments import Force, Json, Quiet, make_argument, make_option
from ecqx_onnx.cli.frame import emit, register_command, show_progress, suggest
from ecqx_onnx.options.option import get_help
from ecqx_onnx.options.pack import PackOptions, UnpackOptions


def _pack_option(name: str) -> Any:
    return make_option(PackOptions, name)


def _unpack_option(name: str) -> Any:
    return make_option(UnpackOptions, name)


@register_command
def pack(
    model: Annotated[Path, make_argument(PackOptions, "model", metavar="FILE.onnx")],
    out: Annotated[Path, make_argument(PackOptions, "out")],
    storage: Annotated[str, _pack_option("storage")] = "auto",
    prefer: Annotated[str, _pack_option("prefer")] = "auto",
    dequantize: Annotated[str, _pack_option("dequantize")] = "auto",
    target: Annotated[str, _pack_option("target")] = "onnxruntime",
    opset: Annotated[int | None, _pack_option("opset")] = None,
    inputs: Annotated[Path | None, _pack_option("inputs")] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help=get_help(PackOptions, "check"))
    ] = True,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Store the quantised weights of someone else's model in fewer bytes, losslessly.

    The outputs are checked against the original's. Takes DequantizeLinear, QDQ, QCDQ, QONNX,
    QLinear and Integer operators, and float weights that lie on few values.

    Example:  ecqx-onnx pack model-int8.onnx packed.onnx
    """
    from ecqx_onnx.validation.equivalence import load_inputs
    from ecqx_onnx.verbs import pack as packing

    with show_progress(quiet or as_json, "packing the weights and comparing the outputs"):
        report = packing.pack(
            model,
            out,
            storage=storage,
            prefer=prefer,
            dequantize=dequantize,
            target=target,
            opset=opset,
            check=check,
            inputs=None if inputs is None else load_inputs(inputs),
            force=force,
        )
    emit(report, as_json=as_json, quiet=quiet)
    suggest("validate", out, "--against", model, as_json=as_json, quiet=quiet)


@register_command
def unpack(
    model: Annotated[Path, make_argument(UnpackOptions, "model", metavar="PACKED.onnx")],
    out: Annotated[Path, make_argument(UnpackOptions, "out")],
    floats: Annotated[bool, make_option(UnpackOptions, "floats", "--float")] = False,
    dequantize: Annotated[str, _unpack_option("dequantize")] = "auto",
    target: Annotated[str, _unpack_option("target")] = "qdq",
    opset: Annotated[int | None, _unpack_option("opset")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write dense integers and DequantizeLinear, for tools that cannot decode or fold.

    Every weight's checksum is verified.

    Example:  ecqx-onnx unpack packed.onnx dense.onnx
    """
    from ecqx_onnx.verbs import pack as packing

    with show_progress(quiet or as_json, "unpacking the weights"):
        report = packing.unpack(
            model,
            out,
            floats=floats,
            dequantize=dequantize,
            target=target,
            opset=opset,
            force=force,
        )
    emit(report, as_json=as_json, quiet=quiet)
