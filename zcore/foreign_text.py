"""Text of others in terminals and messages, where it must neither act nor grow.

Control characters could change a terminal's title, hide text or forge lines; PostgreSQL cannot store NUL; a name from a
file can be megabytes long. Knows no errors and no formats.
"""

import json
import unicodedata
from collections.abc import Sequence

JOINERS = "\u200c\u200d"
"""Zero-width (non-)joiners, which emoji and several scripts need."""
LONGEST_EXCERPT = 200
"""Largest number of characters of a foreign text in a message."""


def printable(text: str) -> str:
    r"""Return the text as one line that a terminal only shows: other characters are written as in JSON, `\u001b`.

    These are controls (C0, C1), line and paragraph separators, invisible format characters (bidirectional ones among
    them) and lone surrogates. JSON stays the same JSON.
    """
    return "".join(one if _is_shown(one) else json.dumps(one)[1:-1] for one in text)


def excerpt(text: object, longest: int = LONGEST_EXCERPT) -> str:
    """Return text from a foreign file for a message: printable, with at most `longest` characters."""
    return shortened(printable(str(text)[: longest + 1]), longest)


def listed(names: Sequence[str], at_most: int = 10) -> str:
    """Return names from a foreign file for a message; only the number of those beyond `at_most` is given."""
    more = len(names) - at_most
    return ", ".join(map(excerpt, names[:at_most])) + (f", and {more} more" if more > 0 else "")


def shortened(text: str, at_most: int) -> str:
    """Return the text with at most that many characters; of a longer one, the beginning and an ellipsis."""
    return text if len(text) <= at_most else text[: at_most - 1] + "…"


def first_line(text: object) -> str:
    """Return the first line of a text, such as the message of an error of a library."""
    return str(text).partition("\n")[0]


def _is_shown(character: str) -> bool:
    return character.isprintable() or character in JOINERS or unicodedata.category(character) == "Zs"
