"""Choosing the integer level of each weight: grid, entropy, assignment; tensors in and out."""
