"""A small convolutional network for scikit-learn's 8x8 handwritten digits; `make demo` trains it.

The digits are those of Alpaydin and Kaynak 1998.
"""

from ecqx_onnx.demo.model import INPUT_SHAPE, PREPROCESSING, digits_cnn

__all__ = ["INPUT_SHAPE", "PREPROCESSING", "digits_cnn"]
