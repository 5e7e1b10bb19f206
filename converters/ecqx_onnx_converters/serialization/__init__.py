"""A plan becomes an ONNX file, and a file becomes levels again."""
