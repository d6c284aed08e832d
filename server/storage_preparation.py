"""Preparation of the storage while the server starts: in the background, because jobs are accepted without it."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from itertools import chain, repeat

from zcore.errors import StorageError
from zcore.storage import Storage
from zcore.telemetry import log

PATIENCE_S = 3.0
RETRY_DELAYS_S = (1.0, 2.0, 5.0, 15.0)


def prepare_in_background(storage: Storage) -> Callable[[], None]:
    """Create the bucket or folder, again and again until the storage answers. Returns after 3 s at the latest.

    What it returns ends the attempts. Raises `ConfigurationError` if the storage has refused the settings by then;
    later refusals are only logged.
    """
    first_try: Future[Exception | None] = Future()
    first_try.set_running_or_notify_cancel()
    stopped = threading.Event()
    arguments = (storage, first_try, stopped)
    threading.Thread(target=_prepare, args=arguments, name="storage-preparation", daemon=True).start()
    if not wait([first_try], PATIENCE_S).done:
        log.warning("storage.unreachable", error=f"it has not answered within {PATIENCE_S:g} s")
    elif (refusal := first_try.result()) is not None:
        raise refusal
    return stopped.set


def _prepare(storage: Storage, first_try: "Future[Exception | None]", stopped: threading.Event) -> None:
    for delay_s in chain(RETRY_DELAYS_S, repeat(RETRY_DELAYS_S[-1])):
        refusal: Exception | None = None
        is_over = True
        try:
            storage.prepare()
        except StorageError as fault:
            log.warning("storage.unreachable", error=fault.message)
            is_over = False
        except Exception as fault:
            log.error("storage.refused", exc_info=fault)
            refusal = fault
        if not first_try.done():
            first_try.set_result(refusal)
        if is_over or stopped.wait(delay_s):
            return
