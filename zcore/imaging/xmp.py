"""One text in a picture's XMP packet, and back: how JPEG, WebP and AVIF carry what PNG has its own chunks for.

Takes any text that UTF-8 can hold; gives a packet of RDF/XML (ISO 16684-1) with the text as the one property of our own
namespace, and reads it back from such a packet. A JPEG segment ends at 64 KiB, so a larger packet goes into several, by
the rule that XMP has for it (ExtendedXMP; XMP Specification Part 3, 1.1.3.1). Does not know what the text says.
"""

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.sax.saxutils import escape

NAMESPACE = "urn:zimage:parameters:1#"
NOTE_NAMESPACE = "http://ns.adobe.com/xmp/note/"
PROPERTY = f"{{{NAMESPACE}}}parameters"
EXTENDED_BY = f"{{{NOTE_NAMESPACE}}}HasExtendedXMP"

PACKET_BYTES_IN_JPEG = 65_502
EXTENSION_MARK = b"http://ns.adobe.com/xmp/extension/\0"
EXTENSION_BYTES = 65_400
"""Of the packet, in one segment; what the specification recommends."""

APP1 = b"\xff\xe1"


@dataclass(frozen=True, slots=True)
class JpegPacket:
    """A packet as a JPEG file holds it: `main` in the usual segment, `extensions` as whole segments beside it."""

    main: bytes
    extensions: bytes


def packet(text: str) -> bytes:
    """The packet that says `text`. Characters that XML cannot hold have to be escaped by the caller."""
    return _packet("zimage:parameters", NAMESPACE, text)


def text_in(content: bytes, segments: Iterable[bytes] = ()) -> str | None:
    """What a packet says; None where it is not ours, or broken.

    `segments` are the contents of a JPEG file's APP1 segments, for a packet that goes on in them.
    """
    text = _property(content, PROPERTY)
    if text is not None:
        return text
    digest = _property(content, EXTENDED_BY)
    return _property(_extension(digest, segments), PROPERTY) if digest is not None else None


def split_for_jpeg(content: bytes) -> JpegPacket:
    """A packet of any size, as JPEG segments can hold it."""
    if len(content) <= PACKET_BYTES_IN_JPEG:
        return JpegPacket(content, b"")
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest().upper()
    segments: list[bytes] = []
    for offset in range(0, len(content), EXTENSION_BYTES):
        part = content[offset : offset + EXTENSION_BYTES]
        payload = EXTENSION_MARK + digest.encode() + struct.pack(">II", len(content), offset) + part
        segments.append(APP1 + struct.pack(">H", 2 + len(payload)) + payload)
    return JpegPacket(_packet("xmpNote:HasExtendedXMP", NOTE_NAMESPACE, digest), b"".join(segments))


def _packet(name: str, namespace: str, text: str) -> bytes:
    prefix = name.partition(":")[0]
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" xmlns:{prefix}="{namespace}">'
        f"<{name}>{escape(text)}</{name}>"
        "</rdf:Description></rdf:RDF></x:xmpmeta>"
        '<?xpacket end="r"?>'
    ).encode()


def _property(content: bytes, name: str) -> str | None:
    """A property by its name: an element, or an attribute, which is how other programs may write it anew."""
    try:
        document = content.decode().strip("\0 \r\n\t")
        if "<!" in document:
            return None  # no packet needs a document type, and its entities could grow without bound
        for element in ElementTree.fromstring(document).iter():
            found = element.text if element.tag == name else element.get(name)
            if found is not None:
                return found
    except (UnicodeDecodeError, ElementTree.ParseError):
        pass
    return None


def _extension(digest: str, segments: Iterable[bytes]) -> bytes:
    """The packet with this MD5 out of its segments, in whatever order they came; empty where it is not whole."""
    head = EXTENSION_MARK + digest.encode()
    body = len(head) + 4  # behind the whole packet's length
    parts = sorted(segment[body:] for segment in segments if segment.startswith(head))  # each begins with its offset
    whole = b"".join(part[4:] for part in parts)
    return whole if hashlib.md5(whole, usedforsecurity=False).hexdigest().upper() == digest else b""
