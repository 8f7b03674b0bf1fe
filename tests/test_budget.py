"""How many encoders may be open: the accounting, whatever becomes of them."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio import background
from audio.background import BackgroundEncoder
from audio.budget import PATH_COST, Budget, EncodersBusyError, Kind
from audio.formats import RATES, SERVED, Codec, Container, Format

ENGINE_RATE = 24_000
FREE = (8_000, 12_345, 24_000, 48_000)
FORMATS = [
    Format(container, codec, rate)
    for container, codec in SERVED
    for rate in RATES.get(codec, FREE)
    if codec is not Codec.PCM_S16LE or rate != ENGINE_RATE
]
MP3 = Format(Container.MP3, Codec.MP3, ENGINE_RATE)
WAV = Format(Container.WAV, Codec.PCM_S16LE, ENGINE_RATE)


def costing(budget: Budget, format: Format, cost: float) -> Kind:
    """The kind of a format, once it has shown for long that it costs so much in all."""
    kind = Kind.of(format)
    for _ in range(2000):
        budget.measured(kind, cost - PATH_COST, 1.0)
    assert budget.cost(kind) == pytest.approx(cost, rel=0.01)
    return kind


def test_as_many_are_let_in_as_keep_the_pace_of_real_time() -> None:
    budget = Budget(0.75, cores=2)
    kind = costing(budget, MP3, 0.0999)
    for _ in range(15):
        budget.take(kind)
    with pytest.raises(EncodersBusyError):
        budget.take(kind)
    assert (budget.open, budget.refused) == (15, 1)
    budget.give(kind)
    budget.take(kind)


def test_of_cheap_ones_no_more_are_let_in_than_python_can_serve() -> None:
    budget = Budget(0.75, cores=1000)
    kind = costing(budget, MP3, PATH_COST)
    for _ in range(int(0.75 / PATH_COST)):
        budget.take(kind)
    with pytest.raises(EncodersBusyError):
        budget.take(kind)


def test_the_first_is_let_in_whatever_it_costs() -> None:
    budget = Budget(0.001, cores=1)
    kind = costing(budget, MP3, 0.5)
    budget.take(kind)
    with pytest.raises(EncodersBusyError):
        budget.take(kind)


def test_a_cost_is_learnt_again_when_it_changes() -> None:
    budget = Budget(0.75, cores=2)
    costing(budget, MP3, 0.01)
    costing(budget, MP3, 0.3)
    costing(budget, MP3, 0.02)


def test_there_are_few_kinds_whatever_is_asked_for() -> None:
    kinds = {Kind.of(Format(Container.FLAC, Codec.FLAC, rate)) for rate in range(8_000, 96_001)}
    assert len(kinds) == 9
    assert all(kind.rate <= 48_000 for kind in kinds)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_is_open_is_what_was_taken_and_not_given_back(data: st.DataObject) -> None:
    budget = Budget(data.draw(st.floats(0.001, 1.0)), cores=data.draw(st.integers(1, 4)))
    held: list[Kind] = []
    refused = 0
    for _ in range(data.draw(st.integers(0, 60))):
        kind = Kind.of(data.draw(st.sampled_from(FORMATS)))
        match data.draw(st.sampled_from(["take", "take", "give", "move", "measure"])):
            case "take":
                load, cost = budget.load, budget.cost(kind)
                try:
                    budget.take(kind)
                    assert not held or load + cost <= budget.max_load
                    held.append(kind)
                except EncodersBusyError:
                    assert held
                    refused += 1
            case "give" if held:
                budget.give(held.pop(data.draw(st.integers(0, len(held) - 1))))
            case "move" if held:
                budget.move(held.pop(), kind)
                held.append(kind)
            case "measure":
                budget.measured(kind, data.draw(st.floats(0, 2)), data.draw(st.floats(0, 400)))
        assert budget.open == len(held)
        assert budget.load == pytest.approx(sum(budget.cost(kind) for kind in held))
    for kind in held:
        budget.give(kind)
    assert (budget.open, budget.load, budget.refused) == (0, 0, refused)


# --- the encoders that take and give


class Unreliable:
    """Stands in for a codec that fails now and then."""

    chance = random.Random(0)

    def __init__(self, format: Format, engine_rate: int) -> None:
        self.samples = 0
        self._fail("made")

    def encode(self, pcm: bytes) -> bytes:
        self._fail("encoding")
        return pcm

    def finish(self) -> bytes:
        self._fail("finished")
        return b""

    def close(self) -> None:
        """Nothing is held."""

    def _fail(self, where: str) -> None:
        if self.chance.random() < 0.1:
            raise MemoryError(where)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
async def test_all_room_is_given_back_whatever_happens(seed: int) -> None:
    """Callers finish, leave at any moment, are refused, change their wish, meet codecs that fail."""
    chance, budget = random.Random(seed), Budget(chance_share(seed), cores=1)
    Unreliable.chance = random.Random(seed)

    async def caller() -> None:
        with BackgroundEncoder(budget) as encoder:
            for _ in range(chance.randint(1, 3)):
                encoder.reserve(chance.choice([*FORMATS, WAV]), ENGINE_RATE)
            encoder.reserve(MP3, ENGINE_RATE)
            for _ in range(chance.randint(0, 3)):
                await encoder.encode(bytes(2 * 6000))
            await encoder.finish()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(background, "Encoder", Unreliable)
        callers = [asyncio.create_task(caller()) for _ in range(20)]
        for task in callers:
            if chance.random() < 0.5:
                for _ in range(chance.randint(0, 4)):
                    await asyncio.sleep(0)
                task.cancel()
        ends = await asyncio.gather(*callers, return_exceptions=True)
    foreseen = (EncodersBusyError, MemoryError, asyncio.CancelledError, type(None))
    assert all(isinstance(end, foreseen) for end in ends)
    assert (budget.open, budget.load) == (0, 0)


def chance_share(seed: int) -> float:
    """Room for one, for some, or for all."""
    return (0.001, 0.02, 1.0)[seed % 3]


def test_room_is_not_lost_when_costs_rise_or_the_format_changes() -> None:
    budget = Budget(0.5, cores=1)
    with BackgroundEncoder(budget) as first, BackgroundEncoder(budget) as second:
        for encoder in (first, second):
            encoder.reserve(MP3, ENGINE_RATE)
        for format in (MP3, FORMATS[0]):
            costing(budget, format, 0.9)
        for format in (MP3, FORMATS[0]):
            second.reserve(format, ENGINE_RATE)
            assert budget.open == 2
    assert (budget.open, budget.load) == (0, 0)


def test_what_is_closed_takes_nothing_any_more() -> None:
    budget = Budget(0.75, cores=1)
    with BackgroundEncoder(budget) as encoder:
        encoder.reserve(MP3, ENGINE_RATE)
        assert budget.open == 1
    encoder.reserve(MP3, ENGINE_RATE)
    assert budget.open == 0


def test_what_costs_nothing_needs_no_room() -> None:
    budget = Budget(0.001, cores=1)
    with BackgroundEncoder(budget) as first, BackgroundEncoder(budget) as second:
        first.reserve(MP3, ENGINE_RATE)
        second.reserve(WAV, ENGINE_RATE)
        first.reserve(WAV, ENGINE_RATE)
        assert budget.open == 0
        second.reserve(MP3, ENGINE_RATE)
        assert budget.open == 1


async def test_the_cost_is_measured_where_the_codec_works() -> None:
    budget = Budget(0.75, cores=1)
    with BackgroundEncoder(budget) as encoder:
        encoder.reserve(MP3, ENGINE_RATE)
        for _ in range(8):
            await encoder.encode(bytes(2 * 6000))
        await encoder.finish()
    assert budget.audio_seconds[Codec.MP3] == pytest.approx(2.0)
    assert budget.cpu_seconds[Codec.MP3] > 0
    assert budget.cost(Kind.of(MP3)) > PATH_COST
