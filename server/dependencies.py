"""Types of the arguments that handlers receive by name: the components created in `app`, and the caller."""

import asyncio

from litestar.di import NamedDependency
from litestar.params import SkipValidation

from server.callers import Caller
from server.drain import Drain
from server.prompt_check import PromptCheck
from server.submission import Submissions
from server.threads import Threads
from zcore.broker import Notifier
from zcore.jobs.database import Database
from zcore.request import GenerationDefaults
from zcore.settings import Settings
from zcore.storage import Storage

NamedCaller = NamedDependency[SkipValidation[Caller]]
NamedDatabase = NamedDependency[SkipValidation[Database]]
NamedDefaults = NamedDependency[SkipValidation[GenerationDefaults]]
NamedDrain = NamedDependency[SkipValidation[Drain]]
NamedNotifier = NamedDependency[SkipValidation[Notifier]]
NamedPromptCheck = NamedDependency[SkipValidation[PromptCheck]]
NamedSettings = NamedDependency[SkipValidation[Settings]]
NamedStorage = NamedDependency[SkipValidation[Storage]]
NamedSubmissions = NamedDependency[SkipValidation[Submissions]]
NamedThreads = NamedDependency[SkipValidation[Threads]]
NamedTrainedSide = NamedDependency[SkipValidation[int]]
NamedUploadSlots = NamedDependency[SkipValidation[asyncio.Semaphore]]
