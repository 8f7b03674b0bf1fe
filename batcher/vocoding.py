"""Whose samples are made next, and how far: only a request's first unfinished row, as far as its reader has credit."""

from __future__ import annotations

import itertools

from batcher.blocks import Blocks
from batcher.due import DueDates
from batcher.engine import Caps, Vocode
from batcher.policy import Policy
from batcher.request import NEVER, Row


class Vocoding:
    """Asks for blocks of samples, the most urgent first."""

    def __init__(self, caps: Caps, policy: Policy, due: DueDates) -> None:
        self._caps = caps
        self._blocks = Blocks(policy.first_block_steps, policy.block_steps)
        self._due = due
        self._ready: dict[Row, None] = {}
        """Rows with a block that is final, whether or not their readers have credit for it."""

    def choose(self, limit: int) -> tuple[Vocode, ...]:
        """The next blocks of at most so many rows."""
        ready = list(self._ready)
        if len(ready) > limit:
            ready.sort(key=lambda row: self._due.audio(row.request))
        asks = ((row, to_step) for row in ready if (to_step := self._as_far_as(row)) > row.vocode_asked)
        return tuple(self._ask(row, to_step) for row, to_step in itertools.islice(asks, limit))

    def advanced(self, row: Row) -> None:
        """A row has done more steps."""
        if row.steps_done >= row.vocode_at:
            self._ready[row] = None

    def note(self, row: Row) -> None:
        """Notes how far a row must come for its next block. Called when it joins, is asked for, ends or comes first."""
        if row is not row.request.head:
            row.vocode_at = NEVER
        elif row.ended:
            row.vocode_at = 0 if row.vocode_asked < row.steps_done else NEVER
        else:
            row.vocode_at = self._blocks.after(row.vocode_asked) + self._caps.lookahead_steps
        self._ready.pop(row, None)
        self.advanced(row)

    def drop(self, row: Row) -> None:
        """Nothing of a row will be made any more."""
        self._ready.pop(row, None)

    def take_back(self, row: Row) -> None:
        """What was asked for and is not there yet was not done."""
        row.vocode_asked = row.vocoded
        self.note(row)

    def _as_far_as(self, row: Row) -> int:
        """The end of the last block that is final and that the reader has credit for."""
        request = row.request
        wanted = row.steps_done if row.ended else self._blocks.last(row.steps_done - self._caps.lookahead_steps)
        # Set before the credit is read: a reader that takes audio after this reading sees it and wakes us.
        request.reader.starved = True
        allowed = (request.reader.samples - request.segment_start) // self._caps.samples_per_step
        if wanted <= allowed:
            request.reader.starved = False
            return wanted
        request.held_back = True
        return self._blocks.last(allowed)

    def _ask(self, row: Row, to_step: int) -> Vocode:
        assert row.ref is not None
        row.vocode_asked = to_step
        self.note(row)
        return Vocode(row.ref, to_step)
