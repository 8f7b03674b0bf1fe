"""What of a cache's memory is for texts that come once: hit rates of four rules at equal memory.

    python -m bench.admission [--quick] [--json]

The traffic of `bench.cache` (60 % repeats, Zipf), without servers; memory is a number of speeches, of which each rule
pays for its own bookkeeping. `none`: what was made is kept, and the least used goes (LRU). `probation`: what came once
goes after a while, before anything that came twice. `filters`: two rotating bit filters (9.6 bits a key) remember what
came; kept is what comes again. `bloom`: the article's, one filter that is never emptied.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import OrderedDict
from collections.abc import Sequence

from bench.cache import repeats
from bench.report import metadata

SHARES = (0.02, 0.1, 0.5)
"""Of all different texts, that memory holds."""
SPEECH_BYTES = 288_000
KEY_BITS = 9.6
PROBATION = 0.1
"""The share of memory that is for what came once."""


class Memory:
    """Speeches by number, the least used first."""

    def __init__(self, most: int) -> None:
        self._most = max(0, most)
        self._kept: OrderedDict[int, None] = OrderedDict()

    def hit(self, text: int) -> bool:
        """Whether it is there; then it is used."""
        if text in self._kept:
            self._kept.move_to_end(text)
            return True
        return False

    def keep(self, text: int) -> int | None:
        """Keeps it, and returns what had to go."""
        self._kept[text] = None
        return self._kept.popitem(last=False)[0] if len(self._kept) > self._most else None

    def drop(self, text: int) -> None:
        """Forgets it."""
        self._kept.pop(text, None)


def none(trace: Sequence[int], most: int) -> float:
    """The hit rate where everything is kept."""
    memory, hits = Memory(most), 0
    for text in trace:
        if memory.hit(text):
            hits += 1
        else:
            memory.keep(text)
    return hits / len(trace)


def probation(trace: Sequence[int], most: int) -> float:
    """Where what came once has a small part of the memory to itself."""
    young, old, hits = Memory(round(most * PROBATION)), Memory(most - round(most * PROBATION)), 0
    for text in trace:
        if old.hit(text):
            hits += 1
        elif young.hit(text):
            hits += 1
            young.drop(text)
            old.keep(text)
        else:
            young.keep(text)
    return hits / len(trace)


def filters(trace: Sequence[int], most: int, *, rotate: bool = True) -> float:
    """Where only what comes again is kept."""
    period = max(1, most * 4)
    cost = 2 * period * KEY_BITS / 8 / SPEECH_BYTES
    memory, hits = Memory(round(most - cost)), 0
    now: set[int] = set()
    before: set[int] = set()
    for text in trace:
        if memory.hit(text):
            hits += 1
        elif text in now or text in before:
            memory.keep(text)
        else:
            now.add(text)
            if rotate and len(now) >= period:
                before, now = now, set()
    return hits / len(trace)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    trace = repeats(30_000 if args.quick else 300_000, random.Random(9))
    report = metadata() | {"requests": len(trace), "reachable": round(1 - len(set(trace)) / len(trace), 3)}
    for share in SHARES:
        most = round(share * len(set(trace)))
        rates = {
            "none": none(trace, most),
            "probation": probation(trace, most),
            "filters": filters(trace, most),
            "bloom": filters(trace, most, rotate=False),
        }
        report |= {f"hit_rate.{share:.0%}.{name}": round(rate, 3) for name, rate in rates.items()}
    print(json.dumps(report) if args.json else "\n".join(f"{name:<32} {value}" for name, value in report.items()))


if __name__ == "__main__":
    main()
