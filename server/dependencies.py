"""What handlers are given by name: the parts of the process, made once in `app`, and the caller's name."""

import asyncio

from litestar.di import NamedDependency
from litestar.params import SkipValidation

from server.limits import PromptLimit
from server.watch import Watch
from zcore.broker import Doorbell
from zcore.jobs.database import Database
from zcore.settings import Settings
from zcore.storage import Storage

NamedDatabase = NamedDependency[SkipValidation[Database]]
NamedDoorbell = NamedDependency[SkipValidation[Doorbell]]
NamedOpening = NamedDependency[SkipValidation[asyncio.Semaphore]]
NamedPromptLimit = NamedDependency[SkipValidation[PromptLimit]]
NamedSettings = NamedDependency[SkipValidation[Settings]]
NamedStorage = NamedDependency[SkipValidation[Storage]]
NamedWatch = NamedDependency[SkipValidation[Watch]]
Owner = NamedDependency[SkipValidation[str]]
