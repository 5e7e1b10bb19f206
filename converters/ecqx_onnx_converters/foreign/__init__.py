"""Read the quantized weights of models that other tools have written."""
