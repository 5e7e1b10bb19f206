"""Decide for each weight how it is stored and dequantized, with the reason in words."""
