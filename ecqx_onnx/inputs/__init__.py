"""Files opened without trust: torch files, exported programs, .onnx files, the user's own code."""
