"""Faults that the tone engine makes on demand.

Faults, separated by `;` (so TEXT has none). Steps are counted from when the faults were set.

    row:TEXT        rows whose text contains TEXT fail alone, in their first step
    row@STEP:TEXT   … in their STEP-th step; 0: in their prefill
    empty:TEXT      rows whose text contains TEXT end in their prefill, with no step and no samples
    long:TEXT       rows whose text contains TEXT never end by themselves: LENGTH after `max_steps`
    step@N          the N-th step raises RuntimeError: the engine failed and has forgotten all rows
    slow@N:MS       the N-th step takes MS milliseconds more
    oom@N           the plan whose steps reach the N-th is refused for want of memory, once
    oom>ROWS        every plan that computes with more than ROWS rows in slots is refused for want of memory
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from common.errors import StartupError

_FORMS = {
    "row:TEXT": r"(?P<kind>row):(?P<text>.+)",
    "row@STEP:TEXT": r"(?P<kind>row)@(?P<number>\d+):(?P<text>.+)",
    "empty:TEXT": r"(?P<kind>empty):(?P<text>.+)",
    "long:TEXT": r"(?P<kind>long):(?P<text>.+)",
    "step@N": r"(?P<kind>step)@(?P<number>[1-9]\d*)",
    "slow@N:MS": r"(?P<kind>slow)@(?P<number>[1-9]\d*):(?P<ms>\d+(\.\d+)?)",
    "oom@N": r"(?P<kind>oom)@(?P<number>[1-9]\d*)",
    "oom>ROWS": r"(?P<kind>oom>)(?P<number>\d+)",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of the grammar. `number` is its STEP, N or ROWS."""

    kind: str
    number: int = 1
    text: str = ""
    ms: float = 0.0


def parse_faults(faults: str) -> tuple[Fault, ...]:
    """Reads the grammar above.

    Raises:
        StartupError: names what is wrong and the valid forms.
    """
    return tuple(_parse_fault(part.strip()) for part in faults.split(";") if part.strip())


def _parse_fault(fault: str) -> Fault:
    for pattern in _FORMS.values():
        if match := re.fullmatch(pattern, fault, re.DOTALL):
            parts = match.groupdict()
            return Fault(
                parts["kind"], int(parts.get("number") or 1), parts.get("text") or "", float(parts.get("ms") or 0)
            )
    raise StartupError(f"tone.faults: {fault!r} is no fault; the forms are {', '.join(_FORMS)}, separated by ;")


@dataclass(slots=True)
class Faults:
    """The faults in effect, and which of those that happen once have happened."""

    given: tuple[Fault, ...]
    since_step: int
    spent: set[Fault] = field(default_factory=set)

    def naming(self, kind: str, text: str) -> Fault | None:
        """The first of a kind that is meant for this text."""
        return next((fault for fault in self.given if fault.kind == kind and fault.text in text), None)

    def at(self, kind: str, first: int, last: int) -> Fault | None:
        """The first of a kind that is meant for one of these steps, counted from the engine's start."""
        steps = range(first - self.since_step, last - self.since_step + 1)
        return next((fault for fault in self.given if fault.kind == kind and fault.number in steps), None)
