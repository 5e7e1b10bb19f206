"""Quantization by training: grid, relevances and the assignment of levels at every step."""

from ecqx_onnx.options.quantizer import Recipe
from ecqx_onnx.quantization.quantizer import Quantizer
from ecqx_onnx.quantization.report import Report, TensorReport
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
