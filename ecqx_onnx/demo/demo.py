"""() -> the whole main job on handwritten digits: train, quantise, convert, validate, and a table of before and after."""

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
from ecqx_onnx.validation.metrics import Proportion

DATA = "sklearn:digits"
SEED = 0
FLOAT_EPOCHS, EPOCHS, BATCH = 25, 25, 64
RECIPE: dict[str, Any] = {"bits": 4, "entropy_weight": 0.2, "relevance": "epsilon_plus_flat"}


@dataclass(frozen=True, eq=False)
class DemoResult:
    """Before and after. float_bytes: of the float network as .onnx; accuracies on the same held-out digits."""

    float_bytes: int
    float_accuracy: Proportion
    report: ValidationReport
    written: WriteReport
    zeros: float
    bits_per_weight: float

    @property
    def ok(self) -> bool:
        return self.report.ok

    def to_json(self) -> dict[str, Any]:
        return {
            "float_bytes": self.float_bytes,
            "bytes": self.written.nbytes,
            "float_accuracy": self.float_accuracy.to_json(),
            "zeros": self.zeros,
            "bits_per_weight": self.bits_per_weight,
            "validation": self.report.to_json(),
        }

    def render(self) -> RenderableType:
        table = Table(title="Handwritten digits: before and after", title_justify="left")
        for heading in ("", "float32", "ecqx-onnx"):
            table.add_column(heading, justify="left" if not heading else "right")
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
    """Writes model.pt and model.onnx into `folder`. The test digits are looked at once, at the end."""
    checkpoint_file, onnx_file = folder / "model.pt", folder / "model.onnx"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"{folder}: cannot be made a folder ({error.strerror}); choose another with --folder"
        ) from error
    for file in (checkpoint_file, onnx_file):
        check_output(file, force=force)
    torch.set_num_threads(
        1
    )  # a net this small gains nothing from two, and on a busy machine they wait for each other
    dataset = load_dataset(DATA).with_preprocessing(demo_model.PREPROCESSING)
    torch.manual_seed(SEED)
    model = demo_model.digits_cnn()
    train_float(model, dataset, progress)
    float_accuracy = api.accuracy(model, dataset.test)
    float_bytes = len(export_float_onnx(model))

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
    """The float network that the demo starts from, trained in place."""
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


def export_float_onnx(model: torch.nn.Module) -> bytes:
    return (
        export(model, torch.zeros(2, *demo_model.INPUT_SHAPE)).graph.to_model().SerializeToString()
    )
