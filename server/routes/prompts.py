"""What a prompt can be laid in and how long it is: templates, and the formatted text with its tokens."""

from typing import Annotated, Any

from litestar import get, post
from litestar.enums import RequestEncodingType
from litestar.params import BodyKwarg, FromPath, FromQuery, QueryParameter

from server import media_types
from server.auth import callers_only
from server.dependencies import NamedPromptLimit, NamedSettings, Owner
from server.problems import refusal
from server.schemas import FormattedPromptAnswer, TemplateEntry, TemplateList, TemplateText, prompt_schema
from zcore.errors import InvalidRequest, NotFound
from zcore.request import GenerationRequest, parse_submission

_unauthorized = {401: refusal("No API key, or a wrong one")}


@get("/api/templates", tags=["prompts"], summary="All templates", responses=_unauthorized, sync_to_thread=False)
def list_templates(
    owner: Owner,
    prompt_limit: NamedPromptLimit,
    category: FromQuery[str | None] = None,
    text: Annotated[
        str | None, QueryParameter(max_length=200, description="A part of the name, the description or the text")
    ] = None,
) -> TemplateList:
    """Names to be used as `template`, sorted by category and name."""
    return TemplateList(
        [
            TemplateEntry(found.name, found.category, found.description)
            for found in prompt_limit.templates.search(category, text)
        ]
    )


@get(
    "/api/templates/{name:str}",
    tags=["prompts"],
    summary="A template",
    responses={**_unauthorized, 404: refusal("There is no such template")},
    sync_to_thread=False,
)
def get_template(owner: Owner, prompt_limit: NamedPromptLimit, name: FromPath[str]) -> TemplateText:
    """The system prompt that the template lays before the user's message, and what else it adds."""
    try:
        found = prompt_limit.templates.get(name)
    except InvalidRequest as fault:
        raise NotFound(fault.errors[0].detail) from fault
    return TemplateText(
        name=found.name,
        category=found.category,
        description=found.description,
        system_prompt=found.body,
        thinking_content=found.thinking_content,
        assistant_content=found.assistant_content,
        force_think_block=found.add_think_block,
    )


@post(
    "/api/format-prompt",
    guards=[callers_only, media_types.only("application/json")],
    status_code=200,
    tags=["prompts"],
    summary="What the text encoder will read, and how many tokens it is",
    responses={
        **_unauthorized,
        400: refusal("A field is outside its bounds; `errors` names each"),
        413: refusal("The body is larger than 1 MiB"),
        415: refusal("The body is not `application/json`"),
    },
    sync_to_thread=True,  # a long prompt takes milliseconds to count
)
def format_prompt(
    data: Annotated[
        dict[str, Any], BodyKwarg(media_type=RequestEncodingType.JSON, schema_extra=prompt_schema(GenerationRequest))
    ],
    owner: Owner,
    settings: NamedSettings,
    prompt_limit: NamedPromptLimit,
) -> FormattedPromptAnswer:
    """Takes any body that `POST /api/generate` takes, and paints nothing.

    `tokens`, `limit` and `kept_tokens` are null where the model's tokenizer does not lie on the server's host.
    """
    request = parse_submission(data, settings.generation_defaults, settings.limits).request
    laid_out = prompt_limit.lay_out(request)
    return FormattedPromptAnswer(
        formatted=str(laid_out.prompt),
        tokens=laid_out.tokens,
        limit=laid_out.limit,
        kept_tokens=laid_out.kept_tokens,
        long_prompt_mode=request.long_prompt_mode,
    )
