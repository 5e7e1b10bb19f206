"""What is in a file: each weight's levels, and where every byte goes."""

from ecqx_onnx.inspection.inspection import FloatWeight, InspectedTensor, Inspection, inspect

__all__ = ["FloatWeight", "InspectedTensor", "Inspection", "inspect"]
