"""The words that this project does not use are in none of its files.

A word is searched for as a whole word and as a part of a snake_case or CamelCase name, in any case: `ring` is found in
`ring_all` and `RingAll`, and not in `string`. Prompts are data for a model and are not judged.
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]

WORDS = {
    "notify, notification, notifier, report": (
        "doorbell doorbells bell bells ring rings rang ringing announce announces announced announcing announcement"
        " tell tells told telling wake wakes woke woken waking"
    ),
    "transition table": "law laws",
    "cancellation request, request": "wish wishes wished",
    "heartbeat": "pulse pulses beat beats beating",
    "maintenance, periodic task": "chore chores tick ticks ticked ticking upkeep",
    "out-of-memory fallback, fallback step": "ladder ladders rung rungs relief relieve relieves relieved relieving",
    "invocation": "commission commissions commissioned",
    "generate, render, edit, worker": (
        "paint paints painted painter painters painting paintings repaint repaints repainted repainting"
    ),
    "image": "picture pictures pictured",
    "context, training folder": "workplace workplaces",
    "cache": "shelf shelves",
    "loop, progress counter": "walk walks walked walking",
    "initial noise, random": "drawn",
    "preserved, retained, cached, stored": "kept",
    "written, dtype name": "spell spells spelled spelling spelt",
    "rotate, convert, become": "turn turns turned turning",
    "layer counts": "depths",
    "transformer": "dit",
    "architecture, package": "house houses",
    "space, module": "room rooms",
}
PHRASES = {
    "heartbeat": r"life[\s-]signs?",
    "maintenance, periodic task": r"the clock",
    "formatted": r"(?:lay|lays|laid|laying) out",
    "transformer": r"DiT",
    "ImageWorker, PromptWorker": r"class (?:Generator|Encoder)(?=[:(])",
}
ALLOWED = {
    r"dit[_-](?:device|quantization|weights)(?![a-z])": "arguments, and flags made of them, that z_image.md promises",
    r"\bllm[_-]dit\b": "the name of another project",
    r"(?:ast|os|[Pp]ath|inspect)\.walk\b": "a function of the standard library",
    r"\.tell\(": "a method of files",
    r"--?(?:without-)?beat\b|celery[ .]beat": "a part of Celery",
    r"\bin turn\b|\b(?:take|takes|taking|took) turns\b": "ordinary English",
    r"\bturn(?:s|ed|ing)?(?: \w+)? (?:on|off)\b|\bturn(?:s|ed|ing)? out\b": "ordinary English",
    r"\bring buffer\b|\bround[- ]trip\b": "terms of computing",
    r"</?picture\b": "an element of HTML",
    r"\b(?:oil|watercolou?r|ink|hand|chinese)[ _-]paint(?:ing|ed)s?\b": "what a prompt asks for, or a template's name",
    r"\b[Pp]aint (?:me|as cut|with)\b|\bplease paint\b|\b(?:thick|visible) paint\b": "what a prompt asks for",
    r"\broom\.png\b": "a file name in an example",
}
ALLOWED_IN = {
    # Names of columns and events before the migration that renamed them.
    "tests/integration/jobs/test_migrations.py": r"\b(?:announced_at|memory_relieved|ck_jobs_pictures_expire)\b",
    # Captions: what people type, as the demo model learns it. Docstrings are judged.
    "zcore/demo/captions.py": r'(?<!")"(?!")[^"\n]*"(?!")',
}
UNJUDGED = {
    "templates/z_image/": "prompts: what a model is asked to draw",
    "tests/unit/settings_in_the_wild.md": "settings as other people published them",
    "zcore/demo/checkpoint/": "data",
    "zcore/demo/training/": "data",
    "config/requirements.lock": "names of other people's packages",
    "tests/benchmarks/LOG.md": "dated results stay as they were written",
    "tests/project/test_vocabulary.py": "this list",
    **{f"migrations/versions/{number:04}_": "a migration stays as it was released" for number in range(1, 6)},
}
BINARY = (".safetensors", ".png", ".jpg", ".webp", ".avif", ".ico", ".woff2", ".bin", ".pt", ".csv")
# A command of the documentation with its prompts, and a row of the list of templates: a template's own description.
COMMAND = re.compile(r"^ +zimage .*$", re.MULTILINE)
PROMPT = re.compile(r'"[^"\n]*"|\'[^\'\n]*\'')
TEMPLATE_ROW = re.compile(r"^\| `\w+` \| .* \|$", re.MULTILINE)

FORBIDDEN = {word: instead for instead, words in WORDS.items() for word in words.split()}
PART_OF_A_NAME = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


@dataclass(frozen=True)
class Finding:
    """One use of a word: where, and which words to use instead."""

    file: str
    line: int
    word: str
    instead: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: `{self.word}`; use {self.instead}"


def test_no_file_uses_a_word_of_the_old_vocabulary() -> None:
    found = [str(finding) for finding in findings()]
    assert not found, f"{len(found)} uses of words that this project does not use:\n" + "\n".join(found)


def test_a_word_is_found_in_prose_and_in_names_and_not_inside_other_words() -> None:
    text = "A ring.\nring_all RingAll ring2\nstring Turing\nThe\nclock"
    assert [(one.line, one.word) for one in uses("x.py", text)] == [
        (1, "ring"), (2, "ring"), (2, "ring"), (2, "ring"), (4, "the clock"),
    ]  # fmt: skip


def test_a_promised_name_a_prompt_and_a_function_of_python_are_not_found() -> None:
    assert not list(uses("docs/x.md", '    zimage generate --dit-weights a.gguf "a picture of a room"'))
    assert not list(uses("x.py", "for node in ast.walk(tree): pass"))


def findings() -> Iterator[Finding]:
    """Every use of a forbidden word in the tracked text files and in their names."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=TREE, capture_output=True, text=True, check=True)
    for name in filter(None, listing.stdout.split("\0")):
        path = TREE / name
        if name.endswith(BINARY) or name.startswith(tuple(UNJUDGED)) or not path.is_file():
            continue
        for finding in uses(name, name):
            yield Finding(name, 0, finding.word, finding.instead)
        yield from uses(name, path.read_text(encoding="utf-8"))


def uses(name: str, text: str) -> Iterator[Finding]:
    """Every use of a forbidden word in the text of this file, in the order of lines."""
    judged = _without_exceptions(name, text)
    found: list[tuple[int, str, str]] = []
    for match in PART_OF_A_NAME.finditer(judged):
        if instead := FORBIDDEN.get(match[0].lower()):
            found.append((match.start(), match[0].lower(), instead))
    for instead, pattern in PHRASES.items():
        flags = re.IGNORECASE if pattern.islower() else 0
        spaced = rf"\b{pattern}\b".replace(" ", r"[\s#]+")
        found += [
            (match.start(), re.sub(r"[\s#]+", " ", match[0].lower()), instead)
            for match in re.finditer(spaced, judged, flags)
        ]
    for position, word, instead in sorted(found):
        yield Finding(name, text.count("\n", 0, position) + 1, word, instead)


def _without_exceptions(name: str, text: str) -> str:
    """The text with all that is allowed blanked out, so that positions stay the same."""
    if name.endswith(".md"):
        text = COMMAND.sub(lambda command: PROMPT.sub(_blank, command[0]), text)
    if name == "docs/templates.md":
        text = TEMPLATE_ROW.sub(_blank, text)
    for pattern in (*ALLOWED, *filter(None, [ALLOWED_IN.get(name)])):
        text = re.sub(pattern, _blank, text, flags=re.IGNORECASE)
    return text


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])
