"""`zimage templates` lists the prompt templates and shows one in full."""

import json
from pathlib import Path

from tests.unit.cli.conftest import TREE, Terminal


def test_all_templates_are_listed_with_category_and_description(zimage: Terminal) -> None:
    rows = zimage("templates").out.splitlines()
    files = list((TREE / "templates" / "z_image").rglob("*.md"))
    assert len(rows) == len(files) > 200
    assert next(row.split(maxsplit=2) for row in rows if row.startswith("art_oil ")) == [
        "art_oil",
        "art",
        "Traditional oil painting from life, with visible paint.",
    ]


def test_category_and_search_narrow_the_list_and_no_match_is_status_1(zimage: Terminal) -> None:
    listed = [json.loads(row) for row in zimage("templates", "--category", "art", "--json").out.splitlines()]
    assert {one["category"] for one in listed} == {"art"}
    found = [json.loads(row) for row in zimage("templates", "--search", "WATERCOLOR", "--json").out.splitlines()]
    assert 0 < len(found) < 100
    assert all("watercolor" in f"{one['name']} {one['description']} {one['body']}".lower() for one in found)
    nothing = zimage("templates", "--category", "art", "--search", "no such words")
    assert (nothing.status, nothing.out, nothing.err) == (1, "", "")


def test_one_template_is_shown_with_its_full_text(zimage: Terminal) -> None:
    shown = zimage("templates", "art_oil").out
    text = next((TREE / "templates" / "z_image").rglob("art_oil.md")).read_text().split("---")[2].strip()
    assert shown.startswith("name: art_oil\ncategory: art\n")
    assert shown.endswith(f"\n\n{text}\n")


def test_a_templates_folder_is_resolved_from_the_working_folder(zimage: Terminal) -> None:
    Path("own").mkdir()
    Path("own/tiles.md").write_text("Square tiles, made by hand.")
    assert zimage("templates", "--templates-dir", "own").out.split() == ["tiles"]
    shown = zimage("templates", "--templates-dir", "own", "tiles").out
    assert shown == "name: tiles\nthink block: yes\n\nSquare tiles, made by hand.\n"
