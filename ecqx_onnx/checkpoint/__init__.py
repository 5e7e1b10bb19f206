"""A quantized model with all that belongs to it, and the file model.pt that holds it."""

from ecqx_onnx.checkpoint.checkpoint import Checkpoint, build, is_checkpoint, load, save
from ecqx_onnx.inputs.torch_file import is_program

__all__ = ["Checkpoint", "build", "is_checkpoint", "is_program", "load", "save"]
