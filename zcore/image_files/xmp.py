"""An image's XMP packet: one text of our own, and IPTC's digital source type.

Takes any text that UTF-8 can hold; returns a packet of RDF/XML (ISO 16684-1) with the text as the only property of our
own namespace, and reads it back. A JPEG segment ends at 64 KiB, so a larger text is split over several segments
(ExtendedXMP; XMP Specification Part 3, 1.1.3.1). Does not interpret the text.
"""

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.sax.saxutils import escape

NAMESPACE = "urn:zimage:parameters:1#"
NOTE_NAMESPACE = "http://ns.adobe.com/xmp/note/"
PARAMETERS = f"{{{NAMESPACE}}}parameters"
SOURCE_TYPE = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
EXTENDED_BY = f"{{{NOTE_NAMESPACE}}}HasExtendedXMP"
PREFIXES = {PARAMETERS: "zimage", SOURCE_TYPE: "Iptc4xmpExt", EXTENDED_BY: "xmpNote"}

PACKET_BYTES_IN_JPEG = 65_502
EXTENSION_MARK = b"http://ns.adobe.com/xmp/extension/\0"
EXTENSION_BYTES = 65_400
"""Bytes of the packet per segment, as the specification recommends."""

APP1 = b"\xff\xe1"


@dataclass(frozen=True, slots=True)
class JpegPacket:
    """A packet in a JPEG file: `main` goes into the usual segment, `extensions` are complete additional segments."""

    main: bytes
    extensions: bytes


def packet(text: str | None, source_type: str | None) -> bytes:
    """Return the packet with our text and a digital source type, or with one of them.

    The caller must escape characters that XML does not allow.
    """
    properties = {PARAMETERS: text, SOURCE_TYPE: source_type}
    return _packet({name: value for name, value in properties.items() if value is not None})


def text_in(content: bytes, segments: Iterable[bytes] = ()) -> str | None:
    """Return the text of a packet, or None if the packet is not ours or is damaged.

    `segments` are the contents of a JPEG file's APP1 segments, in which a large packet continues.
    """
    text = _property(content, PARAMETERS)
    if text is not None:
        return text
    digest = _property(content, EXTENDED_BY)
    return _property(_extension(digest, segments), PARAMETERS) if digest is not None else None


def jpeg_packet(text: str, source_type: str | None) -> JpegPacket:
    """Return what `packet` does as JPEG segments. The source type is in the first one, which every reader reads."""
    whole = packet(text, source_type)
    if len(whole) <= PACKET_BYTES_IN_JPEG:
        return JpegPacket(whole, b"")
    content = packet(text, None)
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest().upper()
    segments: list[bytes] = []
    for offset in range(0, len(content), EXTENSION_BYTES):
        part = content[offset : offset + EXTENSION_BYTES]
        payload = EXTENSION_MARK + digest.encode() + struct.pack(">II", len(content), offset) + part
        segments.append(APP1 + struct.pack(">H", 2 + len(payload)) + payload)
    main = {EXTENDED_BY: digest} if source_type is None else {SOURCE_TYPE: source_type, EXTENDED_BY: digest}
    return JpegPacket(_packet(main), b"".join(segments))


def _packet(properties: Mapping[str, str]) -> bytes:
    declarations, elements = "", ""
    for name, value in properties.items():
        namespace, _, local = name[1:].partition("}")
        prefix = PREFIXES[name]
        declarations += f' xmlns:{prefix}="{namespace}"'
        elements += f"<{prefix}:{local}>{escape(value)}</{prefix}:{local}>"
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about=""{declarations}>{elements}'
        "</rdf:Description></rdf:RDF></x:xmpmeta>"
        '<?xpacket end="r"?>'
    ).encode()


def _property(content: bytes, name: str) -> str | None:
    """Return a property by name. It is an element, or an attribute if another program has rewritten the packet."""
    try:
        document = content.decode().strip("\0 \r\n\t")
        if "<!" in document:
            return None  # a packet needs no document type, and entities could expand without limit
        for element in ElementTree.fromstring(document).iter():
            found = element.text if element.tag == name else element.get(name)
            if found is not None:
                return found
    except (UnicodeDecodeError, ElementTree.ParseError):
        pass
    return None


def _extension(digest: str, segments: Iterable[bytes]) -> bytes:
    """Return the packet with this MD5 from its segments, in any order; empty if it is incomplete."""
    head = EXTENSION_MARK + digest.encode()
    body = len(head) + 4  # after the length of the whole packet
    parts = sorted(segment[body:] for segment in segments if segment.startswith(head))  # each starts with its offset
    whole = b"".join(part[4:] for part in parts)
    return whole if hashlib.md5(whole, usedforsecurity=False).hexdigest().upper() == digest else b""
