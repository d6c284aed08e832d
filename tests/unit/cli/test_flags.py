"""Every request field and every promised flag has its flag; a mistake is one line and status 2."""

import io
import shlex
import sys
import tomllib
from importlib.metadata import EntryPoint, version
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.cli.conftest import TREE, Terminal
from zcore.cli import build_parser, main
from zcore.cli.invocation import read_invocation
from zcore.cli.parser import Parser, parse
from zcore.cli.request_flags import SETTING_PREFIXES, flag_of, request_fields
from zcore.cli.setting_flags import ALL, chosen_settings
from zcore.request import SIZE_FIELDS, Dype, GenerationRequest
from zcore.settings import setting_names

# Command lines from the model's documentation, with `zimage generate` for its script, and the request of each.
PROMISED: list[tuple[str, dict[str, Any]]] = [
    (
        '--config config.toml --hidden-layer -3 --steps 9 --width 1024 --height 1024 "Your prompt"',
        {"hidden_layer": -3, "steps": 9, "width": 1024, "height": 1024, "prompt": "Your prompt"},
    ),
    ('--model-path /path/to/z-image "A cat sleeping in sunlight"', {"prompt": "A cat sleeping in sunlight"}),
    ('--model-path /path/to/z-image --seed 42 "A sunset over mountains"', {"seed": 42}),
    ('--model-path /path/to/z-image --width 1536 --height 1024 "A panoramic landscape"', {"width": 1536}),
    ('--long-prompt-mode attention_pool "A prompt"', {"long_prompt_mode": "attention_pool"}),
    ('--encoder-device cpu "A prompt"', {}),
    ('--quantization 8bit "A prompt"', {}),
    ('--cpu-offload "A prompt"', {}),
    (
        '--model-path /path --dype --dype-scale 2.0 --width 2048 --height 2048 "A landscape"',
        {"dype": msgspec.to_builtins(Dype(scale=2.0)), "width": 2048, "tiled_vae": False},
    ),
    (
        '--dype --dype-scale 4.0 --tiled-vae --width 4096 --height 4096 "A cityscape"',
        {"dype": msgspec.to_builtins(Dype(scale=4.0)), "tiled_vae": True},
    ),
    (
        '--slg --slg-scale 2.5 --slg-layers 7,8,9,10,11,12 --slg-start 0.05 --slg-stop 0.5 "A portrait"',
        {"slg": {"scale": 2.5, "layers": (7, 8, 9, 10, 11, 12), "start": 0.05, "stop": 0.5}},
    ),
    (
        '--tiled-vae --tile-size 512 --tile-overlap 64 --width 2048 --height 2048 "A large image"',
        {"tiled_vae": True, "slg": None, "dype": None},
    ),
]


def command(name: str) -> Parser:
    """Return the parser of one command."""
    return parse(build_parser(), [name, "x"]).parser


def request_of(*arguments: str) -> GenerationRequest:
    """Return the request of `zimage generate` with these arguments."""
    parsed = parse(build_parser(), ["generate", *arguments])
    return read_invocation(parsed, chosen_settings(parsed).settings).request


def test_every_field_of_a_request_is_a_flag_of_generate() -> None:
    flags = command("generate").flags
    fields = {*GenerationRequest.__struct_fields__, *SIZE_FIELDS} - {"version", "loras"}
    assert {flag_of(name) for name in SETTING_PREFIXES} <= flags.keys()
    fields -= set(SETTING_PREFIXES)
    assert set(request_fields()) == fields
    assert {name: flags[flag_of(name)].dest for name in fields} == {name: name for name in fields}


def test_every_flag_has_a_help_text_of_full_sentences() -> None:
    for name in ("generate", "encode", "inspect", "templates", "config"):
        for flag, action in command(name).flags.items():
            assert action.help, flag
            assert action.help.rstrip(")").rpartition(" (")[0].endswith(".") or action.help.endswith("."), flag


def test_flags_of_settings_name_settings_that_exist() -> None:
    names = [name for flag in ALL for name in (*flag.settings, *([flag.needs] if flag.needs else []))]
    assert set(names) <= setting_names().keys()


def test_every_flag_sets_its_field_of_the_request() -> None:
    line = """'He said "hi"' --negative-prompt blur --template art_oil --system-prompt S --thinking-content T
        --assistant-content A --no-force-think-block --strip-quotes --clean-whitespace --hidden-layer -5
        --layer-weights '{"-2": 0.7, "-5": 0.3}' --long-prompt-mode pool --width 256 --height 128 --steps 3 --shift 2.5
        --guidance-scale 4 --cfg-normalization 1 --cfg-truncation 0.5
        --passes '[{"scale": 0.5, "steps": 4}, {"scale": 1}]'
        --seed 9 --n 2 --format webp --quality 80 --strength-rule diffusers --strength 0.3 --fit contain
        --no-keep-unmasked"""
    expected: dict[str, Any] = {
        "version": 1,
        "prompt": 'He said "hi"',
        "negative_prompt": "blur",
        "template": "art_oil",
        "system_prompt": "S",
        "thinking_content": "T",
        "assistant_content": "A",
        "force_think_block": False,
        "strip_quotes": True,
        "clean_whitespace": True,
        "hidden_layer": -5,
        "layer_weights": {"-2": 0.7, "-5": 0.3},
        "long_prompt_mode": "pool",
        "width": 256,
        "height": 128,
        "steps": 3,
        "shift": 2.5,
        "guidance_scale": 4.0,
        "cfg_normalization": 1.0,
        "cfg_truncation": 0.5,
        "image": None,
        "mask": None,
        "strength": 0.3,
        "strength_rule": "diffusers",
        "fit": "contain",
        "keep_unmasked": False,
        "seed": 9,
        "n": 2,
        "format": "webp",
        "quality": 80,
        "tiled_vae": False,
        "slg": None,
        "dype": None,
        "loras": (),
    }
    request = msgspec.to_builtins(request_of(*shlex.split(line)))
    passes = request.pop("passes")
    assert request == expected
    assert [(one["scale"], one["steps"]) for one in passes] == [(0.5, 4), (1.0, None)]


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("--size 512x256", (512, 256)),
        ("--size 16:9", (1280, 720)),
        ("--size portrait_4_3", (864, 1152)),
        ("--aspect-ratio 3:2 --resolution 1280", (1536, 1024)),
        ("--profile demo", (128, 128)),
        ("--profile demo --width 256", (256, 128)),
    ],
)
def test_a_size_can_be_given_in_several_forms(line: str, size: tuple[int, int]) -> None:
    request = request_of("x", *line.split())
    assert (request.width, request.height) == size


@pytest.mark.parametrize(("name", "scales"), [("twopass", [0.5, 1.0]), ("threepass", [0.25, 0.5, 1.0])])
def test_common_passes_have_a_name(name: str, scales: list[float]) -> None:
    passes = request_of("x", "--passes", name).passes
    assert [one.scale for one in passes] == scales
    assert passes[-1].strength == 0.5


@pytest.mark.parametrize(("line", "expected"), PROMISED)
def test_a_promised_command_line_gives_the_documented_request(
    line: str, expected: dict[str, Any], settings_file: Any, zimage: Terminal
) -> None:
    path = settings_file("[default]\nmodel_path = 'from-file'\n")
    arguments = [path if one == "config.toml" else one for one in shlex.split(line)]
    request = msgspec.to_builtins(request_of(*arguments))
    assert {name: request[name] for name in expected} == expected


def test_loras_are_files_with_scales(zimage: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("style.safetensors", "detail.safetensors"):
        (tmp_path / name).touch()
    line = "--lora style.safetensors:0.5 --lora detail.safetensors x"
    assert chosen_settings(parse(build_parser(), ["generate", *shlex.split(line)])).settings.fused_loras == [
        (tmp_path / "style.safetensors", 0.5),
        (tmp_path / "detail.safetensors", 1.0),
    ]


@pytest.mark.parametrize("flag", [flag for flag in ALL if flag.needs])
def test_a_flag_without_its_switch_is_refused(flag: Any, zimage: Terminal) -> None:
    value = {"slg.stop": "1", "dype.method": "ntk", "slg.layers": "3,4", "pytorch.tile_size": "256"}.get(
        flag.settings[0], "0"
    )
    value = "1" if flag.names[0] in ("--dype-scale", "--dype-exponent") else value
    finished = zimage("generate", "x", flag.names[0], value)
    assert finished.status == 2
    assert finished.err.startswith(f"zimage: {flag.names[0]}: has no effect without --")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("genrate x", "; did you mean `generate`?"),
        ("draw x", "`draw` is not a command (generate, encode, inspect,"),
        ("config --hidden-layer -3", "default is `--set encoder.hidden_layer=...`"),
        ("generate --output - x", "--output: `-` (standard output) is not supported; give the path of a file"),
        ("generate", "PROMPT: is required"),
        ("generate ' '", "PROMPT: must not be blank"),
        ("generate a cat", "unexpected argument `cat`; put a text of several words in quotes"),
        ("generate x --widht 64", "--widht: unknown flag; did you mean `--width`?"),
        ("generate x --wid 64", "--wid: unknown flag; did you mean `--width`?"),
        ("generate x --width", "--width: expected one argument"),
        ("generate x --width wide", "--width: must be a whole number, not `wide`"),
        (
            "generate x --width 65 --steps 99",
            "--width: must be a whole number from 64 to 8192 that is a multiple of 16; the nearest is 64; --steps:",
        ),
        ("generate x --size 64x64 --width 64", "--size: cannot be combined with width"),
        ("generate x --strength 1.5", "--strength: must be a number above 0"),
        ("generate x --fit crop", "--fit: invalid choice: 'crop' (choose from"),
        ("generate x --passes thrice", "--passes: is not valid JSON"),
        ("generate x --passes '[{\"scale\": 0.5}]'", "--passes: scales must not decrease and must end at 1.0"),
        ("generate x --layer-weights -2", "--layer-weights: "),
        ("generate x --device gpu", "--dit-device: must be auto, cpu"),
        (
            "generate x --lora style:strong",
            "--lora: must be FILE:SCALE such as style.safetensors:0.8, not",
        ),
        ("generate x --negative-prompt blur", "--negative-prompt: has no effect without a guidance_scale above 0"),
        ("generate x --mask mask.png", "--mask: mask.png cannot be read: No such file"),
        ("generate x --img2img no.png", "--img2img: no.png cannot be read: No such file"),
        ("generate x --output image.gif", "--output: image.gif must end in one of .png,"),
        ("generate x --output no/image.png", "--output: the folder no does not exist"),
        ("generate --from no.png", "--from: no.png cannot be read"),
        ("generate --embeddings no.safetensors", "--embeddings: no.safetensors cannot be read"),
        ("generate x --config no.toml", "no.toml: cannot be read"),
        ("generate x --profile dem", "there is no profile `dem`; did you mean `demo`?"),
        ("generate x --set pytorch.compiled=true", "option pytorch.compiled is not a setting; did you mean"),
        ("generate x --set compile", "`compile`: settings must be written as name=value"),
        ("generate x --template art_oill", "--template: there is no template `art_oill`; did you mean `art_oil`"),
        ("encode x --template art_oill", "--template: there is no template `art_oill`"),
        ("encode", "the following arguments are required: PROMPT"),
        ("encode x --width 64", "--width: unknown flag"),
        ("encode x --output no/cat.safetensors", "--output: the folder no does not exist"),
        ("inspect", "the following arguments are required: FILE"),
        ("templates art_oill", "NAME: there is no template `art_oill`; did you mean `art_oil`"),
        ("config pytorh", "`pytorh` is neither a setting nor a section; did you mean `pytorch`?"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(line: str, message: str, zimage: Terminal) -> None:
    finished = zimage(*shlex.split(line))
    assert (finished.status, finished.out) == (2, "")
    assert finished.err.startswith("zimage: ")
    assert message in finished.err
    assert finished.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["help"]])
def test_without_a_command_the_help_is_shown(arguments: list[str], zimage: Terminal) -> None:
    finished = zimage(*arguments)
    assert (finished.status, finished.err) == (0, "")
    assert "usage: zimage" in finished.out
    assert "doctor" in finished.out


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"zimage {version('zimage')}\n"


def test_a_dash_reads_the_prompt_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("generate", "encode"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("a red circle\non white\n"))
        assert parse(build_parser(), [command, "-"]).prompt == "a red circle\non white"


def test_a_missing_model_is_a_mistake_of_the_caller(zimage: Terminal) -> None:
    finished = zimage("generate", "x", "--profile", "demo", "--model-path", "no/such/folder/at/all")
    assert finished.status == 2
    assert finished.err == (
        "zimage: --model-path: no/such/folder/at/all is neither a folder nor a Hugging Face model name\n"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model-path ./nope", "--model-path: ./nope is neither a folder nor a Hugging Face model name"),
        ("--set model_path=./nope", "model_path: ./nope is neither a folder nor a Hugging Face model name"),
        ("--lora nope.safetensors:1", "--lora: there is no file "),
        ("--dit-weights nope.gguf", "--dit-weights: there is no file "),
        ("--set pipeline.vae_weights_file=nope", "pipeline.vae_weights_file: there is no file "),
    ],
)
def test_a_missing_model_file_is_named_by_what_named_it(zimage: Terminal, flags: str, message: str) -> None:
    finished = zimage("generate", "x", "--profile", "demo", *flags.split())
    assert finished.status == 2
    assert finished.err.startswith(f"zimage: {message}")
    assert finished.err.count("\n") == 1


def test_flag_before_set_before_environment_before_profile_before_default(
    settings_file: Any, zimage: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = settings_file(
        "[default.pytorch]\ntile_size = 128\ntile_overlap = 8\ncompile_mode = 'max-autotune'\n"
        "[small.pytorch]\ntile_overlap = 16\nattention_backend = 'sage'\nembedding_cache_bytes = 1\n"
        "[small.generation]\nwidth = 64\n"
    )
    monkeypatch.setenv("ZIMAGE_PYTORCH__ATTENTION_BACKEND", "xformers")
    monkeypatch.setenv("ZIMAGE_PYTORCH__EMBEDDING_CACHE_BYTES", "2")
    line = ["--config", path, "--profile", "small", "--attention-backend", "sdpa"]
    sets = ["--set", "pytorch.attention_backend=flash_attn_2", "--set", "pytorch.compile=true"]
    shown = {
        row.partition(" = ")[0]: row.partition(" = ")[2].split(maxsplit=2)
        for row in zimage("config", *line, *sets, "pytorch").out.splitlines()
    }
    assert shown["pytorch.attention_backend"] == ['"sdpa"', "#", "flag"]
    assert shown["pytorch.compile"] == ["true", "#", "flag"]
    assert shown["pytorch.embedding_cache_bytes"] == ["2", "#", "environment"]
    assert shown["pytorch.tile_overlap"] == ["16", "#", "config.toml [small]"]
    assert shown["pytorch.tile_size"] == ["128", "#", "config.toml [default]"]
    assert shown["pytorch.tiled_vae"] == ["false", "#", "default"]
    assert request_of("x", *line).width == 64
    assert request_of("x", *line, "--set", "generation.width=80").width == 80
    assert request_of("x", *line, "--set", "generation.width=80", "--width", "96").width == 96


def test_a_model_path_is_resolved_from_the_working_folder(zimage: Terminal) -> None:
    (zimage.folder / "model").mkdir()
    assert f'model_path = "{zimage.folder / "model"}"' in zimage("config", "--model-path", "model", "model_path").out
    assert 'model_path = "some/name"' in zimage("config", "--model-path", "some/name", "model_path").out


def test_the_installed_command_is_this_one() -> None:
    scripts = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]["scripts"]
    assert EntryPoint("zimage", scripts["zimage"], "console_scripts").load() is main
