"""The only room that runs ONNX models: sessions, calibration, the decoded float model, latency."""
