"""`python -m tests.chaos.stand_in_worker`: a whole worker process whose model sleeps, and obeys a few prompts."""

import os
import signal
import time

from tests.integration.worker.stand_in_pipeline import StandInEncoder, StandInPipeline
from tests.integration.worker.stand_ins import run_with
from zcore.request import GenerationRequest
from zcore.settings import Settings

KILLS = "kill the worker"
"""A prompt whose generation kills its process, as a segmentation fault or the kernel for want of memory would."""
RAISES = "raise an error"
STEP_S = 0.02


def _step(request: GenerationRequest, step: int) -> None:
    time.sleep(STEP_S)
    if step == 1 and request.prompt == KILLS:
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 1 and request.prompt == RAISES:
        raise RuntimeError("the request asked for it")


def _pipeline(_settings: Settings) -> StandInPipeline:
    return StandInPipeline(before_step=_step)


def _encoder(_settings: Settings) -> StandInEncoder:
    return StandInEncoder()


if __name__ == "__main__":
    run_with(_pipeline, _encoder)
