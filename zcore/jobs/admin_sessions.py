"""The open sessions of the admin pages: all API processes see at once that one was ended.

A session's cookie names its row and states when it ends; the row exists so that signing out also ends copies of the
cookie. Knows neither keys nor cookies.
"""

import uuid
from datetime import timedelta

from sqlalchemy import delete

from zcore.jobs.database import Transaction
from zcore.jobs.models import AdminSession


def start(transaction: Transaction, lifetime_s: float) -> uuid.UUID:
    """Open a session and return its id; delete those whose lifetime has passed."""
    transaction.session.execute(delete(AdminSession).where(AdminSession.ends_at < transaction.now))
    session = AdminSession(id=uuid.uuid4(), ends_at=transaction.now + timedelta(seconds=lifetime_s))
    transaction.session.add(session)
    return session.id


def is_open(transaction: Transaction, session_id: uuid.UUID) -> bool:
    """Return whether the session was started and not ended, and its lifetime has not passed."""
    found = transaction.session.get(AdminSession, session_id)
    return found is not None and found.ends_at > transaction.now


def end(transaction: Transaction, session_id: uuid.UUID) -> None:
    """End a session. Does nothing if there is none."""
    transaction.session.execute(delete(AdminSession).where(AdminSession.id == session_id))
