"""What turns raw samples into model inputs, and the JSON that records it. Numpy only."""

from ecqx_onnx.preprocessing.preprocessing import (
    KINDS,
    LONGEST_JSON,
    Preprocessing,
    infer_preprocessing,
)
from ecqx_onnx.preprocessing.spectrum import Spectrum

__all__ = ["KINDS", "LONGEST_JSON", "Preprocessing", "Spectrum", "infer_preprocessing"]
