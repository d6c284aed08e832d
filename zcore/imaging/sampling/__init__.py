"""Sampling arithmetic: noise levels, Euler steps, guidance, multi-pass plans."""
