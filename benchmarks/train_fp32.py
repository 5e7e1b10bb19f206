"""Train a float32 network: the baseline that quantization starts from, as a state dict.

    python benchmarks/train_fp32.py models/lenet_300_100.py:lenet_300_100 \\
        ../shared/data/mnist.npz --epochs 12 --out lenet300.pt

Adam with a one-cycle learning rate. The last epoch's weights are saved: no epoch is picked on the
test set.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from shared import make_parser

from ecqx_onnx.data import Split, load_dataset
from ecqx_onnx.data.augmentation import AUGMENTATIONS
from ecqx_onnx.inputs.user_code import load_function
from ecqx_onnx.sources.loading import apply_state, load_state


def train(
    model: torch.nn.Module,
    split: Split,
    *,
    epochs: int,
    rate: float,
    decay: float,
    augment: str | None,
    seed: int,
    bfloat16: bool,
) -> None:
    """Train in place; the same seed gives the same weights on the same machine."""
    batch_size = 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    steps = epochs * math.ceil(len(split) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    generator = np.random.default_rng(seed)
    loss_function = torch.nn.CrossEntropyLoss(label_smoothing=0.05)
    model.train()
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        for x, y in split.batches(
            batch_size, shuffle=generator, augment=AUGMENTATIONS[augment] if augment else None
        ):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                loss = loss_function(model(torch.from_numpy(x)), torch.from_numpy(y))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(y)
        print(
            (
                f"epoch {epoch + 1}/{epochs}  loss {total / len(split):.4f}  "
                f"{time.perf_counter() - start:.1f} s"
            ),
            flush=True,
        )


@torch.no_grad()
def count_correct(model: torch.nn.Module, split: Split) -> int:
    model.eval()
    return sum(
        int((model(torch.from_numpy(x)).argmax(1).numpy() == y).sum())
        for x, y in split.batches(256)
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", help="FILE.py:FACTORY")
    parser.add_argument("data", help="a data set, as `ecqx-onnx quantize --data` takes it")
    parser.add_argument("--weights", help="a float state dict to go on from")
    parser.add_argument(
        "--bfloat16", action="store_true", help="autocast: half the time for convolutions"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=1e-2)
    parser.add_argument("--augment", choices=sorted(AUGMENTATIONS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    factory = load_function(arguments.model)
    model = factory()
    if arguments.weights:
        apply_state(model, load_state(arguments.weights), arguments.weights)
    model = model.to(memory_format=torch.channels_last)
    data = load_dataset(arguments.data, preprocessing=factory.__globals__.get("PREPROCESSING"))
    start = time.perf_counter()
    train(
        model,
        data.training,
        epochs=arguments.epochs,
        rate=arguments.rate,
        decay=arguments.decay,
        augment=arguments.augment,
        seed=arguments.seed,
        bfloat16=arguments.bfloat16,
    )
    correct, count = count_correct(model, data.test), len(data.test)
    torch.save(model.state_dict(), arguments.out)
    print(
        f"{100 * correct / count:.2f} % ({correct} of {count}), {time.perf_counter() - start:.0f} "
        f"s, saved {arguments.out}"
    )


if __name__ == "__main__":
    main()
