"""What `quantize` needs around the training itself: its data, and its budget of bytes."""
