"""The API while its bucket accepts connections and answers none of them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import make_url

from server.threads import MAX_WAITING_FOR_STORAGE, STORAGE_THREADS
from tests.integration.api.test_inputs import image_file
from tests.integration.broker.tcp_proxy import TcpProxy, proxy_to
from tests.integration.installation import Installation, Server, has_logged
from tests.services.postgres import Postgres
from tests.services.s3 import S3
from tests.waiting import wait_until

REFUSED = 2
UPLOADS = STORAGE_THREADS + MAX_WAITING_FOR_STORAGE + REFUSED


@dataclass(frozen=True)
class Hanging:
    """A server that was started while its bucket hung, which did not exist either."""

    server: Server
    to_bucket: TcpProxy


@pytest.fixture
def hanging(
    tmp_path_factory: pytest.TempPathFactory, postgres: Postgres, migrated_template: str, s3: S3
) -> Iterator[Hanging]:
    port = make_url(s3.endpoint_url).port
    assert port is not None
    with postgres.database(migrated_template) as url, proxy_to(port) as to_bucket:
        to_bucket.hold()
        given = {
            "database.url": url,
            "storage.bucket": f"test-{uuid4().hex}",
            "storage.endpoint_url": f"http://127.0.0.1:{to_bucket.port}",
            "storage.access_key_id": s3.access_key_id,
            "storage.secret_access_key": s3.secret_access_key,
            "storage.region": s3.region,
        }
        with Installation(tmp_path_factory.mktemp("hanging"), given).serving() as server:
            yield Hanging(server, to_bucket)


def upload(url: str, side: int) -> httpx.Response:
    """Upload an image that no other upload has."""
    content = image_file(size=(side, side))
    return httpx.post(f"{url}/api/inputs", content=content, headers={"content-type": "image/png"}, timeout=120)


def test_uploads_to_a_bucket_that_hangs_hold_up_no_other_request(hanging: Hanging) -> None:
    url = hanging.server.url
    assert has_logged(hanging.server.running, "storage.unreachable"), "it listens although the bucket never answered"
    with ThreadPoolExecutor(UPLOADS) as callers, httpx.Client(base_url=url, timeout=60) as client:
        uploads = [callers.submit(upload, url, 32 + index) for index in range(UPLOADS)]
        refused = wait_until(lambda: done if len(done := [one for one in uploads if one.done()]) == REFUSED else None)
        for answer in (one.result() for one in refused):
            assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
            assert int(answer.headers["retry-after"]) > 0
        job = client.post("/api/generate", json={"prompt": "a fox"}).json()
        assert client.get("/health/ready").status_code == 200
        assert client.get(f"/api/jobs/{job['id']}").json()["status"] == "queued"
        assert client.get("/api/jobs").json()["jobs"]
        assert client.get("/playground").status_code == 200
        assert sum(one.done() for one in uploads) == REFUSED, "all of this was answered while the uploads waited"
        hanging.to_bucket.plug()
        ends = {(one.result().status_code, one.result().json().get("code")) for one in uploads if one not in refused}
    assert ends <= {(201, None), (503, "storage_unavailable")}
    wait_until(lambda: upload(url, side=16).status_code == 201, timeout_s=120)  # the bucket is created when it answers
