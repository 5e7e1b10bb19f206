"""Rewrites of the whole graph, each from (graph, matching) to the same: BatchNorm, float16, int8
activations."""
