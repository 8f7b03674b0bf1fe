"""The one door between scheduling and computing: what a scheduler asks of an engine, and what it is told.

An engine advances *rows*. A row is one segment of text on its way to sound. Two things of a row have lifetimes of their
own:

- its **slot** (in a model: a place in the KV cache), from its join until it ends or leaves;
- its **hidden states**, from its join until its last sample is vocoded or it leaves.

So a row that has ended holds no slot, however slowly its listener reads.

Time in speech is counted in *steps* of a fixed number of samples (`Caps.samples_per_step`). An engine that computes
whole utterances is the one-step case: it ends a row in the first report that speaks of it, with all its steps done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol


class EngineLostError(Exception):
    """The engine is gone, and will not come back."""


class EngineOutOfMemoryError(Exception):
    """The device has no memory left for the plan. Nothing of the plan was done."""


@dataclass(frozen=True, slots=True)
class Controls:
    """How a segment is spoken. `None` means the voice's own."""

    speed: float = 1.0
    oral: int | None = None
    laugh: int | None = None
    pause: int | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a model draws tokens. `None` means the model's own."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """What one row speaks: a sentence or so, in one voice.

    Everything that may change the sound is in here, so that a row depends on nothing else: neither on its neighbours in
    the batch nor on when it joined.
    """

    text: str
    voice: str
    language: str
    index: int = 0
    seed: int = 0
    controls: Controls = field(default_factory=Controls)
    sampling: Sampling = field(default_factory=Sampling)
    refine_text: bool = False


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a row will cost, as far as one can tell before it runs."""

    prompt_tokens: int
    steps_p50: int
    steps_p90: int


@dataclass(frozen=True, slots=True)
class Caps:
    """What an engine can do, and what that costs.

    `predict`, `step_seconds` and `prefill_seconds` are pure and fast: the scheduler calls them while planning.
    """

    sample_rate_hertz: int
    samples_per_step: int
    slots: int
    """Rows that may hold a slot at once."""
    max_rows: int
    """Rows that one forward pass takes; at most `slots`."""
    max_vocode: int
    """Rows that may be vocoded in one tick."""
    max_steps: int
    """Steps after which a row is ended as LENGTH."""
    lookahead_steps: int
    """Steps that must be done beyond those that are vocoded, unless the row has ended."""
    predict: Callable[[Segment], Prediction]
    step_seconds: Callable[[int], float]
    """Rows in a step → seconds it takes."""
    prefill_seconds: Callable[[int], float]
    """Prompt tokens of the rows that join, padding included → seconds their prefill takes."""

    @property
    def steps_per_second(self) -> float:
        """Steps in a second of audio."""
        return self.sample_rate_hertz / self.samples_per_step


@dataclass(frozen=True, slots=True)
class RowRef:
    """Names a row for as long as anything of it lives.

    `row` is never used twice. `generation` counts the occupants of `slot`, so that what is reported of a past occupant
    can never be taken for the present one's.
    """

    row: int
    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class Join:
    """A segment takes a slot."""

    ref: RowRef
    segment: Segment


@dataclass(frozen=True, slots=True)
class Vocode:
    """A row's hidden states up to `to_step` become samples, from where the last vocoding of the row ended."""

    ref: RowRef
    to_step: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One tick's work: leave, join, step, vocode, in this order."""

    leaves: tuple[RowRef, ...] = ()
    """Rows to forget wholly, slot and hidden states. One that the engine does not know is none of its business."""
    joins: tuple[tuple[Join, ...], ...] = ()
    """Groups of joining rows: a group is prefilled in one forward pass."""
    steps: int = 0
    """Forward passes over all rows that hold a slot."""
    vocode: tuple[Vocode, ...] = ()

    @property
    def empty(self) -> bool:
        """It asks for nothing."""
        return not (self.leaves or self.joins or self.steps or self.vocode)


class EndReason(Enum):
    """Why a row has no more steps to do."""

    COMPLETE = "complete"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Pcm:
    """Samples of a row: 16-bit signed, little-endian, one channel."""

    data: bytes
    start_sample: int
    """The first sample's place in the row."""
    to_step: int
    """The step up to which the row is vocoded now."""


@dataclass(frozen=True, slots=True)
class RowReport:
    """What became of one row. A report that leaves something out says that it has not changed."""

    ref: RowRef
    steps_done: int = 0
    """Steps since the row's join."""
    ended: EndReason | None = None
    """Set once, when the last step is done: the slot is free from here on."""
    pcm: Pcm | None = None
    error: str | None = None
    """The row failed alone: the engine has forgotten it. For the log, not for the caller."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a tick did. May speak of an earlier plan: results of a GPU arrive one tick behind."""

    rows: tuple[RowReport, ...] = ()


class Engine(Protocol):
    """Runs plans. Called from one thread only, which it may block for about a tick."""

    caps: Caps

    def run(self, plan: Plan) -> Report:
        """Does what the plan says.

        Raises:
            EngineOutOfMemoryError: nothing of the plan was done, the engine is as it was before, and what memory it
                could give back it has given back.
            EngineLostError: nothing is called afterwards but `close`.
            Exception: the engine failed; it has forgotten all its rows and can be used again.
        """
        ...

    def close(self) -> None:
        """Releases everything. Nothing is called afterwards."""
        ...
