"""torchvision's MobileNetV3-Small for images of 224x224, with the 1000 classes of ImageNet.

Howard et al., "Searching for MobileNetV3", ICCV 2019 (arXiv 1905.02244).
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.quantization.relevance.zennit_import import import_zennit

import_zennit()  # beside a CPU-only torch, torchvision alone may not import

from torchvision.models import MobileNet_V3_Small_Weights, mobilenet_v3_small  # noqa: E402

INPUT_SHAPE = (3, 224, 224)
PREPROCESSING = Preprocessing(
    "image",
    scale=255.0,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    image_shape=(224, 224, 3),
)
LABELS = tuple(MobileNet_V3_Small_Weights.IMAGENET1K_V1.meta["categories"])


def pretrained() -> nn.Module:
    """Build the network as torchvision trained it; downloads 10 MB the first time."""
    return mobilenet_v3_small(weights=MobileNet_V3_Small_Weights.IMAGENET1K_V1).eval()


def untrained() -> nn.Module:
    """Build the same network with random weights, which needs no download and knows nothing."""
    torch.manual_seed(0)
    return mobilenet_v3_small(weights=None).eval()


def main() -> None:
    """Write the weights to a file, for `ecqx-onnx convert FILE --model models/mobilenet_v3.py:...`.

    python models/mobilenet_v3.py FILE.pth [--untrained]
    """
    parser = argparse.ArgumentParser(description="Write MobileNetV3-Small's weights to a file.")
    parser.add_argument("file", help="such as mobilenet_v3.pth")
    parser.add_argument("--untrained", action="store_true", help="random ones, without download")
    arguments = parser.parse_args()
    network = untrained() if arguments.untrained else pretrained()
    torch.save(network.state_dict(), arguments.file)


if __name__ == "__main__":
    main()
