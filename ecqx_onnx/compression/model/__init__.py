"""The float model that is compressed: its graph, its weights, its biases."""
