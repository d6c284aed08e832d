"""`python -m tests.integration.worker.stand_ins`: a whole worker process with stand-ins for its models.

While the file `hold-encode` or `hold-generate` exists in the data folder, every job is held at that stage. A job whose
prompt is `POISON` kills the process; one whose prompt is `HANGS` never gets beyond its second step. The prompts of all
generations that have begun are lines of the file `generated`.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from tests.integration.worker.stand_in_pipeline import (
    StandInEncoder,
    StandInPipeline,
    read_embedding,
    write_embedding,
)
from tests.waiting import wait_until
from worker import app
from zcore.request import GenerationRequest
from zcore.settings import Settings

POISON = "a job that kills its worker"
HANGS = "a job that hangs"


def _encoder(settings: Settings) -> StandInEncoder:
    return StandInEncoder(before=lambda _request: _wait_while(settings.data_path / "hold-encode"))


def _pipeline(settings: Settings) -> StandInPipeline:
    def before_step(request: GenerationRequest, step: int) -> None:
        if step == 0:
            with (settings.data_path / "generated").open("a") as file:
                file.write(f"{request.prompt}\n")
        _wait_while(settings.data_path / "hold-generate")
        if request.prompt == POISON:
            os.kill(os.getpid(), signal.SIGKILL)
        if request.prompt == HANGS and step == 1:
            threading.Event().wait()

    return StandInPipeline(before_step=before_step)


def _wait_while(file: Path) -> None:
    wait_until(lambda: not file.exists())


def run_with(
    load_pipeline: Callable[[Settings], StandInPipeline], load_encoder: Callable[[Settings], StandInEncoder]
) -> None:
    """Run a worker, with the arguments of this process, on these stand-ins for the model."""
    sys.modules["worker.load_model"] = SimpleNamespace(  # the real one would load torch
        load_encoder=load_encoder,
        load_pipeline=load_pipeline,
        write_embedding=write_embedding,
        read_embedding=read_embedding,
    )
    app.run_worker(sys.argv[1:])


if __name__ == "__main__":
    run_with(_pipeline, _encoder)
