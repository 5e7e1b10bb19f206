"""Training that keeps the weights on few levels, for any loss, resumed bit for bit."""

from ecqx_onnx.quantization.training.devices import emulates_bfloat16
from ecqx_onnx.quantization.training.records import EpochRecord, Progress, Training, TrainingSplit
from ecqx_onnx.quantization.training.training import train

__all__ = [
    "EpochRecord",
    "Progress",
    "Training",
    "TrainingSplit",
    "emulates_bfloat16",
    "train",
]
