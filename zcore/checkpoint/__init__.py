"""A checkpoint's folder without its weights: files, sizes, layer counts, default shift. Needs no torch."""
