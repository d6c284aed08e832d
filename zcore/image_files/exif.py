"""One text as an EXIF block: JPEG, WebP and AVIF files have it where PNG has a text chunk.

The block holds only the tag UserComment, in UTF-16. Both the block and the text are big-endian: readers of
stable-diffusion-webui's files always expect the text so, and EXIF readers expect the byte order of the block.
"""

import struct

EXIF_IFD_TAG = 0x8769
USER_COMMENT_TAG = 0x9286
LONG, UNDEFINED = 4, 7
DIRECTORY_BYTES = 2 + 12 + 4
MARK = b"Exif\0\0"
CHARACTER_CODE = b"UNICODE\0"
LARGEST_IN_JPEG_BYTES = 65_533
"""A JPEG segment ends at 64 KiB, and EXIF cannot continue in another one."""


def user_comment(text: str) -> bytes:
    """Return an EXIF block, as Pillow takes it for every format, with `text` as its only content."""
    comment = CHARACTER_CODE + text.encode("utf-16-be", "replace")
    header = MARK + b"MM\0*" + struct.pack(">I", 8)
    first = _directory(EXIF_IFD_TAG, LONG, 1, value=8 + DIRECTORY_BYTES)
    second = _directory(USER_COMMENT_TAG, UNDEFINED, len(comment), value=8 + 2 * DIRECTORY_BYTES)
    return header + first + second + comment


def _directory(tag: int, kind: int, count: int, value: int) -> bytes:
    """Return a directory of one entry without a successor; `value` is the entry's value, or its offset."""
    return struct.pack(">HHHIII", 1, tag, kind, count, value, 0)
