"""Commit messages follow the rules of CONTRIBUTING.md, from the baseline on, and the hook enforces the same rules."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[2]
CHECK = TREE / "bin" / "check_commit_message.py"
BASELINE = "a454f2d"
"""The last commit from before the rules. Its ancestors are not judged."""

BODY = "\n\nThe list had no bound, so a long one took the whole memory."


@pytest.fixture(scope="module")
def problems() -> Callable[[str], list[str]]:
    """The check of `bin/check_commit_message.py`."""
    spec = importlib.util.spec_from_file_location("check_commit_message", CHECK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.problems


def test_every_commit_after_the_baseline_has_a_proper_message(problems: Callable[[str], list[str]]) -> None:
    if not (TREE / ".git").exists():
        pytest.skip("this tree is not a git repository")
    found = [
        f"{commit[:9]} {message.splitlines()[0] if message else ''}: {problem}"
        for commit, message in new_commits(TREE)
        for problem in problems(message)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "subject",
    ["Bound the list of jobs", "Test both kinds of storage", "Process uploads once", "Seed the noise on the CPU"],
)
def test_an_imperative_subject_with_a_body_is_accepted(problems: Callable[[str], list[str]], subject: str) -> None:
    assert problems(subject + BODY) == []


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ("", "the message is empty"),
        ("Bound the list of jobs", "a body"),
        ("Bound the list of jobs\nIt had none.", "the second line"),
        ("Bound the list of jobs." + BODY, "full stop"),
        ("bound the list of jobs" + BODY, "capital letter"),
        ("Bound " + 65 * "x" + BODY, "71 characters"),
        ("Bounded the list of jobs" + BODY, "imperative"),
        ("Bounds the list of jobs" + BODY, "imperative"),
        ("Bounding the list of jobs" + BODY, "imperative"),
        ("The list of jobs has a bound" + BODY, "imperative"),
        ("Figures of offloading and batches, measured again" + BODY, "imperative"),
    ],
)
def test_each_broken_rule_is_named(problems: Callable[[str], list[str]], message: str, fault: str) -> None:
    found = problems(message)
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize("message", ["Merge branch 'a' into b", 'Revert "Bound the list of jobs"'])
def test_what_git_writes_itself_needs_no_body(problems: Callable[[str], list[str]], message: str) -> None:
    assert problems(message) == []


def test_comments_and_the_diff_of_the_editor_are_not_judged(problems: Callable[[str], list[str]]) -> None:
    scissors = "# ------------------------ >8 ------------------------"
    assert problems(f"# On branch main\nBound the list{BODY}\n{scissors}\ndiff --git a b") == []
    assert problems(f"Bound the list\n\n# Changes to be committed\n{scissors}\ndiff --git a b") != []


def test_the_installed_hook_refuses_a_commit_and_accepts_a_better_one(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("Makefile", "bin/check_commit_message.py"):
        (tmp_path / name).write_bytes((TREE / name).read_bytes())
    git(tmp_path, "init", "--quiet")
    subprocess.run(["make", "hooks", f"PYTHON={sys.executable}"], cwd=tmp_path, check=True, capture_output=True)
    assert commit(tmp_path, ["the list has a bound"]).returncode != 0
    assert commit(tmp_path, ["Bound the list of jobs", "The list had no bound."]).returncode == 0


def test_a_shallow_clone_judges_what_comes_after_its_oldest_commit(tmp_path: Path) -> None:
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    origin.mkdir()
    git(origin, "init", "--quiet")
    for subject in ("old, not judged", "older than the clone's second", "Bound the list of jobs"):
        assert commit(origin, [subject]).returncode == 0
    git(tmp_path, "clone", "--quiet", "--depth=2", f"file://{origin}", str(clone))
    assert [message for _, message in new_commits(clone)] == ["Bound the list of jobs"]


def new_commits(folder: Path) -> Iterable[tuple[str, str]]:
    """Hash and message of the commits after the baseline, or after the oldest that a shallow clone has."""
    is_there = subprocess.run(["git", "cat-file", "-e", f"{BASELINE}^{{commit}}"], cwd=folder, capture_output=True)
    if is_there.returncode == 0:
        commits = git(folder, "rev-list", f"{BASELINE}..HEAD").split()
    else:
        assert git(folder, "rev-parse", "--is-shallow-repository") == "true", f"commit {BASELINE} is gone"
        oldest = set(git(folder, "rev-list", "--max-parents=0", "HEAD").split())
        commits = [found for found in git(folder, "rev-list", "HEAD").split() if found not in oldest]
    return [(found, git(folder, "show", "--no-patch", "--format=%B", found)) for found in commits]


def commit(folder: Path, paragraphs: list[str]) -> subprocess.CompletedProcess[str]:
    """An empty commit by an author who needs no configuration."""
    author = {f"GIT_{role}_{part}": "test@localhost" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
    message = [argument for paragraph in paragraphs for argument in ("-m", paragraph)]
    return subprocess.run(
        ["git", "commit", "--quiet", "--allow-empty", *message],
        cwd=folder,
        env={**os.environ, **author},
        capture_output=True,
        text=True,
    )


def git(folder: Path, *arguments: str) -> str:
    """The output of a git command, without the line end."""
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
