"""The observer of a chaos run finds each violation, and finds none where there is none."""

from dataclasses import replace

import pytest

from tests.chaos import rules
from tests.chaos.facts import Accepted, Answer, Delivery, Facts, JobRow, Kind, OutputRow, Sample, Seen

DONE = "01-done"
CANCELED = "02-canceled"
KILLER = "03-killer"
PROBLEM = "application/problem+json"


def accepted(job_id: str, kind: Kind = Kind.PLAIN, images: int = 1, webhook: bool = True) -> Accepted:
    return Accepted(job_id, f"key-{job_id}", kind, images, took_s=0.1, replayed=False, webhook=webhook)


def samples(**growth: int) -> list[Sample]:
    """Return a process's samples; each named resource grows by that much in every one."""
    start = {"rss_bytes": 100 * 2**20, "descriptors": 20, "threads": 8, "sockets": 10}
    return [
        Sample("api-0", 7, at, **{name: value + at * growth.get(name, 0) for name, value in start.items()})
        for at in range(40)
    ]


GOOD = Facts(
    accepted=[accepted(DONE, images=2), accepted(CANCELED, webhook=False), accepted(KILLER, Kind.KILLS)],
    jobs={DONE: JobRow("succeeded", None), CANCELED: JobRow("canceled", None), KILLER: JobRow("failed", "poison")},
    cancellations=frozenset({CANCELED}),
    events={
        DONE: ["claimed", "rescued", "claimed", "succeeded"],
        CANCELED: ["canceled"],
        KILLER: [*["claimed", "rescued"] * 3, "claimed", "failed"],
    },
    outputs={DONE: [OutputRow(0, "jobs/01-done/2-0.png", "aa"), OutputRow(1, "jobs/01-done/2-1.png", "bb")]},
    objects={"jobs/01-done/2-0.png": "aa", "jobs/01-done/2-1.png": "bb", "inputs/x/y": "cc"},
    uploads=frozenset({"inputs/x/y"}),
    downloads=[(DONE, True)],
    webhook_ids={DONE: ["hook-1"], KILLER: ["hook-2"]},
    deliveries=[
        Delivery("hook-1", DONE, "job.succeeded", True),
        Delivery("hook-1", DONE, "job.succeeded", True),
        Delivery("hook-2", KILLER, "job.failed", True),
    ],
    answers=[
        Answer("submit", 202, "application/json", 0.1),
        Answer("submit", 503, PROBLEM, 5.0),
        Answer("get", 0, "", 1),
    ],
    seen=[Seen(DONE, "queued"), Seen(DONE, "running"), Seen(DONE, "queued"), Seen(DONE, "succeeded")],
    samples=samples(),
    unexpected_ends=[("worker-0", -9)],
)


CASES: list[tuple[str, dict[str, object]]] = [
    ("every_accepted_job_ends", {"jobs": {**GOOD.jobs, DONE: JobRow("running", None)}}),
    ("every_accepted_job_ends", {"accepted": [*GOOD.accepted, accepted("04-vanished")]}),
    ("each_submission_makes_one_job", {"jobs": {**GOOD.jobs, "04-unknown": JobRow("canceled", None)}}),
    ("each_submission_makes_one_job", {"accepted": [*GOOD.accepted, replace(accepted(KILLER), key=f"key-{DONE}")]}),
    ("innocent_jobs_succeed", {"jobs": {**GOOD.jobs, DONE: JobRow("failed", "worker_lost")}}),
    ("innocent_jobs_succeed", {"cancellations": frozenset[str]()}),
    ("guilty_jobs_fail_as_such", {"jobs": {**GOOD.jobs, KILLER: JobRow("failed", "worker_lost")}}),
    ("guilty_jobs_fail_as_such", {"jobs": {**GOOD.jobs, KILLER: JobRow("succeeded", None)}}),
    ("a_success_has_exactly_its_images", {"outputs": {DONE: GOOD.outputs[DONE][:1]}}),
    ("a_success_has_exactly_its_images", {"outputs": {DONE: [*GOOD.outputs[DONE], GOOD.outputs[DONE][0]]}}),
    ("a_success_has_exactly_its_images", {"outputs": {**GOOD.outputs, CANCELED: GOOD.outputs[DONE][:1]}}),
    ("a_success_has_exactly_its_images", {"objects": {**GOOD.objects, "jobs/01-done/2-0.png": "other"}}),
    ("a_success_has_exactly_its_images", {"downloads": [(DONE, False)]}),
    ("objects_equal_rows", {"objects": {**GOOD.objects, "jobs/01-done/1-0.png": "aa"}}),
    ("objects_equal_rows", {"uploads": frozenset({"inputs/x/y", "inputs/x/z"})}),
    ("attempts_are_bounded", {"events": {**GOOD.events, KILLER: ["claimed", "rescued"] * 5}}),
    ("attempts_are_bounded", {"events": {**GOOD.events, DONE: ["claimed", "rescued"] * 101}}),
    (
        "timelines_follow_the_transition_table",
        {"events": {**GOOD.events, DONE: ["claimed", "claimed", "succeeded"]}},
    ),
    ("terminal_states_never_change", {"seen": [Seen(DONE, "failed"), Seen(DONE, "succeeded")]}),
    ("terminal_states_never_change", {"seen": [Seen(DONE, "canceled")]}),
    (
        "terminal_states_never_change",
        {"events": {**GOOD.events, DONE: ["claimed", "succeeded", "succeeded"]}},
    ),
    ("every_webhook_arrives_under_one_id", {"deliveries": GOOD.deliveries[:2]}),
    (
        "every_webhook_arrives_under_one_id",
        {"deliveries": [*GOOD.deliveries, Delivery("hook-3", DONE, "job.succeeded", True)]},
    ),
    ("every_webhook_arrives_under_one_id", {"webhook_ids": {**GOOD.webhook_ids, DONE: ["hook-1", "hook-3"]}}),
    ("every_webhook_arrives_under_one_id", {"webhook_ids": {**GOOD.webhook_ids, CANCELED: ["hook-4"]}}),
    (
        "every_webhook_arrives_under_one_id",
        {"deliveries": [Delivery("hook-1", DONE, "job.succeeded", False), *GOOD.deliveries[1:]]},
    ),
    (
        "every_webhook_arrives_under_one_id",
        {"deliveries": [Delivery("hook-1", DONE, "job.failed", True), *GOOD.deliveries[1:]]},
    ),
    ("errors_are_503_and_say_so", {"answers": [Answer("get", 500, PROBLEM, 0.1)]}),
    ("errors_are_503_and_say_so", {"answers": [Answer("get", 503, "text/plain", 0.1)]}),
    ("well_formed_requests_are_not_refused", {"answers": [Answer("submit", 400, PROBLEM, 0.1)]}),
    ("no_request_takes_longer_than_70_s", {"answers": [Answer("get", 503, PROBLEM, 70.5)]}),
    ("processes_end_only_when_ended", {"unexpected_ends": [("worker-0", 0)]}),
    ("processes_end_only_when_ended", {"unexpected_ends": [("api-0", -9)]}),
    ("resources_stay_flat", {"samples": samples(rss_bytes=4 * 2**20)}),
    ("resources_stay_flat", {"samples": samples(descriptors=2)}),
    ("resources_stay_flat", {"samples": samples(threads=2)}),
    ("resources_stay_flat", {"samples": samples(sockets=2)}),
]


def test_a_good_run_breaks_no_rule() -> None:
    assert rules.violations(GOOD) == []


@pytest.mark.parametrize("at", range(0, 40, 5))
def test_a_step_is_no_growth(at: int) -> None:
    grown = [replace(sample, sockets=50) if sample.at >= at else sample for sample in samples()]
    assert rules.violations(replace(GOOD, samples=grown)) == []


@pytest.mark.parametrize(("rule", "changes"), CASES)
def test_each_violation_is_found_by_its_rule(rule: str, changes: dict[str, object]) -> None:
    found = {violation.rule for violation in rules.violations(replace(GOOD, **changes))}
    assert rule in found


def test_every_rule_has_a_violation_here() -> None:
    assert {rule for rule, _ in CASES} == {rule.__name__ for rule in rules.RULES}
