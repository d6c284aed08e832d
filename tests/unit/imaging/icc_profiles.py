"""ICC profiles written from the ICC.1 specification: Display P3, a linear grey, and a CMYK with chosen colours of inks.

LittleCMS, which reads them, can itself only create sRGB, Lab and XYZ.
"""

import struct
from collections.abc import Mapping
from itertools import product

D50 = (0.9642, 1.0, 0.8249)


def display_p3() -> bytes:
    """Return Display P3: its primaries adapted to D50, and the curve of sRGB."""
    curve = b"para" + struct.pack(">IHH", 0, 3, 0) + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    colorants = {"rXYZ": (0.5151, 0.2412, -0.0011), "gXYZ": (0.2920, 0.6922, 0.0419), "bXYZ": (0.1571, 0.0666, 0.7841)}
    tags = {name: _xyz(colorant) for name, colorant in colorants.items()}
    return _profile(b"mntr", b"RGB ", b"XYZ ", {**tags, **dict.fromkeys(("rTRC", "gTRC", "bTRC"), curve)})


def linear_grey() -> bytes:
    """Return a grey profile whose levels are proportional to luminance."""
    curve = b"curv" + struct.pack(">IIH", 0, 1, 0x0100) + b"\0\0"
    return _profile(b"mntr", b"GRAY", b"XYZ ", {"kTRC": curve})


def cmyk(lab_of_cyan: tuple[int, int, int]) -> bytes:
    """Return a CMYK profile in which full cyan is this L*a*b*, no ink is white, and everything else is black."""
    straight = bytes(range(256))
    nodes = b""
    for inks in product((0, 1), repeat=4):  # cyan varies least quickly
        lightness, a, b = {(0, 0, 0, 0): (100, 0, 0), (1, 0, 0, 0): lab_of_cyan}.get(inks, (0, 0, 0))
        nodes += bytes([round(lightness * 2.55), a + 128, b + 128])
    table = b"mft1" + struct.pack(">IBBBB", 0, 4, 3, 2, 0) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return _profile(b"prtr", b"CMYK", b"Lab ", {"A2B0": table + straight * 4 + nodes + straight * 3})


def _profile(kind: bytes, space: bytes, connection: bytes, tags: Mapping[str, bytes]) -> bytes:
    described = {"wtpt": _xyz(D50), **tags}
    offset = 128 + 4 + 12 * len(described)
    table, content = struct.pack(">I", len(described)), b""
    for name, value in described.items():
        padded = value + b"\0" * (-len(value) % 4)
        table += name.encode() + struct.pack(">II", offset + len(content), len(value))
        content += padded
    header = struct.pack(
        ">I4sI4s4s4s12s4s", offset + len(content), b"", 0x02400000, kind, space, connection, b"", b"acsp"
    )
    return (header + bytes(28) + _fixed(*D50)).ljust(128, b"\0") + table + content


def _xyz(values: tuple[float, float, float]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(*values)


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65_536)) for value in values)
