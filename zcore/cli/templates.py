"""`zimage templates`: the prompt templates, to look through and to read.

Takes a command line; gives a list, or one template whole. Needs no torch.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from zcore.cli import setting_flags
from zcore.cli.parser import Commands
from zcore.cli.setting_flags import add_setting_flags, chosen_settings
from zcore.imaging.text.templates import Template, TemplateLibrary

DESCRIPTION = """\
Styles by name, for `zimage generate --template NAME`.

  zimage templates                            all of them
  zimage templates --category photography     those of one category
  zimage templates --search watercolor        those that speak of it
  zimage templates art_oil                    one, with its whole text"""


def add_to(commands: Commands) -> None:
    """The command with its flags."""
    parser = commands.add_parser(
        "templates",
        usage="zimage templates [FLAGS] [NAME]",
        help="list prompt templates, or read one",
        description=DESCRIPTION,
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="The template to read.")
    parser.add_argument("--category", metavar="NAME", help="Only those of this category.")
    parser.add_argument("--search", metavar="TEXT", help="Only those with this in name, description or text.")
    parser.add_argument("--json", action="store_true", help="One line of JSON for each, for programs.")
    add_setting_flags(parser, setting_flags.TEMPLATES)
    parser.set_defaults(run=run, parser=parser)


def run(said: argparse.Namespace) -> int:
    """Print. Raises `ZImageError`; a search without a find prints nothing and is status 1, as grep's."""
    library = TemplateLibrary.load(*chosen_settings(said).settings.templates_paths)
    found = [library.get(said.name)] if said.name else library.search(said.category, said.search)
    if said.json:
        for template in found:
            print(json.dumps(asdict(template), ensure_ascii=False))
    elif said.name:
        print(_whole(found[0]))
    else:
        print(*_rows(found), sep="\n", end="\n" if found else "")
    return 0 if found else 1


def _rows(templates: Sequence[Template]) -> list[str]:
    name_width = max((len(template.name) for template in templates), default=0)
    category_width = max((len(template.category) for template in templates), default=0)
    return [f"{one.name:{name_width}}  {one.category:{category_width}}  {one.description}" for one in templates]


def _whole(template: Template) -> str:
    parts = {
        "category": template.category,
        "description": template.description,
        "think block": "yes" if template.add_think_block else "",
        "thinking": template.thinking_content,
        "answer": template.assistant_content,
    }
    head = [f"{name}: {value}" for name, value in {"name": template.name, **parts}.items() if value]
    return "\n".join([*head, "", template.body or "(empty)"])
