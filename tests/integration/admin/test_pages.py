"""The admin as a person uses it: in a real browser, against a real server process on PostgreSQL."""

from datetime import timedelta
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.integration.admin.conftest import ADMIN_KEY, Served, natural_widths, painted, sign_in
from tests.integration.installation import Installation
from tests.integration.jobs.examples import (
    DEFECT,
    HOOK,
    cancel,
    claim,
    events,
    fail,
    look,
    submit,
)
from tests.services.s3 import Bucket
from tests.waiting import wait_until
from zcore.jobs import lifecycle, presence, webhooks
from zcore.jobs.states import State
from zcore.jobs.webhooks import AttemptOutcome
from zcore.stages import Stage
from zcore.storage import open_storage


def test_a_stranger_signs_in_and_arrives_where_he_wanted_to_go(admin: Served, stranger: Page) -> None:
    job = submit(admin.database)
    stranger.goto(f"{admin.url}/admin/jobs/{job.id}?still=1")
    expect(stranger).to_have_url(f"{admin.url}/admin/sign-in")
    sign_in(stranger, ADMIN_KEY)
    expect(stranger).to_have_url(f"{admin.url}/admin/jobs/{job.id}?still=1")


def test_a_wrong_key_opens_nothing(admin: Served, stranger: Page, complaints: list[str]) -> None:
    stranger.goto(f"{admin.url}/admin")
    sign_in(stranger, "another key")
    expect(stranger.get_by_role("alert")).to_have_text("That is not the admin key.")
    stranger.goto(f"{admin.url}/admin")
    expect(stranger).to_have_url(f"{admin.url}/admin/sign-in")
    assert all("403" in complaint for complaint in complaints)
    complaints.clear()


def test_signing_out_closes_the_pages(admin: Served, page: Page) -> None:
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("status")).to_have_text("You are signed out.")
    page.goto(f"{admin.url}/admin")
    expect(page).to_have_url(f"{admin.url}/admin/sign-in")


def test_the_history_shows_the_newest_job_first(admin: Served, page: Page) -> None:
    for prompt in ("first", "second", "third"):
        submit(admin.database, prompt=prompt)
    page.reload()
    shows(page, "third", "second", "first")


def test_pages_lead_through_every_job_and_back(admin: Served, page: Page) -> None:
    for number in range(120):
        submit(admin.database, prompt=f"number {number}")
    page.reload()
    stretches = [[f"number {n}" for n in range(end - 1, end - 31, -1)] for end in (120, 90, 60, 30)]
    for stretch in stretches[:-1]:
        shows(page, *stretch)
        page.get_by_role("link", name="Older →").click()
    shows(page, *stretches[-1])
    expect(page.get_by_role("link", name="Older →")).to_have_count(0)
    for stretch in reversed(stretches[:-1]):
        page.get_by_role("link", name="← Newer").click()
        shows(page, *stretch)
    expect(page.get_by_role("link", name="← Newer")).to_have_count(0)


def test_a_status_and_a_text_narrow_the_list_together(admin: Served, page: Page) -> None:
    submit(admin.database, prompt="a red barn")
    cancel(admin.database, submit(admin.database, prompt="a red boat").id)
    cancel(admin.database, submit(admin.database, prompt="100% wool").id)
    page.reload()
    page.get_by_role("link", name="Canceled 2").click()
    shows(page, "100% wool", "a red boat")
    page.get_by_label("Prompt or id").fill("RED")
    page.get_by_role("button", name="Filter").click()
    shows(page, "a red boat")
    page.get_by_label("Prompt or id").fill("0%")
    page.get_by_role("button", name="Filter").click()
    shows(page, "100% wool")
    page.get_by_role("link", name="Clear").click()
    expect(page.locator("th.prompt")).to_have_count(3)


def test_a_whole_id_finds_its_job(admin: Served, page: Page) -> None:
    wanted = submit(admin.database, prompt="this one")
    submit(admin.database, prompt="not this one")
    page.get_by_label("Prompt or id").fill(f" {wanted.id} ")
    page.get_by_role("button", name="Filter").click()
    shows(page, "this one")


def test_an_owner_s_name_shows_his_jobs_alone(admin: Served, page: Page) -> None:
    submit(admin.database, owner="anna", prompt="hers")
    submit(admin.database, owner="ben & co", prompt="his")
    page.reload()
    page.get_by_role("link", name="ben & co").click()
    shows(page, "his")
    page.get_by_role("link", name="show everybody’s").click()
    shows(page, "his", "hers")


def test_times_narrow_the_list(admin: Served, page: Page) -> None:
    job = submit(admin.database)
    minute = job.created_at.replace(second=0, microsecond=0, tzinfo=None)
    narrow(page, created_from=minute)
    expect(page.locator("th.prompt")).to_have_count(1)
    narrow(page, created_from=minute + timedelta(minutes=1))
    expect(page.get_by_text("No job fits these filters.")).to_be_visible()
    narrow(page, created_from=minute, created_before=minute)
    shows(page)
    narrow(page, created_from=minute, created_before=minute + timedelta(minutes=1))
    expect(page.locator("th.prompt")).to_have_count(1)


def test_workers_that_are_there_are_named(admin: Served, page: Page) -> None:
    expect(page.get_by_text("No worker is present")).to_be_visible()
    with admin.database.write() as transaction:
        presence.show(transaction, "painter-7", "zcore/demo/checkpoint", "cpu", [Stage.GENERATE])
    page.reload()
    page.get_by_text("1 worker present").click()
    expect(page.get_by_text("painter-7 generate · cpu")).to_be_visible()


def test_a_picture_is_shown_on_both_pages(admin: Served, page: Page) -> None:
    painted(admin, prompt="a lighthouse", n=2, seed=4711)
    page.reload()
    thumbnail = page.locator("td.thumbnail img")
    expect(thumbnail).to_have_count(1)
    assert natural_widths(page, "td.thumbnail img") == [64]
    page.get_by_role("link", name="a lighthouse").click()
    assert natural_widths(page, "figure img") == [64, 64]
    expect(page.get_by_role("row", name="seed")).to_contain_text("4711")


def test_pictures_of_a_bucket_are_shown_too(database_url: str, s3: Bucket, tmp_path: Path, browser_page: Page) -> None:
    storage = {
        "storage.bucket": s3.name,
        "storage.endpoint_url": s3.endpoint_url,
        "storage.access_key_id": s3.access_key_id,
        "storage.secret_access_key": s3.secret_access_key,
    }
    given = {"database.url": database_url, "server.admin_key": ADMIN_KEY, **storage}
    installation = Installation(tmp_path, given)
    with installation.serving() as server, installation.database() as database:
        served = Served(server.url, database, open_storage(installation.settings, ""), tmp_path)
        job = painted(served)
        browser_page.goto(f"{server.url}/admin/jobs/{job.id}")
        sign_in(browser_page, ADMIN_KEY)
        assert natural_widths(browser_page, "figure img") == [64]


def test_a_prompt_is_text_whatever_it_holds(admin: Served, page: Page) -> None:
    prompt = "<script>document.title = 'taken'</script><b>bold</b> & \"quoted\""
    submit(admin.database, prompt=prompt)
    page.reload()
    page.get_by_role("link", name=prompt).click()
    expect(page.get_by_role("region", name="Prompt").locator("p")).to_have_text(prompt)
    assert "taken" not in page.title().split(" · ")[1]
    assert page.locator("b").count() == 0


def test_a_job_whose_prompt_waits_to_be_encoded_says_so(admin: Served, page: Page) -> None:
    job = submit(admin.database, stage=Stage.ENCODE)
    page.reload()
    expect(page.get_by_role("cell", name="queued to encode")).to_be_visible()
    page.goto(f"{admin.url}/admin/jobs/{job.id}")
    expect(page.get_by_text("Next in the queue to encode")).to_be_visible()


def test_a_queued_job_is_canceled(admin: Served, page: Page) -> None:
    job = submit(admin.database)
    page.goto(f"{admin.url}/admin/jobs/{job.id}")
    expect(page.get_by_text("Next in the queue")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("status")).to_have_text("The job is canceled.")
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
    assert look(admin.database, job.id).status == State.CANCELED


def test_the_wish_to_cancel_reaches_a_running_job(admin: Served, page: Page) -> None:
    job = submit(admin.database)
    lease = claim(admin.database)
    with admin.database.write() as transaction:
        lifecycle.heartbeat(transaction, lease, 30, ("denoising", 3, 8))
    page.goto(f"{admin.url}/admin/jobs/{job.id}")
    expect(page.get_by_label("Denoising, step 3 of 8")).to_have_js_property("value", 3)
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("status")).to_have_text("The worker will stop at its next step.")
    assert look(admin.database, job.id).cancel_requested_at is not None


def test_a_running_job_is_followed_to_its_end_without_a_click(admin: Served, page: Page) -> None:
    job = submit(admin.database)
    lease = claim(admin.database)
    page.goto(f"{admin.url}/admin/jobs/{job.id}")
    expect(page.get_by_role("heading", level=1)).to_contain_text("running")
    fail(admin.database, lease, DEFECT)
    expect(page.get_by_role("heading", level=1)).to_contain_text("failed")
    expect(page.get_by_text("This page follows the job")).to_have_count(0)


def test_a_failed_job_says_why_and_is_retried(admin: Served, page: Page) -> None:
    job = submit(admin.database)
    fail(admin.database, claim(admin.database), DEFECT)
    rings = len(list(admin.bell.iterdir()))
    page.goto(f"{admin.url}/admin/jobs/{job.id}")
    expect(page.get_by_role("region", name="Failed: model_unavailable")).to_contain_text(DEFECT.message)
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("status")).to_have_text("The job is back in the queue.")
    assert look(admin.database, job.id).status == State.QUEUED
    assert events(admin.database, job.id)[-1] == "retried"
    wait_until(lambda: len(list(admin.bell.iterdir())) == rings + 1)


def test_a_job_that_changed_meanwhile_is_not_retried(admin: Served, page: Page) -> None:
    job = submit(admin.database)
    cancel(admin.database, job.id)
    page.goto(f"{admin.url}/admin/jobs/{job.id}")
    with admin.database.write() as transaction:
        lifecycle.retry(transaction, job.id, 3)
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("alert")).to_contain_text("Nothing was changed")


def test_a_webhook_shows_its_attempts_and_is_sent_again(admin: Served, page: Page) -> None:
    job = submit(admin.database, webhook_url=HOOK)
    cancel(admin.database, job.id)
    with admin.database.write() as transaction:
        [due] = webhooks.claim_due(transaction, 10, hold_s=60)
        webhooks.record_attempt(transaction, due, AttemptOutcome(False, 503, "<h1>busy</h1>", 250, None))
    page.goto(f"{admin.url}/admin/jobs/{job.id}")
    expect(page.get_by_role("heading", name="job.canceled given up")).to_be_visible()
    row = page.get_by_role("table", name="Attempts to deliver job.canceled").get_by_role("row").nth(1)
    expect(row).to_contain_text("503")
    expect(row).to_contain_text("250 ms")
    expect(row).to_contain_text("<h1>busy</h1>")
    page.get_by_role("button", name="Send again").click()
    expect(page.get_by_role("status")).to_have_text("The webhook will be sent again now.")
    expect(page.get_by_role("heading", name="job.canceled due")).to_be_visible()
    with admin.database.write() as transaction:
        assert [event.id for event in webhooks.claim_due(transaction, 10, hold_s=60)] == [due.id]


def test_a_deleted_picture_is_not_asked_for(admin: Served, page: Page) -> None:
    job = painted(admin, retention_s=0)
    with admin.database.write() as transaction:
        assert lifecycle.expire(transaction, job.id) is not None
    page.goto(f"{admin.url}/admin/jobs/{job.id}")
    expect(page.get_by_text("The picture was deleted after the retention time.")).to_be_visible()
    assert page.locator("figure").count() == 0


def test_an_unknown_job_is_a_page_that_leads_back(admin: Served, page: Page, complaints: list[str]) -> None:
    for address in ("jobs/01234567-0123-7123-8123-0123456789ab", "jobs/none", "nowhere", "jobs/none/deeper"):
        answer = page.goto(f"{admin.url}/admin/{address}")
        assert answer is not None
        assert answer.status == 404
        expect(page.get_by_role("heading", name="Not Found")).to_be_visible()
    assert all("404" in complaint for complaint in complaints)
    complaints.clear()
    page.get_by_role("link", name="To the jobs").click()
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()


def test_nothing_needs_a_wide_window(admin: Served, page: Page) -> None:
    job = painted(admin, prompt="word" * 100, webhook_url=HOOK)
    page.set_viewport_size({"width": 360, "height": 740})
    for address in ("admin", f"admin/jobs/{job.id}", "admin?status=expired"):
        page.goto(f"{admin.url}/{address}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, address


def shows(page: Page, *prompts: str) -> None:
    """The list holds these prompts, from above, and no others."""
    expect(page.locator("th.prompt")).to_have_text(list(prompts))


def narrow(page: Page, **moments: object) -> None:
    """Fill in the times and filter."""
    for name in ("created_from", "created_before"):
        page.locator(f"#{name}").fill(f"{moments[name]:%Y-%m-%dT%H:%M}" if name in moments else "")
    page.get_by_role("button", name="Filter").click()
