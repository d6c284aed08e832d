"""The command as a separate process: the modules it loads, encoding and generating on two machines, and Ctrl-C."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
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
    """Run a command line in a folder."""
    return subprocess.run([*COMMAND, *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)


def test_commands_without_a_model_and_mistakes_load_no_heavy_modules(tmp_path: Path) -> None:
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
        ["generate", "x", "--model-path", "./nope"],
        ["encode", "x", "--model-path", "no/such/folder"],
        ["generate", "x", "--profile", "demo", "--lora", "nope.safetensors:1"],
        ["generate", "x", "--profile", "demo", "--dit-weights", "nope.safetensors"],
        ["generate", "x", "--profile", "demo", "--size", "2048x2048"],
        ["generate", "x", "--img2img", "nope.png"],
        ["doctor", "--profile", "demo", "--size", "2048x2048"],
        ["profile", "--profile", "demo", "--size", "2048x2048"],
        ["profile", "--sweep", "--tests", "encode"],
        ["benchmark", "attention", "--profile", "demo", "--width", "65"],
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
    assert finished.stdout.splitlines() == [f"{status} []" for status in (0, 0, 0, 0, 1, *[2] * 14)]


def test_a_closed_pipe_prints_no_error() -> None:
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
    """Two copies of the checkpoint: one with only the text encoder's weights, one without them."""
    for name, removed in (("encoding", ("transformer", "vae")), ("generating", ("text_encoder",))):
        shutil.copytree(DEMO, tmp_path / name)
        for component in removed:
            for weights in (tmp_path / name / component).glob("*.safetensors"):
                weights.unlink()
    return tmp_path


def test_two_machines_together_make_the_same_image_as_one(split: Path, zimage: Terminal) -> None:
    guided = ("--guidance-scale", "3", "--negative-prompt", "blue")
    options = ("--size", "64x64", "--steps", "2", "--seed", "11", "--guidance-scale", "3")
    shared = ("--profile", "demo", "--model-path")
    encode = run("encode", "a red star", *guided, *shared, "encoding", "--output", "star.safetensors", folder=split)
    assert (encode.returncode, encode.stderr) == (0, "")
    generate = run("generate", "--embeddings", "star.safetensors", *options, *shared, "generating", folder=split)
    assert (generate.returncode, generate.stderr) == (0, "")
    zimage.generate("a red star", *options, *guided)
    with Image.open(split / "output.png") as two, Image.open("output.png") as one:
        assert two.tobytes() == one.tobytes()
    shown = zimage("inspect", str(split / "star.safetensors")).out
    assert {"layers: -2", "long_prompt_mode: interpolate"} <= {line.strip() for line in shown.splitlines()}
    assert "negative: " in shown
    repeated = zimage.generate("--from", str(split / "output.png"), "--embeddings", str(split / "star.safetensors"))
    assert repeated.out.startswith("output.png  seed 11")
    with Image.open(split / "output.png") as two, Image.open("output.png") as again:
        assert two.tobytes() == again.tobytes()


def test_missing_weights_are_reported_in_one_line(split: Path, zimage: Terminal) -> None:
    finished = zimage("generate", "x", "--profile", "demo", "--model-path", str(split / "generating"))
    assert finished.status == 2
    assert "text_encoder" in finished.err
    assert finished.err.count("\n") == 1


def test_an_embedding_excludes_a_prompt_and_is_needed_to_repeat_its_image(zimage: Terminal) -> None:
    assert zimage("encode", "a red star", "--profile", "demo").out == "embedding.safetensors  11 tokens\n"
    zimage.generate("--embeddings", "embedding.safetensors", "--size", "64x64", "--steps", "2")
    both = zimage("generate", "a red star", "--profile", "demo", "--embeddings", "embedding.safetensors")
    assert both.status == 2
    assert both.err.startswith("zimage: PROMPT: cannot be combined with --embeddings")
    without = zimage("generate", "--profile", "demo", "--from", "output.png")
    assert without.status == 2
    assert without.err == "zimage: --from: the image was made from an embedding; add it with --embeddings\n"
    Path("embedding.safetensors").write_bytes(b"something else")
    corrupt = zimage("generate", "--profile", "demo", "--embeddings", "embedding.safetensors")
    assert corrupt.status == 2
    assert corrupt.err.startswith("zimage: --embeddings: is not a safetensors file")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let child processes react to Ctrl-C even if the tests run as a background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_terminal_shows_the_progress_and_ctrl_c_leaves_no_partial_file(tmp_path: Path) -> None:
    arguments = ("generate", "a red circle", "--profile", "demo", "--size", "512x512", "--steps", "50")
    terminal, other_end = pty.openpty()
    termios.tcsetwinsize(other_end, (24, 80))
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=other_end
    )
    os.close(other_end)
    os.set_blocking(terminal, False)
    shown = bytearray()

    def is_generating() -> bool:
        assert process.poll() is None, shown.decode()
        try:
            shown.extend(os.read(terminal, 65536))
        except BlockingIOError:
            return False
        return b"denoise" in shown and b"| 2/50 [" in shown

    try:
        wait_until(is_generating, timeout_s=300)
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
