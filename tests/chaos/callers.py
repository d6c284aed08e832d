"""Independent callers: submit under an Idempotency-Key until answered, poll until the end, sometimes cancel.

Some jobs start from an upload or from an earlier image of the same caller. A journal records what they see.
"""

import asyncio
import hashlib
import io
import random
import time
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx
from PIL import Image

from tests.chaos.facts import Accepted, Answer, Kind, Seen
from tests.chaos.stand_in_worker import KILLS, RAISES
from zcore.jobs.states import TERMINAL, State

PROMPTS = {Kind.KILLS: KILLS, Kind.RAISES: RAISES}
FORMATS = ("png", "jpeg", "webp")
TIMEOUT_S = 90.0
"""Longer than any request may take, so that a request that takes too long is seen."""
HIGHEST_PRIORITY = 10


@dataclass
class Journal:
    """What all callers of a run saw, in order."""

    accepted: list[Accepted] = field(default_factory=list[Accepted])
    answers: list[Answer] = field(default_factory=list[Answer])
    seen: list[Seen] = field(default_factory=list[Seen])
    cancellations: set[str] = field(default_factory=set[str])
    downloads: list[tuple[str, bool]] = field(default_factory=list[tuple[str, bool]])


@dataclass(frozen=True)
class Mix:
    """Which jobs the callers submit: the share of each kind other than plain ones, of webhooks, of cancellations."""

    from_upload: float = 0.1
    from_output: float = 0.1
    kills: float = 0.0
    raises: float = 0.0
    webhooks: float = 0.8
    cancellations: float = 0.05

    def choose(self, source: random.Random) -> Kind:
        """Return the kind of the next job."""
        kinds = [Kind.FROM_UPLOAD, Kind.FROM_OUTPUT, Kind.KILLS, Kind.RAISES]
        shares = [self.from_upload, self.from_output, self.kills, self.raises]
        return source.choices([*kinds, Kind.PLAIN], [*shares, 1 - sum(shares)])[0]


CALM_MIX = Mix()


@dataclass(frozen=True)
class Recovery:
    """How long after a fault a new job was accepted, and had succeeded, in seconds."""

    accepted_s: float
    succeeded_s: float


class Caller:
    """One caller with one API key and one pool of connections."""

    def __init__(
        self,
        url: str,
        key: str,
        journal: Journal,
        source: random.Random,
        webhook_url: str,
        mix: Mix,
        pooled: bool = True,
    ) -> None:
        self._journal = journal
        self._random = source
        self._webhook_url = webhook_url
        self._mix = mix
        self._uploads: list[str] = []
        self._images: list[str] = []
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={"authorization": f"Bearer {key}"},
            timeout=TIMEOUT_S,
            trust_env=False,
            limits=httpx.Limits(max_keepalive_connections=None if pooled else 0),
        )

    async def run(self, stopped: asyncio.Event, pause_s: float) -> None:
        """Submit one job after another until `stopped` is set, and see each to its end."""
        async with self._client:
            while not stopped.is_set():
                await self.one_job(self._mix.choose(self._random))
                await asyncio.sleep(self._random.uniform(0, 2 * pause_s))

    async def probe(self) -> Recovery:
        """Submit a job of the highest priority and see it to its end, each request on a connection of its own."""
        began = time.monotonic()
        async with self._client:
            body = {"prompt": "probe", "width": 64, "height": 64, "steps": 1, "priority": HIGHEST_PRIORITY}
            job_id = await self._submit({**body, "n": 1, "metadata": {}}, Kind.PLAIN)
            accepted_s = time.monotonic() - began
            if job_id is not None:
                await self._until_ended(job_id)
            return Recovery(accepted_s, time.monotonic() - began)

    async def one_job(self, kind: Kind) -> None:
        """Submit a job and see it to its end."""
        body = await self._body(kind)
        job_id = await self._submit(body, kind)
        if job_id is None:
            return
        if self._random.random() < self._mix.cancellations:
            await asyncio.sleep(self._random.uniform(0, 1))
            self._journal.cancellations.add(job_id)
            await self._until_answered("POST", f"/api/jobs/{job_id}/cancel", "cancel")
        job = await self._until_ended(job_id)
        if job["status"] == State.SUCCEEDED:
            self._images += [f"output:{job_id}/{output['index']}" for output in job["outputs"]]
            if self._random.random() < 0.2:
                await self._download(job)

    async def _body(self, kind: Kind) -> dict[str, Any]:
        body: dict[str, Any] = {
            "prompt": PROMPTS.get(kind, f"a circle, {uuid4().hex}"),
            "width": 64,
            "height": 64,
            "steps": self._random.randint(2, 8),
            "n": self._random.choice((1, 1, 1, 2, 4)),
            "format": self._random.choice(FORMATS),
            "priority": self._random.choice((0, 0, 0, -1, 1)),
            "metadata": {"note": uuid4().hex},
        }
        if self._random.random() < self._mix.webhooks:
            body["webhook_url"] = self._webhook_url
        if kind is Kind.FROM_UPLOAD:
            body["image"] = await self._upload()
        if kind is Kind.FROM_OUTPUT and self._images:
            body["image"] = self._random.choice(self._images)
        return body

    async def _upload(self) -> str:
        if self._uploads and self._random.random() < 0.5:
            return self._random.choice(self._uploads)
        file = io.BytesIO()
        color = tuple(self._random.randrange(256) for _ in range(3))
        Image.new("RGB", (64, 64), color).save(file, "png")
        answer = await self._until_answered(
            "POST", "/api/inputs", "upload", content=file.getvalue(), headers={"content-type": "image/png"}
        )
        self._uploads.append(answer.json()["id"])
        return self._uploads[-1]

    async def _submit(self, body: dict[str, Any], kind: Kind) -> str | None:
        key, began = uuid4().hex, time.monotonic()
        answer = await self._until_answered(
            "POST", "/api/generate", "submit", json=body, headers={"idempotency-key": key}
        )
        if not answer.is_success:
            return None
        job = answer.json()
        replayed = "idempotency-replayed" in answer.headers
        took_s = time.monotonic() - began
        self._journal.accepted.append(
            Accepted(job["id"], key, kind, body["n"], took_s, replayed, "webhook_url" in body)
        )
        assert job["metadata"] == body["metadata"], "another job was returned"
        return str(job["id"])

    async def _until_ended(self, job_id: str) -> dict[str, Any]:
        while True:
            answer = await self._until_answered("GET", f"/api/jobs/{job_id}", "get")
            if not answer.is_success:
                return {"status": None}
            job: dict[str, Any] = answer.json()
            self._journal.seen.append(Seen(job_id, job["status"]))
            if job["status"] in TERMINAL:
                return job
            await asyncio.sleep(self._random.uniform(0.3, 1.0))

    async def _download(self, job: dict[str, Any]) -> None:
        output = self._random.choice(job["outputs"])
        try:
            async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
                answer = await client.get(output["url"])
        except httpx.TransportError:
            return  # the bucket is unreachable at this moment; every object is read at the end of the run
        if answer.status_code == 200:
            same = hashlib.sha256(answer.content).hexdigest() == output["sha256"]
            self._journal.downloads.append((job["id"], same))

    async def _until_answered(self, method: str, path: str, route: str, **request: Any) -> httpx.Response:
        """Repeat a request until it is answered with anything but 429 or an error of the service."""
        pause_s = 0.2
        while True:
            began = time.monotonic()
            try:
                answer = await self._client.request(method, path, **request)
            except httpx.TransportError as fault:
                self._note(route, 0, "", began, type(fault).__name__)
            else:
                media_type = answer.headers.get("content-type", "").partition(";")[0]
                detail = "" if answer.is_success else answer.text[:200]
                self._note(route, answer.status_code, media_type, began, detail)
                if answer.status_code < 500 and answer.status_code != 429:
                    return answer
            await asyncio.sleep(self._random.uniform(0.5, 1) * pause_s)
            pause_s = min(2 * pause_s, 2.0)

    def _note(self, route: str, status: int, media_type: str, began: float, detail: str) -> None:
        self._journal.answers.append(Answer(route, status, media_type, time.monotonic() - began, detail))
