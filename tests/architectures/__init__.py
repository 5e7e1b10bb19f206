"""Architectures as people bring them, with random weights, and what this project does with each.

`python -m tests.architectures` tries all and prints a table; `tests/test_architectures.py` is the
same as a slow test. torchvision comes with the project; timm and transformers with the extra
`architectures`, and what is not installed is skipped.
"""
