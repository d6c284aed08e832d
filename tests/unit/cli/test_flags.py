"""Every field of a request and every promised flag can be said; what is wrong is one line and status 2."""

import shlex
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.cli.conftest import TREE, Terminal
from zcore.cli import build_parser, main
from zcore.cli.commission import commissioned
from zcore.cli.parser import Parser, parse
from zcore.cli.request_flags import SAID_AS_SETTINGS, flag_of, request_fields
from zcore.cli.setting_flags import ALL, chosen_settings
from zcore.request import SIZE_FIELDS, Dype, GenerationRequest
from zcore.settings import setting_names

# What the model's documentation promises, with `zimage generate` for its script, and what each asks for.
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
    """The parser of one command."""
    return parse(build_parser(), [name, "x"]).parser


def asked(*arguments: str) -> GenerationRequest:
    """What `zimage generate` with these arguments would paint."""
    said = parse(build_parser(), ["generate", *arguments])
    return commissioned(said, chosen_settings(said).settings).request


def test_every_field_of_a_request_is_a_flag_of_generate() -> None:
    flags = command("generate").flags
    fields = {*GenerationRequest.__struct_fields__, *SIZE_FIELDS} - {"version", "loras"}
    assert {flag_of(name) for name in SAID_AS_SETTINGS} <= flags.keys()
    fields -= set(SAID_AS_SETTINGS)
    assert set(request_fields()) == fields
    assert {name: flags[flag_of(name)].dest for name in fields} == {name: name for name in fields}


def test_every_flag_explains_itself_in_sentences() -> None:
    for name in ("generate", "encode", "inspect", "templates", "config"):
        for flag, action in command(name).flags.items():
            assert action.help, flag
            assert action.help.rstrip(")").rpartition(" (")[0].endswith(".") or action.help.endswith("."), flag


def test_flags_of_settings_name_settings_that_exist() -> None:
    names = [name for flag in ALL for name in (*flag.settings, *([flag.needs] if flag.needs else []))]
    assert set(names) <= setting_names().keys()


def test_every_field_reaches_the_request_as_its_flag_said_it() -> None:
    line = """'He said "hi"' --negative-prompt blur --template art_oil --system-prompt S --thinking-content T
        --assistant-content A --no-force-think-block --strip-quotes --clean-whitespace --hidden-layer -5
        --layer-weights '{"-2": 0.7, "-5": 0.3}' --long-prompt-mode pool --width 256 --height 128 --steps 3 --shift 2.5
        --guidance-scale 4 --cfg-normalization 1 --cfg-truncation 0.5
        --passes '[{"scale": 0.5, "steps": 4}, {"scale": 1}]'
        --seed 9 --n 2 --format webp --quality 80 --strength-rule diffusers --strength 0.3 --fit contain
        --no-keep-unmasked"""
    said: dict[str, Any] = {
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
    request = msgspec.to_builtins(asked(*shlex.split(line)))
    passes = request.pop("passes")
    assert request == said
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
def test_a_size_can_be_said_in_several_ways(line: str, size: tuple[int, int]) -> None:
    request = asked("x", *line.split())
    assert (request.width, request.height) == size


@pytest.mark.parametrize(("name", "scales"), [("twopass", [0.5, 1.0]), ("threepass", [0.25, 0.5, 1.0])])
def test_passes_have_names_for_the_usual_ones(name: str, scales: list[float]) -> None:
    passes = asked("x", "--passes", name).passes
    assert [one.scale for one in passes] == scales
    assert passes[-1].strength == 0.5


@pytest.mark.parametrize(("line", "wanted"), PROMISED)
def test_a_promised_command_line_asks_for_what_it_says(
    line: str, wanted: dict[str, Any], settings_file: Any, zimage: Terminal
) -> None:
    path = settings_file("[default]\nmodel_path = 'from-file'\n")
    arguments = [path if one == "config.toml" else one for one in shlex.split(line)]
    request = msgspec.to_builtins(asked(*arguments))
    assert {name: request[name] for name in wanted} == wanted


def test_loras_are_files_with_scales(zimage: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("style.safetensors", "detail.safetensors"):
        (tmp_path / name).touch()
    said = parse(build_parser(), ["generate", *shlex.split("--lora style.safetensors:0.5 --lora detail.safetensors x")])
    assert chosen_settings(said).settings.fused_loras == [
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
    assert finished.err.startswith(f"zimage: {flag.names[0]}: does nothing without --")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("paint x", "COMMAND: invalid choice: 'paint'"),
        ("generate", "PROMPT: is required"),
        ("generate ' '", "PROMPT: must not be blank"),
        ("generate a cat", "`cat` is one argument too many"),
        ("generate x --widht 64", "--widht: there is no such flag; did you mean `--width`?"),
        ("generate x --wid 64", "--wid: there is no such flag; did you mean `--width`?"),
        ("generate x --width", "--width: expected one argument"),
        ("generate x --width wide", "--width: must be a whole number, not `wide`"),
        ("generate x --width 65 --steps 99", "--width: expected `int` that's a multiple of 16; --steps: expected"),
        ("generate x --size 64x64 --width 64", "--size: contradicts `width`"),
        ("generate x --strength 1.5", "--strength: expected"),
        ("generate x --fit crop", "--fit: invalid choice: 'crop' (choose from"),
        ("generate x --passes thrice", "--passes: is not JSON"),
        ("generate x --passes '[{\"scale\": 0.5}]'", "--passes: scales have to grow and end at 1.0"),
        ("generate x --layer-weights -2", "--layer-weights: "),
        ("generate x --device gpu", "--dit-device: expected"),
        ("generate x --lora style:strong", "--lora: `style:strong` has to be FILE:SCALE"),
        ("generate x --negative-prompt blur", "--negative-prompt: does nothing without a guidance_scale above 0"),
        ("generate x --mask mask.png", "--mask: mask.png cannot be read: No such file"),
        ("generate x --img2img no.png", "--img2img: no.png cannot be read: No such file"),
        ("generate x --output picture.gif", "--output: picture.gif has to end in one of .png,"),
        ("generate x --output no/picture.png", "--output: there is no folder no"),
        ("generate --from no.png", "--from: no.png cannot be read"),
        ("generate --embeddings no.safetensors", "--embeddings: no.safetensors cannot be read"),
        ("generate x --config no.toml", "no.toml: cannot be read"),
        ("generate x --profile dem", "there is no profile `dem`; did you mean `demo`?"),
        ("generate x --set pytorch.compiled=true", "option pytorch.compiled is not a setting; did you mean"),
        ("generate x --set compile", "`compile`: settings are given as name=value"),
        ("generate x --template art_oill", "--template: there is no template `art_oill`; did you mean `art_oil`"),
        ("encode x --template art_oill", "--template: there is no template `art_oill`"),
        ("encode", "the following arguments are required: PROMPT"),
        ("encode x --width 64", "--width: there is no such flag"),
        ("encode x --output no/cat.safetensors", "--output: there is no folder no"),
        ("inspect", "the following arguments are required: FILE"),
        ("templates art_oill", "there is no template `art_oill`; did you mean `art_oil`"),
        ("config pytorh", "`pytorh` is neither a setting nor a section; did you mean `pytorch`?"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(line: str, complaint: str, zimage: Terminal) -> None:
    finished = zimage(*shlex.split(line))
    assert (finished.status, finished.out) == (2, "")
    assert finished.err.startswith("zimage: ")
    assert complaint in finished.err
    assert finished.err.count("\n") == 1


def test_a_model_that_is_not_there_is_the_callers_mistake(zimage: Terminal) -> None:
    finished = zimage("generate", "x", "--profile", "demo", "--model-path", "no/such/folder/at/all")
    assert finished.status == 2
    assert finished.err == "zimage: model_path: no/such/folder/at/all is not a folder\n"


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
    assert asked("x", *line).width == 64
    assert asked("x", *line, "--set", "generation.width=80").width == 80
    assert asked("x", *line, "--set", "generation.width=80", "--width", "96").width == 96


def test_a_model_path_typed_is_looked_up_from_the_working_folder(zimage: Terminal) -> None:
    (zimage.folder / "model").mkdir()
    assert f'model_path = "{zimage.folder / "model"}"' in zimage("config", "--model-path", "model", "model_path").out
    assert 'model_path = "some/name"' in zimage("config", "--model-path", "some/name", "model_path").out


def test_the_installed_command_is_this_one() -> None:
    scripts = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]["scripts"]
    assert EntryPoint("zimage", scripts["zimage"], "console_scripts").load() is main
