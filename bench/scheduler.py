"""What the scheduler's decisions cost and how good they are, under a virtual clock: no engine, no sleep.

    python -m bench.scheduler [--quick] [--json]

- `plan_us_per_row`: the time of a plan over the rows that run, 256 of them beside 1,000 requests that wait; median of
  many plans while rows end and others join. Beside it `sort_us_per_row`, a bare scan and sort of as many objects, and
  `apply_us_per_row`, taking in the report.
- `plan_growth_10x`: the time of a plan with 2,560 rows and 10,000 waiting over ten times that with 256 and 1,000.
- `cancel_to_free_ticks`: most plans from a cancel until another row has the slot.
- `padding_waste`: padded over useful tokens of the prefills in a storm of requests.
- `jain_index`: of nine modest tenants and one greedy, audio served over the max-min fair share of each; 1 is fair.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from batcher.engine import Plan, Segment
from batcher.policy import Policy
from batcher.request import Request, Row
from batcher.scheduler import Scheduler
from bench.report import metadata
from bench.simulate import LONGEST_SECONDS, MEAN_SECONDS, card, night
from bench.simulate import QUICK as QUICK_NIGHT
from bench.simulate import TINY as TINY_NIGHT
from bench.simulate import Size as NightSize
from bench.virtual import Caller, ModelledCard, Replay, Speech, lengths
from common.process import calm_garbage_collector
from service.engines.tone import h200

SEED = 7
STEPS = 4
"""In a tick."""
MODEST_TENANTS = 9
MODEST_SHARE = 0.08
"""Of the card, that a modest tenant asks for."""
GREEDY_SHARE = 3.0


@dataclass(frozen=True, slots=True)
class Size:
    """How much to measure."""

    plans: int
    seconds: float
    """Of traffic, for the shares."""
    night: NightSize


TINY = Size(plans=30, seconds=4, night=TINY_NIGHT)
QUICK = Size(plans=400, seconds=30, night=QUICK_NIGHT)
FULL = Size(plans=2000, seconds=120, night=QUICK_NIGHT)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    calm_garbage_collector()  # as the product does
    size = TINY if args.tiny else QUICK if args.quick else FULL
    report = metadata() | measure(size)
    print(json.dumps(report) if args.json else _table(report))


def measure(size: Size) -> dict[str, float]:
    """All figures."""
    small = Crowd(rows=256, waiting=1_000)
    large = Crowd(rows=2_560, waiting=10_000)
    small_us, large_us = small.plan_us(size.plans), large.plan_us(size.plans // 4)
    return {
        "plan_us_per_row": round(small_us / small.rows, 3),
        "apply_us_per_row": round(small.apply_us / small.rows, 3),
        "sort_us_per_row": round(_sort_us(small.rows, size.plans) / small.rows, 3),
        "plan_growth_10x": round(large_us / small_us / 10, 3),
        "cancel_to_free_ticks": small.cancel_to_free(size.plans),
        "padding_waste": round(padding_waste(size.night), 4),
        "jain_index": round(jain_index(size.seconds), 4),
    }


class Crowd:
    """A scheduler with so many rows that run and requests that wait, and whoever leaves is replaced."""

    def __init__(self, rows: int, waiting: int) -> None:
        self.rows = rows
        self.apply_us = 0.0
        self._waiting = waiting
        chance = random.Random(SEED)
        drawn = (lengths(chance, MEAN_SECONDS, LONGEST_SECONDS) for _ in count())
        self._speeches: list[Speech] = []
        self._drawn = (Speech(0.0, *steps) for steps in drawn)
        self._card = ModelledCard(h200(2.0, slots=rows), self._speeches)
        # The same number of steps a tick whatever they take, so that crowds of all sizes do the same a row.
        policy = Policy(max_delay=math.inf, max_waiting=10 * waiting, tick_seconds=1e9, max_steps_per_tick=STEPS)
        self._scheduler = Scheduler(self._card.caps, policy)
        self._requests: list[Request] = []

    def plan_us(self, plans: int) -> float:
        """The median time of a plan, in microseconds. The first plans, in which all join, don't count."""
        ticks = [self._tick() for _ in range(plans + 20)][20:]
        self.apply_us = statistics.median(applied for _, applied in ticks)
        return statistics.median(planned for planned, _ in ticks)

    def cancel_to_free(self, plans: int) -> int:
        """Most plans from a cancel until the slot is another row's."""
        worst = 0
        for _ in range(plans // 10):
            running = [request for request in self._requests if not request.over and request.first_join is not None]
            leaver = running[len(running) // 2]
            assert leaver.head is not None
            assert leaver.head.ref is not None
            slot = leaver.head.ref.slot
            self._scheduler.cancel(leaver)
            worst = max(worst, next(ticks for ticks in count(1) if slot in self._joined_slots()))
        return worst

    def _joined_slots(self) -> set[int]:
        self._fill()
        plan = self._scheduler.plan(self._card.now)
        self._scheduler.apply(self._card.run(plan), self._card.now)
        return {join.ref.slot for group in plan.joins for join in group}

    def _tick(self) -> tuple[float, float]:
        """Microseconds of a plan, and of taking in its report."""
        self._fill()
        began = time.perf_counter()
        plan: Plan = self._scheduler.plan(self._card.now)
        planned = time.perf_counter()
        report = self._card.run(plan)
        ran = time.perf_counter()
        self._scheduler.apply(report, self._card.now)
        return (planned - began) * 1e6, (time.perf_counter() - ran) * 1e6

    def _fill(self) -> None:
        while self._scheduler.waiting < self._waiting:
            speech = next(self._drawn)
            segment = Segment("", "", "", seed=len(self._speeches))
            self._speeches.append(speech)
            stream = bool(len(self._speeches) % 2)
            request = Request([segment], Caller(speech), 1, stream=stream, tenant=str(len(self._speeches) % 10))
            self._requests.append(request)
            self._scheduler.submit(request, self._card.now)
        self._requests = [request for request in self._requests if not request.over]


def _sort_us(rows: int, rounds: int) -> float:
    """A bare scan and sort of as many rows by a number: what any policy in Python must pay."""
    chance = random.Random(SEED)
    caller = Caller(Speech(0.0, 1, 1))
    segment = Segment("", "", "")
    card = ModelledCard(h200(), [caller.speech])
    prediction = card.caps.predict(segment)
    crowd = [Row(Request([segment], caller, 1, arrived=chance.random()), segment, prediction) for _ in range(rows)]
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        sorted(crowd, key=lambda row: row.request.arrived)
        times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times)


def padding_waste(size: NightSize) -> float:
    """Padded over useful tokens in the night of `bench.simulate`."""
    counters = Replay(ModelledCard(card(), night(size)), Policy()).run().scheduler.counters
    return counters.prefill_padding / counters.prefill_tokens


def jain_index(seconds: float) -> float:
    """Jain, Chiu, Hawe, "A Quantitative Measure of Fairness" (1984), over shares of what is max-min fair."""
    settings = card()
    capacity = Scheduler(ModelledCard(settings, []).caps, Policy()).speed
    demand = {"greedy": GREEDY_SHARE} | {str(n): MODEST_SHARE for n in range(MODEST_TENANTS)}
    speeches = sorted(
        (speech for name, share in demand.items() for speech in _arrivals(name, share * capacity, seconds)),
        key=lambda speech: speech.at,
    )
    replay = Replay(ModelledCard(settings, speeches), Policy()).run()
    asked, served = dict.fromkeys(demand, 0.0), dict.fromkeys(demand, 0.0)
    for caller in replay.callers:
        asked[caller.speech.tenant] += caller.speech.audio_seconds
        served[caller.speech.tenant] += caller.speech.audio_seconds if caller.ended is not None else 0.0
    fair = max_min(asked, sum(served.values()))
    shares = [served[name] / fair[name] for name in demand]
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


def max_min(asked: Mapping[str, float], available: float) -> dict[str, float]:
    """The max-min fair shares of what is available: nobody gets more than it asks for, and nobody less than another."""
    fair: dict[str, float] = {}
    for place, name in enumerate(sorted(asked, key=lambda name: asked[name])):
        fair[name] = min(asked[name], (available - sum(fair.values())) / (len(asked) - place))
    return fair


def _arrivals(tenant: str, audio_seconds_per_s: float, seconds: float) -> Iterator[Speech]:
    chance = random.Random(f"{SEED} {tenant}")
    at = 0.0
    while (at := at + chance.expovariate(audio_seconds_per_s / MEAN_SECONDS)) < seconds:
        yield Speech(at, *lengths(chance, MEAN_SECONDS, LONGEST_SECONDS), tenant=tenant)


def _table(report: Mapping[str, object]) -> str:
    names: Sequence[str] = list(report)
    return "\n".join(f"{name:<24} {report[name]}" for name in names)


if __name__ == "__main__":
    main()
