"""Raw samples to model inputs, and the JSON that says how. Numpy only."""

from ecqx_onnx.preprocessing.preprocessing import (
    KINDS,
    LONGEST_JSON,
    Preprocessing,
    infer_preprocessing,
)
from ecqx_onnx.preprocessing.spectrum import Spectrum

__all__ = ["KINDS", "LONGEST_JSON", "Preprocessing", "Spectrum", "infer_preprocessing"]
