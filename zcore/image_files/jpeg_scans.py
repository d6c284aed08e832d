"""Which image data a JPEG file contains, read from its markers (ITU-T T.81, annex B). Decodes nothing."""

from collections.abc import Iterator

COEFFICIENTS = 64
"""Coefficients of a block; a progressive file distributes them, and the bits of each, over several scans."""

FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
SCAN = 0xDA
END = 0xD9
WITHOUT_LENGTH = frozenset([0x00, 0x01, 0xFF, *range(0xD0, 0xD9)])
"""Second bytes after 0xFF that begin no segment: data, fill bytes, restarts, and the beginning of an image."""


def has_every_scan(content: bytes) -> bool:
    """Return whether a scan begins for every coefficient of every component, up to its last bit."""
    components, complete = 0, set[tuple[int, int]]()
    for marker, payload in _segments(content):
        if marker in FRAMES:
            components = payload[5]
        elif marker == SCAN:
            selected, (first, last, bits) = payload[1 : 1 + 2 * payload[0] : 2], payload[-3:]
            if bits & 0x0F == 0:  # the position of the lowest bit in this scan
                complete |= {(component, index) for component in selected for index in range(first, last + 1)}
    return components > 0 and len(complete) == components * COEFFICIENTS


def _segments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield marker and payload of each whole segment up to the end marker; image data between them is skipped."""
    position = content.find(b"\xff", 2)
    while 0 <= position < len(content) - 3:
        marker = content[position + 1]
        if marker == END:
            return
        end = position + 1
        if marker not in WITHOUT_LENGTH:
            end = position + 2 + int.from_bytes(content[position + 2 : position + 4])
            if end > len(content):
                return
            yield marker, content[position + 4 : end]
        position = content.find(b"\xff", end)
