"""The command `ecqx-onnx compress`: its options, its lines of progress, its exit status."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ecqx_onnx.cli.arguments import (
    Factory,
    Force,
    InputShape,
    Json,
    Quiet,
    TrustPickle,
    make_argument,
    make_option,
    parse_numbers,
)
from ecqx_onnx.cli.frame import _json_file, register_command
from ecqx_onnx.cli.terminal import escape, escape_report, make_strict_json, stderr, stdout
from ecqx_onnx.errors import CheckFailed, OptionError
from ecqx_onnx.options.compress import CompressOptions
from ecqx_onnx.options.input_shape import parse_dynamic, parse_input_shape

SIZE, QUALITY, FILE = "Bounds of size", "Bounds of quality", "The file"


def _option(name: str, *flags: str, panel: str | None = None, metavar: str | None = None) -> Any:
    return make_option(CompressOptions, name, *flags, panel=panel, metavar=metavar)


@register_command
def compress(
    model: Annotated[Path, make_argument(CompressOptions, "model")],
    out: Annotated[Path, make_argument(CompressOptions, "out")],
    data: Annotated[str, _option("data", metavar="DATA")],
    factory: Factory = None,
    max_bytes: Annotated[str | None, _option("max_bytes", panel=SIZE)] = None,
    bits_per_weight: Annotated[float | None, _option("bits_per_weight", panel=SIZE)] = None,
    max_drop: Annotated[float | None, _option("max_drop", panel=QUALITY)] = None,
    min_agreement: Annotated[float | None, _option("min_agreement", panel=QUALITY)] = None,
    max_error: Annotated[float | None, _option("max_error", panel=QUALITY)] = None,
    output: Annotated[str | None, _option("output")] = None,
    class_axis: Annotated[int | None, _option("class_axis")] = None,
    include: Annotated[list[str] | None, _option("include")] = None,
    exclude: Annotated[list[str] | None, _option("exclude")] = None,
    mean: Annotated[str | None, _option("mean")] = None,
    std: Annotated[str | None, _option("std")] = None,
    input_shape: InputShape = None,
    dynamic: Annotated[list[str] | None, _option("dynamic", metavar="AXIS")] = None,
    samples: Annotated[int, _option("samples")] = 1024,
    floats: Annotated[str, _option("floats", panel=FILE)] = "float32",
    storage: Annotated[str, _option("storage", panel=FILE)] = "auto",
    dequantize: Annotated[str, _option("dequantize", panel=FILE)] = "auto",
    target: Annotated[str, _option("target", panel=FILE)] = "onnxruntime",
    opset: Annotated[int | None, _option("opset", panel=FILE)] = None,
    keep_best: Annotated[bool, _option("keep_best", "--keep-best")] = False,
    report: Annotated[
        Path | None,
        typer.Option(help="Write an HTML page of the result as well.", rich_help_panel=FILE),
    ] = None,
    checkpoint: Annotated[Path | None, _option("checkpoint", panel=FILE)] = None,
    seed: Annotated[int, _option("seed")] = 0,
    threads: Annotated[int, _option("threads")] = 1,
    trust_pickle: TrustPickle = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a float model small without training, to a number of bytes or of lost points.

    Without a bound: the smallest file that agrees with the float model on 99 % of the samples, or
    whose outputs are within 5 %. Exit status 1 where a bound can't be held.

    Example:  ecqx-onnx compress model.onnx small.onnx --data samples.npz --max-bytes 70k
    """
    from ecqx_onnx.compression.page import write_page
    from ecqx_onnx.verbs.compress import compress as run

    if report is not None:
        _check_report(report, out, model, force)
    result = run(
        model,
        out,
        data=data,
        factory=factory,
        input_shape=parse_input_shape(input_shape),
        dynamic=parse_dynamic(dynamic),
        max_bytes=max_bytes,
        bits_per_weight=bits_per_weight,
        max_drop=max_drop,
        min_agreement=min_agreement,
        max_error=max_error,
        output=output,
        class_axis=class_axis,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        mean=parse_numbers(mean, "--mean") or (),
        std=parse_numbers(std, "--std") or (),
        samples=samples,
        storage=storage,
        dequantize=dequantize,
        target=target,
        opset=opset,
        floats=floats,
        seed=seed,
        threads=threads,
        keep_best=keep_best,
        checkpoint=checkpoint,
        trust_pickle=trust_pickle,
        force=force,
        say=None if quiet or as_json else _speaker(),
    )
    if report is not None:
        write_page(result, report, force=force)
    if as_json:
        document = make_strict_json(result.to_json())
        print(json.dumps(document, indent=2, allow_nan=False), file=_json_file.get(), flush=True)
    elif not quiet:
        stdout.print(escape_report(result).render())
    if not result.ok:
        written = "the file was kept all the same" if result.path else "nothing was written"
        raise CheckFailed(f"{'; '.join(result.misses)}: {written}; {result.advice}")


def _check_report(report: Path, out: Path, model: Path, force: bool) -> None:
    """Refuse a page that can't be written before hours of work have gone by."""
    from ecqx_onnx_converters.graph.outputs import check_output

    if report.resolve() == out.resolve():
        raise OptionError(f"--report {report} is the file to write itself: name another one")
    check_output(report, force=force, source=model)


def _speaker() -> Callable[[str], None]:
    """Lines on stderr, each with the time since the start."""
    start = time.monotonic()

    def say(text: str) -> Any:
        stderr.print(f"{time.monotonic() - start:6.1f} s  {escape(text)}", highlight=False)

    return say
