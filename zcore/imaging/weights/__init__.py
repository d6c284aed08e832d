"""Weights: loading, quantization, and offloading."""
