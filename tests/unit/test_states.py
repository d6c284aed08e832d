"""The transition table of job states, as a graph."""

from zcore.jobs.states import TERMINAL, TRANSITIONS, State, chart


def reachable(start: State) -> set[State]:
    found, ahead = set[State](), {start}
    while ahead:
        found |= ahead
        ahead = {transition.target for transition in TRANSITIONS if transition.sources & ahead} - found
    return found


def test_every_state_can_be_reached_from_a_submission() -> None:
    assert reachable(State.QUEUED) == set(State)


def test_every_unfinished_job_can_end() -> None:
    for state in State:
        assert reachable(state) & TERMINAL


def test_stored_images_can_only_expire() -> None:
    assert reachable(State.SUCCEEDED) == {State.SUCCEEDED, State.EXPIRED}
    assert reachable(State.EXPIRED) == {State.EXPIRED}


def test_only_a_claim_starts_work() -> None:
    assert [transition.verb for transition in TRANSITIONS if transition.target is State.RUNNING] == ["claim"]


def test_callers_are_notified_of_every_terminal_state_but_expiry() -> None:
    assert {transition.target for transition in TRANSITIONS if transition.notifies} == TERMINAL - {State.EXPIRED}
    assert all(transition.notifies for transition in TRANSITIONS if transition.target in TERMINAL - {State.EXPIRED})


def test_verbs_are_unique_and_no_transition_is_a_loop() -> None:
    assert len({transition.verb for transition in TRANSITIONS}) == len(TRANSITIONS)
    assert not [transition for transition in TRANSITIONS if transition.target in transition.sources]


def test_the_chart_shows_every_transition_once() -> None:
    lines = chart().splitlines()
    assert lines[:2] == ["stateDiagram-v2", "    [*] --> queued: submit"]
    assert sorted(lines[2:]) == sorted(
        f"    {source} --> {transition.target}: {transition.verb}"
        for transition in TRANSITIONS
        for source in transition.sources
    )
