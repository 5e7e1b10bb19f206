"""ONNX graphs: reading and writing files, names, opsets, who uses which value."""
