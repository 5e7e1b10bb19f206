"""Running ONNX models in onnxruntime: sessions, calibration, decoded float model, latency."""
