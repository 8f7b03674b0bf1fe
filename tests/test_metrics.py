"""Metrics of our own look like the library's."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Histogram, generate_latest

from common.metrics import Spread

BOUNDS = (0.002, 1.0, 60.0)
VALUES = (0.0, 0.002, 0.0021, 0.5, 1.0, 60.0, 60.1, 1e9)


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spread]:
    monkeypatch.setattr(time, "time", lambda: 1.5e9)
    spread = Spread("test_seconds", "How long it took.", "method", BOUNDS)
    yield spread
    REGISTRY.unregister(spread)


def test_a_histogram_looks_like_the_librarys(spread: Spread) -> None:
    theirs = CollectorRegistry()
    histogram = Histogram("test_seconds", "How long it took.", ["method"], buckets=BOUNDS, registry=theirs)
    for method in ("a/b", "c/d"):
        for value in VALUES:
            histogram.labels(method).observe(value)
            spread.observe(method, value)
    ours = CollectorRegistry()
    ours.register(spread)
    assert generate_latest(ours) == generate_latest(theirs)
