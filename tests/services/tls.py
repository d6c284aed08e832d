"""HTTPS servers with certificates of a private authority: one that records requests, and TLS in front of any server."""

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import certifi
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PIECE_BYTES = 65_536
VALID = timedelta(days=1)
HOST = "receiver.example"
"""A name that leads to the loopback interface while `resolve_host` is in force."""


class Authority:
    """A certificate authority that exists for one test run; `certificate` is the file that its clients trust."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        identifier = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        self._issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
        own = (
            _unsigned(self._name, self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate = folder / f"{name}.pem"
        self.certificate.write_bytes(own.public_bytes(serialization.Encoding.PEM))

    def server_context(self, host: str) -> ssl.SSLContext:
        """Return the context of a server that holds a certificate for `host`."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _unsigned(_named(host), self._name, key)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(self._issuer, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        file = self._folder / f"{self.certificate.stem}-{host}.pem"
        private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        file.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, *private)
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context


def resolve_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `HOST` resolve to 127.0.0.1 in this process."""
    resolve: Callable[..., Any] = socket.getaddrinfo

    def resolving(host: Any, *arguments: Any, **options: Any) -> Any:
        return resolve("127.0.0.1" if host == HOST else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolving)


def trust_only(monkeypatch: pytest.MonkeyPatch, authority: Authority) -> None:
    """Make `authority` the only one that httpx trusts, in place of those that certifi lists."""
    monkeypatch.setattr(certifi, "where", lambda: str(authority.certificate))


@dataclass(frozen=True)
class TlsEndpoint:
    """A port that speaks TLS, and the server names (SNI) that clients asked for."""

    port: int
    names: list[str | None]


@contextmanager
def tls_in_front_of(port: int, context: ssl.SSLContext) -> Iterator[TlsEndpoint]:
    """Terminate TLS on a new loopback port and pass the bytes on to `port`."""
    names: list[str | None] = []
    # Returning None accepts the name.
    context.sni_callback = lambda _object, name, _context: names.append(name)
    started = threading.Event()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = []

    async def connected(near: asyncio.StreamReader, to_near: asyncio.StreamWriter) -> None:
        far, to_far = await asyncio.open_connection("127.0.0.1", port)
        try:
            await asyncio.gather(_pass_on(near, to_far), _pass_on(far, to_near))
        finally:
            for writer in (to_near, to_far):
                writer.transport.abort()

    async def serve() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=context)
        ending = asyncio.Event()
        running.append((asyncio.get_running_loop(), ending, server.sockets[0].getsockname()[1]))
        started.set()
        async with server:
            await ending.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="tls")
    thread.start()
    started.wait()
    loop, ending, own_port = running[0]
    try:
        yield TlsEndpoint(own_port, names)
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join()


@dataclass(frozen=True)
class HttpsServer:
    """A server on the loopback interface that answers every request with 200, and what it has received so far."""

    port: int
    names: list[str | None]
    hosts: list[str]
    bodies: list[bytes]


@contextmanager
def https_server(context: ssl.SSLContext, answer: bytes = b"") -> Iterator[HttpsServer]:
    """Run an HTTPS server whose answers have `answer` as their body."""
    hosts: list[str] = []
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            hosts.append(self.headers["host"])
            bodies.append(self.rfile.read(int(self.headers.get("content-length", 0))))
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            with tls_in_front_of(server.server_address[1], context) as endpoint:
                yield HttpsServer(endpoint.port, endpoint.names, hosts, bodies)
        finally:
            server.shutdown()
            thread.join()


async def _pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Copy until one side ends; TLS has no half-closed connections, so the other direction ends with it."""
    with contextlib.suppress(OSError):
        while piece := await source.read(PIECE_BYTES):
            sink.write(piece)
            await sink.drain()
    sink.close()
    with contextlib.suppress(OSError):
        await sink.wait_closed()


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _unsigned(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - VALID)
        .not_valid_after(now + VALID)
        .add_extension(identifier, critical=False)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
