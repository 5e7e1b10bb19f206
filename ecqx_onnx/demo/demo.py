"""The demonstration: train on handwritten digits, quantize, convert, validate, compare.

It needs no data and no options; a table shows the network before and after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ecqx_onnx_converters.graph.outputs import check_output
from ecqx_onnx_converters.serialization.report import WriteReport
from rich.console import Group, RenderableType
from rich.table import Table

from ecqx_onnx import api
from ecqx_onnx.checkpoint import save
from ecqx_onnx.checkpoint.export import export
from ecqx_onnx.data import Dataset, load_dataset
from ecqx_onnx.demo import model as demo_model
from ecqx_onnx.errors import FileError
from ecqx_onnx.validation import ValidationReport
from ecqx_onnx.validation.outputs.metrics import Proportion

DATA = "sklearn:digits"
SEED = 0
FLOAT_EPOCHS = 25
EPOCHS = 25
BATCH = 64
RECIPE: dict[str, Any] = {"bits": 4, "entropy_weight": 0.2, "relevance": "epsilon_plus_flat"}


@dataclass(frozen=True, eq=False)
class DemoResult:
    """The network before and after.

    Attributes:
        float_bytes: size of the float network as .onnx.
        float_accuracy: of the float network, on the held-out digits.
        report: the validation of the written file, on the same digits.
        written: what was written.
        zeros: share of the quantized weights that are zero, 0 to 1.
        bits_per_weight: zero-order entropy of the levels.
    """

    float_bytes: int
    float_accuracy: Proportion
    report: ValidationReport
    written: WriteReport
    zeros: float
    bits_per_weight: float

    @property
    def ok(self) -> bool:
        """Whether the validation passed."""
        return self.report.ok

    def to_json(self) -> dict[str, Any]:
        """List the figures as `--json` prints them.

        Returns:
            Values that JSON can hold, by name.
        """
        return {
            "float_bytes": self.float_bytes,
            "bytes": self.written.nbytes,
            "float_accuracy": self.float_accuracy.to_json(),
            "zeros": self.zeros,
            "bits_per_weight": self.bits_per_weight,
            "validation": self.report.to_json(),
        }

    def render(self) -> RenderableType:
        """Draw the validation and the table of before and after.

        Returns:
            What rich prints.
        """
        table = Table(title="Handwritten digits: before and after", title_justify="left")
        table.add_column("")
        table.add_column("float32", justify="right")
        table.add_column("ecqx-onnx", justify="right")
        latency = self.report.latency
        samples = self.report.samples
        table.add_row(".onnx file", f"{self.float_bytes:,} bytes", f"{self.written.nbytes:,} bytes")
        table.add_row("", "", f"{self.float_bytes / self.written.nbytes:.1f}x smaller")
        table.add_row(
            f"accuracy on {samples} held-out digits (95 %)",
            str(self.float_accuracy),
            str(self.report.onnx_accuracy),
        )
        table.add_row("weights that are zero", "0 %", f"{self.zeros:.1%}")
        table.add_row("entropy of the levels", "", f"{self.bits_per_weight:.2f} bit/weight")
        if latency is not None:
            table.add_row(
                "latency, one digit",
                f"{1e3 * latency.other_seconds:.3f} ms",
                f"{1e3 * latency.seconds:.3f} ms",
            )
        return Group(self.report.render(), table)


def run_demo(
    folder: Path, *, force: bool = False, progress: Callable[..., None] | None = None
) -> DemoResult:
    """Do the whole work: train, quantize, convert and validate.

    The test digits are looked at once, at the end.

    Args:
        folder: gets model.pt and model.onnx, and is made if need be.
        force: replace files of these names.
        progress: is called with (done, all, what is done) as the work goes on.

    Returns:
        The figures of before and after.

    Raises:
        FileError: if the folder cannot be made, or a file is in the way.
    """
    checkpoint_file = folder / "model.pt"
    onnx_file = folder / "model.onnx"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"{folder}: cannot be made a folder ({error.strerror}); choose another with --folder"
        ) from error
    for file in (checkpoint_file, onnx_file):
        check_output(file, force=force)
    # A net this small gains nothing from two threads, which wait for each other on busy machines.
    torch.set_num_threads(1)
    # 1. The float network.
    dataset = load_dataset(DATA).with_preprocessing(demo_model.PREPROCESSING)
    torch.manual_seed(SEED)
    model = demo_model.digits_cnn()
    train_float(model, dataset, progress)
    float_accuracy = api.accuracy(model, dataset.test)
    float_bytes = len(_export_float_onnx(model))

    # 2. Quantize it while training on.
    from ecqx_onnx.quantization import train

    shown = None if progress is None else api.training_progress(progress)
    trained = train(
        model, dataset, epochs=EPOCHS, batch_size=BATCH, seed=SEED, progress=shown, **RECIPE
    )
    checkpoint = api.as_checkpoint(
        trained.quantizer,
        example=torch.zeros(2, *demo_model.INPUT_SHAPE),
        preprocessing=dataset.preprocessing,
        labels=dataset.labels,
        recipe={"data": DATA, "seed": SEED, "epochs": EPOCHS},
    )
    after = api.accuracy(trained.quantizer.model, dataset.test)
    checkpoint = api.with_history(
        checkpoint, trained, before=float_accuracy, after=after, data=DATA
    )
    save(checkpoint, checkpoint_file, force=force)
    # 3. Write the .onnx file, and hold it against the checkpoint.
    written = api.convert(checkpoint_file, onnx_file, force=force)
    report = api.validate(onnx_file, against=checkpoint_file, data=dataset)
    size = sum(tensor.size for tensor in checkpoint.tensors)
    zeros = sum(tensor.zeros * tensor.size for tensor in checkpoint.tensors) / size
    bits = sum(tensor.entropy * tensor.size for tensor in checkpoint.tensors) / size
    return DemoResult(float_bytes, float_accuracy, report, written, zeros, bits)


def train_float(
    model: torch.nn.Module,
    dataset: Dataset,
    progress: Callable[..., None] | None,
    *,
    seed: int = SEED,
) -> None:
    """Train the float network that the demonstration starts from, in place.

    Args:
        model: takes the data set's inputs and gives logits [N, classes].
        dataset: its training split is used.
        progress: is called with (epoch, epochs, what is done) after each epoch.
        seed: decides the order of the batches.

    Raises:
        DataError: if the data set has no training split.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = np.random.default_rng(seed)
    model.train()
    for epoch in range(FLOAT_EPOCHS):
        for x, y in dataset.training.batches(BATCH, shuffle=generator):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
            optimizer.step()
        if progress is not None:
            progress(epoch + 1, FLOAT_EPOCHS, "training the float network")


def _export_float_onnx(model: torch.nn.Module) -> bytes:
    graph = export(model, torch.zeros(2, *demo_model.INPUT_SHAPE)).graph
    return graph.to_model().SerializeToString()
