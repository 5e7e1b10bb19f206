"""Which integer level each weight gets: grid, entropy, assignment. Tensors in, tensors out."""
