"""What a caller may ask for: one frozen, validated value that HTTP accepts, the job stores and the pipeline takes.

Takes untyped input (a JSON body, CLI arguments) and the operator's defaults and limits; gives a `GenerationRequest`
with every value decided, the seed included. Every bound of a request stands here, once. Does not know HTTP, the
database, the tokenizer (lengths in tokens are checked where one is at hand) or the model.
"""

import math
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from zcore.errors import FieldError, InvalidRequest, did_you_mean
from zcore.sizes import LARGEST_SIDE_PX, RATIOS, SIDE_MULTIPLE_PX, SMALLEST_SIDE_PX, named_size

SEED_BOUND = 2**63
CHOSEN_SEED_BOUND = 2**53  # what every JSON reader keeps exactly
PROMPT_LIMIT_CHARACTERS = 16_384
METADATA_LIMIT_BYTES = 1024

# What neither PostgreSQL nor UTF-8 can hold.
UNWRITABLE = re.compile("[\0\ud800-\udfff]")

Side = Annotated[
    int,
    Meta(
        ge=SMALLEST_SIDE_PX,
        le=LARGEST_SIDE_PX,
        multiple_of=SIDE_MULTIPLE_PX,
        description="Pixels; a multiple of 16 from 64 to 8192.",
    ),
]
Steps = Annotated[int, Meta(ge=1, le=50, description="Transformer forwards; 8 is what the model was distilled for.")]
Shift = Annotated[float, Meta(ge=0.1, le=20.0, description="Flow-matching schedule shift.")]
GuidanceScale = Annotated[
    float,
    Meta(
        ge=0.0,
        le=30.0,
        description="Classifier-free guidance; 0 is off, which a distilled checkpoint wants. Above 0 every step costs "
        "two forwards.",
    ),
]
HiddenLayer = Annotated[
    int, Meta(ge=-36, le=-1, description="Which hidden state of the text encoder is read; -2 is what was trained on.")
]
Strength = Annotated[
    float, Meta(gt=0.0, le=1.0, description="How much of the input is painted anew: near 0 little, 1 all of it.")
]
StrengthRule = Literal["continuous", "diffusers"]
LongPromptMode = Literal["truncate", "interpolate", "pool", "attention_pool", "refuse"]
OutputFormat = Literal["png", "jpeg", "webp", "avif"]
Fit = Literal["cover", "contain", "stretch"]
SlgScale = Annotated[float, Meta(ge=0.0, le=30.0, description="How strongly; 0 is off.")]
LayerIndex = Annotated[int, Meta(ge=0, le=199)]
LayerIndices = Annotated[
    tuple[LayerIndex, ...],
    Meta(min_length=1, max_length=200, description="Which main blocks of the transformer are left out, from 0."),
]
PartOfSteps = Annotated[float, Meta(ge=0.0, le=1.0)]
DypeMethod = Literal["vision_yarn", "yarn", "ntk"]
DypeScale = Annotated[float, Meta(ge=0.0, le=16.0, description="How strongly positions are stretched; 0 is off.")]
DypeExponent = Annotated[float, Meta(gt=0.0, le=16.0, description="How early the stretch fades along the steps.")]
DypeStart = Annotated[
    float, Meta(ge=0.001, le=1.0, description="The noise level below which vision_yarn's amplitude fades.")
]
BaseResolution = Annotated[
    int, Meta(ge=64, le=8192, multiple_of=16, description="Pixels a side that the checkpoint was trained at.")
]
LayerName = Annotated[str, Meta(pattern=r"^-([1-9]|[12][0-9]|3[0-6])$(?!\n)")]  # `$` alone ends before a last line end
LayerWeight = Annotated[float, Meta(gt=0.0, le=1000.0)]
SystemText = Annotated[str, Meta(max_length=PROMPT_LIMIT_CHARACTERS)]
LoraName = Annotated[  # the same
    str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$(?!\n)", description="A LoRA of this service, by name.")
]
LoraScale = Annotated[
    float, Meta(ge=-10.0, le=10.0, description="How strongly it acts; 0 not at all, below 0 the other way.")
]
InputAddress = Annotated[str, Meta(min_length=1, max_length=2048)]

INPUT_FIELDS = ("image", "mask")
"""Fields that hold addresses of pictures."""
INPUT_ID = re.compile(r"input:([0-9a-f]{64})")
"""An uploaded file, by the SHA-256 of its bytes."""
OUTPUT_OF_JOB = re.compile(r"output:([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/(\d{1,2})")
"""A picture that an earlier job of the same caller painted, by the job's id and the picture's index."""
GIVEN = "given:"
"""Begins the address of an input that a program passes beside the request; the rest is its name."""


class SkipLayerGuidance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Away from what the transformer paints without some of its layers; active where start <= step / steps < stop.

    What a request's object leaves out is as in the operator's settings, whether they switch it on or not.
    """

    scale: SlgScale = 2.5
    layers: LayerIndices = (7, 8, 9, 10, 11, 12)
    start: PartOfSteps = 0.05
    stop: PartOfSteps = 0.5


class Dype(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Positions stretched for pictures larger than trained; see `zcore.imaging.model.dype`.

    What a request's object leaves out is as in the operator's settings, whether they switch it on or not.
    """

    method: DypeMethod = "vision_yarn"
    scale: DypeScale = 2.0
    exponent: DypeExponent = 2.0
    start_sigma: DypeStart = 1.0
    base_resolution: BaseResolution = 1024
    anisotropic: bool = False
    dynamic: bool = True


class Pass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One pass of a multi-pass generation.

    What is absent is as in the request, but for `strength`: 0.5 where a pass refines the one before it.
    """

    scale: Annotated[
        float,
        Meta(gt=0.0, le=1.0, description="Part of the final width and height; each side becomes a multiple of 16."),
    ]
    steps: Steps | None = None
    strength: Strength | None = None
    shift: Shift | None = None
    guidance_scale: GuidanceScale | None = None
    slg: SkipLayerGuidance | None = None
    dype: Dype | None = None


class LoraUse(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A LoRA that acts on a picture, and how strongly."""

    name: LoraName
    scale: LoraScale = 1.0


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=False):
    """One picture (or `n` of them) as asked for, with everything that decides its pixels.

    Built by `parse_submission` or `parse_generation`.
    """

    version: Literal[1] = 1
    prompt: Annotated[str, Meta(min_length=1, max_length=PROMPT_LIMIT_CHARACTERS, description="What to paint.")]
    negative_prompt: Annotated[
        str,
        Meta(
            max_length=PROMPT_LIMIT_CHARACTERS, description="What to steer away from; needs a guidance_scale above 0."
        ),
    ] = ""
    template: (
        Annotated[str, Meta(min_length=1, max_length=100, description="A system prompt by name: see /api/templates.")]
        | None
    ) = None
    system_prompt: Annotated[SystemText, Meta(description="In place of the template's; empty for none.")] | None = None
    thinking_content: (
        Annotated[SystemText, Meta(description="What the assistant thought before; brings a think block.")] | None
    ) = None
    assistant_content: (
        Annotated[SystemText, Meta(description="What the assistant answered; closes its message.")] | None
    ) = None
    force_think_block: Annotated[bool, Meta(description="Whether a think block stands there even if empty.")] | None = (
        None
    )
    strip_quotes: Annotated[bool, Meta(description='Take every " out of the prompt, which would be painted.')] = False
    clean_whitespace: Annotated[
        bool, Meta(description="Trim, runs of blanks to one, three or more line ends to two. Off in the official code.")
    ] = False
    hidden_layer: HiddenLayer = -2
    layer_weights: Annotated[
        dict[LayerName, LayerWeight],
        Meta(description='Blend of hidden states, as {"-2": 0.7, "-5": 0.3}; replaces hidden_layer.'),
    ] = {}
    long_prompt_mode: Annotated[
        LongPromptMode, Meta(description="What becomes of a prompt with more tokens than the model can place.")
    ] = "interpolate"
    width: Side = 1024
    height: Side = 1024
    steps: Steps = 8
    shift: Shift = 3.0
    guidance_scale: GuidanceScale = 0.0
    cfg_normalization: Annotated[
        float,
        Meta(
            ge=0.0,
            le=10.0,
            description="Largest norm of the guided prediction, in norms of the prompt's own; 0 is off.",
        ),
    ] = 0.0
    cfg_truncation: Annotated[
        float,
        Meta(ge=0.0, le=1.0, description="Guidance ends where 1 - sigma is above this; 1 keeps it to the end."),
    ] = 1.0
    slg: (
        Annotated[
            SkipLayerGuidance,
            Meta(description="Skip layer guidance: scale, layers, start, stop. A step where it is active costs more."),
        ]
        | None
    ) = None
    dype: (
        Annotated[
            Dype,
            Meta(
                description="Dynamic position extrapolation, for pictures above base_resolution: method, scale, "
                "exponent, start_sigma, base_resolution, anisotropic, dynamic. Patent pending, say its authors."
            ),
        ]
        | None
    ) = None
    image: (
        Annotated[
            InputAddress,
            Meta(description="What to start from: an https URL, input:SHA256 of an upload, or output:JOB/INDEX."),
        ]
        | None
    ) = None
    mask: (
        Annotated[InputAddress, Meta(description="Where to paint anew (white); the rest stays as it is in `image`.")]
        | None
    ) = None
    strength: Strength = 0.6
    strength_rule: Annotated[
        StrengthRule,
        Meta(description="`continuous` starts at just that noise; `diffusers` rounds to a step of the full schedule."),
    ] = "continuous"
    fit: Annotated[
        Fit, Meta(description="How an input of other proportions fills the picture: cropped, bordered or stretched.")
    ] = "cover"
    keep_unmasked: Annotated[
        bool, Meta(description="With a mask: pixels outside it are the input's own, untouched by the VAE.")
    ] = True
    tiled_vae: Annotated[
        bool,
        Meta(description="Pixels and latents in tiles, which saves memory; what would not fit otherwise always is."),
    ] = False
    passes: Annotated[
        tuple[Pass, ...],
        Meta(max_length=4, description="Multi-pass: sizes growing to the final one, each refining the last."),
    ] = ()
    loras: Annotated[
        tuple[LoraUse, ...], Meta(max_length=8, description="LoRAs that act together, each by name and scale.")
    ] = ()
    seed: Annotated[
        int,
        Meta(ge=0, le=SEED_BOUND - 1, description="0 to 2^63-1; chosen at random, stored and returned when absent."),
    ] = 0
    n: Annotated[int, Meta(ge=1, le=8, description="Pictures of this request; picture i uses seed + i.")] = 1
    format: Annotated[OutputFormat, Meta(description="Of the stored files; each holds its parameters.")] = "png"
    quality: Annotated[int, Meta(ge=1, le=100, description="Of JPEG, WebP and AVIF; PNG is without loss.")] = 90

    @property
    def is_guided(self) -> bool:
        """Whether any pass is guided, and so needs the negative prompt too."""
        return self.guidance_scale > 0 or any(one.guidance_scale for one in self.passes)

    def seed_of(self, index: int) -> int:
        """The seed of picture `index` (from 0) of this request; wraps at 2^63."""
        return (self.seed + index) % SEED_BOUND


SIZE_FIELDS = ("size", "aspect_ratio", "resolution")
"""What a caller may say in place of width and height; a request only keeps what follows from it."""


class Delivery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the caller wants around the picture: who is told, what is remembered, how soon."""

    webhook_url: (
        Annotated[str, Meta(max_length=2048, description="Told by a signed POST when the job has ended.")] | None
    ) = None
    metadata: Annotated[dict[str, Any], Meta(description="The caller's own; at most 1 KiB as JSON.")] = {}
    priority: Annotated[int, Meta(ge=-10, le=10, description="Higher is claimed first.")] = 0


class Submission(msgspec.Struct, frozen=True):
    """What one `POST /api/generate` asks for."""

    request: GenerationRequest
    delivery: Delivery


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator's settings fill in where the caller is silent."""

    width: Side = 1024
    height: Side = 1024
    steps: Steps = 8
    shift: Shift = 3.0
    guidance_scale: GuidanceScale = 0.0
    hidden_layer: HiddenLayer = -2
    long_prompt_mode: LongPromptMode = "interpolate"
    tiled_vae: bool = False
    slg: SkipLayerGuidance | None = None
    slg_parts: SkipLayerGuidance = SkipLayerGuidance()
    dype: Dype | None = None
    dype_parts: Dype = Dype()
    """What a `slg` or `dype` that says something leaves out."""


class RequestLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator's hardware allows, below the model's own bounds.

    `max_pixels` counts one picture's width times height; `max_input_bytes` one file that is uploaded or fetched.
    """

    max_pixels: Annotated[int, Meta(ge=64 * 64)] = 4096 * 4096
    max_input_bytes: Annotated[int, Meta(ge=1)] = 25 * 1024**2


def parse_submission(body: Mapping[str, Any], defaults: GenerationDefaults, limits: RequestLimits) -> Submission:
    """The whole body of a submission. Raises `InvalidRequest` naming every field that is wrong.

    In place of `width` and `height` it may say `size` or `aspect_ratio` (see `zcore.sizes`), of the operator's usual
    area or of that of `resolution`. Inputs are addresses that any worker can follow: https URLs, uploads, outputs.
    """
    return _parse(body, defaults, limits, _REMOTE)


def parse_generation(
    fields: Mapping[str, Any], defaults: GenerationDefaults | None = None, limits: RequestLimits | None = None
) -> GenerationRequest:
    """The picture's part alone, for callers in this process, who pass inputs beside the request as `given:NAME`.

    Raises `InvalidRequest` naming every field that is wrong.
    """
    unwanted = [
        FieldError(f"/{name}", "belongs to a submitted job, not to a picture")
        for name in fields
        if name in Delivery.__struct_fields__
    ]
    if unwanted:
        raise InvalidRequest(unwanted)
    return _parse(fields, defaults or GenerationDefaults(), limits or RequestLimits(), _LOCAL).request


def _parse(
    body: Mapping[str, Any], defaults: GenerationDefaults, limits: RequestLimits, inputs: "_InputKinds"
) -> Submission:
    errors: list[FieldError] = []
    said = {name: value for name, value in body.items() if name not in SIZE_FIELDS}
    size = _said_size({name: body[name] for name in SIZE_FIELDS if name in body}, said, defaults, errors)
    request_fields = {name: value for name, value in said.items() if name not in Delivery.__struct_fields__}
    delivery_fields = {name: value for name, value in said.items() if name in Delivery.__struct_fields__}
    chosen = {"seed": secrets.randbelow(CHOSEN_SEED_BOUND)}
    decided = {**_defaults(defaults), **chosen, **size, **_completed(request_fields, defaults)}
    request = _valid_fields(decided, GenerationRequest, errors)
    delivery = _valid_fields(delivery_fields, Delivery, errors)
    errors += [*_request_faults(request, limits, inputs), *_delivery_faults(delivery)]
    if errors:
        raise InvalidRequest(errors)
    return Submission(GenerationRequest(**request), Delivery(**delivery))


def _defaults(defaults: GenerationDefaults) -> dict[str, Any]:
    known = GenerationRequest.__struct_fields__
    return {name: value for name, value in msgspec.to_builtins(defaults).items() if name in known}


def _completed(fields: Mapping[str, Any], defaults: GenerationDefaults) -> dict[str, Any]:
    """The fields, where objects have what they do not say: of the operator's settings, in passes of the request."""
    parts: dict[str, Any] = {
        "slg": msgspec.to_builtins(defaults.slg_parts),
        "dype": msgspec.to_builtins(defaults.dype_parts),
    }

    def completed(said: Mapping[str, Any]) -> dict[str, Any]:
        objects = {name: {**parts[name], **said[name]} for name in parts if isinstance(said.get(name), Mapping)}
        return {**said, **objects}

    whole = completed(fields)
    parts |= {name: whole[name] for name in parts if isinstance(whole.get(name), Mapping)}
    if isinstance(whole.get("passes"), list | tuple):
        whole["passes"] = [
            completed(cast(Mapping[str, Any], one)) if isinstance(one, Mapping) else one for one in whole["passes"]
        ]
    return whole


def said_plainly(message: str) -> str:
    """msgspec's sentence without its path, which stands beside it in another form."""
    sentence = message.split(" - at ")[0]
    return sentence[:1].lower() + sentence[1:]


def _valid_fields(fields: Mapping[str, Any], shape: type[msgspec.Struct], errors: list[FieldError]) -> dict[str, Any]:
    """Each field by itself, so that one answer names every fault: those that are right; the others go to `errors`."""
    known = {field.name: field for field in msgspec.structs.fields(shape)}
    errors += [FieldError(_pointer(name), _unknown_field(name)) for name in fields if name not in known]
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name not in fields:
            if field.required:
                errors.append(FieldError(_pointer(name), "is required"))
            continue
        try:
            value = msgspec.convert(fields[name], field.type)
        except msgspec.ValidationError as fault:
            errors.append(FieldError(_pointer(name) + _pointer_within(str(fault)), said_plainly(str(fault))))
            continue
        if any(UNWRITABLE.search(text) for text in _texts(value)):
            errors.append(FieldError(_pointer(name), "holds a NUL or half a surrogate pair, which cannot be stored"))
            continue
        values[name] = value
    return values


@dataclass(frozen=True, slots=True)
class _InputKinds:
    """Which addresses of inputs are taken, and how they are described."""

    is_taken: Callable[[str], bool]
    described: str


_REMOTE = _InputKinds(
    lambda address: (
        bool(INPUT_ID.fullmatch(address) or OUTPUT_OF_JOB.fullmatch(address)) or _is_plain_web_address(address)
    ),
    "must be an https URL without user and password, input:SHA256 of an upload, or output:JOB/INDEX",
)
_LOCAL = _InputKinds(
    lambda address: address.startswith(GIVEN), f"must be passed as a picture, and is named {GIVEN}NAME"
)


def _said_size(
    said: Mapping[str, Any], others: Mapping[str, Any], defaults: GenerationDefaults, errors: list[FieldError]
) -> dict[str, int]:
    """Width and height as `size`, `aspect_ratio` and `resolution` mean them; empty where none is said."""
    if not said:
        return {}
    sides = [name for name in ("width", "height") if name in others]
    if sides:
        errors += [FieldError(_pointer(name), f"contradicts `{sides[0]}`; say one of them") for name in said]
        return {}
    if "size" in said and len(said) > 1:
        errors.append(FieldError("/size", "is given together with aspect_ratio or resolution; say one of them"))
        return {}
    usual = round(math.sqrt(defaults.width * defaults.height))
    try:
        resolution = msgspec.convert(said.get("resolution", usual), Annotated[int, Meta(ge=64, le=8192)])
    except msgspec.ValidationError as fault:
        errors.append(FieldError("/resolution", said_plainly(str(fault))))
        return {}
    name = "size" if "size" in said else "aspect_ratio"
    wanted = said.get(name, "1:1")
    if wanted == "auto":
        if "resolution" in said:
            errors.append(FieldError("/resolution", f"does nothing where {name} is auto; say a ratio with it"))
        return {}
    if not isinstance(wanted, str) or (name == "aspect_ratio" and ":" not in wanted):
        errors.append(FieldError(_pointer(name), f"must be a text as {' or '.join(RATIOS[:2])}"))
        return {}
    try:
        size = named_size(wanted, resolution)
    except ValueError as fault:
        errors.append(FieldError(_pointer(name), str(fault)))
        return {}
    return {"width": size.width, "height": size.height}


def _request_faults(valid: Mapping[str, Any], limits: RequestLimits, inputs: _InputKinds) -> list[FieldError]:
    """What no single field can know, as far as the fields it needs are right by themselves."""
    faults: list[FieldError] = []
    width, height = valid.get("width", 0), valid.get("height", 0)
    pixels = width * height
    if pixels > limits.max_pixels:
        detail = f"{width}x{height} is {pixels} pixels; at most {limits.max_pixels} are painted here"
        faults += [FieldError("/width", detail), FieldError("/height", detail)]
    unpainted = '"' if valid.get("strip_quotes") else ""
    if "prompt" in valid and not valid["prompt"].replace(unpainted or "\0", "").strip():
        faults.append(FieldError("/prompt", "must not be blank" + (" without its quotes" if unpainted else "")))
    is_guided = valid.get("guidance_scale") or any(one.guidance_scale for one in valid.get("passes", ()))
    if valid.get("negative_prompt") and not is_guided:
        faults.append(FieldError("/negative_prompt", "does nothing without a guidance_scale above 0"))
    addresses = {name: valid[name] for name in INPUT_FIELDS if valid.get(name) is not None}
    refused = [name for name, address in addresses.items() if not inputs.is_taken(address)]
    faults += [FieldError(f"/{name}", inputs.described) for name in refused]
    if "mask" in addresses and "image" not in addresses and "mask" not in refused:
        faults.append(FieldError("/mask", "needs an `image` that it is laid over"))
    loras = [lora.name for lora in valid.get("loras", ())]
    faults += [
        FieldError(f"/loras/{index}/name", f"`{name}` is named before; give it one scale")
        for index, name in enumerate(loras)
        if name in loras[:index]
    ]
    return [*faults, *_pass_faults(valid), *_slg_faults(valid)]


def _pass_faults(valid: Mapping[str, Any]) -> list[FieldError]:
    passes: tuple[Pass, ...] = valid.get("passes", ())
    if not passes:
        return []
    scales = [one.scale for one in passes]
    if scales != sorted(scales) or scales[-1] != 1.0:
        return [FieldError("/passes", f"scales have to grow and end at 1.0, not {scales}")]
    if valid.get("mask") is not None:
        return [FieldError("/passes", "cannot be combined with a mask")]
    faults: list[FieldError] = []
    if passes[0].strength is not None and valid.get("image") is None:
        faults.append(FieldError("/passes/0/strength", "the first pass begins from noise; it has no strength"))
    shortest = min(valid.get("width", 0), valid.get("height", 0))
    if shortest and shortest * scales[0] < SMALLEST_SIDE_PX:
        faults.append(FieldError("/passes/0/scale", f"{scales[0]} of {shortest} px is below {SMALLEST_SIDE_PX} px"))
    return faults


def _slg_faults(valid: Mapping[str, Any]) -> Iterator[FieldError]:
    for pointer, slg in said_everywhere(valid.get("slg"), valid.get("passes", ()), "slg"):
        if repeated := sorted({layer for layer in slg.layers if slg.layers.count(layer) > 1}):
            yield FieldError(f"{pointer}/layers", f"names layer {repeated[0]} twice")
        if slg.start >= slg.stop:
            yield FieldError(f"{pointer}/stop", f"has to be above start, {slg.start}")


def said_everywhere(whole: Any, passes: Sequence[Pass], name: str) -> Iterator[tuple[str, Any]]:
    """An object of the request and those of its passes, each with its JSON pointer."""
    if whole is not None:
        yield f"/{name}", whole
    for index, one in enumerate(passes):
        if getattr(one, name) is not None:
            yield f"/passes/{index}/{name}", getattr(one, name)


def _delivery_faults(valid: Mapping[str, Any]) -> list[FieldError]:
    faults: list[FieldError] = []
    webhook_url = valid.get("webhook_url")
    if webhook_url is not None and not _is_plain_web_address(webhook_url):
        faults.append(FieldError("/webhook_url", "must be an absolute http or https URL without user and password"))
    size = len(msgspec.json.encode(valid.get("metadata")))
    if size > METADATA_LIMIT_BYTES:
        faults.append(FieldError("/metadata", f"is {size} bytes as JSON; at most {METADATA_LIMIT_BYTES}"))
    return faults


def _texts(document: Any) -> Iterator[str]:
    """Every text in a JSON document, keys included."""
    waiting: list[Any] = [document]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            waiting += [*cast(dict[Any, Any], part), *cast(dict[Any, Any], part).values()]
        elif isinstance(part, list):
            waiting += cast(list[Any], part)


def _pointer(name: str) -> str:
    """RFC 6901, section 3."""
    return "/" + name.replace("~", "~0").replace("/", "~1")


def _pointer_within(message: str) -> str:
    """Where in a field msgspec found a fault, as a pointer; empty where that is the field itself, or a key of it."""
    found = re.search(r" - at `\$((?:\.\w+|\[\d+\])+)`$", message)
    return re.sub(r"\.(\w+)|\[(\d+)\]", r"/\1\2", found[1]) if found else ""


def _is_plain_web_address(url: str) -> bool:
    if " " in url or not url.isprintable():
        return False  # urlsplit would drop some of these without a word
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None and port != 0


def _unknown_field(name: str) -> str:
    known = (*GenerationRequest.__struct_fields__, *SIZE_FIELDS, *Delivery.__struct_fields__)
    return f"is not a field of a request{did_you_mean(name, known)}"
