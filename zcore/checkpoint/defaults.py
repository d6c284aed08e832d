"""Defaults of a request: the operator's setting if set, else the checkpoint's value, else the published one.

HTTP, the command line and the Python API share this rule, so that one request gives the same pixels through each.
"""

from zcore.checkpoint.files import locate_local
from zcore.checkpoint.scheduler import default_shift
from zcore.request import GenerationDefaults
from zcore.settings import Settings


def generation_defaults(settings: Settings) -> GenerationDefaults:
    """Return the defaults of requests under these settings.

    The shift is the checkpoint's if `scheduler.shift` is not set and the checkpoint is on this host; a checkpoint does
    not specify size, steps or hidden layer. Raises `CheckpointError` if its scheduler configuration is not valid.
    """
    folder = None if settings.scheduler.shift is not None else locate_local(settings.model_location)
    shift = settings.scheduler.shift if folder is None else default_shift(folder)
    return settings.generation_defaults(shift)
