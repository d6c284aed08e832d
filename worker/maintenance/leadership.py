"""Whether this process is the one that does the maintenance."""

import os
import random
import secrets
import socket
import time
from collections.abc import Callable

from zcore.jobs import leadership, recovery
from zcore.jobs.database import Database, Transaction
from zcore.telemetry import log

WORK = "maintenance"
TERM_S = 8.0
"""How long a leader leads without renewing its term; one that is killed is replaced after that."""
RENEWAL_INTERVAL_S = 2.5
LONGEST_JITTER_S = 1.5
"""How much later than the end of a leader's term another process looks, so that not all of them look at once."""


class Leadership:
    """Takes the leadership when it is free, and renews it. Used by one thread; `is_held` by any."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns seconds that pass steadily."""
        self._database = database
        self._clock = clock
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._held_until = float("-inf")
        self._look_at = float("-inf")

    @property
    def is_held(self) -> bool:
        """Whether this process leads now. What it begins later must ask again."""
        return self._clock() < self._held_until

    def seek(self) -> bool:
        """Take or renew the leadership if it is time to, and return whether this process leads.

        Raises `DatabaseError`.
        """
        asked_at = self._clock()
        if asked_at < self._look_at:
            return self.is_held
        if not self.is_held and not self._is_free(asked_at):
            return False
        with self._database.write() as transaction:
            taken = leadership.take(transaction, WORK, self.holder, TERM_S) or self._follow_clock(transaction)
        if not taken:
            self.lose()
            return False
        if not self.is_held:
            log.info("maintenance.leading", holder=self.holder)
        # Counted from before the database was asked, so that the term never ends later here than there.
        self._held_until = asked_at + TERM_S
        self._look_at = asked_at + RENEWAL_INTERVAL_S
        return True

    def lose(self) -> None:
        """Stop leading, because the database names another leader."""
        if self.is_held:
            log.warning("maintenance.leadership_lost", holder=self.holder)
        self._held_until = float("-inf")

    def resign(self) -> None:
        """Stop leading, and let another process lead. Raises `DatabaseError`."""
        if self.is_held:
            self._held_until = float("-inf")
            with self._database.write() as transaction:
                leadership.resign(transaction, WORK, self.holder)

    def _follow_clock(self, transaction: Transaction) -> bool:
        """Take the leadership if nobody could because the database's clock was set back; return whether it is so.

        Everything else that waits for a time is brought forward with it.
        """
        set_back_s = leadership.end_term_of_another_time(transaction, WORK, TERM_S)
        if not set_back_s:
            return False
        log.warning("maintenance.clock_set_back", set_back_s=round(set_back_s))
        recovery.follow_clock(transaction, set_back_s)
        return leadership.take(transaction, WORK, self.holder, TERM_S)

    def _is_free(self, asked_at: float) -> bool:
        """Return whether nobody leads, or only by a term from before a clock was set back.

        If somebody does, do not look again before that term is over.
        """
        with self._database.read() as transaction:
            remaining_s = leadership.remaining_s(transaction, WORK)
        if not 0 < remaining_s <= TERM_S + leadership.CLOCK_TOLERANCE_S:
            return True
        self._look_at = asked_at + remaining_s + random.uniform(0, LONGEST_JITTER_S)
        return False
