"""The breaker, under a clock of the test's own."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from common.breaker import FAILURES, JITTER, PROBE_SECONDS, Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_opens_after_so_many_failures_in_a_row_and_not_before() -> None:
    breaker = Breaker(Clock())
    for _ in range(FAILURES - 1):
        breaker.failed()
    breaker.succeeded()
    for _ in range(FAILURES - 1):
        breaker.failed()
        assert breaker.allows()
    breaker.failed()
    assert breaker.open
    assert not breaker.allows()


def test_one_that_was_waited_for_opens_it_at_once() -> None:
    breaker = Breaker(Clock())
    breaker.failed(costly=True)
    assert not breaker.allows()


def test_an_answer_to_a_probe_closes_it() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    breaker.failed(costly=True)
    clock.now += PROBE_SECONDS * (1 + JITTER)
    assert breaker.due
    assert breaker.allows()
    assert not breaker.allows()  # one at a time
    breaker.succeeded()
    assert not breaker.open
    assert breaker.allows()


@given(st.lists(st.floats(0.0, 0.5), max_size=100))
def test_while_it_is_open_probes_are_a_second_apart(steps: list[float]) -> None:
    clock = Clock()
    breaker = Breaker(clock)
    breaker.failed(costly=True)
    passed = [0.0]
    for step in steps:
        clock.now += step
        if breaker.allows():
            passed.append(clock.now)
            breaker.failed()
    assert all(after - before >= PROBE_SECONDS - 1e-9 for before, after in pairwise(passed))
    # And one passes as soon as it may.
    assert clock.now - passed[-1] <= PROBE_SECONDS * (1 + JITTER)
