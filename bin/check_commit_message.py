"""Check a commit message by this project's rules; `make hooks` has git run it before each commit.

    python3 bin/check_commit_message.py FILE

The subject is imperative, begins with a capital letter, has at most 70 characters and no full stop at the end. A
blank line and a body that says why follow it; merges and reverts need none. Exits with 1 and one line for each broken
rule.
"""

import re
import sys
from pathlib import Path

LONGEST_SUBJECT = 70
# First words that begin a title or a sentence, not a command.
NOT_IMPERATIVE = """
    a an the this that these those each every all any some no both one two three several many more most other
    another it its we our you your there here what which who how when where why if in on at for from with without by
    of to as and but or not also now new old initial minor various further first last next same
"""
# Verbs whose bare form looks like a past tense, a third person or a participle.
IMPERATIVE = """
    embed exceed feed need proceed seed shed speed succeed access address bias bring bypass canvass compress cross
    discuss dismiss express focus guess miss pass press process stress suppress toss
"""
BY_GIT = ("Merge ", 'Revert "')
SCISSORS = "# ------------------------ >8 ------------------------"


def problems(message):
    """Return what is wrong with this message, one line for each problem; empty if nothing is wrong."""
    lines = _without_comments(message)
    if not lines:
        return ["the message is empty"]
    subject = lines[0]
    if subject.startswith(BY_GIT):
        return []
    found = _problems_of_subject(subject)
    if len(lines) > 1 and lines[1].strip():
        found.append("the second line must be blank")
    if not any(line.strip() for line in lines[1:]):
        found.append("a body is missing: say why, and what was wrong before")
    return found


def _problems_of_subject(subject):
    found = []
    if len(subject) > LONGEST_SUBJECT:
        found.append(f"the subject has {len(subject)} characters; at most {LONGEST_SUBJECT} are allowed")
    if subject.endswith("."):
        found.append("the subject must not end with a full stop")
    if not subject[:1].isupper():
        found.append("the subject must begin with a capital letter")
    first = re.split(r"[^\w'-]", subject, maxsplit=1)[0].lower()
    if first in NOT_IMPERATIVE.split() or (first not in IMPERATIVE.split() and re.search(r"(ed|ing|s)$", first)):
        found.append(f"the subject must begin with a verb in the imperative, as in `Add`; it begins with `{first}`")
    return found


def _without_comments(message):
    """Return the lines that git will store: without comments, and without the diff of `git commit --verbose`."""
    lines = message.split(SCISSORS)[0].splitlines()
    lines = [line.rstrip() for line in lines if not line.startswith("#")]
    while lines and not lines[0]:
        lines.pop(0)
    return lines


if __name__ == "__main__":
    FOUND = problems(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for line in FOUND:
        print("commit message: " + line, file=sys.stderr)
    sys.exit(1 if FOUND else 0)
