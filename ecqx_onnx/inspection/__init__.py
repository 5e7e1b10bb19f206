"""What is in a file: each weight's levels, and where every byte goes."""

from ecqx_onnx.inspection.inspection import inspect
from ecqx_onnx.inspection.result import FloatWeight, InspectedTensor, Inspection

__all__ = ["FloatWeight", "InspectedTensor", "Inspection", "inspect"]
