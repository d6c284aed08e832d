"""Prompt in, pixels out: the model and everything around it.

Depends on torch, but not on HTTP, jobs, queues or storage. Importing the package itself does not load torch.
"""
