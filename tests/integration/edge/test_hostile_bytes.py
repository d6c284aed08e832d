"""No bytes that a client can send make the server fail: every answer is below 500 and has the form of this service."""

import json

import httpx
import msgspec
import pytest

from server.schemas import Problem
from tests.integration.edge.conftest import KEY, Served

HOST = "Host: 127.0.0.1"
JSON = "Content-Type: application/json"
FORM = "Content-Type: application/x-www-form-urlencoded"


def raw(line: str, *headers: str, body: bytes = b"", host: str = HOST) -> bytes:
    """Return a request with the caller's key, a correct length and these headers, in Latin-1."""
    sent = [host, f"Authorization: Bearer {KEY}", *headers]
    if body:
        sent.append(f"Content-Length: {len(body)}")
    lines = [f"{line} HTTP/1.1", *(one for one in sent if one), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def get(path: str, *headers: str, host: str = HOST) -> bytes:
    return raw(f"GET {path}", *headers, host=host)


def post(path: str, body: bytes, *headers: str) -> bytes:
    return raw(f"POST {path}", *(headers or (JSON,)), body=body)


def multipart(body: bytes, boundary: str = "x") -> bytes:
    return post("/admin/sign-in", body, f"Content-Type: multipart/form-data; boundary={boundary}")


# Requests that are answered with a problem below 500.
REFUSED = {
    "invalid UTF-8 in a value": post("/api/generate", b'{"prompt":"\xff"}'),
    "invalid UTF-8 in a key": post("/api/generate", b'{"\xff":"x"}'),
    "invalid UTF-8 in a preview": post("/api/format-prompt", b'{"prompt":"\xc3\x28"}'),
    "a surrogate in UTF-8": post("/api/generate", b'{"prompt":"\xed\xa0\x80"}'),
    "an escaped lone surrogate": post("/api/generate", b'{"prompt":"\\ud800"}'),
    "UTF-16": post("/api/generate", '{"prompt":"x"}'.encode("utf-16")),
    "a byte order mark": post("/api/generate", b'\xef\xbb\xbf{"prompt":"x"}'),
    "an array": post("/api/generate", b"[]"),
    "no body": raw("POST /api/generate", JSON),
    "deep nesting": post("/api/generate", b'{"prompt":' + b"[" * 100_000),
    "deep nesting in an ignored place": post("/api/format-prompt", b'{"metadata":' + b'{"a":' * 5000 + b"1"),
    "an integer of 5000 digits": post("/api/generate", b'{"prompt":"x","seed":' + b"9" * 5000 + b"}"),
    "a number beyond doubles": post("/api/generate", b'{"prompt":"x","shift":1e400}'),
    "an integer beyond 64 bits": post("/api/generate", b'{"prompt":"x","steps":1e300}'),
    "a NUL in a prompt": post("/api/generate", b'{"prompt":"a\\u0000b"}'),
    "ten thousand unknown fields": post("/api/generate", json.dumps({f"k{i}": 0 for i in range(10_000)}).encode()),
    "a compressed body": post("/api/generate", b"\x1f\x8b\x08", JSON, "Content-Encoding: gzip"),
    "no media type": post("/api/generate", b"{}", "X: y"),
    "a media type of punctuation": post("/api/generate", b"{}", "Content-Type: ;;;/;="),
    "a media type in Latin-1": post("/api/generate", b"{}", "Content-Type: \xff\xfe"),
    "a charset that does not exist": post("/api/generate", b'{"prompt": 1}', f"{JSON}; charset=klingon"),
    "an empty idempotency key": post("/api/generate", b'{"prompt":"x"}', JSON, 'Idempotency-Key: ""'),
    "a long idempotency key": post("/api/generate", b'{"prompt":"x"}', JSON, f"Idempotency-Key: {'k' * 256}"),
    "an image that is none": post("/api/inputs", b"\x89PNG", "Content-Type: image/png"),
    "an empty image": raw("POST /api/inputs", "Content-Type: image/png"),
    "a form at an upload": post("/api/inputs", b"a=b", FORM),
    "an unclosed host": get("/api/jobs", host="Host: [::1"),
    "a host that is no address": get("/api/jobs", host="Host: [x]"),
    "a host with two ports": get("/api/jobs", host="Host: a:b:c"),
    "a port out of range": get("/api/jobs", host="Host: x:99999999"),
    "a port beyond 65535": get("/api/jobs", host="Host: x:65536"),
    "a host with a user": get("/api/jobs", host="Host: user@localhost"),
    "a host with a path": get("/api/jobs", host="Host: localhost/x"),
    "a host in Latin-1": get("/api/jobs", host="Host: \xe4"),
    "two hosts": get("/api/jobs", "Host: localhost"),
    "no host": get("/api/jobs", host=""),
    "an odd host at the health check": get("/health/live", host="Host: [::1"),
    "an odd host at an unknown path": get("/nowhere", host="Host: ]["),
    "an odd host at a missing parameter": get("/files/a", host="Host: x:y"),
    "a path of invalid UTF-8": get("/api/jobs/%ff"),
    "a path with a NUL": get("/api/templates/%00"),
    "a path with a line end": get("/api/templates/%0d%0ax:y"),
    "a broken escape": get("/api/templates/%zz"),
    "a long path": get("/api/templates/" + "x" * 60_000),
    "a position of 5000 digits": get(f"/api/jobs/01920000-0000-7000-8000-000000000000/outputs/{'9' * 5000}"),
    "a signed link without its parameters": get("/files/jobs/x"),
    "a signed link with a huge time": get(f"/files/jobs/x?expires={'9' * 5000}&signature=x"),
    "a signed link with a NUL": get("/files/%00?expires=1&signature=%00"),
    "a query of invalid UTF-8": get("/api/jobs?text=%ff&status=%ff"),
    "a query with a NUL": get("/api/jobs?text=%00"),
    "a query of separators": get("/api/jobs?&&==&=x&"),
    "thousands of parameters": get("/api/jobs?" + "&".join(f"a{i}" for i in range(10_000))),
    "a time at the edge of the calendar": get("/api/jobs?created_from=0001-01-01T00:00%2B23:59"),
    "a cursor of invalid base64": get("/api/jobs?cursor=%ff%fe"),
    "a key in Latin-1": raw("GET /api/jobs", host=HOST).replace(KEY.encode(), b"\xff\xfe"),
    "an authorization without a key": raw("GET /api/jobs").replace(f"Bearer {KEY}".encode(), b"Bearer"),
    "an unknown page of the description": get("/schema/swagger"),
    "a proxy's request": raw("GET http://[::1/api/jobs"),
    "a tunnel": raw("CONNECT localhost:80"),
    "an unknown method": raw("BREW /api/jobs"),
    "a line that is not HTTP": b"hello\r\n\r\n",
    "a TLS handshake": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
    "HTTP/2 without an upgrade": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "two lengths": raw("POST /api/generate", JSON, "Content-Length: 2", "Content-Length: 3"),
    "a length and chunks": raw("POST /api/generate", JSON, "Content-Length: 2", "Transfer-Encoding: chunked"),
    "a negative length": raw("POST /api/generate", JSON, "Content-Length: -1"),
    "a chunk of letters": raw("POST /api/generate", JSON, "Transfer-Encoding: chunked") + b"zz\r\n",
    "a header without a name": raw("GET /api/jobs", ": x"),
    "a header with a NUL": raw("GET /api/jobs", "X: a\0b"),
    "a header of 100 kB": raw("GET /api/jobs", f"X: {'x' * 100_000}"),
}
# Requests to the admin's pages, whose errors are pages, and requests that are answered with success.
ANSWERED = {
    "a form without a boundary": post("/admin/sign-in", b"key=x", "Content-Type: multipart/form-data"),
    "a form with another boundary": multipart(b"--y\r\n\r\n--y--\r\n"),
    "a form that ends early": multipart(b'--x\r\nContent-Disposition: form-data; name="key"\r\n\r\nabc'),
    "a part without a name": multipart(b"--x\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--x--\r\n"),
    "a part without headers": multipart(b"--x\r\n\r\nabc\r\n--x--\r\n"),
    "a part with a huge header": multipart(b"--x\r\nA: " + b"a" * 10_000 + b"\r\n\r\nabc\r\n--x--\r\n"),
    "a part in an unknown charset": multipart(
        b'--x\r\nContent-Disposition: form-data; name="key"\r\nContent-Type: text/plain; charset=klingon\r\n\r\n'
        b"\xff\r\n--x--\r\n"
    ),
    "a key as a file": multipart(
        b'--x\r\nContent-Disposition: form-data; name="key"; filename="f"\r\n\r\nabc\r\n--x--\r\n'
    ),
    "thousands of parts": multipart(
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * 200 + b"--x--\r\n"
    ),
    "a boundary in Latin-1": multipart(b"x", "\xff"),
    "a form of invalid UTF-8": post("/admin/sign-in", b"key=%ff&form_token=\xff", FORM),
    "a form of separators": post("/admin/sign-in", b"&&==&;%", FORM),
    "a form that is JSON": post("/admin/sign-in", b'{"key": "\xff"}'),
    "a cookie of separators": get("/admin", "Cookie: ;;=;=="),
    "a cookie that is not encrypted": get("/admin", "Cookie: zimage_admin=!!!"),
    "a cookie in Latin-1": get("/admin", "Cookie: zimage_admin=\xff\xfe"),
    "a cookie in parts": get("/admin", "Cookie: zimage_admin-0=AAAA; zimage_admin-9=\xff; zimage_admin-x=1"),
    "a page with an odd host": get("/admin", host="Host: [::1"),
    "a page that does not exist": get("/admin/%ff%00"),
    "a page with odd filters": get("/admin?created_from=0001-01-01T00:00%2B23:59&status=%00&newer=%ff"),
    "an odd destination": get("/admin/jobs/%0d%0aSet-Cookie:x?y=%0d%0a"),
    "an asset that does not exist": get("/admin/assets/%2e%2e%2fx"),
    "a playground with parameters": get("/playground?utm_source=%ff"),
    "an odd request id": get("/health/live", "X-Request-Id: \xff;\x7f"),
    "odd preferences": get("/health/live", "Prefer: wait=;;,=", "Accept: ;;/;q=x", "Range: bytes=9-1"),
    "an upgrade": get("/health/live", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
    "every method of the server": raw("OPTIONS *"),
    "a request in absolute form": raw("GET http://x/health/live"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_request_is_refused_with_a_problem(served: Served, name: str) -> None:
    reply = served.send(REFUSED[name])
    assert 400 <= reply.status < 500, (reply.status, reply.body)
    assert reply.headers["content-type"].startswith("application/problem+json")
    problem = msgspec.json.decode(reply.body, type=Problem)
    assert problem.status == reply.status
    assert problem.detail
    assert problem.request_id == reply.headers["x-request-id"]
    assert len(reply.body) < 16_000, "the answer must not grow with the request"


@pytest.mark.parametrize("name", ANSWERED)
def test_an_odd_request_is_answered(served: Served, name: str) -> None:
    reply = served.send(ANSWERED[name])
    assert reply.status < 500, (reply.status, reply.body)
    assert reply.headers["x-request-id"]


def test_the_server_still_answers(client: httpx.Client) -> None:
    answer = client.get("/health/ready")
    assert answer.status_code == 200, answer.text
