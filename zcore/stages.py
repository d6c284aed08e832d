"""The two parts of a job that machines of different kinds do.

Gives `Stage`. The settings say which a worker does, a job which it is at, and the doorbell has a queue for each.
"""

from enum import StrEnum


class Stage(StrEnum):
    """What is done next: the prompt's embedding, which needs no GPU, or the pictures."""

    ENCODE = "encode"
    GENERATE = "generate"
