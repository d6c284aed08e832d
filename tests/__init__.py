"""The tests. A package by name only, so that another distribution's `tests` never stands in its place."""
