"""Prompt in, pixels out. Knows torch and the model; does not know HTTP, jobs, queues or storage.

Importing this package loads nothing heavy: `zcore.imaging.text` and `zcore.imaging.encode` work without torch, so
that the server can check a prompt's length and read a picture's parameters; `zcore.imaging.pipeline` is where torch
begins.
"""
