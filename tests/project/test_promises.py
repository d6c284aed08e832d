"""docs/promises.md lists every promise with a test that exists, and every promised name exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import zcore
from zcore.cli import build_parser
from zcore.cli.parser import parse
from zcore.settings import setting_names

TREE = Path(__file__).resolve().parents[2]
PAGE = (TREE / "docs" / "promises.md").read_text()


def names(text: str) -> list[str]:
    return text.split()


FLAGS = names("""
    --attention-backend --config --cpu-offload --dype --dype-scale --encoder-device --height --hidden-layer --img2img
    --long-prompt-mode --lora --model-path --profile --quantization --seed --slg --slg-layers --slg-scale --slg-start
    --slg-stop --steps --strength --tile-overlap --tile-size --tiled-vae --width
""")
KEYS = names("""
    model_path templates_dir encoder.device encoder.torch_dtype encoder.hidden_layer encoder.quantization
    pipeline.device pipeline.torch_dtype generation.height generation.width generation.num_inference_steps
    generation.guidance_scale scheduler.shift pytorch.attention_backend pytorch.use_custom_scheduler pytorch.tiled_vae
    pytorch.tile_size pytorch.tile_overlap pytorch.long_prompt_mode pytorch.compile pytorch.compile_mode
    pytorch.embedding_cache dype.enabled dype.method dype.dype_scale dype.dype_exponent slg.enabled slg.scale slg.layers
    slg.start slg.stop lora.paths lora.scales
""")
ROUTES = ["POST /api/generate"]
CALLS = names("""
    ZImagePipeline.from_pretrained ZImagePipeline.__call__ ZImagePipeline.img2img ZImagePipeline.generate_multipass
    ZImagePipeline.from_pretrained_generator_only ZImagePipeline.generate_from_embeddings PromptEncoder.encode
""")
PROFILER = (
    "zimage profile --show-info",
    "zimage profile --tests encode,generate",
    "zimage profile --sweep",
    "zimage profile --attention-backend sdpa --tests generate",
    "zimage benchmark attention",
)
ROWS = dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", PAGE, re.MULTILINE))
NAMED_TESTS = sorted(set(re.findall(r"`(tests/[\w/.]+\.py::\w+)`", PAGE)))


@pytest.mark.parametrize("promise", [*FLAGS, *KEYS, *ROUTES, *CALLS, *PROFILER])
def test_every_promise_has_a_row_with_a_test(promise: str) -> None:
    assert re.search(r"`tests/[\w/.]+::\w+`", ROWS[promise])


def test_the_page_lists_no_other_promises() -> None:
    assert set(ROWS) == {*FLAGS, *KEYS, *ROUTES, *CALLS, *PROFILER}


@pytest.mark.parametrize("name", NAMED_TESTS)
def test_every_named_test_exists(name: str) -> None:
    path, _, function = name.partition("::")
    assert function in functions_of(TREE / path)


def test_every_promised_flag_exists() -> None:
    assert set(FLAGS) <= parse(build_parser(), ["generate", "x"]).parser.flags.keys()


@pytest.mark.parametrize("line", PROFILER)
def test_every_command_of_the_profiler_exists(line: str) -> None:
    parse(build_parser(), line.split()[1:])


def test_every_promised_key_exists() -> None:
    assert set(KEYS) <= setting_names().keys()


def test_every_promised_call_exists() -> None:
    for call in CALLS:
        owner, _, method = call.partition(".")
        assert callable(getattr(getattr(zcore, owner), method)), call


@cache
def functions_of(path: Path) -> frozenset[str]:
    return frozenset(node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
