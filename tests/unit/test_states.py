"""The law of job states, as a graph."""

from zcore.jobs.states import TERMINAL, TRANSITIONS, State, chart


def reachable(start: State) -> set[State]:
    found, ahead = set[State](), {start}
    while ahead:
        found |= ahead
        ahead = {way.target for way in TRANSITIONS if way.sources & ahead} - found
    return found


def test_every_state_can_be_reached_from_a_submission() -> None:
    assert reachable(State.QUEUED) == set(State)


def test_every_unfinished_job_can_still_end() -> None:
    for state in State:
        assert reachable(state) & TERMINAL


def test_pictures_once_stored_lead_only_to_their_expiry() -> None:
    assert reachable(State.SUCCEEDED) == {State.SUCCEEDED, State.EXPIRED}
    assert reachable(State.EXPIRED) == {State.EXPIRED}


def test_only_a_claim_starts_work() -> None:
    assert [way.verb for way in TRANSITIONS if way.target is State.RUNNING] == ["claim"]


def test_the_caller_is_told_of_every_end_but_the_expiry_and_of_nothing_else() -> None:
    assert {way.target for way in TRANSITIONS if way.announces} == TERMINAL - {State.EXPIRED}
    assert all(way.announces for way in TRANSITIONS if way.target in TERMINAL - {State.EXPIRED})


def test_verbs_are_unique_and_no_way_leads_where_it_began() -> None:
    assert len({way.verb for way in TRANSITIONS}) == len(TRANSITIONS)
    assert not [way for way in TRANSITIONS if way.target in way.sources]


def test_the_chart_draws_every_way_once() -> None:
    lines = chart().splitlines()
    assert lines[:2] == ["stateDiagram-v2", "    [*] --> queued: submit"]
    assert sorted(lines[2:]) == sorted(
        f"    {source} --> {way.target}: {way.verb}" for way in TRANSITIONS for source in way.sources
    )
