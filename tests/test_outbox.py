"""The outbox: order, credit, and waking."""

from __future__ import annotations

import asyncio

import pytest

from batcher.engine import EndReason
from batcher.outbox import Outbox
from batcher.request import Audio, Event, RequestEnded, SegmentEnded

END = RequestEnded(EndReason.COMPLETE, 3, 0.0)


class Wakes:
    """Counts, and notes what credit is seen at each."""

    def __init__(self) -> None:
        self.outbox: Outbox | None = None
        self.credits: list[int] = []

    def __call__(self) -> None:
        assert self.outbox is not None
        self.credits.append(self.outbox.samples)


def make_outbox(window: int = 10) -> tuple[Outbox, Wakes]:
    wakes = Wakes()
    wakes.outbox = Outbox(window, wakes)
    return wakes.outbox, wakes


def audio(samples: int, start: int = 0) -> Audio:
    return Audio(bytes(2 * samples), start)


async def test_events_come_in_their_order() -> None:
    outbox, _ = make_outbox()
    events: list[Event] = [audio(2), SegmentEnded(0, 0, 2), audio(1, 2), END]
    for event in events:
        outbox.put(event)
    assert [await outbox.get() for _ in events] == events


async def test_a_reader_waits_for_what_is_not_there_yet() -> None:
    outbox, _ = make_outbox()
    reading = asyncio.create_task(outbox.get())
    await asyncio.sleep(0)
    assert not reading.done()
    outbox.put(END)
    outbox.put(audio(1))  # the reader was woken already
    assert await reading == END


async def test_only_taken_audio_gives_credit() -> None:
    outbox, _ = make_outbox(window=10)
    for event in (audio(3), SegmentEnded(0, 0, 3), audio(4, 3)):
        outbox.put(event)
    credits = [outbox.samples]
    for _ in range(3):
        await outbox.get()
        credits.append(outbox.samples)
    assert credits == [10, 13, 13, 17]


async def test_a_starved_reader_wakes_the_scheduler_once_and_after_its_credit_shows() -> None:
    outbox, wakes = make_outbox(window=10)
    for _ in range(3):
        outbox.put(audio(5))
    await outbox.get()
    assert wakes.credits == []
    outbox.starved = True
    await outbox.get()
    await outbox.get()
    assert wakes.credits == [20]
    assert not outbox.starved


async def test_what_is_no_audio_wakes_nobody() -> None:
    outbox, wakes = make_outbox()
    outbox.starved = True
    outbox.put(SegmentEnded(0, 0, 0))
    await outbox.get()
    assert wakes.credits == []
    assert outbox.starved


async def test_what_comes_after_the_end_or_a_close_is_dropped() -> None:
    outbox, _ = make_outbox()
    for event in (audio(1), END, audio(2), END):
        outbox.put(event)
    assert [await outbox.get() for _ in range(2)] == [audio(1), END]
    outbox.close()
    outbox.put(audio(3))
    reading = asyncio.create_task(outbox.get())
    await asyncio.sleep(0)
    assert not reading.done()
    reading.cancel()


@pytest.mark.parametrize("put_first", [False, True])
async def test_a_reader_that_gives_up_waiting_loses_nothing(put_first: bool) -> None:
    outbox, _ = make_outbox()
    reading = asyncio.create_task(outbox.get())
    await asyncio.sleep(0)
    if put_first:
        outbox.put(END)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    if not put_first:
        outbox.put(END)
    assert await outbox.get() == END


async def test_a_held_reader_has_no_credit_until_it_is_released() -> None:
    outbox, wakes = make_outbox(window=10)
    held = Outbox(10, wakes, held=True)
    wakes.outbox = held
    assert (held.samples, outbox.samples) == (0, 10)
    held.starved = True
    held.release()
    assert wakes.credits == [10]  # the credit is there when the scheduler is woken
    held.release()
    assert wakes.credits == [10]
