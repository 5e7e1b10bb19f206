"""What this machine has, what is missing, and the command that brings it."""

from ecqx_onnx.doctor.examination import Examination, examine

__all__ = ["Examination", "examine"]
