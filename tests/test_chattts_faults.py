"""The ChatTTS engine under faults: memory that runs out anywhere, and random work through the real scheduler."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from batcher.engine import EngineOutOfMemoryError, Plan, RowRef, Sampling, Segment, Vocode
from batcher.errors import EngineFailedError, RowFailedError
from batcher.policy import Policy
from batcher.request import Audio, Event, Request, RequestEnded, RequestFailed, SegmentEnded
from batcher.scheduler import Delivery, Scheduler
from service.engines.chattts import engine as engine_module
from service.engines.chattts.engine import PROMPT_TOKENS, ChatTTSEngine
from tests.test_chattts_engine import STEP, Driver, assert_same_sound, pcm, segment, settings_for


@pytest.fixture(scope="module")
def shared(tiny_checkpoint: Path) -> ChatTTSEngine:
    return ChatTTSEngine(settings_for(tiny_checkpoint, deterministic=True))


@pytest.fixture
def engine(shared: ChatTTSEngine) -> Iterator[ChatTTSEngine]:
    """An engine that nobody uses, before and after."""
    yield shared
    shared.close()
    assert (shared.held_slots, shared.kept_rows) == (0, 0)


class Memory(TorchDispatchMode):
    """Counts the operations that ask for memory, and lets one of them fail."""

    def __init__(self, fails_at: int = 0, error: Callable[[], Exception] = torch.OutOfMemoryError) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.asked = 0
        self._fails_at = fails_at
        self._error = error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        if returns and all(each.alias_info is None for each in returns):
            self.asked += 1
            if self.asked == self._fails_at:
                raise self._error()
        return func(*args, **(kwargs or {}))


ASKED = [segment(seed=seed, refine_text=seed == 3, sampling=Sampling(temperature=1.0)) for seed in range(1, 5)]


@pytest.fixture(autouse=True)
def _short_refining(monkeypatch: pytest.MonkeyPatch) -> None:
    _shorten_refining(monkeypatch)


def _shorten_refining(monkeypatch: pytest.MonkeyPatch) -> None:
    """What random weights call refined is read again as several times as many tokens."""
    monkeypatch.setattr(engine_module, "REFINING", replace(engine_module.REFINING, max_steps=12))


@pytest.fixture
def undisturbed(engine: ChatTTSEngine) -> list[NDArray[np.int16]]:
    """How the rows sound that are asked for."""
    return Driver(engine).say(*ASKED, steps=8)


@pytest.mark.parametrize("seed", range(2))
def test_memory_may_run_out_anywhere(engine: ChatTTSEngine, undisturbed: list[NDArray[np.int16]], seed: int) -> None:
    """Each tick is tried first with an operation that fails, from the first to the last that need memory."""
    driver, chance = Driver(engine), random.Random(seed)
    waiting, failures, asks = list(ASKED), 0, 100
    rows: dict[RowRef, Segment] = {}
    while waiting or engine.kept_rows:
        joining = [waiting.pop() for _ in range(min(len(waiting), chance.randint(0, 2)))]
        steps, wishes = chance.randint(3, 12), [wish for ref in rows if (wish := _wish(driver, ref, chance))]
        for fails_at in (chance.randint(1, asks), chance.randint(max(1, asks - 40), asks), 0):
            joins = tuple(driver.join(segment) for segment in joining)
            plan = Plan(joins=(joins,) if joins else (), steps=steps, vocode=tuple(wishes))
            try:
                with Memory(fails_at) as memory:
                    driver.run(plan)
            except EngineOutOfMemoryError:
                failures += 1
                assert engine.kept_rows <= len(rows)
                continue
            asks = memory.asked
            rows |= {join.ref: join.segment for join in joins}
            break
    assert failures > 15
    for ref, asked in rows.items():
        assert_same_sound(pcm(driver.samples[ref]), undisturbed[ASKED.index(asked)])


def test_what_a_failed_call_has_made_is_given_back(engine: ChatTTSEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the cache is emptied, and however long somebody keeps the error."""
    made: list[weakref.ref[torch.Tensor]] = []

    def fail(*args: Any) -> None:
        tensor = torch.zeros(10)
        made.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(engine._decoder._gpt, "prefill", fail)
    with pytest.raises(EngineOutOfMemoryError) as kept:
        engine.run(Plan(joins=((Driver(engine).join(segment()),),)))
    assert kept.value.__cause__ is not None
    assert [reference() for reference in made] == [None]


def _wish(driver: Driver, ref: RowRef, chance: random.Random) -> Vocode | None:
    """Samples up to some step, of a row that has some that were not asked for."""
    done, given = driver.steps.get(ref, 0), len(driver.samples.get(ref, b"")) // (2 * STEP)
    final = done if ref in driver.ended else done - 52
    return Vocode(ref, chance.randint(given + 1, final)) if final > given else None


# -- random work through the real scheduler ---------------------------------------------------------------------------

LONG = "a " * PROMPT_TOKENS
"""Its prompt is too long: its row fails alone."""
TEXTS = (
    segment("hello you"),
    segment("where are you", seed=2, voice="male1", sampling=Sampling(temperature=1.0)),
    segment("hello you", seed=4, sampling=Sampling(temperature=1.0)),
    segment("one two", seed=3, refine_text=True),
)
WINDOW = 40 * STEP


class Listener:
    """Checks what a request is given: in order, once, and no further ahead than it lets."""

    starved = False

    def __init__(self, expected: NDArray[np.int16] | None, window: int) -> None:
        self.heard = b""
        self.ends: list[RequestEnded | RequestFailed] = []
        self._expected = expected
        self._window = window
        self._taken = 0

    @property
    def samples(self) -> int:
        return self._taken + self._window

    def put(self, event: Event) -> None:
        assert not self.ends, "nothing follows the end"
        if isinstance(event, Audio):
            assert event.start_sample == len(self.heard) // 2
            self.heard += event.data
            assert len(self.heard) // 2 <= self.samples
        elif not isinstance(event, SegmentEnded):
            self.ends.append(event)

    def listen(self) -> None:
        """Takes what there is."""
        self._taken = len(self.heard) // 2

    def check(self) -> None:
        """All of it, or one error of the kind that a fault may cause."""
        (end,) = self.ends
        if isinstance(end, RequestFailed):
            assert isinstance(end.error, EngineFailedError | RowFailedError)
            assert isinstance(end.error, EngineFailedError) or self._expected is None
        else:
            assert self._expected is not None
            assert_same_sound(pcm(self.heard), self._expected)


@dataclass(frozen=True)
class Call:
    """A request that comes at a tick and perhaps is given up at another."""

    texts: list[int]
    comes: int
    goes: int | None
    stream: bool
    slow: bool
    too_long: bool


CALLS = st.lists(
    st.builds(
        Call,
        texts=st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=3),
        comes=st.integers(0, 12),
        goes=st.none() | st.integers(1, 25),
        stream=st.booleans(),
        slow=st.booleans(),
        too_long=st.integers(0, 7).map(lambda number: number == 0),
    ),
    min_size=2,
    max_size=4,
)
FAULTS = st.dictionaries(
    st.integers(0, 40),
    st.tuples(st.integers(1, 1200), st.sampled_from([torch.OutOfMemoryError, torch.OutOfMemoryError, OSError])),
    max_size=10,
)
"""By tick: at which operation that needs memory what is raised."""


@pytest.fixture(scope="module")
def small(tiny_checkpoint: Path) -> ChatTTSEngine:
    return ChatTTSEngine(settings_for(tiny_checkpoint, deterministic=True, max_steps=80, slots=3))


@pytest.fixture(scope="module")
def sounds(small: ChatTTSEngine) -> list[NDArray[np.int16]]:
    """How the texts sound, each alone."""
    with pytest.MonkeyPatch.context() as patched:
        _shorten_refining(patched)
        return [Driver(small).say(text)[0] for text in TEXTS]


# What fails is told as it was found: to shrink it would take minutes.
@settings(
    max_examples=12,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(calls=CALLS, faults=FAULTS)
def test_every_request_ends_once_with_all_of_its_audio_or_one_error(
    small: ChatTTSEngine,
    sounds: list[NDArray[np.int16]],
    calls: list[Call],
    faults: Mapping[int, tuple[int, type[Exception]]],
) -> None:
    scheduler = Scheduler(small.caps, Policy(max_delay=math.inf, tick_seconds=1000.0, max_steps_per_tick=12))
    requests: dict[int, Request] = {}
    listeners: dict[int, Listener] = {}
    for tick in range(400):
        now = 0.5 * tick
        for number, call in enumerate(calls):
            if call.comes == tick:
                requests[number], listeners[number] = _request(call, sounds)
                assert not scheduler.submit(requests[number], now)
            if call.goes is not None and call.comes + call.goes == tick:
                scheduler.cancel(requests[number])
            if number in listeners and (not call.slow or tick % 5 == 0):
                listeners[number].listen()
        plan = scheduler.plan(now)
        if plan.empty and len(requests) == len(calls) and all(request.over for request in requests.values()):
            break
        for request, event in _run(small, scheduler, plan, faults.get(tick), now):
            request.reader.put(event)
    else:
        raise AssertionError("requests do not end")
    for number, listener in listeners.items():
        if listener.ends:
            listener.check()
        else:
            assert calls[number].goes is not None, "nobody else may go without an end"
    assert (small.held_slots, small.kept_rows) == (0, 0)
    assert not any((small._decoder.rows, small._owners, small._refined, small._news))
    assert (scheduler.requests, scheduler.rows, scheduler.parked) == (0, 0, 0)
    assert scheduler.slots_free == small.caps.slots


def _request(call: Call, sounds: Sequence[NDArray[np.int16]]) -> tuple[Request, Listener]:
    texts = [TEXTS[number] for number in call.texts] + ([segment(LONG)] if call.too_long else [])
    expected = None if call.too_long else np.concatenate([sounds[number] for number in call.texts])
    listener = Listener(expected, WINDOW if call.slow else 1_000_000)
    return Request(texts, listener, max_rows=2, stream=call.stream), listener


def _run(
    engine: ChatTTSEngine,
    scheduler: Scheduler,
    plan: Plan,
    fault: tuple[int, type[Exception]] | None,
    now: float,
) -> list[Delivery]:
    """As the runner does it."""
    try:
        with Memory(*fault) if fault else nullcontext():
            report = engine.run(plan)
    except EngineOutOfMemoryError:
        return scheduler.out_of_memory(plan, now)
    except OSError:
        assert (engine.held_slots, engine.kept_rows) == (0, 0)
        return scheduler.engine_failed(plan)
    return scheduler.apply(report, now)
