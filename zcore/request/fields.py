"""Fields of a request, with their bounds and defaults.

Each bound is stated once, here. `parsing` builds these values from untyped input, and `rules` checks conditions that
involve several fields. Does not depend on HTTP, the database, the tokenizer or the model.
"""

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from zcore.sizes import LARGEST_SIDE_PX, PRESETS, SIDE_MULTIPLE_PX, SMALLEST_SIDE_PX

SEED_BOUND = 2**63
CHOSEN_SEED_BOUND = 2**53  # every JSON reader represents smaller integers exactly
PROMPT_LIMIT_CHARACTERS = 16_384
METADATA_LIMIT_BYTES = 1024

# Characters that PostgreSQL or UTF-8 cannot store.
UNWRITABLE = re.compile("[\0\ud800-\udfff]")

# Rules of `parsing` and `rules`, as far as a regular expression can state them to readers of the JSON schema. They
# cover URLs in ASCII; host names in other scripts and, during development, plain http are accepted besides.
# In every pattern of this module, `$` alone would also match before a final newline.
_WRITABLE = {"pattern": r"^[^\x00]*$(?!\n)"}
_NOT_BLANK = {"pattern": r"^\s*[^\s\x00][^\x00]*$(?!\n)"}
_LABEL = "[A-Za-z0-9_-]{1,63}"
_GROUPS = "[0-9A-Fa-f]{1,4}(:[0-9A-Fa-f]{1,4})"
_HOST = rf"({_LABEL}(\.{_LABEL})*|\[({_GROUPS}{{7}}|({_GROUPS}{{0,3}})?::({_GROUPS}{{0,2}})?)\])"
_PORT = ":([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_WEB_URL = rf"https://{_HOST}({_PORT})?([/?#][!-~]*)?"
_JOB_OUTPUT = "output:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/[0-9]{1,2}"
_INPUT_ADDRESS = {"pattern": rf"^(input:[0-9a-f]{{64}}|{_JOB_OUTPUT}|{_WEB_URL})$(?!\n)"}
_RATIO = "[0-9]{1,3}:[0-9]{1,3}"

Side = Annotated[
    int,
    Meta(
        ge=SMALLEST_SIDE_PX,
        le=LARGEST_SIDE_PX,
        multiple_of=SIDE_MULTIPLE_PX,
        description="Pixels; a multiple of 16 from 64 to 8192.",
    ),
]
Steps = Annotated[int, Meta(ge=1, le=50, description="Denoising steps; the model was distilled for 8.")]
Shift = Annotated[float, Meta(ge=0.1, le=20.0, description="Shift of the flow-matching schedule.")]
GuidanceScale = Annotated[
    float,
    Meta(
        ge=0.0,
        le=30.0,
        description="Classifier-free guidance; 0 turns it off, which suits a distilled checkpoint. Above 0 each step "
        "takes two forward passes.",
    ),
]
HiddenLayer = Annotated[
    int,
    Meta(ge=-36, le=-1, description="Hidden state of the text encoder to use; the model was trained with -2."),
]
Strength = Annotated[
    float, Meta(gt=0.0, le=1.0, description="How much of the input is regenerated: near 0 a little, 1 everything.")
]
StrengthRule = Literal["continuous", "diffusers"]
LongPromptMode = Literal["truncate", "interpolate", "pool", "attention_pool", "refuse"]
OutputFormat = Literal["png", "jpeg", "webp", "avif"]
Fit = Literal["cover", "contain", "stretch"]
SlgScale = Annotated[float, Meta(ge=0.0, le=30.0, description="Strength of the guidance; 0 turns it off.")]
LayerIndex = Annotated[int, Meta(ge=0, le=199)]
LayerIndices = Annotated[
    tuple[LayerIndex, ...],
    Meta(
        min_length=1,
        max_length=200,
        description="Main blocks of the transformer to skip, counted from 0.",
        extra_json_schema={"uniqueItems": True},
    ),
]
PartOfSteps = Annotated[float, Meta(ge=0.0, le=1.0)]
DypeMethod = Literal["vision_yarn", "yarn", "ntk"]
DypeScale = Annotated[float, Meta(ge=0.0, le=16.0, description="How strongly positions are stretched; 0 turns it off.")]
DypeExponent = Annotated[float, Meta(gt=0.0, le=16.0, description="How early the stretch fades over the steps.")]
DypeStart = Annotated[
    float, Meta(ge=0.001, le=1.0, description="Noise level below which the amplitude of vision_yarn fades.")
]
BaseResolution = Annotated[
    int, Meta(ge=64, le=8192, multiple_of=16, description="Side in pixels that the checkpoint was trained at.")
]
LayerName = Annotated[
    str, Meta(pattern=r"^-([1-9]|[12][0-9]|3[0-6])$(?!\n)", extra={"allowed": 'a layer from "-36" to "-1"'})
]
LayerWeight = Annotated[float, Meta(gt=0.0, le=1000.0)]
SystemText = Annotated[str, Meta(max_length=PROMPT_LIMIT_CHARACTERS, extra_json_schema=_WRITABLE)]
Seed = Annotated[
    int, Meta(ge=0, le=SEED_BOUND - 1, description="0 to 2^63-1; chosen at random, stored and returned if omitted.")
]
SeedText = Annotated[
    str,
    Meta(
        pattern=r"^[0-9]{1,19}$(?!\n)",
        description="The same number as text, for clients without integers above 2^53.",
    ),
]
LoraName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$(?!\n)",
        description="Name of a LoRA that is registered with this service.",
        extra={"allowed": "1 to 100 letters, digits, `.`, `_` or `-`, starting with a letter or digit"},
    ),
]
LoraScale = Annotated[
    float, Meta(ge=-10.0, le=10.0, description="Strength of the LoRA; 0 has no effect, below 0 inverts it.")
]
InputAddressText = Annotated[str, Meta(min_length=1, max_length=2048, extra_json_schema=_INPUT_ADDRESS)]
Resolution = Annotated[
    int,
    Meta(
        ge=SMALLEST_SIDE_PX,
        le=LARGEST_SIDE_PX,
        description="Side in pixels of the square with the same area; replaces the default size's.",
    ),
]


class SkipLayerGuidance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Guidance away from what the transformer predicts without some of its layers.

    Active where start <= step / steps < stop. Fields that a request's object omits come from the operator's settings,
    whether or not those enable the guidance.
    """

    scale: SlgScale = 2.5
    layers: LayerIndices = (7, 8, 9, 10, 11, 12)
    start: PartOfSteps = 0.05
    stop: PartOfSteps = 0.5


class Dype(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Stretching of positions for images above the trained resolution; see `zcore.imaging.network.dype`.

    Fields that a request's object omits come from the operator's settings, whether or not those enable the stretch.
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

    Omitted fields are taken from the request, except `strength`: it is 0.5 for a pass that refines the previous one.
    """

    scale: Annotated[
        float,
        Meta(gt=0.0, le=1.0, description="Fraction of the final width and height; sides become multiples of 16."),
    ]
    steps: Steps | None = None
    strength: Strength | None = None
    shift: Shift | None = None
    guidance_scale: GuidanceScale | None = None
    slg: SkipLayerGuidance | None = None
    dype: Dype | None = None


class LoraUse(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A LoRA applied to an image, and its strength."""

    name: LoraName
    scale: LoraScale = 1.0


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """Defaults of a request under the operator's settings.

    `slg` and `dype` are what a request without the field gets; `slg_fields` and `dype_fields` complete an object that
    omits some of its fields.
    """

    width: Side = 1024
    height: Side = 1024
    steps: Steps = 8
    shift: Shift = 3.0
    guidance_scale: GuidanceScale = 0.0
    hidden_layer: HiddenLayer = -2
    long_prompt_mode: LongPromptMode = "interpolate"
    tiled_vae: bool = False
    slg: SkipLayerGuidance | None = None
    slg_fields: SkipLayerGuidance = SkipLayerGuidance()
    dype: Dype | None = None
    dype_fields: Dype = Dype()


PUBLISHED = GenerationDefaults()
"""Values that the model was published with."""


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=False):
    """A request for `n` images, with everything that determines their pixels."""

    version: Annotated[Literal[1], Meta(description="Version of this form of a request.")] = 1
    prompt: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=PROMPT_LIMIT_CHARACTERS,
            description="What the image should show.",
            extra_json_schema=_NOT_BLANK,
        ),
    ]
    negative_prompt: Annotated[
        str,
        Meta(
            max_length=PROMPT_LIMIT_CHARACTERS,
            description="What to steer away from; needs a guidance_scale above 0.",
            extra_json_schema=_WRITABLE,
        ),
    ] = ""
    template: (
        Annotated[
            str,
            Meta(
                min_length=1,
                max_length=100,
                description="Name of a system prompt; see /api/templates.",
                extra_json_schema=_WRITABLE,
            ),
        ]
        | None
    ) = None
    system_prompt: (
        Annotated[SystemText, Meta(description="Replaces the template's system prompt; empty for none.")] | None
    ) = None
    thinking_content: (
        Annotated[SystemText, Meta(description="Earlier thinking of the assistant; adds a think block.")] | None
    ) = None
    assistant_content: (
        Annotated[SystemText, Meta(description="Answer of the assistant; closes its message.")] | None
    ) = None
    force_think_block: Annotated[bool, Meta(description="Whether to add a think block even if it is empty.")] | None = (
        None
    )
    strip_quotes: Annotated[bool, Meta(description='Remove every " from the prompt, which the model would draw.')] = (
        False
    )
    clean_whitespace: Annotated[
        bool,
        Meta(
            description="Trim the prompt, and shorten runs of blanks to one and of three or more newlines to two. "
            "The official code does not."
        ),
    ] = False
    hidden_layer: HiddenLayer = PUBLISHED.hidden_layer
    layer_weights: Annotated[
        dict[LayerName, LayerWeight],
        Meta(description='Blend of hidden states, such as {"-2": 0.7, "-5": 0.3}; replaces hidden_layer.'),
    ] = {}
    long_prompt_mode: Annotated[
        LongPromptMode, Meta(description="How to handle a prompt with more tokens than the model has positions for.")
    ] = PUBLISHED.long_prompt_mode
    width: Side = PUBLISHED.width
    height: Side = PUBLISHED.height
    steps: Steps = PUBLISHED.steps
    shift: Shift = PUBLISHED.shift
    guidance_scale: GuidanceScale = PUBLISHED.guidance_scale
    cfg_normalization: Annotated[
        float,
        Meta(
            ge=0.0,
            le=10.0,
            description="Largest norm of the guided prediction, as a multiple of the norm of the prediction for the "
            "prompt alone; 0 means no limit.",
        ),
    ] = 0.0
    cfg_truncation: Annotated[
        float,
        Meta(ge=0.0, le=1.0, description="Guidance stops where 1 - sigma exceeds this; 1 keeps it to the end."),
    ] = 1.0
    slg: (
        Annotated[
            SkipLayerGuidance,
            Meta(
                description="Skip layer guidance: scale, layers, start, stop. Steps in which it is active take longer."
            ),
        ]
        | None
    ) = None
    dype: (
        Annotated[
            Dype,
            Meta(
                description="Dynamic position extrapolation, for images above base_resolution: method, scale, "
                "exponent, start_sigma, base_resolution, anisotropic, dynamic. Its authors state that a patent is "
                "pending."
            ),
        ]
        | None
    ) = None
    image: (
        Annotated[
            InputAddressText,
            Meta(description="Image to start from: an https URL, input:SHA256 of an upload, or output:JOB/INDEX."),
        ]
        | None
    ) = None
    mask: (
        Annotated[
            InputAddressText, Meta(description="Region to regenerate, in white; the rest of `image` is preserved.")
        ]
        | None
    ) = None
    strength: Strength = 0.6
    strength_rule: Annotated[
        StrengthRule,
        Meta(
            description="`continuous` starts at exactly that noise level; `diffusers` rounds to a step of the full "
            "schedule."
        ),
    ] = "continuous"
    fit: Annotated[
        Fit,
        Meta(description="How an input of another aspect ratio fills the image: cropped, bordered or stretched."),
    ] = "cover"
    keep_unmasked: Annotated[
        bool, Meta(description="With a mask: pixels outside it are copied from the input, not decoded by the VAE.")
    ] = True
    tiled_vae: Annotated[
        bool,
        Meta(description="Run the VAE in tiles to save memory; always done if the image would not fit otherwise."),
    ] = PUBLISHED.tiled_vae
    passes: Annotated[
        tuple[Pass, ...],
        Meta(max_length=4, description="Multi-pass: growing sizes up to the final one; each refines the previous."),
    ] = ()
    loras: Annotated[
        tuple[LoraUse, ...], Meta(max_length=8, description="LoRAs applied together, each by name and scale.")
    ] = ()
    seed: Seed = 0
    n: Annotated[int, Meta(ge=1, le=8, description="Number of images; image i has the seed + i.")] = 1
    format: Annotated[OutputFormat, Meta(description="Format of the files; each contains its parameters.")] = "png"
    quality: Annotated[int, Meta(ge=1, le=100, description="Quality of JPEG, WebP and AVIF; PNG is lossless.")] = 90

    @property
    def is_guided(self) -> bool:
        """Whether any pass is guided and therefore needs the negative prompt."""
        return self.guidance_scale > 0 or any(one.guidance_scale for one in self.passes)

    def seed_of(self, index: int) -> int:
        """Return the seed of image `index` (from 0) of this request; wraps at 2^63."""
        return (self.seed + index) % SEED_BOUND


class SizeChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that a caller may send instead of width and height; a request stores only the resulting sides.

    An omitted field has no value. `zcore.sizes` defines the size that they name.
    """

    size: (
        Annotated[
            str,
            Meta(
                description="1536x864, a preset such as landscape_16_9, a ratio such as 16:9, or auto; instead of "
                "width and height.",
                extra_json_schema={
                    "pattern": rf"^({'|'.join(('auto', *PRESETS))}|{_RATIO}|[0-9]{{2,4}}[xX×][0-9]{{2,4}})$(?!\n)"
                },
            ),
        ]
        | msgspec.UnsetType
    ) = msgspec.UNSET
    aspect_ratio: (
        Annotated[
            str,
            Meta(
                description="A ratio from 1:8 to 8:1, such as 16:9, or auto; instead of width and height.",
                extra_json_schema={"pattern": rf"^(auto|{_RATIO})$(?!\n)"},
            ),
        ]
        | msgspec.UnsetType
    ) = msgspec.UNSET
    resolution: Resolution | msgspec.UnsetType = msgspec.UNSET


class SentSeed(msgspec.Struct, frozen=True, kw_only=True):
    """The seed as a caller may send it. A request stores the number."""

    seed: Seed | SeedText = 0


SIZE_FIELDS = SizeChoice.__struct_fields__
LOWEST_PRIORITY, HIGHEST_PRIORITY = -10, 10


class Delivery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Handling of a job apart from its images: notification, metadata and priority."""

    webhook_url: (
        Annotated[
            str,
            Meta(
                max_length=2048,
                description="An https URL that receives a signed POST when the job has ended.",
                extra_json_schema={"pattern": rf"^{_WEB_URL}$(?!\n)"},
            ),
        ]
        | None
    ) = None
    metadata: Annotated[dict[str, Any], Meta(description="Any JSON object, returned with the job; at most 1 KiB.")] = {}
    priority: Annotated[
        int,
        Meta(ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY, description="Jobs of higher priority are claimed first."),
    ] = 0


class Submission(msgspec.Struct, frozen=True):
    """The parsed body of one `POST /api/generate`."""

    request: GenerationRequest
    delivery: Delivery


class RequestLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of the operator's hardware, below the model's own bounds.

    `max_pixels` is the width times height of one image; `max_input_bytes` the size of one uploaded or fetched file, and
    `max_input_pixels` the width times height of the image in it.
    """

    max_pixels: Annotated[int, Meta(ge=64 * 64)] = 4096 * 4096
    max_input_bytes: Annotated[int, Meta(ge=1)] = 25 * 1024**2
    max_input_pixels: Annotated[int, Meta(ge=64 * 64, le=LARGEST_SIDE_PX**2)] = 50_000_000


PASS_PRESETS: dict[str, list[dict[str, float]]] = {
    "twopass": [{"scale": 0.5}, {"scale": 1.0, "strength": 0.5}],
    "threepass": [{"scale": 0.25}, {"scale": 0.5, "strength": 0.6}, {"scale": 1.0, "strength": 0.5}],
}
"""Named `passes` of a multi-pass generation."""
