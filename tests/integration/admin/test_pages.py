"""The admin in a real browser, against a real server process on PostgreSQL."""

from datetime import timedelta
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.integration.admin.conftest import ADMIN_KEY, Served, complete, natural_widths, sign_in, succeeded_job
from tests.integration.installation import Installation
from tests.integration.jobs.examples import (
    HOOK,
    PERMANENT,
    cancel,
    claim,
    events,
    fail,
    fetch,
    submit,
)
from tests.integration.worker.stand_in_pipeline import CacheStatistics
from tests.services.s3 import Bucket
from tests.waiting import wait_until
from zcore.jobs import claims, lifecycle, recovery, webhooks, workers
from zcore.jobs.states import State
from zcore.jobs.webhooks import AttemptOutcome
from zcore.stages import Stage
from zcore.storage import open_storage


def test_signing_in_returns_to_the_requested_page(admin: Served, anonymous_page: Page) -> None:
    job = submit(admin.database)
    anonymous_page.goto(f"{admin.url}/admin/jobs/{job.id}?paused=1")
    expect(anonymous_page).to_have_url(f"{admin.url}/admin/sign-in")
    sign_in(anonymous_page, ADMIN_KEY)
    expect(anonymous_page).to_have_url(f"{admin.url}/admin/jobs/{job.id}?paused=1")


def test_a_wrong_key_is_refused(admin: Served, anonymous_page: Page, browser_errors: list[str]) -> None:
    anonymous_page.goto(f"{admin.url}/admin")
    sign_in(anonymous_page, "another key")
    expect(anonymous_page.get_by_role("alert")).to_have_text("That is not the admin key.")
    anonymous_page.goto(f"{admin.url}/admin")
    expect(anonymous_page).to_have_url(f"{admin.url}/admin/sign-in")
    assert all("403" in error for error in browser_errors)
    browser_errors.clear()


def test_signing_out_ends_the_session(admin: Served, anonymous_page: Page) -> None:
    anonymous_page.goto(f"{admin.url}/admin")
    sign_in(anonymous_page, ADMIN_KEY)  # not the session that the other tests share: it ends on the server
    anonymous_page.get_by_role("button", name="Sign out").click()
    expect(anonymous_page.get_by_role("status")).to_have_text("You are signed out.")
    anonymous_page.goto(f"{admin.url}/admin")
    expect(anonymous_page).to_have_url(f"{admin.url}/admin/sign-in")


def test_the_job_list_shows_the_newest_job_first(admin: Served, page: Page) -> None:
    for prompt in ("first", "second", "third"):
        submit(admin.database, prompt=prompt)
    page.reload()
    shows(page, "third", "second", "first")


def test_paging_covers_every_job_in_both_directions(admin: Served, page: Page) -> None:
    for number in range(120):
        submit(admin.database, prompt=f"number {number}")
    page.reload()
    page_promptses = [[f"number {n}" for n in range(end - 1, end - 31, -1)] for end in (120, 90, 60, 30)]
    for page_prompts in page_promptses[:-1]:
        shows(page, *page_prompts)
        page.get_by_role("link", name="Older →").click()
    shows(page, *page_promptses[-1])
    expect(page.get_by_role("link", name="Older →")).to_have_count(0)
    for page_prompts in reversed(page_promptses[:-1]):
        page.get_by_role("link", name="← Newer").click()
        shows(page, *page_prompts)
    expect(page.get_by_role("link", name="← Newer")).to_have_count(0)


def test_status_and_text_filters_combine(admin: Served, page: Page) -> None:
    submit(admin.database, prompt="a red barn")
    cancel(admin.database, submit(admin.database, prompt="a red boat").id)
    cancel(admin.database, submit(admin.database, prompt="100% wool").id)
    page.reload()
    page.get_by_role("link", name="Canceled 2").click()
    shows(page, "100% wool", "a red boat")
    page.get_by_label("Words, metadata or ID").fill("RED")
    page.get_by_role("button", name="Filter").click()
    shows(page, "a red boat")
    page.get_by_label("Words, metadata or ID").fill("woo 100%")
    page.get_by_role("button", name="Filter").click()
    shows(page, "100% wool")
    page.get_by_role("link", name="Clear").click()
    expect(page.locator("th.prompt")).to_have_count(3)


def test_a_complete_id_finds_its_job(admin: Served, page: Page) -> None:
    wanted = submit(admin.database, prompt="this one")
    submit(admin.database, prompt="not this one")
    page.get_by_label("Words, metadata or ID").fill(f" {wanted.id} ")
    page.get_by_role("button", name="Filter").click()
    shows(page, "this one")


def test_clicking_an_owner_shows_only_their_jobs(admin: Served, page: Page) -> None:
    submit(admin.database, owner="anna", prompt="by anna")
    submit(admin.database, owner="ben & co", prompt="by ben")
    page.reload()
    page.get_by_role("link", name="ben & co").click()
    shows(page, "by ben")
    page.get_by_role("link", name="show all owners").click()
    shows(page, "by ben", "by anna")


def test_jobs_are_filtered_by_time(admin: Served, page: Page) -> None:
    job = submit(admin.database)
    minute = job.created_at.replace(second=0, microsecond=0, tzinfo=None)
    filter_times(page, created_from=minute)
    expect(page.locator("th.prompt")).to_have_count(1)
    filter_times(page, created_from=minute + timedelta(minutes=1))
    expect(page.get_by_text("No jobs match these filters.")).to_be_visible()
    filter_times(page, created_from=minute, created_before=minute)
    shows(page)
    filter_times(page, created_from=minute, created_before=minute + timedelta(minutes=1))
    expect(page.locator("th.prompt")).to_have_count(1)


def test_online_workers_are_listed(admin: Served, page: Page) -> None:
    expect(page.get_by_text("No workers online")).to_be_visible()
    with admin.database.write() as transaction:
        cache = CacheStatistics(hits=2, misses=1)
        workers.report(transaction, "worker-7", "zcore/demo/checkpoint", "cpu", [Stage.GENERATE], cache)
    page.reload()
    page.get_by_text("1 worker online").click()
    expect(page.get_by_text("worker-7 generate · cpu")).to_contain_text("67 % of 3 prompts from the embedding cache")


def test_images_are_shown_in_the_list_and_on_the_job_page(admin: Served, page: Page) -> None:
    succeeded_job(admin, prompt="a lighthouse", n=2, seed=4711)
    page.reload()
    thumbnail = page.locator("td.thumbnail img")
    expect(thumbnail).to_have_count(1)
    assert natural_widths(page, "td.thumbnail img") == [64]
    page.get_by_role("link", name="a lighthouse").click()
    assert natural_widths(page, "figure img") == [64, 64]
    expect(page.get_by_role("row", name="seed")).to_contain_text("4711")


def test_images_in_a_bucket_are_shown(database_url: str, s3: Bucket, tmp_path: Path, browser_page: Page) -> None:
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
        job = succeeded_job(served)
        browser_page.goto(f"{server.url}/admin/jobs/{job.id}")
        sign_in(browser_page, ADMIN_KEY)
        assert natural_widths(browser_page, "figure img") == [64]


def test_html_in_a_prompt_is_escaped(admin: Served, page: Page) -> None:
    prompt = "<script>document.title = 'taken'</script><b>bold</b> & \"quoted\""
    submit(admin.database, prompt=prompt)
    page.reload()
    page.get_by_role("link", name=prompt).click()
    expect(page.get_by_role("region", name="Prompt").locator("p")).to_have_text(prompt)
    assert "taken" not in page.title().split(" · ")[1]
    assert page.locator("b").count() == 0


def test_what_was_left_out_of_a_lora_is_shown(admin: Served, page: Page) -> None:
    submit(admin.database)
    notice = "left out (unsupported): <b>double</b>.alpha"
    job = complete(admin, claim(admin.database), engine={"lora_notice:partly": notice})
    page.goto(f"{admin.url}/admin/jobs/{job.id}")
    expect(page.get_by_role("region", name="Environment")).to_contain_text(notice)


def test_the_stage_of_a_queued_job_is_shown(admin: Served, page: Page) -> None:
    job = submit(admin.database, stage=Stage.ENCODE)
    page.reload()
    expect(page.get_by_role("cell", name="queued stage: encode")).to_be_visible()
    page.goto(f"{admin.url}/admin/jobs/{job.id}")
    expect(page.get_by_text("Next in the queue (stage: encode)")).to_be_visible()


def test_a_queued_job_is_canceled(admin: Served, page: Page) -> None:
    job = submit(admin.database)
    page.goto(f"{admin.url}/admin/jobs/{job.id}")
    expect(page.get_by_text("Next in the queue")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("status")).to_have_text("The job was canceled.")
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
    assert fetch(admin.database, job.id).status == State.CANCELED


def test_a_cancellation_request_reaches_a_running_job(admin: Served, page: Page) -> None:
    job = submit(admin.database)
    lease = claim(admin.database)
    with admin.database.write() as transaction:
        claims.heartbeat(transaction, lease, 30, ("denoising", 3, 8))
    page.goto(f"{admin.url}/admin/jobs/{job.id}")
    expect(page.get_by_label("Denoising, step 3 of 8")).to_have_js_property("value", 3)
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("status")).to_have_text("Cancellation requested. The worker will stop at its next step.")
    assert fetch(admin.database, job.id).cancel_requested_at is not None


def test_the_page_of_a_running_job_refreshes_until_it_ends(admin: Served, page: Page) -> None:
    job = submit(admin.database)
    lease = claim(admin.database)
    page.goto(f"{admin.url}/admin/jobs/{job.id}")
    expect(page.get_by_role("heading", level=1)).to_contain_text("running")
    fail(admin.database, lease, PERMANENT)
    expect(page.get_by_role("heading", level=1)).to_contain_text("failed")
    expect(page.get_by_text("This page refreshes")).to_have_count(0)


def test_a_failed_job_shows_its_error_and_can_be_retried(admin: Served, page: Page) -> None:
    job = submit(admin.database)
    fail(admin.database, claim(admin.database), PERMANENT)
    notifications = len(list(admin.notifications.iterdir()))
    page.goto(f"{admin.url}/admin/jobs/{job.id}")
    expect(page.get_by_role("region", name="Failed: model_unavailable")).to_contain_text(PERMANENT.message)
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("status")).to_have_text("The job is back in the queue.")
    assert fetch(admin.database, job.id).status == State.QUEUED
    assert events(admin.database, job.id)[-1] == "retried"
    wait_until(lambda: len(list(admin.notifications.iterdir())) == notifications + 1)


def test_a_job_that_changed_in_the_meantime_is_not_retried(admin: Served, page: Page) -> None:
    job = submit(admin.database)
    cancel(admin.database, job.id)
    page.goto(f"{admin.url}/admin/jobs/{job.id}")
    with admin.database.write() as transaction:
        lifecycle.retry(transaction, job.id, 3)
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("alert")).to_contain_text("The job was not changed")


def test_a_webhook_shows_its_attempts_and_can_be_resent(admin: Served, page: Page) -> None:
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
    expect(page.get_by_role("status")).to_have_text("The webhook will be sent again shortly.")
    expect(page.get_by_role("heading", name="job.canceled pending")).to_be_visible()
    with admin.database.write() as transaction:
        assert [event.id for event in webhooks.claim_due(transaction, 10, hold_s=60)] == [due.id]


def test_a_deleted_image_is_not_requested(admin: Served, page: Page) -> None:
    job = succeeded_job(admin, retention_s=0)
    with admin.database.write() as transaction:
        assert recovery.expire(transaction, job.id) is not None
    page.goto(f"{admin.url}/admin/jobs/{job.id}")
    expect(page.get_by_text("The image was deleted after the retention time.")).to_be_visible()
    assert page.locator("figure").count() == 0


def test_an_unknown_page_links_back_to_the_job_list(admin: Served, page: Page, browser_errors: list[str]) -> None:
    for address in ("jobs/01234567-0123-7123-8123-0123456789ab", "jobs/none", "nowhere", "jobs/none/deeper"):
        answer = page.goto(f"{admin.url}/admin/{address}")
        assert answer is not None
        assert answer.status == 404
        expect(page.get_by_role("heading", name="Not Found")).to_be_visible()
    assert all("404" in error for error in browser_errors)
    browser_errors.clear()
    page.get_by_role("link", name="Back to jobs").click()
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()


def test_pages_fit_a_narrow_window(admin: Served, page: Page) -> None:
    job = succeeded_job(admin, prompt="word" * 100, webhook_url=HOOK)
    page.set_viewport_size({"width": 360, "height": 740})
    for address in ("admin", f"admin/jobs/{job.id}", "admin?status=expired"):
        page.goto(f"{admin.url}/{address}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, address


def shows(page: Page, *prompts: str) -> None:
    """Check that the list shows exactly these prompts, from top to bottom."""
    expect(page.locator("th.prompt")).to_have_text(list(prompts))


def filter_times(page: Page, **moments: object) -> None:
    """Fill in the time filters and submit them."""
    for name in ("created_from", "created_before"):
        page.locator(f"#{name}").fill(f"{moments[name]:%Y-%m-%dT%H:%M}" if name in moments else "")
    page.get_by_role("button", name="Filter").click()
