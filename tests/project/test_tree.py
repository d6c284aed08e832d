"""Rules for the whole tree: a light server, unique package names, downward imports, one lock, no local paths."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TREE = Path(__file__).resolve().parents[2]
PACKAGES = ("server", "worker", "zcore")
HEAVY = ("torch", "diffusers", "transformers", "accelerate")
# Home folders, working folders, folders of wheels: paths that exist only on the author's machine.
MACHINE_PATH = re.compile(r"/(home|Users|root|work|opt)/[A-Za-z]")
BINARY = (".safetensors", ".png", ".jpg", ".webp", ".avif", ".ico", ".woff2", ".bin", ".pt")


def test_the_server_process_never_loads_a_model_library() -> None:
    """An installation of the server contains none of them, so building its app must not import one."""
    program = "import sys, server.asgi; print(sorted(set(sys.modules) & set(sys.argv[1:])))"
    assert _python("-c", program, *HEAVY) == "[]"


def test_importing_the_packages_prints_nothing_and_loads_no_model_library() -> None:
    program = "import sys, server, worker, zcore; print(sorted(set(sys.modules) & set(sys.argv[1:])))"
    assert _python("-c", program, *HEAVY) == "[]"


@pytest.mark.parametrize("name", PACKAGES)
def test_no_other_distribution_provides_our_packages(name: str) -> None:
    assert set(packages_distributions().get(name, [])) <= {"zimage"}


@pytest.mark.parametrize("name", ["config", "templates", "migrations", "tests", "bin"])
def test_folders_of_files_are_never_installed_as_packages(name: str) -> None:
    assert "zimage" not in packages_distributions().get(name, [])


def test_imports_follow_the_contracts() -> None:
    lint = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-logo", "--no-cache"],
        cwd=TREE,
        capture_output=True,
        text=True,
    )
    assert lint.returncode == 0, lint.stdout


def test_every_module_has_a_docstring() -> None:
    undocumented = [
        path for package in PACKAGES for path in sorted((TREE / package).rglob("*.py"))
        if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]  # fmt: skip
    assert not undocumented


def test_no_tracked_file_contains_a_local_path() -> None:
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name in _tracked() if not name.endswith(BINARY) and name != "tests/project/test_tree.py"
        for number, line in enumerate((TREE / name).read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]  # fmt: skip
    assert not found


def test_no_run_time_file_is_tracked() -> None:
    assert not [name for name in _tracked() if name.startswith(("var/", ".venv/")) or "__pycache__" in name]


def test_the_lock_pins_every_requirement_within_its_bounds() -> None:
    pins = _pins()
    unmet = [
        str(requirement) for requirement in _requirements()
        if requirement.marker is None or requirement.marker.evaluate()
        if not requirement.specifier.contains(pins.get(canonicalize_name(requirement.name), "0"))
    ]  # fmt: skip
    assert not unmet


def test_the_lock_works_with_and_without_a_gpu() -> None:
    assert _pins()["torch"] == "2.13.0"
    assert not [name for name in _pins() if name.startswith(("nvidia", "triton", "cuda"))]


def test_an_installation_of_the_server_contains_no_model_library() -> None:
    """Follow the requirements transitively, as they are installed here."""
    project = _project()
    pending = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["server"])]
    seen: set[tuple[str, frozenset[str]]] = set()
    while pending:
        current = pending.pop()
        name = canonicalize_name(current.name)
        if (name, frozenset(current.extras)) in seen:
            continue
        seen.add((name, frozenset(current.extras)))
        for line in requires(name) or ():
            further = Requirement(line)
            extras = {"", *current.extras}
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                pending.append(further)
    names = {name for name, _ in seen}
    assert {"litestar", "sqlalchemy"} <= names
    assert not names & {*HEAVY, "safetensors", "torchvision"}


def _python(*arguments: str) -> str:
    process = subprocess.run([sys.executable, *arguments], cwd=TREE, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def _tracked() -> list[str]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=TREE, capture_output=True, text=True, check=True)
    return [name for name in listing.stdout.split("\0") if name and (TREE / name).is_file()]


def _project() -> dict[str, dict[str, list[str]]]:
    return tomllib.loads((TREE / "pyproject.toml").read_text())["project"]


def _requirements() -> list[Requirement]:
    project = _project()
    return [
        Requirement(line)
        for lines in (project["dependencies"], *project["optional-dependencies"].values())
        for line in lines
    ]


def _pins() -> dict[str, str]:
    lines = (TREE / "config" / "requirements.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))
