"""Rules that involve several fields of a request.

Takes fields that are valid on their own; returns a `FieldError` for each contradiction.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from zcore.errors import FieldError
from zcore.request.fields import METADATA_LIMIT_BYTES, Pass, RequestLimits, SkipLayerGuidance
from zcore.request.inputs import (
    INPUT_FIELDS,
    LOCAL_PREFIX,
    InputAddress,
    JobOutput,
    LocalInput,
    Upload,
    WebUrl,
    blank_fault,
    parse_input_address,
    parse_web_url,
)
from zcore.sizes import SMALLEST_SIDE_PX, largest_size


@dataclass(frozen=True, slots=True)
class InputKinds:
    """Kinds of input addresses that a request may hold, and their description in error messages."""

    accepted: tuple[type[InputAddress], ...]
    description: str


REMOTE_INPUTS = InputKinds(
    (Upload, JobOutput, WebUrl),
    "must be an https URL without user and password, input:SHA256 of an upload, or output:JOB/INDEX",
)
LOCAL_INPUTS = InputKinds((LocalInput,), f"must be passed as an image in memory and addressed as {LOCAL_PREFIX}NAME")


def request_errors(
    valid: Mapping[str, Any], limits: RequestLimits, inputs: InputKinds, size_source: Sequence[str]
) -> list[FieldError]:
    """Return the contradictions between the fields of a request.

    `valid` holds the fields that are valid on their own; a rule is skipped if it needs another. `size_source` names the
    caller's fields that determine the area.
    """
    faults = [*_area_errors(valid, limits, size_source)]
    ignored = '"' if valid.get("strip_quotes") else ""
    if "prompt" in valid and not valid["prompt"].replace(ignored or "\0", "").strip():
        faults.append(FieldError("/prompt", "must not be blank" + (" without its quotes" if ignored else "")))
    is_guided = valid.get("guidance_scale") or any(one.guidance_scale for one in valid.get("passes", ()))
    if valid.get("negative_prompt") and not is_guided:
        faults.append(FieldError("/negative_prompt", "has no effect without a guidance_scale above 0"))
    addresses = {name: valid[name] for name in INPUT_FIELDS if valid.get(name) is not None}
    refused = [
        name for name, address in addresses.items() if not isinstance(parse_input_address(address), inputs.accepted)
    ]
    faults += [
        FieldError(f"/{name}", (WebUrl in inputs.accepted and blank_fault(addresses[name])) or inputs.description)
        for name in refused
    ]
    if "mask" in addresses and "image" not in addresses and "mask" not in refused:
        faults.append(FieldError("/mask", "requires an image"))
    loras = [lora.name for lora in valid.get("loras", ())]
    faults += [
        FieldError(f"/loras/{index}/name", f"repeats `{name}`; list each LoRA once")
        for index, name in enumerate(loras)
        if name in loras[:index]
    ]
    return [*faults, *_pass_errors(valid), *_slg_errors(valid)]


def delivery_errors(valid: Mapping[str, Any]) -> list[FieldError]:
    """Return the errors of delivery fields that their types do not express."""
    faults: list[FieldError] = []
    webhook_url = valid.get("webhook_url")
    if webhook_url is not None and parse_web_url(webhook_url) is None:
        detail = "must be an absolute http or https URL with a valid host name, without user and password"
        faults.append(FieldError("/webhook_url", blank_fault(webhook_url) or detail))
    size = len(msgspec.json.encode(valid.get("metadata")))
    if size > METADATA_LIMIT_BYTES:
        faults.append(FieldError("/metadata", f"must be at most {METADATA_LIMIT_BYTES} bytes as JSON, not {size}"))
    return faults


def each_object(whole: Any, passes: Sequence[Pass], name: str) -> Iterator[tuple[str, Any]]:
    """Yield the object `name` of the request and those of its passes, each with its JSON pointer."""
    if whole is not None:
        yield f"/{name}", whole
    for index, one in enumerate(passes):
        if getattr(one, name) is not None:
            yield f"/passes/{index}/{name}", getattr(one, name)


def slg_errors(slg: SkipLayerGuidance) -> Iterator[tuple[str, str]]:
    """Yield the name of each contradictory field of skip layer guidance, and what is wrong with it."""
    if repeated := sorted({layer for layer in slg.layers if slg.layers.count(layer) > 1}):
        yield "layers", f"must not repeat a layer; {repeated[0]} is listed twice"
    if slg.start >= slg.stop:
        yield "stop", f"must be above start, {slg.start}"


def _area_errors(valid: Mapping[str, Any], limits: RequestLimits, size_source: Sequence[str]) -> Iterator[FieldError]:
    width, height = valid.get("width", 0), valid.get("height", 0)
    if width * height > limits.max_pixels:
        largest = largest_size(width, height, limits.max_pixels)
        detail = (
            f"must result in at most {limits.max_pixels} pixels, not {width * height} ({width}x{height}); "
            f"the largest size of this ratio is {largest.width}x{largest.height}"
        )
        for name in size_source:
            yield FieldError(f"/{name}", detail)


def _pass_errors(valid: Mapping[str, Any]) -> list[FieldError]:
    passes: tuple[Pass, ...] = valid.get("passes", ())
    if not passes:
        return []
    scales = [one.scale for one in passes]
    if scales != sorted(scales) or scales[-1] != 1.0:
        return [FieldError("/passes", f"scales must not decrease and must end at 1.0, not {scales}")]
    if valid.get("mask") is not None:
        return [FieldError("/passes", "cannot be combined with a mask")]
    faults: list[FieldError] = []
    if passes[0].strength is not None and valid.get("image") is None:
        faults.append(FieldError("/passes/0/strength", "requires an image; otherwise the first pass starts from noise"))
    shortest = min(valid.get("width", 0), valid.get("height", 0))
    if shortest and shortest * scales[0] < SMALLEST_SIDE_PX:
        smallest = math.ceil(SMALLEST_SIDE_PX / shortest * 10_000) / 10_000
        detail = f"must be at least {smallest}, so that the shorter side has at least {SMALLEST_SIDE_PX} px"
        faults.append(FieldError("/passes/0/scale", detail))
    return faults


def _slg_errors(valid: Mapping[str, Any]) -> Iterator[FieldError]:
    for pointer, slg in each_object(valid.get("slg"), valid.get("passes", ()), "slg"):
        for name, detail in slg_errors(slg):
            yield FieldError(f"{pointer}/{name}", detail)
