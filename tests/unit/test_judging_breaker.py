"""The circuit breaker: a model that is down is left alone, and tried again by one call."""

import pytest

from gateway.evaluation.judging.breaker import Breaker, Passage


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock) -> Breaker:
    return Breaker(clock, failures=3, open_s=10.0)


def passage(breaker: Breaker) -> Passage:
    """A call that was let in."""
    admitted = breaker.admit()
    assert admitted is not None
    return admitted


def fail(breaker: Breaker, times: int = 1) -> None:
    """Let calls fail."""
    for _ in range(times):
        passage(breaker).failed()


def test_opens_after_failures_in_a_row(breaker):
    """It lets calls pass until the last failure of the row, then none."""
    fail(breaker, 2)
    assert breaker.state == "closed"
    fail(breaker)
    assert (breaker.state, breaker.admit(), breaker.wait_s) == ("open", None, 10.0)


def test_success_begins_a_new_row(breaker):
    """Failures with a success between them do not open it."""
    fail(breaker, 2)
    passage(breaker).succeeded()
    fail(breaker, 2)
    assert breaker.state == "closed"


def test_one_probe_at_a_time(breaker, clock):
    """Once its time is over it lets one call pass, and no other until that has ended."""
    fail(breaker, 3)
    clock.now_s += 10
    assert breaker.state == "half_open"
    probe = passage(breaker)
    assert breaker.admit() is None
    probe.succeeded()
    assert breaker.state == "closed"
    assert breaker.admit() is not None


def test_failed_probe_doubles_the_time(breaker, clock):
    """A failed probe opens it for twice as long, ten minutes at the most; a success starts again from the beginning."""
    fail(breaker, 3)
    for expected_s in (20, 40, 80, 160, 320, 600, 600):
        clock.now_s += breaker.wait_s
        fail(breaker)
        assert breaker.wait_s == expected_s
    clock.now_s += breaker.wait_s
    passage(breaker).succeeded()
    fail(breaker, 3)
    assert breaker.wait_s == 10.0


def test_abandoned_probe_makes_room_for_the_next(breaker, clock):
    """A probe that was given up says nothing: the next call is a probe."""
    fail(breaker, 3)
    clock.now_s += 10
    passage(breaker).abandoned()
    fail(breaker)
    assert breaker.wait_s == 20.0


def test_late_news_do_not_count(breaker, clock):
    """What a call of before it opened has to say neither closes it nor opens it again."""
    late, other, third = (passage(breaker) for _ in range(3))
    fail(breaker, 3)
    late.succeeded()
    assert breaker.state == "open"
    clock.now_s += 10
    probe = passage(breaker)
    other.abandoned()
    assert breaker.admit() is None
    probe.succeeded()
    for _ in range(3):
        third.failed()
    assert breaker.state == "closed"


def test_a_call_ends_once(breaker):
    """Of one call only the first word counts."""
    call = passage(breaker)
    call.succeeded()
    for _ in range(3):
        call.failed()
    assert breaker.state == "closed"
