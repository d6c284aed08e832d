"""Whether an expired lease proves that a worker was lost, or the database was away and nobody could renew it."""

from collections.abc import Callable

SETTLING_S = 10.0
"""How long after an outage a worker that lives may take to renew its lease: a renewal that hangs, and the next one."""


class Outages:
    """The outages of the database as this process saw them. Used by one thread."""

    def __init__(self, lease_s: float, clock: Callable[[], float]) -> None:
        """`clock` returns seconds that pass steadily.

        A worker renews its lease for the last time that counts two thirds of `lease_s` before the end, and repeats
        that: so an outage of less than a third costs no lease.
        """
        self._shortest_s = lease_s / 3
        self._clock = clock
        self._answered_at = clock()
        self._is_away = False
        self._settled_at = float("-inf")

    def note_answer(self) -> None:
        """The database has just answered."""
        now = self._clock()
        if self._is_away and now - self._answered_at >= self._shortest_s:
            self._settled_at = now + SETTLING_S
        self._is_away = False
        self._answered_at = now

    def note_failure(self) -> None:
        """The database has just not answered."""
        self._is_away = True

    @property
    def excuse_losses(self) -> bool:
        """Whether a lease may have expired because of an outage."""
        return self._is_away or self._clock() < self._settled_at
