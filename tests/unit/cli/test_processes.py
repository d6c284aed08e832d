"""The command as a process of its own: what it loads, on which machine each half runs, and how Ctrl-C ends it."""

import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.unit.cli.conftest import TREE, Terminal
from tests.waiting import wait_until

DEMO = TREE / "zcore" / "demo" / "checkpoint"
COMMAND = (sys.executable, "-m", "zcore.cli")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TREE), "OMP_NUM_THREADS": "1"}
HEAVY = "{'torch', 'numpy', 'diffusers', 'transformers', 'safetensors', 'sqlalchemy', 'celery'}"


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command line in a folder."""
    return subprocess.run([*COMMAND, *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)


def test_what_needs_no_model_loads_none_and_nor_does_a_mistake(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "other.png")
    lines = [
        ["--help"],
        ["generate", "--help"],
        ["templates"],
        ["config"],
        ["inspect", "other.png"],
        ["generate", "x", "--width", "65"],
        ["generate", "x", "--img2img", "other.png", "--strength", "2"],
        ["generate", "x", "--template", "no_such"],
        ["encode", "x", "--hidden-layer", "0"],
    ]
    program = f"""
import contextlib, io, sys
from zcore.cli import main
for line in {lines!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            status = main(line)
        except SystemExit as end:
            status = end.code
    print(status, sorted({HEAVY} & set(sys.modules)))
"""
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert finished.stderr == ""
    assert finished.stdout.splitlines() == [f"{status} []" for status in (0, 0, 0, 0, 1, 2, 2, 2, 2)]


def test_a_reader_that_has_seen_enough_is_no_failure_to_talk_about() -> None:
    process = subprocess.Popen(
        [*COMMAND, "config"], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr as errors:
        assert errors.read() == ""
    assert process.wait(60) == 1


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Two copies of the checkpoint, each without the weights of the other's half."""
    for name, absent in (("encoding", ("transformer", "vae")), ("painting", ("text_encoder",))):
        shutil.copytree(DEMO, tmp_path / name)
        for component in absent:
            for weights in (tmp_path / name / component).glob("*.safetensors"):
                weights.unlink()
    return tmp_path


def test_one_machine_encodes_and_another_paints_what_a_single_one_would(split: Path, zimage: Terminal) -> None:
    guided = ("--guidance-scale", "3", "--negative-prompt", "blue")
    painted = ("--size", "64x64", "--steps", "2", "--seed", "11", "--guidance-scale", "3")
    shared = ("--profile", "demo", "--model-path")
    encode = run("encode", "a red star", *guided, *shared, "encoding", "--output", "star.safetensors", folder=split)
    assert (encode.returncode, encode.stderr) == (0, "")
    paint = run("generate", "--embeddings", "star.safetensors", *painted, *shared, "painting", folder=split)
    assert (paint.returncode, paint.stderr) == (0, "")
    zimage.paint("a red star", *painted, *guided)
    with Image.open(split / "output.png") as two, Image.open("output.png") as one:
        assert two.tobytes() == one.tobytes()
    shown = zimage("inspect", str(split / "star.safetensors")).out
    assert {"layers: -2", "long_prompt_mode: interpolate"} <= {line.strip() for line in shown.splitlines()}
    assert "negative: " in shown
    repeated = zimage.paint("--from", str(split / "output.png"), "--embeddings", str(split / "star.safetensors"))
    assert repeated.out.startswith("output.png  seed 11")
    with Image.open(split / "output.png") as two, Image.open("output.png") as again:
        assert two.tobytes() == again.tobytes()


def test_a_half_that_is_not_there_is_missed_in_one_line(split: Path, zimage: Terminal) -> None:
    finished = zimage("generate", "x", "--profile", "demo", "--model-path", str(split / "painting"))
    assert finished.status == 2
    assert "text_encoder" in finished.err
    assert finished.err.count("\n") == 1


def test_an_embedding_goes_with_no_prompt_and_a_picture_from_one_with_no_other(zimage: Terminal) -> None:
    assert zimage("encode", "a red star", "--profile", "demo").out == "embedding.safetensors  11 tokens\n"
    zimage.paint("--embeddings", "embedding.safetensors", "--size", "64x64", "--steps", "2")
    both = zimage("generate", "a red star", "--profile", "demo", "--embeddings", "embedding.safetensors")
    assert both.status == 2
    assert both.err.startswith("zimage: PROMPT: cannot be said with --embeddings")
    without = zimage("generate", "--profile", "demo", "--from", "output.png")
    assert without.status == 2
    assert without.err == "zimage: --from: was painted from an embedding; pass that with --embeddings\n"
    Path("embedding.safetensors").write_bytes(b"something else")
    spoiled = zimage("generate", "--profile", "demo", "--embeddings", "embedding.safetensors")
    assert spoiled.status == 2
    assert spoiled.err.startswith("zimage: --embeddings: is not a safetensors file")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process started from here takes Ctrl-C, even where the tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_terminal_sees_how_far_it_is_and_ctrl_c_leaves_no_torn_file(tmp_path: Path) -> None:
    arguments = ("generate", "a red circle", "--profile", "demo", "--size", "512x512", "--steps", "50")
    terminal, other_end = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=other_end
    )
    os.close(other_end)
    os.set_blocking(terminal, False)
    shown = bytearray()

    def is_painting() -> bool:
        assert process.poll() is None, shown.decode()
        try:
            shown.extend(os.read(terminal, 65536))
        except BlockingIOError:
            return False
        return b"] 2/50 denoise" in shown

    try:
        wait_until(is_painting, timeout_s=300)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    finally:
        process.kill()
        process.wait()
    rest = os.read(terminal, 65536)
    os.close(terminal)
    assert b"loading the model ..." in shown
    assert b"Traceback" not in shown + rest
    assert list(tmp_path.iterdir()) == []
