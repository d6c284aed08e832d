"""`python -m tests.integration.worker.stand_ins`: a whole worker process with stand-ins in place of its models.

Whoever holds the file `hold-encode` or `hold-generate` in its data folder holds every job at that stage: the stand-in
goes on when the file is gone.
"""

import sys
from pathlib import Path

from tests.integration.worker.painter import Painter, Scribe, read_embedding, write_embedding
from tests.waiting import wait_until
from worker import app
from zcore.settings import Settings


def _scribe(settings: Settings) -> Scribe:
    return Scribe(before=lambda _request: _wait_while(settings.data_path / "hold-encode"))


def _painter(settings: Settings) -> Painter:
    return Painter(between=lambda _request, _step: _wait_while(settings.data_path / "hold-generate"))


def _wait_while(file: Path) -> None:
    wait_until(lambda: not file.exists())


if __name__ == "__main__":
    app.load_encoder = _scribe  # type: ignore[assignment]
    app.load_pipeline = _painter  # type: ignore[assignment]
    app.write_embedding = write_embedding  # type: ignore[assignment]
    app.read_embedding = read_embedding  # type: ignore[assignment]
    app.run_worker(sys.argv[1:])
