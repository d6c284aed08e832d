"""`zimage templates`: list the prompt templates, or print one.

Does not need torch.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from zcore.cli import setting_flags
from zcore.cli.parser import Commands
from zcore.cli.setting_flags import add_setting_flags, chosen_settings
from zcore.errors import InvalidRequest
from zcore.foreign_text import printable
from zcore.prompt.templates import Template, TemplateLibrary

DESCRIPTION = """\
List the prompt templates: named styles for `zimage generate --template NAME`.

  zimage templates                            all templates
  zimage templates --category photography     one category
  zimage templates --search watercolor        templates that contain a word
  zimage templates art_oil                    one template with its full text"""


def add_to(commands: Commands) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "templates",
        usage="zimage templates [FLAGS] [NAME]",
        help="list the prompt templates, or show one",
        description=DESCRIPTION,
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="Template to show in full.")
    parser.add_argument("--category", metavar="NAME", help="List only this category.")
    parser.add_argument(
        "--search", metavar="TEXT", help="List only templates with this text in their name, description or body."
    )
    parser.add_argument("--json", action="store_true", help="Print one line of JSON for each template.")
    add_setting_flags(parser, setting_flags.TEMPLATES)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the templates. Like grep, print nothing and return 1 if none match. Raises `ZImageError`."""
    library = TemplateLibrary.load(*chosen_settings(arguments).settings.templates_paths)
    found = (
        [_named(library, arguments.name)] if arguments.name else library.search(arguments.category, arguments.search)
    )
    if arguments.json:
        for template in found:
            print(printable(json.dumps(asdict(template), ensure_ascii=False)))
    elif arguments.name:
        print("\n".join(map(printable, _full_text(found[0]).split("\n"))))
    else:
        print(*map(printable, _rows(found)), sep="\n", end="\n" if found else "")
    return 0 if found else 1


def _named(library: TemplateLibrary, name: str) -> Template:
    """Return a template. Raises `InvalidRequest` on NAME, since this command has no flag for it."""
    try:
        return library.get(name)
    except InvalidRequest as error:
        raise InvalidRequest.field("NAME", error.errors[0].detail) from error


def _rows(templates: Sequence[Template]) -> list[str]:
    name_width = max((len(template.name) for template in templates), default=0)
    category_width = max((len(template.category) for template in templates), default=0)
    return [f"{one.name:{name_width}}  {one.category:{category_width}}  {one.description}" for one in templates]


def _full_text(template: Template) -> str:
    parts = {
        "category": template.category,
        "description": template.description,
        "think block": "yes" if template.add_think_block else "",
        "thinking": template.thinking_content,
        "answer": template.assistant_content,
    }
    head = [f"{name}: {value}" for name, value in {"name": template.name, **parts}.items() if value]
    return "\n".join([*head, "", template.body or "(empty)"])
