"""The generation parameters as the text that AUTOMATIC1111's web UI writes and other programs show.

The form is that of stable-diffusion-webui (`modules/processing.py: create_infotext`): the prompt, a line with the
negative prompt, and a last line of `Name: value` pairs. It has no escapes for the prompt, so a prompt that contains
`Negative prompt:` gets a space before that colon. The complete record is the JSON of `writing`.
"""

import json
from collections.abc import Iterator, Mapping

from zcore.request import GenerationRequest

SHORT_HASH_CHARACTERS = 10
"""Length of an AutoV2 hash: the start of the SHA-256 of a whole file."""
NEGATIVE = "Negative prompt:"


def parameters_text(request: GenerationRequest, made_by: Mapping[str, str]) -> str:
    """Return the text for one image; `request` has the image's own seed, `made_by` is `GenerationResult.made_by`."""
    loras = "".join(f" <lora:{use.name}:{use.scale:g}>" for use in request.loras)
    lines = [_without_marker(request.prompt) + loras]
    if request.negative_prompt:
        lines.append(f"{NEGATIVE} {_without_marker(request.negative_prompt)}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in _pairs(request, made_by)))
    return "\n".join(lines)


def _pairs(request: GenerationRequest, made_by: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    yield "Steps", str(request.steps)
    yield "Sampler", "Euler"
    yield "Schedule type", "Simple"
    # A scale of g adds g times the difference to the prediction, which these programs call a CFG scale of 1 + g.
    yield "CFG scale", f"{1 + request.guidance_scale:g}"
    yield "Seed", str(request.seed)
    yield "Size", f"{request.width}x{request.height}"
    if "model" in made_by:
        yield "Model", made_by["model"]
    if request.image:
        yield "Denoising strength", f"{request.strength:g}"
    yield "Shift", f"{request.shift:g}"
    digests = {use.name: made_by.get(f"lora:{use.name}", "") for use in request.loras}
    hashes = [f"{name}: {digest[:SHORT_HASH_CHARACTERS]}" for name, digest in digests.items() if digest]
    if hashes:
        yield "Lora hashes", ", ".join(hashes)
    yield "Version", f"zimage {made_by.get('engine', '')}".strip()


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value


def _without_marker(prompt: str) -> str:
    return prompt.replace(NEGATIVE, f"{NEGATIVE[:-1]} :")
