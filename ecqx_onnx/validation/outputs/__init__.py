"""How the outputs of two models are compared: samples, metrics, and bounds with their reasons."""
