"""Prompt templates, and a preview of the formatted prompt with its token count."""

from typing import Annotated, Any

from litestar import get, post
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from server import media_types
from server.callers import callers_only
from server.dependencies import NamedCaller, NamedDefaults, NamedPromptCheck, NamedSettings, NamedThreads
from server.problems import refusal
from server.schemas import FormattedPromptAnswer, TemplateEntry, TemplateList, TemplateText
from zcore.errors import InvalidRequest, NotFound
from zcore.request import parse_submission


@get("/api/templates", tags=["prompts"], summary="List prompt templates", sync_to_thread=False)
def list_templates(
    caller: NamedCaller,
    prompt_check: NamedPromptCheck,
    category: FromQuery[str | None] = None,
    text: Annotated[
        str | None, QueryParameter(max_length=200, description="Part of the name, description or text")
    ] = None,
) -> TemplateList:
    """Lists the names that `template` accepts, sorted by category and name."""
    return TemplateList(
        [
            TemplateEntry(found.name, found.category, found.description)
            for found in prompt_check.templates.search(category, text)
        ]
    )


@get(
    "/api/templates/{name:str}",
    tags=["prompts"],
    summary="Get a prompt template",
    responses={404: refusal("There is no such template")},
    sync_to_thread=False,
)
def get_template(caller: NamedCaller, prompt_check: NamedPromptCheck, name: FromPath[str]) -> TemplateText:
    """Returns the system prompt that the template puts before the user's message, and its other parts."""
    try:
        found = prompt_check.templates.get(name)
    except InvalidRequest as error:
        raise NotFound(error.errors[0].detail) from error
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
    summary="Format a prompt and count its tokens",
    operation_class=media_types.SubmissionOperation,
)
async def format_prompt(
    data: JSONBody[dict[str, Any]],
    caller: NamedCaller,
    settings: NamedSettings,
    defaults: NamedDefaults,
    prompt_check: NamedPromptCheck,
    threads: NamedThreads,
) -> FormattedPromptAnswer:
    """Accepts any body that `POST /api/generate` accepts, and generates nothing.

    `tokens`, `limit` and `used_tokens` are null if the model's tokenizer is not on the server's host.
    """
    request = (await threads.local.run(parse_submission, data, defaults, settings.limits)).request
    report = await threads.local.run(prompt_check.format, request)
    return FormattedPromptAnswer(
        formatted=str(report.prompt),
        tokens=report.tokens,
        limit=report.limit,
        used_tokens=report.used_tokens,
        long_prompt_mode=request.long_prompt_mode,
    )
