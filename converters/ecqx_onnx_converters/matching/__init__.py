"""Find each quantized weight in the float graph, by its name or its values."""
