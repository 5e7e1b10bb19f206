"""What a few epochs of distillation without labels give a compressed network, at equal bytes.

    python benchmarks/recovery.py lenet5 --shared ../shared/data --runs runs/recovery

Each network is compressed to a budget on 1,024 samples; then `quantize --from` follows the float
network's outputs on all training samples, to the same budget. Both files run in onnxruntime on the
test split, which nothing was chosen on. One JSON file a run; runs that are there are not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from ecqx_onnx.validation.metrics import Proportion

from ecqx_onnx.sources.loading import load_factory
from ecqx_onnx.verbs.compress import compress
from ecqx_onnx.verbs.convert import convert
from ecqx_onnx.verbs.quantize import quantize

MODELS = Path(__file__).parents[1] / "models"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Network:
    """One row: where the network comes from, its data, and its budget."""

    factory: str
    data: str
    checkpoint: str | None
    max_bytes: int
    epochs: int
    batch_size: int = 64


NETWORKS = {
    "lenet5": Network("lenet5", "mnist.npz", "lenet5_mnist_fp32.pt", 7_500, 3, 128),
    "lenet_300_100": Network("lenet_300_100", "mnist.npz", None, 16_000, 3, 128),
    "resnet20": Network(
        "resnet20", "cifar10_lossless_part.npz", "resnet20_cifar10_fp32.pt", 44_000, 5
    ),
}


def make_float(network: Network, shared: Path, folder: Path) -> Path:
    """The float weights: the public checkpoint's, or five epochs of training."""
    path = folder / f"{network.factory}.float.pt"
    if path.exists():
        return path
    if network.checkpoint is not None:
        source = shared / "checkpoints" / network.checkpoint
        found = torch.load(source, weights_only=True, map_location="cpu")
        state = {k.removeprefix("module."): v for k, v in found.get("state_dict", found).items()}
    else:
        torch.manual_seed(0)
        model = load_factory(f"{MODELS / network.factory}.py:{network.factory}").model
        images = np.load(shared / network.data)
        x = torch.from_numpy(images["x_train"].astype(np.float32) / 255)
        x = ((x - 0.1307) / 0.3081).unsqueeze(1)
        y = torch.from_numpy(images["y_train"].astype(np.int64))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for epoch in range(5):
            order = torch.from_numpy(np.random.RandomState(epoch).permutation(len(x)))
            for rows in order.split(128):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
        state = model.state_dict()
    torch.save(state, path)
    return path


def run(name: str, seed: int, shared: Path, folder: Path) -> dict[str, Any]:
    """One network, one draw of samples."""
    network = NETWORKS[name]
    factory = f"{MODELS / network.factory}.py:{network.factory}"
    weights = make_float(network, shared, folder)
    images = np.load(shared / network.data)
    bare = folder / f"{name}.bare.npz"
    np.savez(bare, x_train=images["x_train"], x_test=images["x_test"])
    started = time.process_time()
    compressed = folder / f"{name}.{seed}.onnx"
    trainable = folder / f"{name}.{seed}.pt"
    compress(
        weights,
        compressed,
        data=str(bare),
        factory=factory,
        max_bytes=network.max_bytes,
        checkpoint=trainable,
        seed=seed,
        force=True,
    )
    halfway = time.process_time()
    trained = folder / f"{name}.{seed}.trained.pt"
    quantize(
        factory,
        data=str(bare),
        out=trained,
        weights=weights,
        start_from=trainable,
        loss="distillation",
        distill_by="logits",
        metric="agreement",
        relevance=None,
        max_bytes=network.max_bytes,
        epochs=network.epochs,
        batch_size=network.batch_size,
        seed=seed,
        force=True,
    )
    recovered = folder / f"{name}.{seed}.trained.onnx"
    convert(trained, recovered, force=True)
    model = load_factory(factory)
    model.model.load_state_dict(torch.load(weights, weights_only=True), strict=False)
    assert model.preprocessing is not None  # our models' files say it
    x = model.preprocessing.apply(images["x_test"])
    wanted = run_float(model.model.eval(), x)
    result: dict[str, Any] = {"network": name, "seed": seed}
    labels = images["y_test"]
    result["float"] = {"accuracy": Proportion(int((wanted == labels).sum()), len(x)).to_json()}
    for key, path in (("compressed", compressed), ("trained", recovered)):
        found = run_file(path, x)
        result[key] = {
            "bytes": path.stat().st_size,
            "agreement": Proportion(int((found == wanted).sum()), len(x)).to_json(),
            "accuracy": Proportion(int((found == labels).sum()), len(x)).to_json(),
        }
    result["cpu_seconds"] = [halfway - started, time.process_time() - halfway]
    return result


def run_float(model: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    """Classes that the float network tells."""
    with torch.no_grad():
        scores = [model(part) for part in torch.from_numpy(x).split(256)]
    classes: np.ndarray = torch.cat(scores).argmax(1).numpy()
    return classes


def run_file(path: Path, x: np.ndarray) -> np.ndarray:
    """Classes that a file tells in onnxruntime."""
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    found = [session.run(None, {name: x[i : i + 256]})[0] for i in range(0, len(x), 256)]
    classes: np.ndarray = np.concatenate(found).argmax(1)
    return classes


def main() -> None:
    """Run what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    print("| network | seed | bytes | agreement: compressed | trained | accuracy: float | both |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.networks:
        for seed in SEEDS[: arguments.seeds]:
            path = arguments.runs / f"{name}.{seed}.json"
            if not path.exists():
                found = run(name, seed, arguments.shared, arguments.runs)
                path.write_text(json.dumps(found, indent=1) + "\n")
            print(show(json.loads(path.read_text())), flush=True)


def show(found: dict[str, Any]) -> str:
    """One row of the table."""
    before, after = found["compressed"], found["trained"]
    cells = [
        found["network"],
        str(found["seed"]),
        f"{before['bytes']:,} / {after['bytes']:,}",
        f"{100 * before['agreement']['share']:.2f}",
        f"{100 * after['agreement']['share']:.2f}",
        f"{100 * found['float']['accuracy']['share']:.2f}",
        f"{100 * before['accuracy']['share']:.2f} / {100 * after['accuracy']['share']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
