"""The ChatTTS engine under faults: memory that runs out anywhere, and random work through the real scheduler."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from batcher.engine import EngineOutOfMemoryError, Plan, RowRef, Sampling, Segment, Vocode
from service.engines.chattts import engine as engine_module
from service.engines.chattts.engine import ChatTTSEngine
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


def _wish(driver: Driver, ref: RowRef, chance: random.Random) -> Vocode | None:
    """Samples up to some step, of a row that has some that were not asked for."""
    done, given = driver.steps.get(ref, 0), len(driver.samples.get(ref, b"")) // (2 * STEP)
    final = done if ref in driver.ended else done - 52
    return Vocode(ref, chance.randint(given + 1, final)) if final > given else None
