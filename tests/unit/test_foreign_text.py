"""Text of others in the terminal: shown, never obeyed."""

import json
import logging
import sys

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from zcore.foreign_text import printable
from zcore.settings import LogSettings
from zcore.telemetry import configure_logging, log


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;OWNED\x07", r"\u001b]0;OWNED\u0007"),
        ("a\nforged: line", r"a\nforged: line"),
        ("over\rwritten", r"over\rwritten"),
        ("\x9b31m", r"\u009b31m"),
        ("\u202efdp.exe", r"\u202efdp.exe"),
        ("\u2066a\u2069\u200f", r"\u2066a\u2069\u200f"),
        ("a\u2028b", r"a\u2028b"),
        ("\udcff", r"\udcff"),
        ("\U000e0041", r"\udb40\udc41"),
    ],
)
def test_controls_are_written_as_in_json(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("text", ["plain", "größer 漢字 हिन्दी", "👩\u200d🚀", "a\u00a0b", "क\u094d\u200dष", "\\u001b"])
def test_text_of_every_language_is_unchanged(text: str) -> None:
    assert printable(text) == text


@given(st.text())
def test_only_what_is_safe_remains_and_json_stays_the_same(text: str) -> None:
    document = json.dumps(text, ensure_ascii=False)
    assert json.loads(printable(document)) == text
    for character in printable(text):
        assert character >= " "
        assert not "\x7f" <= character <= "\x9f"
        assert not "\u202a" <= character <= "\u202e"
        assert not "\u2066" <= character <= "\u2069"


def test_a_log_for_people_shows_foreign_fields_without_obeying_them(capsys: pytest.CaptureFixture[str]) -> None:
    handlers, level = logging.root.handlers, logging.root.level
    try:
        configure_logging(LogSettings(format="console"), "test")
        log.bind().warning("request.refused", path="/\x1b[2J\nforged")
        try:
            raise ValueError("\x1b[31m")
        except ValueError:
            log.bind().error("request.crashed", exc_info=sys.exc_info())
    finally:
        logging.root.handlers, logging.root.level = handlers, level
        structlog.reset_defaults()
        structlog.contextvars.clear_contextvars()
    written = capsys.readouterr().err
    assert r"path=/\u001b[2J\nforged" in written
    assert "Traceback (most recent call last):\n" in written
    assert "\x1b" not in written
