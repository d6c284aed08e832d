"""The playground in a real browser, against a real server process on PostgreSQL."""

import io
import re
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import FilePayload, Locator, Page, expect
from sqlalchemy import select

from server.api_reference import METHODS
from tests.integration.admin.conftest import Served, complete, natural_widths
from tests.integration.installation import Installation
from tests.integration.jobs.examples import PERMANENT, claim, fail, fetch
from tests.waiting import wait_until
from zcore.jobs import claims, workers
from zcore.jobs.models import Job
from zcore.jobs.states import State
from zcore.request import GenerationRequest, Upload, parse_input_address

KEY = "anna-key-0123456789"


@pytest.fixture
def playground(admin: Served, anonymous_page: Page) -> Page:
    """A browser page with the playground loaded."""
    open_playground(anonymous_page, admin.url)
    return anonymous_page


def test_the_address_of_the_service_leads_to_all_its_pages(admin: Served, anonymous_page: Page) -> None:
    for link, heading in (("Playground", "Playground"), ("API reference", "API reference"), ("Admin", "Z-Image")):
        anonymous_page.goto(admin.url)
        anonymous_page.locator("main").get_by_role("link", name=link, exact=True).click()
        expect(anonymous_page.get_by_role("heading", name=heading).first).to_be_visible()


def test_the_reference_shows_every_operation_and_field(admin: Served, anonymous_page: Page) -> None:
    document = httpx.get(f"{admin.url}/schema/openapi.json").json()
    anonymous_page.goto(f"{admin.url}/docs")
    shown = anonymous_page.locator("article h3").all_inner_texts()
    assert sorted(shown) == sorted(
        f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item if method in METHODS
    )
    submission = anonymous_page.locator("article", has=anonymous_page.locator("h3", has_text="POST /api/generate"))
    fields = set(submission.locator("td:first-child code").all_inner_texts())
    assert set(GenerationRequest.__struct_fields__) - {"version"} <= fields
    template = submission.locator("tr", has=anonymous_page.get_by_text("template", exact=True))
    expect(template).to_contain_text("Name of a system prompt; see /api/templates.")


def test_every_template_is_offered_under_its_category(admin: Served, playground: Page) -> None:
    offered: dict[str, list[str]] = playground.get_by_label("Template").evaluate(
        """chooser => Object.fromEntries([...chooser.querySelectorAll("optgroup")].map(
            group => [group.label, [...group.children].map(option => option.value)]))"""
    )
    templates = httpx.get(f"{admin.url}/api/templates").json()["templates"]
    assert sorted(name for names in offered.values() for name in names) == sorted(one["name"] for one in templates)
    assert all(one["name"] in offered[title_of(one["category"])] for one in templates)


def test_the_description_of_the_chosen_template_is_shown(admin: Served, playground: Page) -> None:
    chosen = httpx.get(f"{admin.url}/api/templates").json()["templates"][0]
    playground.get_by_label("Template").select_option(chosen["name"])
    expect(playground.get_by_text(chosen["description"], exact=True)).to_be_visible()


def test_a_request_results_in_an_image(admin: Served, playground: Page) -> None:
    playground.get_by_label("Prompt", exact=True).fill("a lighthouse")
    playground.get_by_label("Seed").fill("4711")
    playground.get_by_label("Steps").fill("3")
    playground.get_by_label("Size").select_option("16:9")
    generate(playground)
    expect(playground.get_by_role("status")).to_have_text("Queued: no worker is running; the job waits for one")
    with admin.database.write() as transaction:
        workers.report(transaction, "worker of this test", "demo", "cpu")
    expect(playground.get_by_role("status")).to_have_text("Queued: next in the queue")
    lease = claim(admin.database)
    with admin.database.write() as transaction:
        claims.heartbeat(transaction, lease, 30, ("denoising", 2, 3))
    expect(playground.get_by_role("status")).to_have_text("Denoising: step 2 of 3")
    expect(playground.get_by_role("progressbar")).to_have_js_property("value", 0.6667)
    job = complete(admin, lease)
    assert natural_widths(playground, "figure img") == [64]
    assert natural_widths(playground, "#strip img") == [64]
    expect(playground.get_by_role("progressbar")).to_be_hidden()
    assert (job.request["prompt"], job.request["seed"], job.request["steps"]) == ("a lighthouse", 4711, 3)
    assert job.request["width"] > job.request["height"]


def test_empty_fields_use_the_configured_defaults(admin: Served, playground: Page) -> None:
    playground.get_by_label("Prompt", exact=True).fill("a lighthouse")
    generate(playground)
    request = submitted(admin).request
    assert (request["steps"], request["n"], request["passes"], request["system_prompt"]) == (8, 1, [], None)


def test_every_field_under_more_reaches_the_request(admin: Served, playground: Page) -> None:
    playground.get_by_label("Prompt", exact=True).fill('a "lighthouse"')
    playground.get_by_text("More", exact=True).click()
    playground.get_by_label("Negative prompt").fill("fog")
    playground.get_by_label("Guidance scale").fill("2.5")
    playground.get_by_label("Hidden layer").fill("-1")
    playground.get_by_label("Passes").select_option(label="Two passes")
    playground.get_by_label("System prompt").fill("Draw.")
    playground.get_by_label("Thinking").fill("A tower.")
    playground.get_by_label("Assistant").fill("Here.")
    playground.get_by_label("Think block").select_option(label="Always")
    playground.get_by_label("Long prompts").select_option("pool")
    playground.get_by_label("Strip quotes from the prompt").check()
    playground.get_by_label("Clean up whitespace in the prompt").check()
    generate(playground)
    request = submitted(admin).request
    assert [one["scale"] for one in request["passes"]] == [0.5, 1.0]
    assert {
        "negative_prompt": "fog",
        "guidance_scale": 2.5,
        "hidden_layer": -1,
        "system_prompt": "Draw.",
        "thinking_content": "A tower.",
        "assistant_content": "Here.",
        "force_think_block": True,
        "long_prompt_mode": "pool",
        "strip_quotes": True,
        "clean_whitespace": True,
    }.items() <= request.items()


def test_the_next_job_can_reuse_a_seed_or_start_from_an_image(admin: Served, playground: Page) -> None:
    playground.get_by_label("Prompt", exact=True).fill("a lighthouse")
    generate(playground)
    submitted(admin)
    first = complete(admin, claim(admin.database))
    playground.get_by_role("button", name="Use this seed").click()
    expect(playground.get_by_label("Seed")).to_have_value(str(first.outputs[0].seed))
    playground.get_by_role("button", name="Start from this image").click()
    playground.get_by_label("Strength").fill("0.3")
    generate(playground)
    second = submitted(admin, after=first)
    assert second.request["image"] == f"output:{first.id}/0"
    assert (second.request["seed"], second.request["strength"]) == (first.outputs[0].seed, 0.3)


def test_download_saves_a_file_even_from_another_origin(admin: Served, anonymous_page: Page, tmp_path: Path) -> None:
    """Browsers ignore the attribute `download` for files of another origin, such as those in a bucket."""
    open_playground(anonymous_page, admin.url.replace("127.0.0.1", "localhost"))
    anonymous_page.get_by_label("Prompt", exact=True).fill("a lighthouse")
    generate(anonymous_page)
    submitted(admin)
    job = complete(admin, claim(admin.database))
    link = anonymous_page.get_by_role("link", name="Download")
    expect(link).to_have_attribute("href", re.compile(r"^http://127\.0\.0\.1"))
    with anonymous_page.expect_download() as download:
        link.click()
    assert download.value.suggested_filename == f"{job.id}-0.png"
    download.value.save_as(tmp_path / "saved.png")
    assert (tmp_path / "saved.png").read_bytes() == admin.storage.get(job.outputs[0].key)
    assert anonymous_page.url == f"{admin.url.replace('127.0.0.1', 'localhost')}/playground"


def test_an_image_and_a_mask_are_uploaded_when_chosen(admin: Served, playground: Page) -> None:
    expect(playground.get_by_label("Strength")).to_be_hidden()
    playground.get_by_label("Start from an image", exact=True).set_input_files(file("start.png", "white"))
    assert natural_widths(playground, "#image-field img") == [96]
    playground.get_by_label("Mask", exact=True).set_input_files(file("mask.png", "black"))
    assert natural_widths(playground, "#mask-field img") == [96]
    playground.get_by_label("Prompt", exact=True).fill("a lighthouse")
    generate(playground)
    first = submitted(admin)
    ids = {first.request["image"], first.request["mask"]}
    assert len(ids) == 2
    assert all(isinstance(parse_input_address(one), Upload) for one in ids)
    playground.get_by_role("button", name="Cancel").click()
    playground.get_by_role("button", name="Remove Start from an image").click()
    expect(playground.get_by_label("Strength")).to_be_hidden()
    generate(playground)
    assert submitted(admin, after=first).request["image"] is None


def test_an_invalid_image_file_is_refused_at_its_field(playground: Page, browser_errors: list[str]) -> None:
    text: FilePayload = {"name": "notes.png", "mimeType": "image/png", "buffer": b"not an image"}
    playground.get_by_label("Start from an image", exact=True).set_input_files(text)
    expect(field_error(playground, "Start from an image")).to_be_visible()
    expect(playground.get_by_label("Strength")).to_be_hidden()
    expect_only(browser_errors, "400")


def test_errors_are_shown_at_their_fields(admin: Served, playground: Page, browser_errors: list[str]) -> None:
    playground.get_by_label("Steps").fill("99")
    playground.get_by_label("Seed").fill("99999999999999999999")
    playground.get_by_text("More", exact=True).click()
    playground.get_by_label("Hidden layer").fill("7")
    playground.get_by_text("More", exact=True).click()
    generate(playground)
    expect(field_error(playground, "Prompt")).to_contain_text("required")
    expect(field_error(playground, "Steps")).to_contain_text("50")
    expect(field_error(playground, "Hidden layer")).to_be_visible()  # under "More", which opens automatically
    expect(field_error(playground, "Seed")).not_to_be_empty()
    expect(playground.get_by_label("Prompt", exact=True)).to_be_focused()
    expect_only(browser_errors, "400")
    playground.get_by_label("Prompt", exact=True).fill("a lighthouse")
    for name in ("Steps", "Seed", "Hidden layer"):
        playground.get_by_label(name).fill("")
    generate(playground)
    expect(playground.locator(".field-error")).to_have_count(0)
    submitted(admin)


def test_an_error_of_the_size_is_shown_at_the_field_that_was_used(playground: Page, browser_errors: list[str]) -> None:
    playground.get_by_label("Prompt", exact=True).fill("a lighthouse")
    playground.get_by_label("Area").evaluate("chooser => chooser.append(new Option('4096'))")
    playground.get_by_label("Area").select_option("4096")
    generate(playground)
    expect(field_error(playground, "Area")).to_contain_text("pixels")
    expect_only(browser_errors, "400")


def test_an_error_without_a_visible_field_is_shown_in_the_status_line(
    playground: Page, browser_errors: list[str]
) -> None:
    playground.get_by_label("Prompt", exact=True).fill("a lighthouse")
    errors = [
        {"in": "body", "pointer": "/elsewhere", "detail": "must be something else"},
        {"in": "body", "pointer": "", "detail": "2 more errors"},
        {"in": "query", "name": "dry", "detail": "is not known"},
    ]
    problem = {"detail": "wrong", "errors": errors}
    playground.route("**/api/generate", lambda route: route.fulfill(status=400, json=problem))
    generate(playground)
    expect(playground.get_by_role("status")).to_contain_text(
        "elsewhere: must be something else; 2 more errors; dry: is not known"
    )
    expect_only(browser_errors, "400")


def test_tokens_are_counted_while_typing(playground: Page) -> None:
    playground.get_by_label("Prompt", exact=True).press_sequentially("a lighthouse")
    counted = playground.locator("#tokens")
    expect(counted).to_have_text(re.compile(r"^\d+ of \d+ tokens$"))
    before = counted.inner_text()
    playground.get_by_label("Template").select_option(index=1)
    expect(counted).not_to_have_text(before)
    playground.get_by_label("Prompt", exact=True).fill("tower " * 2000)
    expect(counted).to_have_text(re.compile(r"too long, will be shortened \(interpolate\)$"))
    playground.get_by_text("More", exact=True).click()
    playground.get_by_label("Long prompts").select_option("refuse")
    expect(counted).to_have_text(re.compile(r"too long, would be refused$"))
    playground.get_by_label("Prompt", exact=True).fill("")
    expect(counted).to_be_empty()


def test_a_job_can_be_canceled(admin: Served, playground: Page) -> None:
    expect(playground.get_by_role("button", name="Cancel")).to_be_disabled()
    playground.get_by_label("Prompt", exact=True).fill("a lighthouse")
    playground.get_by_label("Prompt", exact=True).press("Control+Enter")
    expect(playground.get_by_role("button", name="Generate")).to_be_disabled()
    playground.get_by_role("button", name="Cancel").click()
    expect(playground.get_by_role("status")).to_have_text("Canceled.")
    assert fetch(admin.database, submitted(admin).id).status == State.CANCELED
    expect(playground.get_by_role("button", name="Generate")).to_be_enabled()


def test_the_error_of_a_failed_job_is_shown(admin: Served, playground: Page) -> None:
    playground.get_by_label("Prompt", exact=True).fill("a lighthouse")
    generate(playground)
    submitted(admin)
    fail(admin.database, claim(admin.database), PERMANENT)
    expect(playground.get_by_role("status")).to_have_text(f"Failed: {PERMANENT.message}")


def test_the_page_asks_for_a_key_if_keys_are_configured(sqlite_url: str, tmp_path: Path, browser_page: Page) -> None:
    installation = Installation(tmp_path, {"database.url": sqlite_url, "server.api_keys": {"anna": KEY}})
    with installation.serving() as server, installation.database() as database:
        browser_page.goto(f"{server.url}/playground")
        expect(browser_page.get_by_role("status")).to_have_text("Enter your API key to begin.")
        enter_key(browser_page, "another")
        expect(field_error(browser_page, "API key")).to_contain_text("a valid API key is required")
        enter_key(browser_page, KEY)
        expect(browser_page.locator("#template option")).not_to_have_count(1)
        browser_page.reload()
        expect(browser_page.locator("#template option")).not_to_have_count(1)
        browser_page.get_by_label("Prompt", exact=True).fill("a lighthouse")
        generate(browser_page)
        expect(browser_page.get_by_role("status")).to_contain_text("Queued")
        with database.read() as transaction:
            assert transaction.session.scalars(select(Job.owner)).all() == ["anna"]


def test_the_playground_fits_a_narrow_window(playground: Page) -> None:
    playground.set_viewport_size({"width": 360, "height": 740})
    playground.get_by_text("More", exact=True).click()
    assert playground.evaluate("document.documentElement.scrollWidth") <= 360


def test_every_field_has_a_label(playground: Page) -> None:
    unnamed = playground.locator("#request :is(input, select, textarea)").evaluate_all(
        "fields => fields.filter(field => !field.labels.length).map(field => field.id)"
    )
    assert unnamed == []


def open_playground(page: Page, url: str) -> None:
    """Open the playground and wait until the templates are loaded."""
    page.goto(f"{url}/playground")
    expect(page.locator("#template option")).not_to_have_count(1)


def generate(page: Page) -> None:
    """Click the Generate button."""
    page.get_by_role("button", name="Generate").click()


def enter_key(page: Page, key: str) -> None:
    """Enter an API key and leave its field."""
    page.get_by_label("API key", exact=True).fill(key)
    page.get_by_label("API key", exact=True).press("Tab")


def field_error(page: Page, label: str) -> Locator:
    """Return the error message at the field with this label."""
    field = page.get_by_label(label, exact=True)
    expect(field).to_have_attribute("aria-invalid", "true")
    return page.locator(f"#{field.get_attribute('aria-describedby')}")


def file(name: str, color: str) -> FilePayload:
    """Return an image file to choose in a file field."""
    content = io.BytesIO()
    Image.new("RGB", (96, 64), color).save(content, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": content.getvalue()}


def expect_only(browser_errors: list[str], status: str) -> None:
    """Check that the browser reported responses with this status and nothing else, and clear them."""
    assert browser_errors
    assert all(status in error for error in browser_errors)
    browser_errors.clear()


def submitted(admin: Served, after: Job | None = None) -> Job:
    """Return the job that the page submitted, once it is stored."""

    def newest() -> Job | None:
        with admin.database.read() as transaction:
            found = transaction.session.scalars(select(Job).order_by(Job.id.desc()).limit(1)).first()
            return None if found is None or (after is not None and found.id == after.id) else found

    found = wait_until(newest)
    assert found is not None
    return found


def title_of(category: str) -> str:
    """Return a category's label on the page."""
    return category[:1].upper() + category[1:].replace("_", " ")
