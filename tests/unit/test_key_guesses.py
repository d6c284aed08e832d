"""The limit on guessing keys: who must wait, for how long, and who never."""

from collections.abc import Callable

import pytest
from structlog.testing import capture_logs

from server import key_guesses
from server.key_guesses import MAX_REMEMBERED, MAX_WRONG_KEYS, MAX_WRONG_KEYS_OF_ALL, WINDOW_S, KeyGuesses
from zcore.errors import TooManyWrongKeys

RIGHT = "the right key"


@pytest.fixture
def clock() -> list[float]:
    """The time, in its only element."""
    return [100.0]


@pytest.fixture
def present(clock: list[float]) -> Callable[..., int]:
    """Present a key from an address; return how long it must wait, 0 if it was looked at."""
    guesses = KeyGuesses(clock=lambda: clock[0])

    def judged(address: str, key: str, kind: str = "api_key") -> int:
        try:
            guesses.judge(address, kind, key, key == RIGHT)
        except TooManyWrongKeys as fault:
            return fault.wait_s
        return 0

    return judged


def guess(present: Callable[..., int], address: str, count: int = MAX_WRONG_KEYS) -> list[int]:
    return [present(address, f"{address} {number}") for number in range(count)]


def test_after_five_different_wrong_keys_the_address_must_wait_until_the_minute_is_over(
    present: Callable[..., int], clock: list[float]
) -> None:
    assert guess(present, "192.0.2.1") == [0] * MAX_WRONG_KEYS
    clock[0] += 20
    assert present("192.0.2.1", RIGHT) == WINDOW_S - 20
    assert present("192.0.2.2", RIGHT) == 0
    clock[0] += 40
    assert present("192.0.2.1", RIGHT) == 0


def test_every_kind_of_key_counts_toward_one_limit(present: Callable[..., int]) -> None:
    for number in range(MAX_WRONG_KEYS):
        assert present("192.0.2.1", f"{number}", kind=("api_key", "admin_key", "sign_in")[number % 3]) == 0
    for kind in ("api_key", "admin_key", "sign_in"):
        assert present("192.0.2.1", "one more", kind) > 0


def test_a_key_that_was_right_is_accepted_from_its_address_whatever_others_do(present: Callable[..., int]) -> None:
    present("192.0.2.1", RIGHT)
    guess(present, "192.0.2.1")
    assert present("192.0.2.1", "a guess") > 0
    assert present("192.0.2.1", RIGHT) == 0


def test_a_client_that_repeats_an_outdated_key_keeps_nobody_out(present: Callable[..., int]) -> None:
    for _ in range(100):
        assert present("192.0.2.1", "an outdated key") == 0
    assert present("192.0.2.1", RIGHT) == 0


def test_addresses_of_one_ipv6_customer_count_together(present: Callable[..., int]) -> None:
    for number in range(MAX_WRONG_KEYS):
        present(f"2001:db8::{number}", f"guess {number}")
    assert present("2001:db8::ffff", "a guess") > 0
    assert present("2001:db8:0:1::", "a guess") == 0


def test_many_addresses_together_reach_a_limit_too(present: Callable[..., int], clock: list[float]) -> None:
    for number in range(MAX_WRONG_KEYS_OF_ALL):
        assert present(f"10.{number // 250}.0.{number % 250}", "a guess") == 0
    assert present("192.0.2.1", RIGHT) > 0
    clock[0] += WINDOW_S
    assert present("192.0.2.1", RIGHT) == 0


def test_every_wrong_key_is_logged_without_the_key(present: Callable[..., int]) -> None:
    with capture_logs() as logged:
        for number in range(MAX_WRONG_KEYS + 1):
            present("192.0.2.1", f"secret {number}")
        present("192.0.2.2", RIGHT)
    assert [(line["event"], line["address"], line["kind"]) for line in logged] == [
        ("auth.failed", "192.0.2.1", "api_key")
    ] * (MAX_WRONG_KEYS + 1)
    assert "secret" not in str(logged)


def test_the_memory_of_right_keys_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_REMEMBERED >= 1000
    monkeypatch.setattr(key_guesses, "MAX_REMEMBERED", 3)
    guesses = KeyGuesses()
    for number in range(10):
        guesses.judge(f"192.0.2.{number}", "api_key", RIGHT, is_right=True)
    assert len(guesses._right) == 3
