"""Real services for tests: each module starts one from its PyPI package, or uses an address from the environment."""
