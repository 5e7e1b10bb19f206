"""What a file's outputs are held against: PyTorch's, an .onnx file's, the float model's."""
