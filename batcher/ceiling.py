"""How much the engine is asked for at once: all that it can do, and less for a while after it ran out of memory."""

from __future__ import annotations

from batcher.engine import Caps
from batcher.policy import Policy


class Ceiling:
    """Rows, prompt tokens and vocoded rows of one plan. Halved or cut at once, given back step by step."""

    def __init__(self, caps: Caps, policy: Policy) -> None:
        self._full_rows = caps.max_rows
        self._full_tokens = policy.prefill_tokens
        self._full_vocode = caps.max_vocode
        self._pause = policy.recovery_seconds
        self._next_step: float | None = None
        """When a next step back is due; None at full width."""
        self.rows = self._full_rows
        self.prefill_tokens = self._full_tokens
        self.vocode = self._full_vocode

    def lower_rows(self, rows: int, now: float) -> None:
        """No more rows than this in a forward pass, nor half of the prompt tokens."""
        self.rows = max(1, min(self.rows, rows))
        self.prefill_tokens = max(1, self.prefill_tokens // 2)
        self._next_step = now + self._pause

    def lower_vocode(self, now: float) -> None:
        """Half as many rows are vocoded at once."""
        self.vocode = max(1, self.vocode // 2)
        self._next_step = now + self._pause

    def recover(self, now: float) -> None:
        """Gives a step back, if it is due: an eighth of the rows, twice the tokens, twice the vocoding."""
        if self._next_step is None or now < self._next_step:
            return
        self.rows = min(self._full_rows, self.rows + max(1, self._full_rows // 8))
        self.prefill_tokens = min(self._full_tokens, self.prefill_tokens * 2)
        self.vocode = min(self._full_vocode, self.vocode * 2)
        full = (self.rows, self.prefill_tokens, self.vocode) == (self._full_rows, self._full_tokens, self._full_vocode)
        self._next_step = None if full else now + self._pause
