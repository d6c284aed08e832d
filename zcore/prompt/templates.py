"""Prompt templates: Markdown files whose body is a system prompt and whose front matter describes it.

Takes folders, which it reads once; returns a `TemplateLibrary`. Needs neither torch nor a tokenizer, and does not
depend on the chat format.

    ---
    name: photography              (default: the file's stem)
    category: photography          (for browsing)
    description: One line.
    add_think_block: false         (default: true)
    ---
    The system prompt.

A file without front matter is all body. An unknown key, a value of the wrong type, or a duplicate name raises a
`ConfigurationError` that names the file, because a template that silently does nothing is worse than none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from zcore.errors import ConfigurationError, InvalidRequest, did_you_mean

FENCE = "---"


class _FrontMatter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys allowed between the two fences. `model` is for information only; this service has one."""

    name: Annotated[str, Meta(min_length=1, max_length=100)] | None = None
    description: str = ""
    category: str = ""
    model: str = ""
    add_think_block: bool = True
    thinking_content: str = ""
    assistant_content: str = ""


@dataclass(frozen=True, slots=True)
class Template:
    """One template; `body` is its system prompt, which may be empty."""

    name: str
    description: str
    category: str
    body: str
    add_think_block: bool
    thinking_content: str
    assistant_content: str


@dataclass(frozen=True, slots=True)
class TemplateLibrary:
    """All templates by name."""

    templates: Mapping[str, Template]

    @classmethod
    def load(cls, *folders: Path) -> "TemplateLibrary":
        """Read every `*.md` under the folders. Templates of later folders replace earlier ones of the same name.

        Raises `ConfigurationError` naming the invalid file.
        """
        templates: dict[str, Template] = {}
        for folder in folders:
            templates |= _read_all(folder)
        return cls(templates)

    @classmethod
    def empty(cls) -> "TemplateLibrary":
        """Return a library without templates."""
        return cls({})

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self.templates)

    def search(self, category: str | None = None, text: str | None = None) -> list[Template]:
        """Return the templates of a category that contain a text, sorted by category and name; None matches any."""
        wanted = (text or "").casefold()
        found = [
            template
            for template in self.templates.values()
            if category in (None, template.category)
            and any(wanted in part.casefold() for part in (template.name, template.description, template.body))
        ]
        return sorted(found, key=lambda template: (template.category, template.name))

    def get(self, name: str) -> Template:
        """Return the template of that name. Raises `InvalidRequest` on `template`, suggesting the nearest names."""
        if name in self.templates:
            return self.templates[name]
        hint = did_you_mean(name, self.templates, at_most=3)
        raise InvalidRequest.field("template", f"there is no template `{name}`{hint}")


def _read_all(folder: Path) -> dict[str, Template]:
    if not folder.is_dir():
        raise ConfigurationError(f"templates_dir: {folder} is not a folder")
    templates: dict[str, Template] = {}
    for path in sorted(folder.rglob("*.md")):
        template = _read(path)
        if template.name in templates:
            raise ConfigurationError(f"{path}: another template already has the name `{template.name}`")
        templates[template.name] = template
    return templates


def _read(path: Path) -> Template:
    try:
        front, body = _split(path.read_text(encoding="utf-8-sig"))
        # An empty front matter is YAML's null.
        matter = msgspec.yaml.decode(front, type=_FrontMatter | None) or _FrontMatter()
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from error
    return Template(
        name=matter.name or path.stem,
        description=matter.description,
        category=matter.category,
        body=body.strip(),
        add_think_block=matter.add_think_block,
        thinking_content=matter.thinking_content,
        assistant_content=matter.assistant_content,
    )


def _split(content: str) -> tuple[str, str]:
    """Return front matter and body. An opening fence without a closing one is an error, not a body."""
    lines = content.splitlines(keepends=True)
    if not lines or lines[0].strip() != FENCE:
        return "", content
    for number, line in enumerate(lines[1:], start=1):
        if line.strip() == FENCE:
            return "".join(lines[1:number]), "".join(lines[number + 1 :])
    raise msgspec.DecodeError("the front matter has no closing `---`")
