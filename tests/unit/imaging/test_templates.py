"""Templates: errors name the file, and the shipped templates are usable."""

from pathlib import Path

import pytest

from zcore.errors import ConfigurationError, InvalidRequest
from zcore.prompt.formatter import format_prompt
from zcore.prompt.templates import TemplateLibrary
from zcore.prompt.token_count import TokenCounter

SHIPPED = Path(__file__).resolve().parents[3] / "templates" / "z_image"


def test_front_matter_and_body_are_read_from_any_depth(tmp_path: Path) -> None:
    nested = tmp_path / "art" / "old"
    nested.mkdir(parents=True)
    (nested / "woodcut.md").write_text(
        "---\nname: wood\ncategory: art\ndescription: Cut in wood.\nmodel: z-image\nadd_think_block: false\n"
        "thinking_content: knives\nassistant_content: ink\n---\n\nDraw as cut in wood.\n\n---\n\nBlack ink.\n"
    )
    template = TemplateLibrary.load(tmp_path).get("wood")
    assert template.body == "Draw as cut in wood.\n\n---\n\nBlack ink."
    assert (template.category, template.description) == ("art", "Cut in wood.")
    assert not template.add_think_block
    assert (template.thinking_content, template.assistant_content) == ("knives", "ink")


@pytest.mark.parametrize("content", ["Only a body.", "---\n---\nOnly a body.", "---\n# nothing\n---\nOnly a body."])
def test_keys_missing_from_the_front_matter_have_defaults(tmp_path: Path, content: str) -> None:
    (tmp_path / "plain.md").write_text(content)
    template = TemplateLibrary.load(tmp_path).get("plain")
    assert template.body == "Only a body."
    assert template.add_think_block
    assert template.thinking_content == template.assistant_content == ""


def test_line_ends_and_byte_order_marks_of_other_editors_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "windows.md").write_bytes(b"\xef\xbb\xbf---\r\ncategory: art\r\n---\r\nOne.\r\nTwo.\r\n")
    template = TemplateLibrary.load(tmp_path).get("windows")
    assert (template.category, template.body) == ("art", "One.\nTwo.")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("---\ncategroy: art\n---\nbody", "categroy"),
        ("---\nadd_think_block: maybe\n---\nbody", "bool"),
        ("---\nname: [a, b]\n---\nbody", "name"),
        ("---\nname: ''\n---\nbody", "name"),
        ("---\n: : :\n  - x\n---\nbody", "wrong.md"),
        ("---\njust words\n---\nbody", "object"),
        ("---\nname: endless\n", "no closing `---`"),
    ],
)
def test_an_error_names_its_file(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "wrong.md").write_text(content)
    with pytest.raises(ConfigurationError, match=complaint) as refusal:
        TemplateLibrary.load(tmp_path)
    assert "wrong.md" in refusal.value.message


def test_bytes_that_are_not_text_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "wrong.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match=r"wrong\.md"):
        TemplateLibrary.load(tmp_path)


def test_two_templates_with_one_name_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("---\nname: same\n---\n")
    (tmp_path / "b.md").write_text("---\nname: same\n---\n")
    with pytest.raises(ConfigurationError, match=r"b\.md.*`same`"):
        TemplateLibrary.load(tmp_path)


def test_a_later_folder_adds_templates_and_replaces_earlier_ones(tmp_path: Path) -> None:
    own = tmp_path / "own" / "art"
    own.mkdir(parents=True)
    (own / "art_oil.md").write_text("Thick paint.")
    (own / "kitchen_tiles.md").write_text("Blue tiles.")
    shipped, both = TemplateLibrary.load(SHIPPED), TemplateLibrary.load(SHIPPED, tmp_path / "own")
    assert set(both.names()) == {*shipped.names(), "kitchen_tiles"}
    assert both.get("art_oil").body == "Thick paint."
    assert TemplateLibrary.load(tmp_path / "own", SHIPPED).get("art_oil") == shipped.get("art_oil")
    assert both.get("photography") == shipped.get("photography")


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="templates_dir"):
        TemplateLibrary.load(SHIPPED, tmp_path / "nowhere")


def test_an_unknown_template_is_the_callers_error_and_near_names_are_suggested() -> None:
    with pytest.raises(InvalidRequest, match=r"`photograpy`; did you mean `photography`") as refusal:
        TemplateLibrary.load(SHIPPED).get("photograpy")
    assert [error.pointer for error in refusal.value.errors] == ["/template"]


def test_the_empty_library_has_no_template() -> None:
    assert TemplateLibrary.empty().names() == []
    with pytest.raises(InvalidRequest, match=r"there is no template `photography`$"):
        TemplateLibrary.empty().get("photography")


def test_the_shipped_templates_have_descriptions_and_folders_and_change_only_the_system_prompt() -> None:
    library = TemplateLibrary.load(SHIPPED)
    assert len(library.names()) >= 12
    assert "photography" in library.names()
    for name in library.names():
        template = library.get(name)
        assert template.description.endswith("."), name
        assert (SHIPPED / template.category / f"{name}.md").is_file(), name
        assert template.body or name == "default", name
        assert not template.add_think_block, name
        assert template.thinking_content == template.assistant_content == "", name


def test_the_shipped_templates_leave_most_of_the_prompt_to_the_caller(layout_dir: Path) -> None:
    library = TemplateLibrary.load(SHIPPED)
    counter = TokenCounter.load(layout_dir)
    for name in library.names():
        assert counter.count(format_prompt("", system=library.get(name).body)) <= 250, name
