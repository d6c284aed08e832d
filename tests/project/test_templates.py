"""The shipped prompt templates: enough of them, well-formed, different from each other, and all documented."""

import re
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import pytest

from zcore.prompt.templates import Template, TemplateLibrary

TREE = Path(__file__).resolve().parents[2]
SHIPPED = TREE / "templates" / "z_image"
PAGE = (TREE / "docs" / "templates.md").read_text(encoding="utf-8")
TEMPLATES = TemplateLibrary.load(SHIPPED).templates
REWRITERS = {name: template for name, template in TEMPLATES.items() if template.category == "rewriter"}
# Templates that condition an image: all but the empty one and those for a language model.
STYLES = {name: template for name, template in TEMPLATES.items() if template.body and name not in REWRITERS}
CATEGORIES = {
    "aesthetic", "art", "character", "general", "photography", "rewriter", "scifi_fantasy", "style", "surreal",
    "technical",
}  # fmt: skip
# Brands and names of other people; templates that are known by them elsewhere have plain names here.
FOREIGN = re.compile(
    r"polaroid|kodak|technicolor|octane|ghibli|ps1|playstation|ikea|instagram|linkedin|powerpoint|shrek|cabbage"
    r"|bob.?ross|wes.?anderson|formula.?1|jesus|leica|nikon|hasselblad|disney|pixar|marvel|photoshop|unreal|lego",
    re.IGNORECASE,
)
LARGEST_SHARE = 0.3


def test_there_are_at_least_a_hundred_and_sixty() -> None:
    assert len(TEMPLATES) >= 160


def test_every_file_is_a_template_of_its_own_name_in_the_folder_of_its_category() -> None:
    written = {(path.parent.name, path.stem) for path in SHIPPED.rglob("*.md")}
    assert written == {(template.category, name) for name, template in TEMPLATES.items()}
    assert {path.parent.parent for path in SHIPPED.rglob("*.md")} == {SHIPPED}


def test_there_are_ten_categories_and_photography_has_a_template_of_that_name() -> None:
    assert {template.category for template in TEMPLATES.values()} == CATEGORIES
    assert TEMPLATES["photography"].category == "photography"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_description_is_one_short_sentence(name: str) -> None:
    description = TEMPLATES[name].description
    assert 30 <= len(description) <= 90
    assert description.endswith(".")
    assert description.isprintable()


def test_no_two_templates_are_described_alike() -> None:
    descriptions = [template.description for template in TEMPLATES.values()]
    assert len(set(descriptions)) == len(descriptions)


def test_the_default_template_is_empty() -> None:
    assert TEMPLATES["default"].body == ""
    assert set(TEMPLATES) - set(STYLES) - set(REWRITERS) == {"default"}


@pytest.mark.parametrize("name", STYLES)
def test_a_body_is_a_paragraph_of_forty_to_a_hundred_and_ten_words(name: str) -> None:
    assert 40 <= len(STYLES[name].body.split()) <= 110
    assert "\n" not in STYLES[name].body


def test_a_rewriter_may_be_longer() -> None:
    assert len(REWRITERS) == 3
    for name, template in REWRITERS.items():
        assert 40 <= len(template.body.split()) <= 350, name


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_contains_no_placeholder_quotation_or_brand(name: str) -> None:
    """The model renders text in straight quotation marks as lettering."""
    template = TEMPLATES[name]
    everything = f"{name} {template.description} {template.body}"
    assert not re.search(r'["<>{}\[\]]|TODO|\.\.\.', everything)
    assert not FOREIGN.search(everything)


def test_no_template_changes_the_layout_of_the_answer() -> None:
    for name, template in TEMPLATES.items():
        layout = (template.add_think_block, template.thinking_content, template.assistant_content)
        assert layout == (False, "", ""), name


def test_no_sentence_is_in_two_templates() -> None:
    users: defaultdict[str, set[str]] = defaultdict(set)
    for name, template in TEMPLATES.items():
        for sentence in sentences(template):
            users[sentence].add(name)
    assert [shared for shared in users.items() if len(shared[1]) > 1] == []


def test_no_two_bodies_are_variations_of_one_text() -> None:
    """Bound the fraction of a body's four-word sequences that another body shares; for equal texts it is 1."""
    sequences = {name: four_grams(template) for name, template in TEMPLATES.items() if template.body}
    alike = [
        (one, other)
        for one, other in combinations(sequences, 2)
        if len(sequences[one] & sequences[other])
        > LARGEST_SHARE * min(len(sequences[one]), len(sequences[other]))
    ]  # fmt: skip
    assert alike == []


def test_the_page_lists_exactly_the_templates_with_description_and_category() -> None:
    listed: dict[str, tuple[str, str]] = {}
    category = ""
    for line in PAGE.splitlines():
        if heading := re.fullmatch(r"### (\w+) \(\d+\)", line):
            category = heading[1]
        elif row := re.fullmatch(r"\| `(\w+)` \| (.+) \|", line):
            assert row[1] not in listed
            listed[row[1]] = (category, row[2])
    assert listed == {name: (template.category, template.description) for name, template in TEMPLATES.items()}


def test_the_counts_on_the_page_are_right() -> None:
    counted = {heading[0]: int(heading[1]) for heading in re.findall(r"^### (\w+) \((\d+)\)$", PAGE, re.MULTILINE)}
    assert counted == Counter(template.category for template in TEMPLATES.values())


def sentences(template: Template) -> set[str]:
    """Return the sentences of a body, in lower case."""
    return {part.strip().lower() for part in re.split(r"[.!?](?:\s+|$)", template.body) if part.strip()}


def four_grams(template: Template) -> set[tuple[str, ...]]:
    """Return all sequences of four words in a body, in lower case."""
    words = re.findall(r"\w+", template.body.lower())
    return set(zip(words, words[1:], words[2:], words[3:], strict=False))
