"""What a file is that cannot be opened as an image, recognized by its first bytes, so that an error can name it.

Takes bytes, returns a noun phrase. Knows nothing of the formats that are accepted.
"""

BEGINNING_BYTES = 1024
"""How much of a file is looked at for the name of its markup language."""

SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"%PDF-", "a PDF document"),
    (0, b"%!PS", "a PostScript document"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"\x00\x00\x00\x0cJXL ", "a JPEG XL image"),
    (0, b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 image"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (0, b"\x76\x2f\x31\x01", "an OpenEXR image"),
    (0, b"#?RADIANCE", "a Radiance HDR image"),
    (0, b"\x00\x00\x01\x00", "an icon (ICO)"),
    (0, b"gimp xcf", "a GIMP document"),
    (0, b"II*\x00\x10\x00\x00\x00CR", "a camera raw file"),  # Canon CR2, a TIFF whose first image is a preview
    (4, b"ftypcrx", "a camera raw file"),
    (0, b"FUJIFILMCCD-RAW", "a camera raw file"),
    (0, b"IIRO", "a camera raw file"),
    (0, b"IIRS", "a camera raw file"),
    (0, b"IIU\x00", "a camera raw file"),
    (0, b"\x1a\x45\xdf\xa3", "a video"),  # Matroska, WebM
    (8, b"AVI ", "a video"),
    (4, b"ftypisom", "a video"),
    (4, b"ftypiso2", "a video"),
    (4, b"ftypmp4", "a video"),
    (4, b"ftypM4V", "a video"),
    (4, b"ftypqt", "a video"),
    (4, b"ftypavc1", "a video"),
    (4, b"ftyp3g", "a video"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
)
"""Offset and bytes that identify a kind of file, and its name."""

MARKUP: tuple[tuple[bytes, str], ...] = (
    (b"<svg", "an SVG drawing"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
)


def kind_of(content: bytes) -> str | None:
    """Return what the file is, such as `a PDF document`; None if it is an image of a common format, or unknown."""
    for offset, signature, name in SIGNATURES:
        if content.startswith(signature, offset):
            return name
    beginning = content[:BEGINNING_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if beginning.startswith(b"<"):
        return next((name for tag, name in MARKUP if tag in beginning), None)
    return None
