"""Stages of a job. Different workers may serve different stages.

The settings name the stages of a worker, a job records the stage it is at, and each stage has its own broker queue.
"""

from enum import StrEnum
from typing import Literal


class Stage(StrEnum):
    """Next step of a job: encoding the prompt, which needs no GPU, or generating the images."""

    ENCODE = "encode"
    GENERATE = "generate"


Phase = Literal["encode", "denoise", "decode"]
"""Part of the work on a job that its progress names."""
