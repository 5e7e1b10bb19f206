"""The command `ecqx-onnx compress`: its options, its lines of progress, its exit status."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ecqx_onnx.cli.arguments import (
    Force,
    Json,
    Quiet,
    TrustPickle,
    parse_numbers,
    parse_shape,
)
from ecqx_onnx.cli.frame import _json_file, register_command
from ecqx_onnx.cli.terminal import escape, escape_report, make_strict_json, stderr, stdout
from ecqx_onnx.errors import CheckFailed

SIZE, QUALITY, FILE = "Bounds of size", "Bounds of quality", "The file"


@register_command
def compress(
    model: Annotated[
        Path, typer.Argument(help="A float .onnx file, or a PyTorch model as convert takes it.")
    ],
    out: Annotated[Path, typer.Argument(help="The .onnx file to write.")],
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="Some hundred samples, with or without labels: .npz, a folder, FILE.py:FUNCTION.",
        ),
    ],
    factory: Annotated[
        str | None,
        typer.Option("--model", metavar="FILE.py:FACTORY", help="The network of a state dict."),
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(help="Most bytes of the whole file: 70k, 1.5M, 64KiB.", rich_help_panel=SIZE),
    ] = None,
    bits_per_weight: Annotated[
        float | None,
        typer.Option(help="Most coded bits for each quantized weight.", rich_help_panel=SIZE),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Most percentage points of accuracy lost; needs labels.", rich_help_panel=QUALITY
        ),
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            help="Least percent of samples in the float model's class.", rich_help_panel=QUALITY
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            help="Largest relative error of an output, a share: 0.05.", rich_help_panel=QUALITY
        ),
    ] = None,
    output: Annotated[str | None, typer.Option(help="The output that holds class scores.")] = None,
    class_axis: Annotated[
        int | None, typer.Option(help="The axis of --output that the classes lie along.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Pattern of weights to compress; by default all.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Pattern of weights that stay float.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Mean that is subtracted: one value, or one per channel.")
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="Deviation that is divided by, as --mean.")
    ] = None,
    input_shape: Annotated[
        str | None, typer.Option(help="Shape of one input of a PyTorch model: 3,32,32.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Use at most so many samples.")] = 1024,
    floats: Annotated[
        str,
        typer.Option(help="Type of what stays float: float32 or float16.", rich_help_panel=FILE),
    ] = "float32",
    storage: Annotated[
        str,
        typer.Option(
            help="How integers lie in the file: auto, dense, sparse or packed.",
            rich_help_panel=FILE,
        ),
    ] = "auto",
    dequantize: Annotated[
        str,
        typer.Option(
            help="How levels become floats: auto, folded or standard.", rich_help_panel=FILE
        ),
    ] = "auto",
    target: Annotated[
        str, typer.Option(help="The runtime that must load the file.", rich_help_panel=FILE)
    ] = "onnxruntime",
    opset: Annotated[
        int | None, typer.Option(help="Highest ONNX opset to write.", rich_help_panel=FILE)
    ] = None,
    keep_best: Annotated[
        bool, typer.Option("--keep-best", help="Write the best even if a bound is missed.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(help="Write an HTML page of the result as well.", rich_help_panel=FILE),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw of samples.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Number of threads of onnxruntime.")] = 1,
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

    result = run(
        model,
        out,
        data=data,
        factory=factory,
        input_shape=parse_shape(input_shape),
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
        trust_pickle=trust_pickle,
        force=force,
        say=None if quiet or as_json else _speaker(),
    )
    if report is not None:
        write_page(result, report)
    if as_json:
        document = make_strict_json(result.to_json())
        print(json.dumps(document, indent=2, allow_nan=False), file=_json_file.get(), flush=True)
    elif not quiet:
        stdout.print(escape_report(result).render())
    if not result.ok:
        written = "the file was kept all the same" if result.path else "nothing was written"
        raise CheckFailed(f"{'; '.join(result.misses)}: {written}; {result.advice}")


def _speaker() -> Callable[[str], None]:
    """Lines on stderr, each with the time since the start."""
    start = time.monotonic()

    def say(text: str) -> Any:
        stderr.print(f"{time.monotonic() - start:6.1f} s  {escape(text)}", highlight=False)

    return say
