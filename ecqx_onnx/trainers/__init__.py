"""Callbacks that keep weights on levels inside the trainers that people use.

    from ecqx_onnx.trainers.huggingface import QuantizerCallback   # transformers' Trainer
    from ecqx_onnx.trainers.lightning import QuantizerCallback     # Lightning

A loop of one's own needs none: it calls `quantizer.step(x, y)` after `optimizer.step()`.
"""
