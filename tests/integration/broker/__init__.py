"""Tests of the broker, with a proxy that interrupts connections."""
