"""Rewrites of the whole graph before its weights are planned: BatchNorm, float16, int8."""
