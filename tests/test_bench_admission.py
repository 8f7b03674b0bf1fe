"""What a cache admits: the rules that are compared do what they say."""

from __future__ import annotations

import random

from bench.admission import filters, none, probation
from bench.cache import repeats, simulated


def test_with_room_for_all_only_the_first_sight_misses() -> None:
    trace = repeats(2000, random.Random(1))
    reachable = 1 - len(set(trace)) / len(trace)
    assert none(trace, 10_000) == reachable
    assert probation(trace, 100_000) == reachable
    assert filters(trace, 100_000) < reachable  # the second sight misses too
    assert 0 < none(trace, 20) < reachable


def test_without_flights_all_who_ask_at_once_miss() -> None:
    trace = [0] * 10
    assert simulated(trace, rate=1.0, speech_seconds=0.5, sights=1) == 0.9
    assert simulated(trace, rate=1.0, speech_seconds=4.5, sights=1) == 0.5
    assert simulated(trace, rate=1.0, speech_seconds=0.5, sights=2) == 0.8
