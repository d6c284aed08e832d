"""What a caller may ask for: every bound, every fault at once, nothing half accepted."""

import math
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
    parse_generation,
    parse_submission,
)

LIMITS = RequestLimits(max_pixels=8192 * 8192)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 5000) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def parse(limits: RequestLimits = LIMITS, **fields: Any) -> Submission:
    return parse_submission({"prompt": "a fox", **fields}, GenerationDefaults(), limits)


def faults(body: dict[str, Any], limits: RequestLimits = LIMITS) -> dict[str, str]:
    """What is wrong with it, by JSON pointer."""
    with pytest.raises(InvalidRequest) as refused:
        parse_submission(body, GenerationDefaults(), limits)
    found = {error.pointer: error.detail for error in refused.value.errors}
    assert len(found) == len(refused.value.errors), "a field is named twice"
    return found


# Bounds

UPLOAD = "input:" + "0a" * 32
OUTPUT = "output:01a20719-4142-7484-a819-b2b18c8b5dd4/3"
WITHIN = {
    "prompt": ["x", "x" * PROMPT_LIMIT_CHARACTERS, "狐狸 🦊", " x "],
    "negative_prompt": [""],
    "template": [None, "photography", "x" * 100],
    "system_prompt": [None, "", "Paint.", "x" * PROMPT_LIMIT_CHARACTERS],
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
    "image": [None, UPLOAD, OUTPUT, "https://pictures.example/fox.png"],
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
    "width": [0, -64, 63, 48, 65, 1000, 8193, 8208, 1024.0, "1024", True, None, 2**70],
    "height": [0, -64, 63, 48, 65, 1000, 8193, 8208, 1024.0, "1024", True, None, 2**70],
    "steps": [0, 51, -1, 8.5, "8", None],
    "shift": [0, 0.0999, 20.0001, -3, math.nan, math.inf, "3", None],
    "seed": [-1, 2**63, 2**80, 1.5, "42", None],
    "n": [0, 9, -1, 1.5, None],
    "version": [0, 2, "1", None],
    "webhook_url": [
        "",
        "caller.example",
        "/told",
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
def test_a_value_within_its_bounds_is_taken_as_it_is(field: str, value: Any) -> None:
    made = parse(**{field: value})
    assert getattr(made.request, field, getattr(made.delivery, field, "absent")) == value


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, values in OUTSIDE.items() for value in values])
def test_a_value_outside_its_bounds_is_refused_by_name(field: str, value: Any) -> None:
    (found,) = faults({"prompt": "a fox", field: value})
    assert found == f"/{field}" or found.startswith(f"/{field}/")


def test_every_field_has_its_bounds_tried() -> None:
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
def test_any_json_body_is_either_a_submission_that_can_be_kept_or_a_refusal(body: dict[str, Any]) -> None:
    try:
        made = parse_submission(body, GenerationDefaults(), LIMITS)
    except InvalidRequest:
        return
    assert msgspec.json.decode(msgspec.json.encode(made.request), type=GenerationRequest) == made.request


@pytest.mark.parametrize(
    ("pixels", "allowed"), [(512 * 512, True), (512 * 512 - 1, False), (64 * 64, False), (8192 * 8192, True)]
)
def test_the_operators_cap_on_pixels_holds_and_is_named(pixels: int, allowed: bool) -> None:
    limits = RequestLimits(max_pixels=pixels)
    if allowed:
        assert parse(limits, width=512, height=512).request.width == 512
    else:
        found = faults({"prompt": "x", "width": 512, "height": 512}, limits)
        assert set(found) == {"/width", "/height"}
        assert f"512x512 is 262144 pixels; at most {pixels}" in found["/width"]


def test_limits_are_named_in_the_refusal() -> None:
    found = faults({"prompt": "x", "steps": 51, "width": 65, "n": 0, "seed": -1})
    assert "50" in found["/steps"]
    assert "16" in found["/width"]
    assert "1" in found["/n"]
    assert "0" in found["/seed"]


# Sizes by name


@pytest.mark.parametrize(
    ("said", "sides"),
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
def test_a_size_may_be_said_by_name_ratio_or_resolution(said: dict[str, Any], sides: tuple[int, int]) -> None:
    request = parse(**said).request
    assert (request.width, request.height) == sides


@pytest.mark.parametrize(
    ("said", "pointer"),
    [
        ({"size": "huge"}, "/size"),
        ({"size": 1024}, "/size"),
        ({"size": "1000x1000"}, "/width"),
        ({"size": "1024x1024", "aspect_ratio": "1:1"}, "/size"),
        ({"aspect_ratio": "1:9"}, "/aspect_ratio"),
        ({"aspect_ratio": "square"}, "/aspect_ratio"),
        ({"aspect_ratio": "0:1"}, "/aspect_ratio"),
        ({"aspect_ratio": "1:1", "resolution": 63}, "/resolution"),
        ({"aspect_ratio": "auto", "resolution": 512}, "/resolution"),
        ({"aspect_ratio": "1:1", "width": 1024}, "/aspect_ratio"),
    ],
)
def test_a_size_that_means_nothing_or_two_things_is_refused(said: dict[str, Any], pointer: str) -> None:
    assert pointer in faults({"prompt": "a fox", **said})


@given(st.integers(1, 100), st.integers(1, 100), st.sampled_from([64, 128, 512, 1000, 1024, 4096]))
def test_every_ratio_gives_sides_that_a_request_takes(across: int, down: int, resolution: int) -> None:
    assume(1 / 8 <= across / down <= 8)
    request = parse(aspect_ratio=f"{across}:{down}", resolution=resolution).request
    assert request.width % 16 == request.height % 16 == 0
    assert (request.width >= request.height) == (across >= down) or request.width == request.height


# What fields say together


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


def test_inputs_of_this_process_are_given_beside_the_request() -> None:
    assert parse_generation({"prompt": "a fox", "image": "given:fox.png"}).image == "given:fox.png"
    with pytest.raises(InvalidRequest, match="image: must be passed as a picture"):
        parse_generation({"prompt": "a fox", "image": "https://pictures.example/fox.png"})


# Faults


@given(st.sets(st.sampled_from(sorted(OUTSIDE))), st.data())
def test_all_faults_are_named_at_once(wrong: set[str], data: st.DataObject) -> None:
    assume(wrong)
    values = {name: data.draw(st.sampled_from(OUTSIDE[name])) for name in sorted(wrong)}
    assert {pointer.split("/")[1] for pointer in faults({"prompt": "a fox", **values})} == wrong


def test_what_fields_say_together_is_checked_though_others_are_wrong() -> None:
    body = {"prompt": " ", "width": 8192, "height": 8192, "steps": 99, "metadata": {"x": "y" * 2000}, "priority": 11}
    assert set(faults(body, RequestLimits())) == {
        "/prompt", "/width", "/height", "/steps", "/metadata", "/priority",
    }  # fmt: skip


def test_a_prompt_has_to_be_there() -> None:
    assert faults({}) == {"/prompt": "is required"}


@pytest.mark.parametrize(
    ("written", "meant"),
    [("widht", "width"), ("promt", "prompt"), ("webhookurl", "webhook_url"), ("seeds", "seed"), ("step", "steps")],
)
def test_an_unknown_field_is_refused_with_the_nearest_one(written: str, meant: str) -> None:
    found = faults({"prompt": "a fox", written: 1})
    assert found == {f"/{written}": f"is not a field of a request; did you mean `{meant}`?"}


def test_a_field_that_is_like_none_is_refused_without_a_guess() -> None:
    assert faults({"prompt": "a fox", "qqqq": 1}) == {"/qqqq": "is not a field of a request"}


def test_pointers_are_escaped() -> None:
    assert set(faults({"prompt": "a fox", "a/b~c": 1})) == {"/a~1b~0c"}


# Defaults


def test_a_silent_caller_gets_the_operators_defaults() -> None:
    defaults = GenerationDefaults(
        width=128, height=256, steps=4, shift=6.0, guidance_scale=3.0, hidden_layer=-3, long_prompt_mode="pool"
    )
    request = parse_submission({"prompt": "a fox"}, defaults, LIMITS).request
    assert (request.width, request.height, request.steps, request.shift) == (128, 256, 4, 6.0)
    assert (request.guidance_scale, request.hidden_layer, request.long_prompt_mode) == (3.0, -3, "pool")
    assert (request.n, request.template, request.version) == (1, None, 1)
    assert parse_submission({"prompt": "a fox", "width": 512}, defaults, LIMITS).request.width == 512


def test_an_object_that_says_a_part_has_the_others_of_the_operator_and_a_passs_of_the_request() -> None:
    parts = SkipLayerGuidance(scale=1.0, layers=(2,), start=0.0, stop=0.25)
    passes = [{"scale": 0.5, "slg": {"stop": 1.0}}, {"scale": 1.0}]
    body = {"prompt": "a fox", "slg": {"scale": 4.0}, "passes": passes}
    request = parse_submission(body, GenerationDefaults(slg_parts=parts), LIMITS).request
    assert request.slg == msgspec.structs.replace(parts, scale=4.0)
    assert [one.slg for one in request.passes] == [msgspec.structs.replace(parts, scale=4.0, stop=1.0), None]
    stretched = parse_submission(
        {"prompt": "a fox", "dype": {"method": "ntk"}}, GenerationDefaults(dype_parts=Dype(base_resolution=128)), LIMITS
    )
    assert stretched.request.dype == Dype(method="ntk", base_resolution=128)
    enabled = GenerationDefaults(slg=parts, slg_parts=parts)
    assert parse_submission({"prompt": "a fox"}, enabled, LIMITS).request.slg == parts
    assert parse_submission({"prompt": "a fox", "slg": None}, enabled, LIMITS).request.slg is None


def test_a_fault_within_an_object_is_named_where_it_is() -> None:
    assert list(faults({"prompt": "a fox", "slg": {"layers": [1, -1]}})) == ["/slg/layers/1"]
    assert list(faults({"prompt": "a fox", "slg": {"layers": [1, 1]}})) == ["/slg/layers"]
    passes = [{"scale": 0.5, "slg": {"stop": 0.01}}, {"scale": 1.0, "steps": 99}]
    assert list(faults({"prompt": "a fox", "passes": passes})) == ["/passes/1/steps"]
    assert list(faults({"prompt": "a fox", "passes": [passes[0], {"scale": 1.0}]})) == ["/passes/0/slg/stop"]


def test_a_seed_is_chosen_where_none_is_given() -> None:
    seeds = [parse().request.seed for _ in range(50)]
    assert len(set(seeds)) == 50
    assert all(0 <= seed < CHOSEN_SEED_BOUND for seed in seeds)
    assert parse(seed=0).request.seed == 0


def test_pictures_of_one_request_have_seeds_in_a_row_that_wrap() -> None:
    assert [parse(seed=40, n=3).request.seed_of(index) for index in range(3)] == [40, 41, 42]
    assert [parse(seed=SEED_BOUND - 1, n=2).request.seed_of(index) for index in range(2)] == [SEED_BOUND - 1, 0]


def test_a_request_cannot_be_changed() -> None:
    request = parse().request
    with pytest.raises(AttributeError):
        request.seed = 1  # type: ignore[misc]


def test_everything_that_decides_the_pixels_is_written_down() -> None:
    written = msgspec.to_builtins(parse(seed=7).request)
    assert set(written) == set(GenerationRequest.__struct_fields__)


def test_a_picture_in_this_process_takes_no_delivery() -> None:
    assert parse_generation({"prompt": "a fox", "seed": 3}).seed == 3
    with pytest.raises(InvalidRequest, match="priority: belongs to a submitted job"):
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
