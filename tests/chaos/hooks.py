"""The callers' webhook receiver: verifies each webhook as it arrives; can answer an error, or hang.

Like any receiver it refuses one whose timestamp is too far from its own clock, and expects it again later.
"""

import asyncio
import json
import time

from standardwebhooks import Webhook, WebhookVerificationError

from tests.acceptance.installation import WEBHOOK_SECRET
from tests.chaos.facts import Delivery
from tests.chaos.network import Loop, http_answer

TOLERANCE_S = 300.0


class Hooks:
    """What the receiver accepted; what it refused or left unanswered is no delivery."""

    def __init__(self, loop: Loop) -> None:
        self.deliveries: list[Delivery] = []
        self._loop = loop
        self._status = 200
        self._normal = asyncio.Event()
        self._normal.set()
        self._server = loop.run(asyncio.start_server(self._connected, "127.0.0.1", 0))
        loop.at_end(self._server.close)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/hook"

    def answer(self, status: int) -> None:
        """Answer with this status from now on; 200 is normal."""
        self._loop.run(self._behave(status, hangs=False))

    def hang(self) -> None:
        """Accept connections and leave every request without an answer from now on."""
        self._loop.run(self._behave(200, hangs=True))

    async def _behave(self, status: int, hangs: bool) -> None:
        self._status = status
        if hangs:
            self._normal.clear()
        else:
            self._normal.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lines = [line.partition(":") for line in head.split("\r\n")[1:] if line]
            headers = {name.lower(): value.strip() for name, _, value in lines}
            body = await reader.readexactly(int(headers["content-length"]))
            if not self._normal.is_set():
                await self._normal.wait()
            elif not _is_timely(headers):
                writer.write(http_answer(400, "Bad Request", b"this timestamp is not now"))
            elif self._status == 200:
                self.deliveries.append(_delivery(headers, body))
                writer.write(http_answer(200, "OK"))
            else:
                writer.write(http_answer(self._status, "Unavailable"))
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def _is_timely(headers: dict[str, str]) -> bool:
    return abs(time.time() - float(headers["webhook-timestamp"])) < TOLERANCE_S


def _delivery(headers: dict[str, str], body: bytes) -> Delivery:
    try:
        Webhook(WEBHOOK_SECRET).verify(body, headers)
        signed = True
    except WebhookVerificationError:
        signed = False
    event = json.loads(body)
    return Delivery(headers["webhook-id"], event["data"]["id"], event["type"], signed)
