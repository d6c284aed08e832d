"""The whole way on real processes."""
