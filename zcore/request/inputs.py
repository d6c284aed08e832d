"""Addresses of input images (`image`, `mask`) and other web URLs of a request, parsed once.

Other modules match on the types `Upload`, `JobOutput`, `WebUrl` and `LocalInput` instead of on the text.
"""

import re
import uuid
from dataclasses import dataclass
from urllib.parse import urlsplit

import idna

INPUT_FIELDS = ("image", "mask")
"""Fields of a request that hold the address of an image."""

LOCAL_PREFIX = "given:"
"""Prefix of the address of an image that a program passes in memory; the rest is its name."""

_UPLOAD = re.compile(r"input:([0-9a-f]{64})")
_JOB_OUTPUT = re.compile(r"output:([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/([0-9]{1,2})")
_ASCII_HOST = re.compile(r"(?!.{254})[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Upload:
    """A previously uploaded file, by the SHA-256 of its bytes in hexadecimal: `input:SHA256`."""

    sha256: str

    def __str__(self) -> str:
        return f"input:{self.sha256}"


@dataclass(frozen=True, slots=True)
class JobOutput:
    """An image that an earlier job of the same caller generated, counted from 0: `output:JOB/INDEX`."""

    job_id: uuid.UUID
    index: int

    def __str__(self) -> str:
        return f"output:{self.job_id}/{self.index}"


@dataclass(frozen=True, slots=True)
class WebUrl:
    """An absolute http or https URL without user and password, exactly as the caller wrote it."""

    url: str

    @property
    def is_https(self) -> bool:
        """Whether the scheme is https."""
        return self.url.lower().startswith("https:")

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True, slots=True)
class LocalInput:
    """An image that a program passes in memory alongside the request: `given:NAME`."""

    name: str

    def __str__(self) -> str:
        return f"{LOCAL_PREFIX}{self.name}"


InputAddress = Upload | JobOutput | WebUrl | LocalInput


def parse_input_address(text: str) -> InputAddress | None:
    """Parse the address in `image` or `mask`; None if it has none of the four forms."""
    if upload := _UPLOAD.fullmatch(text):
        return Upload(upload[1])
    if output := _JOB_OUTPUT.fullmatch(text):
        return JobOutput(uuid.UUID(output[1]), int(output[2]))
    if text.startswith(LOCAL_PREFIX):
        return LocalInput(text.removeprefix(LOCAL_PREFIX))
    return parse_web_url(text)


def parse_web_url(text: str) -> WebUrl | None:
    """Parse an absolute http or https URL; None for anything else.

    A URL with a user, a password, port 0 or an invalid host name is refused too.
    """
    if " " in text or not text.isprintable():
        return None  # urlsplit silently drops some of these characters
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None or port == 0:
        return None
    return None if ascii_host(parts.hostname) is None else WebUrl(text)


def blank_fault(text: str) -> str | None:
    """Return what is wrong with a web address that contains a blank; None if it contains none."""
    blank = next((index for index, one in enumerate(text) if one.isspace()), None)
    return None if blank is None else f"must not contain a blank, as after `{text[:blank][-40:]}`; write it as %20"


def ascii_host(host: str) -> str | None:
    """Return a URL's host in ASCII, as browsers resolve it; None if it is not a valid name.

    Names with other characters are encoded by UTS 46 without transitional mapping (`straße.example` is
    `xn--strae-oqa.example`, not `strasse.example`). IPv6 addresses are returned unchanged.
    """
    if ":" in host:
        return host
    if host.isascii() and "xn--" not in host.lower():
        # IDNA 2008 refuses underscores and `--` in the third place of ASCII names, which exist nevertheless.
        return host if _ASCII_HOST.fullmatch(host) else None
    try:
        return idna.encode(host, uts46=True, transitional=False).decode("ascii")
    except idna.IDNAError:
        return None
