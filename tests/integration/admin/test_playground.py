"""The playground as a person uses it: in a real browser, against a real server process on PostgreSQL."""

import io
import re
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import FilePayload, Locator, Page, expect
from sqlalchemy import select

from tests.integration.admin.conftest import Served, natural_widths, paint
from tests.integration.installation import Installation
from tests.integration.jobs.examples import DEFECT, claim, fail, look
from tests.waiting import wait_until
from zcore.jobs import lifecycle
from zcore.jobs.models import Job
from zcore.jobs.states import State
from zcore.request import INPUT_ID

KEY = "anna-key-0123456789"


@pytest.fixture
def playground(admin: Served, stranger: Page) -> Page:
    """A browser at the playground, which has loaded its choices."""
    opened(stranger, admin.url)
    return stranger


def test_every_template_is_offered_under_its_category(admin: Served, playground: Page) -> None:
    offered: dict[str, list[str]] = playground.get_by_label("Template").evaluate(
        """chooser => Object.fromEntries([...chooser.querySelectorAll("optgroup")].map(
            group => [group.label, [...group.children].map(option => option.value)]))"""
    )
    templates = httpx.get(f"{admin.url}/api/templates").json()["templates"]
    assert sorted(name for names in offered.values() for name in names) == sorted(one["name"] for one in templates)
    assert all(one["name"] in offered[said(one["category"])] for one in templates)


def test_a_template_is_described_when_it_is_chosen(admin: Served, playground: Page) -> None:
    chosen = httpx.get(f"{admin.url}/api/templates").json()["templates"][0]
    playground.get_by_label("Template").select_option(chosen["name"])
    expect(playground.get_by_text(chosen["description"], exact=True)).to_be_visible()


def test_a_request_becomes_a_picture(admin: Served, playground: Page) -> None:
    playground.get_by_label("Prompt", exact=True).fill("a lighthouse")
    playground.get_by_label("Seed").fill("4711")
    playground.get_by_label("Steps").fill("3")
    playground.get_by_label("Size").select_option("16:9")
    generate(playground)
    expect(playground.get_by_role("status")).to_have_text("Queued: next in the queue")
    lease = claim(admin.database)
    with admin.database.write() as transaction:
        lifecycle.heartbeat(transaction, lease, 30, ("denoising", 2, 3))
    expect(playground.get_by_role("status")).to_have_text("Denoising: step 2 of 3")
    expect(playground.get_by_role("progressbar")).to_have_js_property("value", 0.6667)
    job = paint(admin, lease)
    assert natural_widths(playground, "figure img") == [64]
    assert natural_widths(playground, "#strip img") == [64]
    expect(playground.get_by_role("progressbar")).to_be_hidden()
    assert (job.request["prompt"], job.request["seed"], job.request["steps"]) == ("a lighthouse", 4711, 3)
    assert job.request["width"] > job.request["height"]


def test_what_is_left_empty_is_the_operator_s(admin: Served, playground: Page) -> None:
    playground.get_by_label("Prompt", exact=True).fill("a lighthouse")
    generate(playground)
    request = submitted(admin).request
    assert (request["steps"], request["n"], request["passes"], request["system_prompt"]) == (8, 1, [], None)


def test_everything_behind_more_reaches_the_request(admin: Served, playground: Page) -> None:
    playground.get_by_label("Prompt", exact=True).fill('a "lighthouse"')
    playground.get_by_text("More", exact=True).click()
    playground.get_by_label("Negative prompt").fill("fog")
    playground.get_by_label("Guidance scale").fill("2.5")
    playground.get_by_label("Hidden layer").fill("-1")
    playground.get_by_label("Passes").select_option(label="Two passes")
    playground.get_by_label("System prompt").fill("Paint.")
    playground.get_by_label("Thinking").fill("A tower.")
    playground.get_by_label("Assistant").fill("Here.")
    playground.get_by_label("Think block").select_option(label="Forced")
    playground.get_by_label("Long prompts").select_option("pool")
    playground.get_by_label("Strip quotes from the prompt").check()
    playground.get_by_label("Clean its whitespace").check()
    generate(playground)
    request = submitted(admin).request
    assert [one["scale"] for one in request["passes"]] == [0.5, 1.0]
    assert {
        "negative_prompt": "fog",
        "guidance_scale": 2.5,
        "hidden_layer": -1,
        "system_prompt": "Paint.",
        "thinking_content": "A tower.",
        "assistant_content": "Here.",
        "force_think_block": True,
        "long_prompt_mode": "pool",
        "strip_quotes": True,
        "clean_whitespace": True,
    }.items() <= request.items()


def test_a_picture_s_seed_and_the_picture_itself_begin_the_next_one(admin: Served, playground: Page) -> None:
    playground.get_by_label("Prompt", exact=True).fill("a lighthouse")
    generate(playground)
    submitted(admin)
    first = paint(admin, claim(admin.database))
    playground.get_by_role("button", name="Use this seed").click()
    expect(playground.get_by_label("Seed")).to_have_value(str(first.outputs[0].seed))
    playground.get_by_role("button", name="Start from it").click()
    playground.get_by_label("Strength").fill("0.3")
    generate(playground)
    second = submitted(admin, after=first)
    assert second.request["image"] == f"output:{first.id}/0"
    assert (second.request["seed"], second.request["strength"]) == (first.outputs[0].seed, 0.3)


def test_a_picture_and_a_mask_are_uploaded_as_they_are_chosen(admin: Served, playground: Page) -> None:
    expect(playground.get_by_label("Strength")).to_be_hidden()
    playground.get_by_label("Start from a picture", exact=True).set_input_files(file("start.png", "white"))
    assert natural_widths(playground, "#image-field img") == [96]
    playground.get_by_label("Mask", exact=True).set_input_files(file("mask.png", "black"))
    assert natural_widths(playground, "#mask-field img") == [96]
    playground.get_by_label("Prompt", exact=True).fill("a lighthouse")
    generate(playground)
    first = submitted(admin)
    ids = {first.request["image"], first.request["mask"]}
    assert len(ids) == 2
    assert all(INPUT_ID.fullmatch(one) for one in ids)
    playground.get_by_role("button", name="Cancel").click()
    playground.get_by_role("button", name="Remove Start from a picture").click()
    expect(playground.get_by_label("Strength")).to_be_hidden()
    generate(playground)
    assert submitted(admin, after=first).request["image"] is None


def test_a_file_that_is_no_picture_is_refused_at_its_field(playground: Page, complaints: list[str]) -> None:
    text: FilePayload = {"name": "notes.png", "mimeType": "image/png", "buffer": b"no picture"}
    playground.get_by_label("Start from a picture", exact=True).set_input_files(text)
    expect(fault_at(playground, "Start from a picture")).to_be_visible()
    expect(playground.get_by_label("Strength")).to_be_hidden()
    refused(complaints, "400")


def test_faults_stand_at_their_fields(admin: Served, playground: Page, complaints: list[str]) -> None:
    playground.get_by_label("Steps").fill("99")
    playground.get_by_label("Seed").fill("99999999999999999999")
    playground.get_by_text("More", exact=True).click()
    playground.get_by_label("Hidden layer").fill("7")
    playground.get_by_text("More", exact=True).click()
    generate(playground)
    expect(fault_at(playground, "Prompt")).to_have_text("is required")
    expect(fault_at(playground, "Steps")).to_have_text("expected `int` <= 50")
    expect(fault_at(playground, "Hidden layer")).to_be_visible()  # behind "More", which opens for it
    expect(fault_at(playground, "Seed")).to_contain_text("expected `int`")
    expect(playground.get_by_label("Prompt", exact=True)).to_be_focused()
    refused(complaints, "400")
    playground.get_by_label("Prompt", exact=True).fill("a lighthouse")
    for name in ("Steps", "Seed", "Hidden layer"):
        playground.get_by_label(name).fill("")
    generate(playground)
    expect(playground.locator(".fault")).to_have_count(0)
    submitted(admin)


def test_a_fault_without_a_field_in_sight_is_one_line(playground: Page, complaints: list[str]) -> None:
    playground.get_by_label("Prompt", exact=True).fill("a lighthouse")
    playground.get_by_label("Area").evaluate("chooser => chooser.append(new Option('4096'))")
    playground.get_by_label("Area").select_option("4096")
    generate(playground)
    expect(playground.get_by_role("status")).to_contain_text("width: 4096x4096 is 16777216 pixels")
    refused(complaints, "400")


def test_tokens_are_counted_while_one_writes(playground: Page) -> None:
    playground.get_by_label("Prompt", exact=True).press_sequentially("a lighthouse")
    counted = playground.locator("#tokens")
    expect(counted).to_have_text(re.compile(r"^\d+ of \d+ tokens$"))
    few = counted.inner_text()
    playground.get_by_label("Template").select_option(index=1)
    expect(counted).not_to_have_text(few)
    playground.get_by_label("Prompt", exact=True).fill("tower " * 2000)
    expect(counted).to_have_text(re.compile(r"too long \(interpolate\)$"))
    playground.get_by_label("Prompt", exact=True).fill("")
    expect(counted).to_be_empty()


def test_a_job_is_canceled(admin: Served, playground: Page) -> None:
    expect(playground.get_by_role("button", name="Cancel")).to_be_disabled()
    playground.get_by_label("Prompt", exact=True).fill("a lighthouse")
    playground.get_by_label("Prompt", exact=True).press("Control+Enter")
    expect(playground.get_by_role("button", name="Generate")).to_be_disabled()
    playground.get_by_role("button", name="Cancel").click()
    expect(playground.get_by_role("status")).to_have_text("Canceled.")
    assert look(admin.database, submitted(admin).id).status == State.CANCELED
    expect(playground.get_by_role("button", name="Generate")).to_be_enabled()


def test_a_job_that_fails_says_why(admin: Served, playground: Page) -> None:
    playground.get_by_label("Prompt", exact=True).fill("a lighthouse")
    generate(playground)
    submitted(admin)
    fail(admin.database, claim(admin.database), DEFECT)
    expect(playground.get_by_role("status")).to_have_text(f"Failed: {DEFECT.message}")


def test_with_keys_configured_the_page_asks_for_one(sqlite_url: str, tmp_path: Path, browser_page: Page) -> None:
    installation = Installation(tmp_path, {"database.url": sqlite_url, "server.api_keys": {"anna": KEY}})
    with installation.serving() as server, installation.database() as database:
        browser_page.goto(f"{server.url}/playground")
        expect(browser_page.get_by_role("status")).to_have_text("Give your API key to begin.")
        give_key(browser_page, "another")
        expect(fault_at(browser_page, "API key")).to_contain_text("a valid API key is needed")
        give_key(browser_page, KEY)
        expect(browser_page.locator("#template option")).not_to_have_count(1)
        browser_page.reload()
        expect(browser_page.locator("#template option")).not_to_have_count(1)
        browser_page.get_by_label("Prompt", exact=True).fill("a lighthouse")
        generate(browser_page)
        expect(browser_page.get_by_role("status")).to_contain_text("Queued")
        with database.read() as transaction:
            assert transaction.session.scalars(select(Job.owner)).all() == ["anna"]


def test_the_playground_needs_no_wide_window(playground: Page) -> None:
    playground.set_viewport_size({"width": 360, "height": 740})
    playground.get_by_text("More", exact=True).click()
    assert playground.evaluate("document.documentElement.scrollWidth") <= 360


def test_every_field_has_a_label(playground: Page) -> None:
    unnamed = playground.locator("#request :is(input, select, textarea)").evaluate_all(
        "fields => fields.filter(field => !field.labels.length).map(field => field.id)"
    )
    assert unnamed == []


def opened(page: Page, url: str) -> None:
    """Go to the playground and wait until the choices are there."""
    page.goto(f"{url}/playground")
    expect(page.locator("#template option")).not_to_have_count(1)


def generate(page: Page) -> None:
    """Press the button."""
    page.get_by_role("button", name="Generate").click()


def give_key(page: Page, key: str) -> None:
    """Type a key and leave its field."""
    page.get_by_label("API key", exact=True).fill(key)
    page.get_by_label("API key", exact=True).press("Tab")


def fault_at(page: Page, label: str) -> Locator:
    """What stands as wrong at the field of this label."""
    field = page.get_by_label(label, exact=True)
    expect(field).to_have_attribute("aria-invalid", "true")
    return page.locator(f"#{field.get_attribute('aria-describedby')}")


def file(name: str, color: str) -> FilePayload:
    """A picture as a person picks one."""
    content = io.BytesIO()
    Image.new("RGB", (96, 64), color).save(content, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": content.getvalue()}


def refused(complaints: list[str], status: str) -> None:
    """The browser complained of an answer with this status, and of nothing else."""
    assert complaints
    assert all(status in complaint for complaint in complaints)
    complaints.clear()


def submitted(admin: Served, after: Job | None = None) -> Job:
    """The job that the page submitted, once it is stored."""

    def newest() -> Job | None:
        with admin.database.read() as transaction:
            found = transaction.session.scalars(select(Job).order_by(Job.id.desc()).limit(1)).first()
            return None if found is None or (after is not None and found.id == after.id) else found

    found = wait_until(newest)
    assert found is not None
    return found


def said(category: str) -> str:
    """A category as the page shows it."""
    return category[:1].upper() + category[1:].replace("_", " ")
