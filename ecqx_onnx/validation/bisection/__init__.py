"""Where do two computations of one model part? Halving finds the first tensor that differs."""

from ecqx_onnx.validation.bisection.result import Bisection, Probe
from ecqx_onnx.validation.bisection.search import bisect_file

__all__ = ["Bisection", "Probe", "bisect_file"]
