"""Leadership: of several processes that could do the same work, one does it.

Takes a `Transaction`. A row for each kind of work names the process that leads, and until when; no connection holds a
lock, so this works on SQLite and behind a connection pooler. A leader that is suspended for longer than its term may
overlap with the next one: what leaders do must stay correct then. Does not commit.
"""

from sqlalchemy import delete, select

from zcore.jobs.database import Transaction
from zcore.jobs.models import Leader

CLOCK_TOLERANCE_S = 10.0
"""How far apart the times of transactions may be that overlap. A term that lasts longer by more than this began before
the database's clock was set back."""


def take(transaction: Transaction, work: str, holder: str, term_s: float) -> bool:
    """Make `holder` the leader for `term_s` seconds from now, if it already is or the last leader's term is over.

    Returns whether it leads. Nobody does while the row has a term that began before the database's clock was set back.
    """
    until = transaction.time(term_s)
    statement = transaction.insert(Leader).values(work=work, holder=holder, until=until)
    taken = transaction.session.scalars(
        statement.on_conflict_do_update(
            index_elements=[Leader.work],
            set_={"holder": holder, "until": until},
            where=((Leader.holder == holder) | (Leader.until <= transaction.time()))
            & (Leader.until <= transaction.time(term_s + CLOCK_TOLERANCE_S)),
        ).returning(Leader.work)
    ).one_or_none()
    return taken is not None


def remaining_s(transaction: Transaction, work: str) -> float:
    """Return how long the current leader's term still lasts, in seconds; at most 0 if nobody leads."""
    row = transaction.session.execute(select(Leader.until, transaction.time()).where(Leader.work == work)).one_or_none()
    return 0.0 if row is None else (row[0] - row[1]).total_seconds()


def end_term_of_another_time(transaction: Transaction, work: str, term_s: float) -> float:
    """End a term that began before the database's clock was set back.

    Returns by how many seconds it was set back at least; 0 if there is no such term.
    """
    last = transaction.session.scalar(select(Leader).where(Leader.work == work).with_for_update())
    set_back_s = 0.0 if last is None else (last.until - transaction.now).total_seconds() - term_s
    if last is None or set_back_s <= CLOCK_TOLERANCE_S:
        return 0.0
    transaction.session.delete(last)
    transaction.session.flush()
    return set_back_s


def resign(transaction: Transaction, work: str, holder: str) -> None:
    """End the term of `holder` now, if it leads."""
    transaction.session.execute(delete(Leader).where(Leader.work == work, Leader.holder == holder))
