"""A small convolutional net for scikit-learn's 8x8 handwritten digits (Alpaydin and Kaynak 1998); `make demo` trains it."""

from ecqx_onnx.demo.model import INPUT_SHAPE, PREPROCESSING, digits_cnn

__all__ = ["INPUT_SHAPE", "PREPROCESSING", "digits_cnn"]
