"""What does a training step cost with ECQ and ECQx, against plain straight-through training?

    python benchmarks/training_step.py

ResNet-20, random 32x32 images, batch 64, Adam, 4 bit. The baseline rounds each weight to the
nearest level in the forward pass and lets the gradient through. All variants live in one process
and take turns by groups of 8 steps, so that a refresh every 8th step is counted in full; the figure
is the fastest group, in CPU seconds with one thread (other work on the machine then counts little)
and by the clock with more.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.utils.parametrize import register_parametrization

from ecqx_onnx.quantization import Quantizer
from ecqx_onnx.quantization.levels.grid import choose_grid, fit_step

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models.resnet20 import resnet20

GROUP = 8  # steps


class StraightThrough(nn.Module):
    """kΔ forward, the gradient of the identity backward."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.grid = choose_grid(weight, 4)
        self.register_buffer("delta", fit_step(weight, self.grid))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        levels = (weight / self.delta).round().clamp(self.grid.lowest, self.grid.highest)
        return weight + (levels * self.delta - weight).detach()


class Variant:
    def __init__(self, *, qat: bool = False, batch: int = 64, **options) -> None:
        torch.manual_seed(0)
        self.model = resnet20().train()
        if qat:
            for module in self.model.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    register_parametrization(
                        module, "weight", StraightThrough(module.weight.detach())
                    )
        self.quantizer = Quantizer(self.model, bits=4, **options) if options else None
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.x, self.y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))

    def time_group(self) -> float:
        """Seconds per step."""
        now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = now()
        for _ in range(GROUP):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.x), self.y).backward()
            self.optimizer.step()
            if self.quantizer is not None:
                self.quantizer.step(self.x, self.y)
        return (now() - start) / GROUP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=1, help="1: no thread waits for another on a busy machine"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    variants = {
        "float training": Variant(batch=arguments.batch),
        "straight-through QAT": Variant(batch=arguments.batch, qat=True),
        "ECQ": Variant(batch=arguments.batch, relevance=None),
        "ECQx, relevances every 8th step": Variant(batch=arguments.batch, refresh_every=8),
        "ECQx, relevances every step": Variant(batch=arguments.batch, refresh_every=1),
        "ECQx, every step, half of the samples": Variant(
            batch=arguments.batch, refresh_every=1, relevance_samples=arguments.batch // 2
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for variant in variants.values():
        variant.time_group()
    for _ in range(arguments.repeats):
        for name, variant in variants.items():
            times[name].append(variant.time_group())
    baseline = min(times["straight-through QAT"])
    table = Table(title=f"ResNet-20, batch {arguments.batch}, {arguments.threads} thread(s)")
    for heading in ("", "ms per step", "against QAT"):
        table.add_column(heading, justify="right")
    for name, measured in times.items():
        table.add_row(name, f"{1000 * min(measured):.1f}", f"{min(measured) / baseline:.2f}x")
    Console().print(table)


if __name__ == "__main__":
    main()
