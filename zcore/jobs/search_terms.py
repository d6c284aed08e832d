"""The words by which a job is found: one tokenizer for what is stored and for what is looked for.

Terms are strings of three kinds that cannot be mistaken for each other, nor begin alike: a word begins with a letter,
mark, digit or symbol; `key=value`, of the metadata or literally in the prompt, with an equals sign; the owner's term
with an at sign. Does not depend on a database.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, cast

import msgspec

MAX_WORD_LENGTH = 64  # characters; longer words are found by these
MAX_PAIR_LENGTH = 200
MAX_BEGINNINGS = 8  # words of a query; looking for all words with a beginning costs more than for one word

_ASCII_WORD = re.compile(r"[0-9a-z]+")
_PAIR = re.compile(r'(?<![^\s"=])([^\s"=]+)=(?:"([^"]*)"|([^\s"]+))')
_BLANK = re.compile(r"[\s\x00-\x1f\x7f]+")
# Scripts written without spaces between words, or with endings attached to them: Thai, Lao, Burmese, Hangul, Khmer,
# kana, bopomofo and Han.
_UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    r"\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\U00020000-\U000323af]"
)


@dataclass(frozen=True, slots=True)
class Word:
    """A term that a job must have to be found or, if `is_beginning`, the beginning of one."""

    text: str
    is_beginning: bool = False


def job_terms(prompt: str, metadata: Mapping[str, Any], owner: str) -> list[str]:
    """Return the terms by which a job is found, sorted and each once."""
    folded = _fold(prompt)
    found = {_owner_term(owner), *_pairs(folded), *_words(folded)}
    for key, value in _leaves(metadata):
        folded_value = _fold(value)
        found |= {_pair(_fold(key), folded_value), *_words(folded_value)}
    found.discard("")
    return sorted(found)


def parse_query(text: str, owner: str | None = None) -> list[Word]:
    """Return what a job must have to be found by the text, among those of the owner or, if None, of all.

    Any text is valid; one without a letter, digit or symbol finds nothing. `key=value` or `key="two words"` is
    metadata; of the rest, every word must occur, in any order. Words match by their beginning, but only the last one if
    there are more than `MAX_BEGINNINGS`. In scripts without spaces, each pair of neighbours must occur.
    """
    folded = _fold(text)
    whole, beginnings = dict.fromkeys(filter(None, _pairs(folded))), dict[str, None]()
    for run, unspaced in _runs(_PAIR.sub(" ", folded)):
        if not unspaced:
            beginnings[run[:MAX_WORD_LENGTH]] = None
        else:
            whole |= dict.fromkeys([run] if len(run) == 1 else map("".join, pairwise(run)))
    *others, last = beginnings or [""]
    found = [*map(Word, whole), *(Word(word, len(others) < MAX_BEGINNINGS) for word in others)]
    found += [Word(last, is_beginning=True)] if last else []
    return [*found, Word(_owner_term(owner))] if found and owner is not None else found


def _owner_term(owner: str) -> str:
    """Return the term that all jobs of the owner have. Owners that differ only in case or blanks may share it."""
    return _joined(f"@{_fold(owner)}")


def _fold(text: str) -> str:
    """Return the text in Unicode's form for comparison without case (NFKC, casefolded)."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _words(folded: str) -> Iterator[str]:
    for run, unspaced in _runs(folded):
        if unspaced:
            yield from run
            yield from (first + second for first, second in pairwise(run))
        else:
            yield run[:MAX_WORD_LENGTH]


def _runs(folded: str) -> Iterator[tuple[str, bool]]:
    """Yield each run of characters of one kind, and whether its script has no spaces."""
    if folded.isascii():
        yield from ((word, False) for word in _ASCII_WORD.findall(folded))
        return
    for unspaced, run in groupby(filter(_is_visible, folded), _is_unspaced):
        if unspaced is not None:
            yield "".join(run), unspaced


def _is_visible(character: str) -> bool:
    """Return False for joiners and the like, which only change how their neighbours look."""
    return unicodedata.category(character) != "Cf" and not "\ufe00" <= character <= "\ufe0f"


def _is_unspaced(character: str) -> bool | None:
    """Return whether a character belongs to a run without spaces; None if it belongs to no word."""
    category = unicodedata.category(character)
    if category[0] in "LMN":
        return _UNSPACED.match(character) is not None
    return True if category in ("So", "Sk") and not character.isascii() else None  # among them emoji


def _pairs(folded: str) -> Iterator[str]:
    if "=" in folded:
        yield from (_pair(key, quoted or value) for key, quoted, value in _PAIR.findall(folded))


def _pair(key: str, value: str) -> str:
    """Return the term of a key and a value; an empty one if either is empty."""
    name, content = key.strip("= \t\n"), value.strip()
    return _joined(f"={name}={content}") if name and content else ""


def _joined(term: str) -> str:
    """Return the text as one term: no blanks, which end a term in SQLite, and no quotes, which a query cannot quote."""
    return _BLANK.sub("_", term.replace('"', "").strip())[:MAX_PAIR_LENGTH]


def _leaves(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield every value as text with its key, `outer.inner` for that of a nested object."""
    left: list[tuple[str, Any]] = list(metadata.items())
    while left:
        key, value = left.pop()
        if isinstance(value, Mapping):
            left += ((f"{key}.{name}", inner) for name, inner in cast(Mapping[str, Any], value).items())
        elif isinstance(value, list | tuple):
            left += ((key, item) for item in cast(Iterable[Any], value))
        else:
            yield key, value if isinstance(value, str) else msgspec.json.encode(value).decode()
