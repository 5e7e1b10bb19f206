"""Which level each weight gets: grid, relevance, assignment, at every training step."""

from ecqx_onnx.options.quantizer import Recipe
from ecqx_onnx.quantization.quantizer import Quantizer, Report, TensorReport
from ecqx_onnx.quantization.training import EpochRecord, Progress, Training, train

__all__ = [
    "EpochRecord",
    "Progress",
    "Quantizer",
    "Recipe",
    "Report",
    "TensorReport",
    "Training",
    "train",
]
