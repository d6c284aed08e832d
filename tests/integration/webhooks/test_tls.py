"""Webhooks over https: the receiver's certificate is checked against known authorities and the name in the address."""

from pathlib import Path

import pytest

from tests.integration.webhooks.conftest import Start, attempts_of, ended_job, webhook
from tests.services.tls import HOST, Authority, HttpsServer, https_server, resolve_host, trust_only
from zcore.jobs.database import Database
from zcore.jobs.models import WebhookAttempt


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """The only authority that the worker trusts."""
    authority = Authority(tmp_path, "trusted")
    resolve_host(monkeypatch)
    trust_only(monkeypatch, authority)
    return authority


def first_attempt(database: Database, start: Start, server: HttpsServer) -> WebhookAttempt:
    """Deliver an event over https; after a failed attempt it is still due."""
    job = ended_job(database, f"https://{HOST}:{server.port}/hook")
    start(retry_schedule_s=(3600,))
    (attempt,) = attempts_of(database, job, 1)
    event, _ = webhook(database, job)
    delivered = attempt.status_code == 200
    assert (event.delivered_at is not None, event.next_attempt_at is None) == (delivered, delivered)
    return attempt


def test_a_webhook_is_delivered_to_the_name_in_its_address(
    database: Database, authority: Authority, start: Start
) -> None:
    with https_server(authority.server_context(HOST)) as server:
        attempt = first_attempt(database, start, server)
    assert attempt.status_code == 200
    (body,) = server.bodies
    assert b"job.succeeded" in body
    assert server.hosts == [f"{HOST}:{server.port}"]
    assert server.names == [HOST], "SNI carries the name although the connection is to an address"


def test_a_certificate_of_an_unknown_authority_is_refused(
    database: Database, authority: Authority, tmp_path: Path, start: Start
) -> None:
    with https_server(Authority(tmp_path, "unknown").server_context(HOST)) as server:
        attempt = first_attempt(database, start, server)
    assert attempt.status_code is None
    assert "certificate verify failed" in attempt.response_body
    assert server.bodies == []


def test_a_certificate_for_another_name_is_refused(database: Database, authority: Authority, start: Start) -> None:
    with https_server(authority.server_context("other.example")) as server:
        attempt = first_attempt(database, start, server)
    assert attempt.status_code is None
    assert "Hostname mismatch" in attempt.response_body
    assert server.bodies == []
