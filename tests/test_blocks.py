"""The grid on which rows are vocoded, and what is learned of their lengths."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batcher.blocks import Blocks
from batcher.engine import Segment
from batcher.estimate import Estimator
from tests.virtual_engine import Script, VirtualEngine

grids = st.tuples(st.integers(1, 40), st.integers(0, 200)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def ends(first: int, regular: int, upto: int) -> list[int]:
    """By definition."""
    found = [0, first]
    while found[-1] < upto + regular + first:
        found.append(2 * found[-1] if found[-1] < regular else found[-1] + regular)
    return found


@given(grid=grids, steps=st.integers(0, 2000))
def test_blocks_double_and_then_are_regular(grid: tuple[int, int], steps: int) -> None:
    blocks = Blocks(*grid)
    known = ends(*grid, steps)
    assert blocks.last(steps) == max(end for end in known if end <= steps)
    assert blocks.after(steps) == min(end for end in known if end > steps)
    assert blocks.last(-5) == 0


def test_the_blocks_of_the_default_policy() -> None:
    blocks = Blocks(8, 24)
    seen = [0]
    while len(seen) < 7:
        seen.append(blocks.after(seen[-1]))
    assert seen == [0, 8, 16, 32, 56, 80, 104]


@pytest.mark.parametrize("bias", [0.5, 1.0, 1.7])
def test_the_quantiles_come_to_lie_where_they_say(bias: float) -> None:
    chance = random.Random(3)
    engine = VirtualEngine(max_steps=10_000)
    estimator = Estimator(engine.caps)
    segment = engine.segment(Script(predicted=100))
    lengths = [round(100 * bias * chance.lognormvariate(0, 0.2)) for _ in range(6000)]
    for steps in lengths[:3000]:
        estimator.learn(segment, steps)
    below = {"p50": 0, "p90": 0}
    for steps in lengths[3000:]:
        prediction = estimator.predict(segment)
        below["p50"] += steps <= prediction.steps_p50
        below["p90"] += steps <= prediction.steps_p90
        estimator.learn(segment, steps)
    assert 0.45 < below["p50"] / 3000 < 0.55
    assert 0.87 < below["p90"] / 3000 < 0.93


def test_voices_and_languages_are_learned_apart_and_their_number_is_bounded() -> None:
    engine = VirtualEngine()
    engine.scripts.append(Script(predicted=10))
    estimator = Estimator(engine.caps)

    def segment(voice: str) -> Segment:
        return Segment("text", voice, "en-US", seed=0)

    for _ in range(100):
        estimator.learn(segment("slow"), 30)
    assert estimator.predict(segment("slow")).steps_p50 > 20
    assert estimator.predict(segment("other")).steps_p50 == 10
    for number in range(3000):
        estimator.learn(segment(str(number)), 10)
    assert len(estimator._biases) <= 1000
