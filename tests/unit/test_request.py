"""Parsing of requests: every bound, every fault in one answer, and exact error messages."""

import difflib
import math
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from zcore.errors import InvalidRequest
from zcore.request import (
    CHOSEN_SEED_BOUND,
    METADATA_LIMIT_BYTES,
    PROMPT_LIMIT_CHARACTERS,
    SEED_BOUND,
    Dype,
    GenerationDefaults,
    GenerationRequest,
    LoraUse,
    Pass,
    RequestLimits,
    SkipLayerGuidance,
    Submission,
    ascii_host,
    parse_generation,
    parse_submission,
    parse_web_url,
)
from zcore.sizes import PRESETS, largest_size

LIMITS = RequestLimits(max_pixels=8192 * 8192)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 5000) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def parse(limits: RequestLimits = LIMITS, **fields: Any) -> Submission:
    return parse_submission({"prompt": "a fox", **fields}, GenerationDefaults(), limits)


def faults(body: dict[str, Any], limits: RequestLimits = LIMITS) -> dict[str, str]:
    """Return the error details of a body by JSON pointer."""
    with pytest.raises(InvalidRequest) as refused:
        parse_submission(body, GenerationDefaults(), limits)
    found = {error.pointer: error.detail for error in refused.value.errors}
    assert len(found) == len(refused.value.errors), "a field is listed twice"
    return found


# Bounds

UPLOAD = "input:" + "0a" * 32
OUTPUT = "output:01a20719-4142-7484-a819-b2b18c8b5dd4/3"
WITHIN = {
    "prompt": ["x", "x" * PROMPT_LIMIT_CHARACTERS, "狐狸 🦊", " x "],
    "negative_prompt": [""],
    "template": [None, "photography", "x" * 100],
    "system_prompt": [None, "", "Draw.", "x" * PROMPT_LIMIT_CHARACTERS],
    "thinking_content": [None, "", "A quiet fox."],
    "assistant_content": [None, "", "Here it is."],
    "force_think_block": [None, True, False],
    "strip_quotes": [False, True],
    "clean_whitespace": [False, True],
    "hidden_layer": [-1, -2, -36],
    "layer_weights": [{}, {"-2": 0.7, "-36": 0.3}, {"-1": 1000}],
    "long_prompt_mode": ["truncate", "interpolate", "pool", "attention_pool", "refuse"],
    "guidance_scale": [0, 0.0, 4.5, 30],
    "cfg_normalization": [0, 1.0, 10],
    "cfg_truncation": [0, 0.5, 1],
    "dype": [None, Dype(), Dype(method="ntk", scale=0, exponent=16, start_sigma=0.001, base_resolution=64)],
    "slg": [None, SkipLayerGuidance(), SkipLayerGuidance(scale=0, layers=(0, 199), start=0, stop=1)],
    "image": [None, UPLOAD, OUTPUT, "https://images.example/fox.png"],
    "mask": [None],
    "strength": [0.01, 0.6, 1],
    "strength_rule": ["continuous", "diffusers"],
    "fit": ["cover", "contain", "stretch"],
    "keep_unmasked": [True, False],
    "tiled_vae": [False, True],
    "passes": [(), (Pass(scale=0.5), Pass(scale=1.0, steps=9, strength=0.5, shift=3.0, guidance_scale=0.0))],
    "loras": [(), (LoraUse(name="night"), LoraUse(name="9.Outline_v-2", scale=-10)), (LoraUse(name="x", scale=0),)],
    "format": ["png", "jpeg", "webp", "avif"],
    "quality": [1, 90, 100],
    "width": [64, 80, 8192],
    "height": [64, 80, 8192],
    "steps": [1, 8, 9, 50],
    "shift": [0.1, 3, 3.0, 20.0],
    "seed": [0, 42, 2**63 - 1],
    "n": [1, 8],
    "version": [1],
    "webhook_url": [None, "http://127.0.0.1:9/x?y=z", "https://caller.example", "https://[::1]:8443/"],
    "metadata": [{}, {"order": [1, None, {"deep": True}]}, {"x": "y" * (METADATA_LIMIT_BYTES - 8)}],
    "priority": [-10, 0, 10],
}
OUTSIDE = {
    "prompt": ["", " \n\t", "x" * (PROMPT_LIMIT_CHARACTERS + 1), 7, None, "nul\0", "half \ud83e"],
    "negative_prompt": [7, None, "x" * (PROMPT_LIMIT_CHARACTERS + 1), "needs guidance"],
    "template": ["", "x" * 101, 7, "nul\0"],
    "system_prompt": [7, "x" * (PROMPT_LIMIT_CHARACTERS + 1), "nul\0"],
    "thinking_content": [7, "x" * (PROMPT_LIMIT_CHARACTERS + 1)],
    "assistant_content": [7, "x" * (PROMPT_LIMIT_CHARACTERS + 1)],
    "force_think_block": [0, "yes"],
    "strip_quotes": [None, 1],
    "clean_whitespace": [None, "no"],
    "hidden_layer": [0, 2, -37, None, -1.5],
    "layer_weights": [None, [], {"-2": 0}, {"-2": -1}, {"-37": 1}, {"0": 1}, {"two": 1}, {"-2": "1"}, {"-2\n": 1}],
    "long_prompt_mode": ["", "cut", None],
    "guidance_scale": [-0.1, 30.1, None, "4"],
    "cfg_normalization": [-1, 11, True],
    "cfg_truncation": [-0.1, 1.1, None],
    "dype": [
        True,
        {"methods": "ntk"},
        {"method": "pi"},
        {"scale": -1},
        {"exponent": 0},
        {"start_sigma": 0},
        {"start_sigma": 1.1},
        {"base_resolution": 1000},
        {"dynamic": 1},
    ],
    "slg": [
        True,
        [],
        {"layer": [1]},
        {"scale": -1},
        {"scale": 31},
        {"layers": []},
        {"layers": [-1]},
        {"layers": [7, 8, 7]},
        {"layers": [200]},
        {"layers": ["7"]},
        {"layers": None},
        {"start": 0.5, "stop": 0.5},
        {"start": 1.1},
    ],
    "image": [
        "",
        7,
        "fox.png",
        "given:fox.png",
        "file:///etc/passwd",
        "input:12",
        "output:1/0",
        "https://a:b@c.example",
    ],
    "mask": ["", 7, "mask.png"],
    "strength": [0, -0.5, 1.01, None],
    "strength_rule": ["floor", None],
    "fit": ["crop", None],
    "keep_unmasked": [None, 1],
    "tiled_vae": [None, 1, "yes"],
    "passes": [
        None,
        [{}],
        [{"scale": 0.5}],
        [{"scale": 1.0}, {"scale": 0.5}],
        [{"scale": 1.0, "step": 9}],
        [{"scale": 1.0}] * 5,
        [{"scale": 1.0, "width": 64}],
    ],
    "loras": [
        None,
        "night",
        ["night"],
        [{}],
        [{"scale": 1.0}],
        [{"name": "night", "scale": 10.1}],
        [{"name": "night", "scale": math.nan}],
        [{"name": "night", "weight": 1}],
        [{"name": "../night"}],
        [{"name": ".night"}],
        [{"name": "night\n"}],
        [{"name": "n" * 101}],
        [{"name": f"night-{index}"} for index in range(9)],
    ],
    "format": ["gif", "PNG", None],
    "quality": [0, 101, 90.5],
    "width": [0, -64, 63, 48, 65, 1000, 8193, 8208, 1024.5, "1024", True, None, 2**70],
    "height": [0, -64, 63, 48, 65, 1000, 8193, 8208, 1024.5, "1024", True, None, 2**70],
    "steps": [0, 51, -1, 8.5, "8", None],
    "shift": [0, 0.0999, 20.0001, -3, math.nan, math.inf, "3", None],
    "seed": [-1, 2**63, 2**80, 1.5, "4.2", "-1", str(2**63), None],
    "n": [0, 9, -1, 1.5, None],
    "version": [0, 2, "1", None],
    "webhook_url": [
        "",
        "caller.example",
        "/hook",
        "ftp://caller.example",
        "file:///etc/passwd",
        "https://",
        "https://:443",
        "https://anna:secret@caller.example",
        "https://anna@caller.example",
        "https://caller.example:0",
        "https://caller.example:99999",
        "https://[::1",
        "https://caller.example/a b",
        "https://caller.example/\nHost: other",
        "https://caller.example/" + "x" * 2048,
        7,
    ],
    "metadata": [[], "x", None, {"x": "y" * (METADATA_LIMIT_BYTES - 7)}, {"x": ["nul\0"]}, {"nul\0": 1}],
    "priority": [-11, 11, 0.5, "high", None],
}


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, values in WITHIN.items() for value in values])
def test_a_value_within_its_bounds_is_unchanged(field: str, value: Any) -> None:
    made = parse(**{field: value})
    assert getattr(made.request, field, getattr(made.delivery, field, "absent")) == value


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, values in OUTSIDE.items() for value in values])
def test_a_value_outside_its_bounds_is_refused_at_its_pointer(field: str, value: Any) -> None:
    (found,) = faults({"prompt": "a fox", field: value})
    assert found == f"/{field}" or found.startswith(f"/{field}/")


def test_the_bounds_of_every_field_are_tested() -> None:
    fields = {*GenerationRequest.__struct_fields__, *msgspec.structs.asdict(parse().delivery)}
    assert set(WITHIN) == set(OUTSIDE) == fields


@given(st.integers(-100, 10_000))
def test_sides_are_multiples_of_16_from_64_to_8192(side: int) -> None:
    allowed = 64 <= side <= 8192 and side % 16 == 0
    if allowed:
        assert parse(width=side, height=side).request.width == side
    else:
        assert set(faults({"prompt": "x", "width": side, "height": side})) == {"/width", "/height"}


@given(st.integers())
def test_seeds_are_the_natural_numbers_below_2_to_the_63(seed: int) -> None:
    if 0 <= seed < SEED_BOUND:
        assert parse(seed=seed).request.seed == seed
    else:
        assert set(faults({"prompt": "x", "seed": seed})) == {"/seed"}


@given(st.dictionaries(st.sampled_from([*OUTSIDE, "widht", "x"]), JSON))
def test_any_json_body_is_either_a_storable_submission_or_refused(body: dict[str, Any]) -> None:
    try:
        made = parse_submission(body, GenerationDefaults(), LIMITS)
    except InvalidRequest:
        return
    assert msgspec.json.decode(msgspec.json.encode(made.request), type=GenerationRequest) == made.request


@pytest.mark.parametrize(
    ("pixels", "allowed"), [(512 * 512, True), (512 * 512 - 1, False), (64 * 64, False), (8192 * 8192, True)]
)
def test_the_operators_limit_on_pixels_is_enforced_and_named(pixels: int, allowed: bool) -> None:
    limits = RequestLimits(max_pixels=pixels)
    if allowed:
        assert parse(limits, width=512, height=512).request.width == 512
    else:
        found = faults({"prompt": "x", "width": 512, "height": 512}, limits)
        assert set(found) == {"/width", "/height"}
        assert f"must result in at most {pixels} pixels, not 262144 (512x512)" in found["/width"]


SIDE = "must be a whole number from 64 to 8192 that is a multiple of 16"
STEPS = "must be a whole number from 1 to 50"
STRENGTH = "must be a number above 0 and at most 1"
LORA_NAME = "must be 1 to 100 letters, digits, `.`, `_` or `-`, starting with a letter or digit"
INPUT = "must be an https URL without user and password, input:SHA256 of an upload, or output:JOB/INDEX"
WEBHOOK_URL = "must be an absolute http or https URL with a valid host name, without user and password"
RATIO = "must be a ratio from 1:8 to 8:1"
SIDES = "must have sides from 64 to 8192 px that are multiples of 16"
UNWRITABLE_TEXT = "must not contain NUL characters or unpaired surrogates"
PRESET_NAMES = ", ".join(PRESETS)
MEGAPIXEL = RequestLimits(max_pixels=1024 * 1024)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"width": 1000}, {"/width": f"{SIDE}; the nearest is 1008"}),
        ({"width": 65}, {"/width": f"{SIDE}; the nearest is 64"}),
        ({"width": 0, "height": 9999}, {
            "/width": f"{SIDE}; the nearest is 64", "/height": f"{SIDE}; the nearest is 8192",
        }),
        ({"width": 2**70}, {"/width": f"{SIDE}; the nearest is 8192"}),
        ({"width": 1024.5}, {"/width": f"{SIDE}; the nearest is 1024"}),
        ({"width": "1024"}, {"/width": SIDE}),
        ({"width": True}, {"/width": SIDE}),
        ({"width": None}, {"/width": SIDE}),
        ({"steps": 51}, {"/steps": f"{STEPS}; the nearest is 50"}),
        ({"steps": 8.4}, {"/steps": f"{STEPS}; the nearest is 8"}),
        ({"seed": -1}, {"/seed": "must be a whole number from 0 to 9223372036854775807; the nearest is 0"}),
        ({"shift": 0}, {"/shift": "must be a number from 0.1 to 20; the nearest is 0.1"}),
        ({"shift": math.inf}, {"/shift": "must be a number from 0.1 to 20; the nearest is 20"}),
        ({"shift": math.nan}, {"/shift": "must be a number from 0.1 to 20"}),
        ({"strength": 0}, {"/strength": STRENGTH}),
        ({"strength": 1.5}, {"/strength": f"{STRENGTH}; the nearest is 1"}),
        ({"version": 2}, {"/version": "must be 1"}),
        ({"format": "PNG"}, {"/format": "must be one of png, jpeg, webp, avif; did you mean `png`?"}),
        ({"format": "gif"}, {"/format": "must be one of png, jpeg, webp, avif"}),
        ({"tiled_vae": 1}, {"/tiled_vae": "must be true or false"}),
        ({"prompt": 7}, {"/prompt": "must be text of 1 to 16384 characters"}),
        ({"prompt": "nul\0"}, {"/prompt": UNWRITABLE_TEXT}),
        ({"negative_prompt": "x" * 16_385}, {"/negative_prompt": "must be text of at most 16384 characters"}),
        ({"template": ""}, {"/template": "must be text of 1 to 100 characters"}),
        ({"metadata": []}, {"/metadata": "must be an object"}),
        ({"metadata": {"x": "y" * 1100}}, {"/metadata": "must be at most 1024 bytes as JSON, not 1108"}),
        ({"loras": "night"}, {"/loras": "must be a list of at most 8 objects"}),
        ({"loras": [{"name": str(index)} for index in range(9)]}, {"/loras": "must be a list of at most 8 objects"}),
        ({"loras": ["night"]}, {"/loras/0": "must be an object"}),
        ({"loras": [{"name": "a"}, {"nam": "b"}]}, {
            "/loras/1/nam": "is not a known field; did you mean `name`?", "/loras/1/name": "is required",
        }),
        ({"loras": [{"name": "../a", "scale": 11}]}, {
            "/loras/0/name": LORA_NAME, "/loras/0/scale": "must be a number from -10 to 10; the nearest is 10",
        }),
        ({"slg": True}, {"/slg": "must be an object"}),
        ({"slg": {"layers": []}}, {"/slg/layers": "must be a list of 1 to 200 whole numbers"}),
        ({"slg": {"layers": [1, 2, 3, 200]}}, {
            "/slg/layers/3": "must be a whole number from 0 to 199; the nearest is 199",
        }),
        ({"slg": {"layers": [7, 7]}}, {"/slg/layers": "must not repeat a layer; 7 is listed twice"}),
        ({"slg": {"start": 0.5}}, {"/slg/stop": "must be above start, 0.5"}),
        ({"dype": {"methods": "ntk"}}, {"/dype/methods": "is not a known field; did you mean `method`?"}),
        ({"layer_weights": {"two": 1, "-2": 1001}}, {
            "/layer_weights/two": 'must be a layer from "-36" to "-1"',
            "/layer_weights/-2": "must be a number above 0 and at most 1000; the nearest is 1000",
        }),
        ({"passes": [{"scale": 0.5, "steps": 0}, {"scale": 2}]}, {
            "/passes/0/steps": f"{STEPS}; the nearest is 1", "/passes/1/scale": f"{STRENGTH}; the nearest is 1",
        }),
        ({"passes": [{"scale": 0.5}]}, {"/passes": "scales must not decrease and must end at 1.0, not [0.5]"}),
        ({"passes": [{"scale": 0.04}, {"scale": 1.0}]}, {
            "/passes/0/scale": "must be at least 0.0625, so that the shorter side has at least 64 px",
        }),
        ({"image": "fox.png"}, {"/image": INPUT}),
        ({"mask": UPLOAD}, {"/mask": "requires an image"}),
        ({"webhook_url": "caller.example"}, {"/webhook_url": WEBHOOK_URL}),
        ({"size": "huge"}, {"/size": f"must be WIDTHxHEIGHT, a ratio such as 16:9, auto, or one of {PRESET_NAMES}"}),
        ({"size": "1000x9999"}, {"/size": f"{SIDES}; the nearest is 1008x8192"}),
        ({"size": "64x64", "width": 64}, {"/size": "cannot be combined with width; give only one of them"}),
        ({"aspect_ratio": "1:9"}, {"/aspect_ratio": f"{RATIO}; the nearest is 1:8"}),
        ({"aspect_ratio": "9:0"}, {"/aspect_ratio": f"{RATIO}; the nearest is 8:1"}),
        ({"aspect_ratio": "square"}, {"/aspect_ratio": "must be a ratio such as 16:9, or auto"}),
        ({"resolution": 9000}, {"/resolution": "must be a whole number from 64 to 8192; the nearest is 8192"}),
    ],
)  # fmt: skip
def test_a_message_says_what_is_allowed_and_what_is_nearest(fields: dict[str, Any], expected: dict[str, str]) -> None:
    assert faults({"prompt": "a fox", **fields}) == expected


@pytest.mark.parametrize(
    ("fields", "pointers", "largest"),
    [
        ({"width": 2048, "height": 1152}, {"/width", "/height"}, "1360x768"),
        ({"width": 8192}, {"/width"}, "2896x352"),
        ({"size": "2048x2048"}, {"/size"}, "1024x1024"),
        ({"size": "1152x2048"}, {"/size"}, "768x1360"),
        ({"aspect_ratio": "16:9", "resolution": 2048}, {"/resolution"}, "1360x768"),
    ],
)
def test_too_many_pixels_are_refused_at_the_callers_field_with_the_largest_size(
    fields: dict[str, Any], pointers: set[str], largest: str
) -> None:
    found = faults({"prompt": "a fox", **fields}, MEGAPIXEL)
    assert found.keys() == pointers
    assert all(detail.endswith(f"; the largest size of this ratio is {largest}") for detail in found.values())
    assert parse(MEGAPIXEL, size=largest).request.width


@given(st.integers(4, 512), st.integers(4, 512), st.integers(64 * 64, 8192 * 8192))
def test_the_largest_size_is_accepted(columns: int, rows: int, max_pixels: int) -> None:
    assume(columns * rows * 256 > max_pixels)
    size = largest_size(columns * 16, rows * 16, max_pixels)
    assert parse(RequestLimits(max_pixels=max_pixels), width=size.width, height=size.height)


# Hosts


@pytest.mark.parametrize(
    ("host", "encoded"),
    [
        ("straße.example", "xn--strae-oqa.example"),
        ("Bücher。example", "xn--bcher-kva.example"),
        ("xn--strae-oqa.example", "xn--strae-oqa.example"),
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("object_store", "object_store"),
        ("r3---sn-a.example.", "r3---sn-a.example."),
        ("a" * 64 + ".example", None),
        ("a..example", None),
        ("xn--a.example", None),
        ("a\u200d.example", None),
        ("a!b.example", None),
        (".".join(["a" * 60] * 5), None),
        ("", None),
    ],
)
def test_a_host_is_encoded_by_uts_46(host: str, encoded: str | None) -> None:
    assert ascii_host(host) == encoded


def test_a_url_with_an_invalid_host_is_refused_at_submission() -> None:
    assert faults({"prompt": "a fox", "webhook_url": "https://a..example/hook"}) == {"/webhook_url": WEBHOOK_URL}
    assert parse_web_url("https://straße.example/hook") is not None


# Sizes by name


@pytest.mark.parametrize(
    ("fields", "sides"),
    [
        ({"size": "1536x864"}, (1536, 864)),
        ({"size": "auto"}, (1024, 1024)),
        ({"size": "landscape_16_9"}, (1280, 720)),
        ({"aspect_ratio": "9:16"}, (720, 1280)),
        ({"aspect_ratio": "21:9", "resolution": 1536}, (2016, 864)),
        ({"resolution": 512}, (512, 512)),
        ({"aspect_ratio": "16:9", "resolution": 128}, (176, 96)),
        ({"aspect_ratio": "2:1"}, (1456, 720)),
    ],
)
def test_a_size_may_be_a_name_a_ratio_or_a_resolution(fields: dict[str, Any], sides: tuple[int, int]) -> None:
    request = parse(**fields).request
    assert (request.width, request.height) == sides


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"size": "huge"}, "/size"),
        ({"size": 1024}, "/size"),
        ({"size": "1000x1000"}, "/size"),
        ({"size": "1024x1024", "aspect_ratio": "1:1"}, "/size"),
        ({"aspect_ratio": "1:9"}, "/aspect_ratio"),
        ({"aspect_ratio": "square"}, "/aspect_ratio"),
        ({"aspect_ratio": "0:1"}, "/aspect_ratio"),
        ({"aspect_ratio": "1:1", "resolution": 63}, "/resolution"),
        ({"aspect_ratio": "auto", "resolution": 512}, "/resolution"),
        ({"aspect_ratio": "1:1", "width": 1024}, "/aspect_ratio"),
    ],
)
def test_an_invalid_or_ambiguous_size_is_refused(fields: dict[str, Any], pointer: str) -> None:
    assert list(faults({"prompt": "a fox", **fields})) == [pointer]


@given(st.integers(1, 100), st.integers(1, 100), st.sampled_from([64, 128, 512, 1000, 1024, 4096]))
def test_every_ratio_results_in_valid_sides(across: int, down: int, resolution: int) -> None:
    assume(1 / 8 <= across / down <= 8)
    request = parse(aspect_ratio=f"{across}:{down}", resolution=resolution).request
    assert request.width % 16 == request.height % 16 == 0
    assert (request.width >= request.height) == (across >= down) or request.width == request.height


# Contradictions between fields


@pytest.mark.parametrize(
    ("fields", "pointers"),
    [
        ({"negative_prompt": "blur"}, {"/negative_prompt"}),
        ({"loras": [{"name": "night"}, {"name": "x"}, {"name": "night", "scale": 2}]}, {"/loras/2/name"}),
        ({"negative_prompt": "blur", "guidance_scale": 4.0}, set()),
        ({"negative_prompt": "blur", "passes": [{"scale": 1.0, "guidance_scale": 2.0}]}, set()),
        ({"prompt": '""', "strip_quotes": True}, {"/prompt"}),
        ({"prompt": '""'}, set()),
        ({"mask": UPLOAD}, {"/mask"}),
        ({"mask": UPLOAD, "image": OUTPUT}, set()),
        ({"mask": UPLOAD, "image": OUTPUT, "passes": [{"scale": 1.0}]}, {"/passes"}),
        ({"passes": [{"scale": 0.5, "strength": 0.5}, {"scale": 1.0}]}, {"/passes/0/strength"}),
        ({"passes": [{"scale": 0.5, "strength": 0.5}, {"scale": 1.0}], "image": OUTPUT}, set()),
        ({"passes": [{"scale": 0.04}, {"scale": 1.0}]}, {"/passes/0/scale"}),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], pointers: set[str]) -> None:
    if pointers:
        assert set(faults({"prompt": "a fox", **fields})) == pointers
    else:
        parse(**fields)


def test_inputs_in_memory_are_accepted_in_this_process_only() -> None:
    assert parse_generation({"prompt": "a fox", "image": "given:fox.png"}).image == "given:fox.png"
    with pytest.raises(InvalidRequest, match="image: must be passed as an image in memory"):
        parse_generation({"prompt": "a fox", "image": "https://images.example/fox.png"})


# Faults


@given(st.sets(st.sampled_from(sorted(OUTSIDE))), st.data())
def test_all_faults_are_listed_at_once(wrong: set[str], data: st.DataObject) -> None:
    assume(wrong)
    values = {name: data.draw(st.sampled_from(OUTSIDE[name])) for name in sorted(wrong)}
    assert {pointer.split("/")[1] for pointer in faults({"prompt": "a fox", **values})} == wrong


def test_contradictions_are_found_even_if_other_fields_are_wrong() -> None:
    body = {"prompt": " ", "width": 8192, "height": 8192, "steps": 99, "metadata": {"x": "y" * 2000}, "priority": 11}
    assert set(faults(body, RequestLimits())) == {
        "/prompt", "/width", "/height", "/steps", "/metadata", "/priority",
    }  # fmt: skip


def test_a_prompt_is_required() -> None:
    assert faults({}) == {"/prompt": "is required"}


@pytest.mark.parametrize(
    ("written", "meant"),
    [("widht", "width"), ("promt", "prompt"), ("webhookurl", "webhook_url"), ("seeds", "seed"), ("step", "steps")],
)
def test_an_unknown_field_is_refused_with_a_similar_one(written: str, meant: str) -> None:
    found = faults({"prompt": "a fox", written: 1})
    assert found == {f"/{written}": f"is not a known field; did you mean `{meant}`?"}


HOSTILE: dict[str, dict[str, Any]] = {
    "unknown fields": {f"negative_prompt{index}": 0 for index in range(10_000)},
    "unknown fields of an object": {"dype": {f"methods{index}": 0 for index in range(10_000)}},
    "unknown fields in a list": {"loras": [{f"name{index}": 0} for index in range(8)] * 1000},
    "unknown fields of passes": {"passes": [{f"scale{index}": 0 for index in range(10_000)}] * 4},
    "wrong items": {"slg": {"layers": ["x"] * 10_000}},
    "wrong keys": {"layer_weights": {f"-{index}": 1 for index in range(10_000)}},
    "long names": {str(index) + "n" * 5000: 0 for index in range(50)},
    "a long choice": {"format": "p" * 100_000, "template": "t" * 100_000},
    "a long size": {"size": "landscape_16_9" * 10_000},
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
def test_the_work_and_the_answer_of_a_refusal_are_bounded(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    """10,000 unknown fields used to be compared with every known one, and answered with a megabyte."""
    compared: list[str] = []

    def counted(name: str, known: Iterable[str], n: int = 1) -> list[str]:
        compared.append(name)
        return []

    monkeypatch.setattr(difflib, "get_close_matches", counted)
    found = faults({"prompt": "a fox", **fields})
    assert found
    assert len(compared) <= 50
    assert sum(len(pointer) + len(detail) for pointer, detail in found.items()) < 10_000


def test_unknown_fields_beyond_the_first_ten_are_counted() -> None:
    found = faults({"prompt": "a fox", **{f"field{index}": 0 for index in range(25)}})
    assert found.keys() == {"", *(f"/field{index}" for index in range(10))}
    assert found[""] == "15 more fields are not known"


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        ({"steps": 8.0}, {"steps": 8}),
        ({"seed": 1e3}, {"seed": 1000}),
        ({"seed": "9007199254740993"}, {"seed": 9007199254740993}),
        ({"seed": str(2**63 - 1)}, {"seed": 2**63 - 1}),
        ({"width": 128.0, "height": 64.0}, {"width": 128, "height": 64}),
        ({"aspect_ratio": "1:1", "resolution": 512.0}, {"width": 512, "height": 512}),
        ({"slg": {"layers": [1.0, 2]}}, {"slg": SkipLayerGuidance(layers=(1, 2))}),
        ({"passes": [{"scale": 1, "steps": 4.0}]}, {"passes": (Pass(scale=1.0, steps=4),)}),
        ({"shift": 3}, {"shift": 3.0}),
    ],
)
def test_a_whole_number_may_be_written_as_json_schema_allows(written: dict[str, Any], stored: dict[str, Any]) -> None:
    request = parse(**written).request
    assert {name: getattr(request, name) for name in stored} == stored
    assert all(type(getattr(request, name)) is type(value) for name, value in stored.items())


def test_metadata_is_returned_as_it_was_written() -> None:
    metadata = parse(metadata={"version": 1.0}).delivery.metadata
    assert repr(metadata) == "{'version': 1.0}"


@pytest.mark.parametrize("name", ["webhook_url", "image"])
def test_a_blank_in_a_web_address_is_named(name: str) -> None:
    detail = "must not contain a blank, as after `https://a.example/my`; write it as %20"
    assert faults({"prompt": "a fox", name: "https://a.example/my hook"}) == {f"/{name}": detail}


@pytest.mark.parametrize(
    ("size", "nearest"),
    [("1920x1080", "1920x1088"), ("99999x5", "8192x64"), ("1x1", "64x64"), ("1000X9", "1008x64")],
)
def test_the_nearest_size_is_named_at_the_field_that_was_used(size: str, nearest: str) -> None:
    bounds = "must have sides from 64 to 8192 px that are multiples of 16"
    assert faults({"prompt": "a fox", "size": size}) == {"/size": f"{bounds}; the nearest is {nearest}"}


def test_an_unknown_field_that_resembles_none_is_refused_without_a_suggestion() -> None:
    assert faults({"prompt": "a fox", "qqqq": 1}) == {"/qqqq": "is not a known field"}


def test_pointers_are_escaped() -> None:
    assert set(faults({"prompt": "a fox", "a/b~c": 1})) == {"/a~1b~0c"}


# Defaults


def test_omitted_fields_are_the_operators_defaults() -> None:
    defaults = GenerationDefaults(
        width=128, height=256, steps=4, shift=6.0, guidance_scale=3.0, hidden_layer=-3, long_prompt_mode="pool"
    )
    request = parse_submission({"prompt": "a fox"}, defaults, LIMITS).request
    assert (request.width, request.height, request.steps, request.shift) == (128, 256, 4, 6.0)
    assert (request.guidance_scale, request.hidden_layer, request.long_prompt_mode) == (3.0, -3, "pool")
    assert (request.n, request.template, request.version) == (1, None, 1)
    assert parse_submission({"prompt": "a fox", "width": 512}, defaults, LIMITS).request.width == 512


def test_a_partial_object_is_completed_by_the_operators_settings_and_in_a_pass_by_the_request() -> None:
    configured = SkipLayerGuidance(scale=1.0, layers=(2,), start=0.0, stop=0.25)
    passes = [{"scale": 0.5, "slg": {"stop": 1.0}}, {"scale": 1.0}]
    body = {"prompt": "a fox", "slg": {"scale": 4.0}, "passes": passes}
    request = parse_submission(body, GenerationDefaults(slg_fields=configured), LIMITS).request
    assert request.slg == msgspec.structs.replace(configured, scale=4.0)
    assert [one.slg for one in request.passes] == [msgspec.structs.replace(configured, scale=4.0, stop=1.0), None]
    stretched = parse_submission(
        {"prompt": "a fox", "dype": {"method": "ntk"}},
        GenerationDefaults(dype_fields=Dype(base_resolution=128)),
        LIMITS,
    )
    assert stretched.request.dype == Dype(method="ntk", base_resolution=128)
    enabled = GenerationDefaults(slg=configured, slg_fields=configured)
    assert parse_submission({"prompt": "a fox"}, enabled, LIMITS).request.slg == configured
    assert parse_submission({"prompt": "a fox", "slg": None}, enabled, LIMITS).request.slg is None


def test_a_fault_within_an_object_has_its_own_pointer() -> None:
    assert list(faults({"prompt": "a fox", "slg": {"layers": [1, -1]}})) == ["/slg/layers/1"]
    assert list(faults({"prompt": "a fox", "slg": {"layers": [1, 1]}})) == ["/slg/layers"]
    passes = [{"scale": 0.5, "slg": {"stop": 0.01}}, {"scale": 1.0, "steps": 99}]
    assert list(faults({"prompt": "a fox", "passes": passes})) == ["/passes/1/steps"]
    assert list(faults({"prompt": "a fox", "passes": [passes[0], {"scale": 1.0}]})) == ["/passes/0/slg/stop"]


def test_an_omitted_seed_is_random() -> None:
    seeds = [parse().request.seed for _ in range(50)]
    assert len(set(seeds)) == 50
    assert all(0 <= seed < CHOSEN_SEED_BOUND for seed in seeds)
    assert parse(seed=0).request.seed == 0


def test_images_of_one_request_have_consecutive_seeds_that_wrap() -> None:
    assert [parse(seed=40, n=3).request.seed_of(index) for index in range(3)] == [40, 41, 42]
    assert [parse(seed=SEED_BOUND - 1, n=2).request.seed_of(index) for index in range(2)] == [SEED_BOUND - 1, 0]


def test_a_request_cannot_be_changed() -> None:
    request = parse().request
    with pytest.raises(AttributeError):
        request.seed = 1


def test_every_field_is_stored() -> None:
    written = msgspec.to_builtins(parse(seed=7).request)
    assert set(written) == set(GenerationRequest.__struct_fields__)


def test_a_generation_in_this_process_has_no_delivery() -> None:
    assert parse_generation({"prompt": "a fox", "seed": 3}).seed == 3
    with pytest.raises(InvalidRequest, match="priority: applies only to a submitted job"):
        parse_generation({"prompt": "a fox", "priority": 3})


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "A cat sleeping", "width": 1024, "height": 1024, "steps": 9, "seed": 42},
        {"prompt": "A sunset", "template": "photography"},
    ],
)
def test_the_documented_bodies_are_accepted(body: dict[str, Any]) -> None:
    assert parse_submission(body, GenerationDefaults(), RequestLimits()).request.prompt == body["prompt"]
