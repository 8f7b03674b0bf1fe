"""Lines that every call has go out together, soon, and none is lost."""

from __future__ import annotations

import asyncio
import io
import json
from datetime import datetime
from typing import Any

import pytest

from common import logs

pytestmark = pytest.mark.asyncio


@pytest.fixture
def out(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    written = io.BytesIO()
    monkeypatch.setattr(logs, "_lines", logs._Lines(written, "gateway"))
    return written


def lines(out: io.BytesIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


async def test_lines_come_together_and_tell_their_own_time(out: io.BytesIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "FLUSH_SECONDS", 0.05)
    for number in range(2):
        logs.log_often("call", {"number": number})
        await asyncio.sleep(0.01)
    assert lines(out) == []
    await asyncio.sleep(0.1)
    first, second = lines(out)
    assert (first["event"], first["process"], first["level"]) == ("call", "gateway", "info")
    assert (first["number"], second["number"]) == (0, 1)
    assert datetime.fromisoformat(first["timestamp"]) < datetime.fromisoformat(second["timestamp"])
    logs.log_often("call", {"number": 2})  # the next ones have a timer of their own
    await asyncio.sleep(0.1)
    assert len(lines(out)) == 3


async def test_there_are_never_too_many(out: io.BytesIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_WAITING", 3)
    for number in range(4):
        logs.log_often("call", {"number": number})
    assert [line["number"] for line in lines(out)] == [0, 1, 2]
