"""The real services of the tests: each file starts one from its PyPI package, or takes the address of another."""
