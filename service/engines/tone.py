"""The engine for tests, load and benchmarks: it costs and fails as its settings say. It does not speak.

It works step by step like an autoregressive model. Its time follows a cost model, its sound carries who asked for what
(`service/engines/tone_code.py`), and it fails on demand (`tone_faults.py`).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from batcher.engine import (
    Caps,
    EndReason,
    EngineOutOfMemoryError,
    Join,
    Pcm,
    Plan,
    Prediction,
    Report,
    RowRef,
    RowReport,
    Segment,
    Vocode,
)
from common.errors import StartupError
from common.settings import ToneSettings
from service.engines.tone_card import Card
from service.engines.tone_code import BYTES_PER_STEP, SAMPLES_PER_STEP, Identity, RowCode, Span, encode_spans, row_code
from service.engines.tone_cost import CostModel, prompt_tokens
from service.engines.tone_faults import Faults, parse_faults
from service.voices import VOICES

SAMPLE_RATE_HERTZ = 24_000


def h200(slowdown: float = 1.0, slots: int = 256) -> ToneSettings:
    """The cost of ChatTTS on one H200 at its physical limit, every time multiplied by `slowdown`.

    A step's time is what it reads from memory, at 4.3 TB/s:

    - base: 190.7 M weights in bf16, 381.4 MB: 0.0887 ms;
    - KV: 61,440 B a token, so 61.44 MB a thousand tokens: 0.01429 ms;
    - a row: nothing besides its KV.

    With 250 tokens a row this gives 0.092, 0.317 and 1.00 ms at 1, 64 and 256 rows. Prefill reads the weights once and
    computes 2 x 190.7 MFLOP a token, at 400 TFLOP/s; the vocoder computes 7 GFLOP an audio second, 0.149 a step, at the
    same rate. No launch costs anything: a real engine needs 0.4 to 0.6 ms for a step of few rows.
    """
    bytes_per_ms, flop_per_ms = 4.3e9, 400e9
    weights_ms = 2 * 190.7e6 / bytes_per_ms
    return ToneSettings(
        slots=slots,
        step_base_ms=slowdown * weights_ms,
        step_kv_ms=slowdown * 1000 * 61_440 / bytes_per_ms,
        prefill_base_ms=slowdown * weights_ms,
        prefill_token_ms=slowdown * 2 * 190.7e6 / flop_per_ms,
        vocode_step_ms=slowdown * 7e9 * SAMPLES_PER_STEP / SAMPLE_RATE_HERTZ / flop_per_ms,
    )


@dataclass(slots=True, eq=False)
class _Row:
    """A row, from its join until its last sample is vocoded."""

    ref: RowRef
    code: RowCode
    prompt_tokens: int
    steps: int
    reason: EndReason
    fails_at: int | None
    done: int = 0
    vocoded: int = 0
    ended: bool = False
    error: str | None = None

    @property
    def passes_left(self) -> int:
        """Forward passes that it will yet take part in, the one that fails included."""
        return (self.steps if self.fails_at is None else self.fails_at) - self.done

    def advance(self, taken: int) -> int:
        """Takes part in so many forward passes. Returns the KV tokens that they read, all together."""
        kv = taken * (self.prompt_tokens + self.done) + taken * (taken - 1) // 2
        self.done += taken
        if self.passes_left == 0:
            self._stop()
        return kv

    def _stop(self) -> None:
        if self.fails_at is None:
            self.ended = True
        else:
            self.error = f"injected: step {self.fails_at}"
            self.done = max(0, self.fails_at - 1)


@dataclass(slots=True)
class _Tick:
    """What one plan has come to so far."""

    ms: float = 0.0
    touched: dict[int, _Row] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    spans: dict[int, Span] = field(default_factory=dict)


class ToneEngine:
    """A `SpeechEngine` that plays tones.

    It is strict: a plan that contradicts the protocol (a held slot, a generation that is not newer, a vocoding of steps
    that are not done) raises ValueError. It ignores what is said of rows that it has forgotten.

    Args:
        settings: costs, lengths and faults.
        sleep: takes seconds. Replace it together with the clock.
        clock: tells seconds.

    Raises:
        StartupError: the faults or the trace cannot be read.
    """

    name = "tone"
    model_revision = "tone-1"
    languages: tuple[str, ...] = ("en-US", "ja-JP", "ko-KR", "yue", "zh-CN")
    voices: tuple[str, ...] = tuple(VOICES)
    notice: str | None = "the tone engine does not speak: it plays tones for tests, load and benchmarks"

    def __init__(
        self,
        settings: ToneSettings,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.step_calls = 0
        self.prefill_calls = 0
        self.vocode_calls = 0
        self.rows_per_step: Counter[int] = Counter()
        """Rows in a forward pass → how many passes had so many."""
        self.modelled_seconds = 0.0
        """What all ticks cost by the model."""
        self.card = Card(settings.card, sleep, clock)
        self._settings = settings
        self._costs = CostModel(settings)
        self._has_costs = any(value > 0 for name, value in settings if name.endswith("_ms"))
        self._trace = cycle(_read_trace(settings.trace)) if settings.trace else None
        self.faults = settings.faults
        self._rows: dict[int, _Row] = {}
        self._holders: dict[int, _Row] = {}
        self._generations: dict[int, int] = {}
        self.caps = Caps(
            sample_rate_hertz=SAMPLE_RATE_HERTZ,
            samples_per_step=SAMPLES_PER_STEP,
            slots=settings.slots,
            max_rows=settings.slots,
            max_vocode=settings.slots,
            max_steps=settings.max_steps,
            lookahead_steps=settings.lookahead_steps,
            predict=self._predict,
            step_seconds=lambda rows: self._costs.step_ms(rows, rows * settings.typical_kv) / 1000,
            prefill_seconds=lambda tokens: self._costs.prefill_ms(1, tokens) / 1000,
        )

    @property
    def faults(self) -> str:
        """The faults in effect. May be set at any time; counts of steps begin anew."""
        return self._faults_text

    @faults.setter
    def faults(self, faults: str) -> None:
        self._faults = Faults(parse_faults(faults), self.step_calls)
        self._faults_text = faults

    @property
    def held_slots(self) -> int:
        """Slots that are held."""
        return len(self._holders)

    @property
    def kept_rows(self) -> int:
        """Rows that the engine remembers, with a slot or with samples yet to vocode."""
        return len(self._rows)

    def run(self, plan: Plan) -> Report:
        """Does the plan, and takes the time that the model says.

        Raises:
            EngineOutOfMemoryError: injected.
            RuntimeError: injected.
            ValueError: the plan contradicts the protocol.
        """
        self._check_memory(plan)
        try:
            return self._tick(plan)
        except Exception:
            self._forget_all()
            raise

    def watch(self, lost: Callable[[Exception], None]) -> None:
        """It lives in this process."""

    def close(self) -> None:
        """Forgets all rows and lets go of the card."""
        self._forget_all()
        self.card.close()

    def _tick(self, plan: Plan) -> Report:
        if not self._takes_time(plan):
            return self._compute(plan, _Tick())
        with self.card.held():
            tick = _Tick()
            report = self._compute(plan, tick)
            self.card.spend(tick.ms / 1000)
            return report

    def _compute(self, plan: Plan, tick: _Tick) -> Report:
        self._leave(plan.leaves)
        self._join(plan.joins, tick)
        self._step(plan.steps, tick)
        self._vocode(plan.vocode, tick)
        self.modelled_seconds += tick.ms / 1000
        pcm = encode_spans(tuple(tick.spans.values()))
        return self._report(tick, dict(zip(tick.spans, pcm, strict=True)))

    def _takes_time(self, plan: Plan) -> bool:
        """Whether the plan may cost anything: if not, the card is not needed."""
        working = plan.joins or plan.vocode or (plan.steps and self._holders)
        return bool(working) and (self._has_costs or any(fault.kind == "slow" for fault in self._faults.given))

    def _leave(self, leaves: Sequence[RowRef]) -> None:
        for ref in leaves:
            if (row := self._find(ref)) is not None:
                self._free(row)
                del self._rows[ref.row]

    def _join(self, groups: Sequence[Sequence[Join]], tick: _Tick) -> None:
        for group in filter(None, groups):
            rows = [self._admit(join) for join in group]
            self.prefill_calls += 1
            tick.ms += self._costs.prefill_ms(len(rows), max(row.prompt_tokens for row in rows))
            for row in rows:
                row.advance(0)
                self._settle(row, tick)

    def _step(self, steps: int, tick: _Tick) -> None:
        rows = list(self._holders.values()) if steps else []
        passes = [min(steps, row.passes_left) for row in rows]
        kv = sum(row.advance(taken) for row, taken in zip(rows, passes, strict=True))
        tick.ms += self._costs.kv_ms(kv)
        for width in _widths(passes):
            tick.ms += self._forward(width)
        for row in rows:
            self._settle(row, tick)

    def _forward(self, rows: int) -> float:
        """Counts one forward pass and returns its milliseconds, KV left out."""
        self.step_calls += 1
        self.rows_per_step[rows] += 1
        if self._faults.at("step", self.step_calls, self.step_calls):
            raise RuntimeError(f"injected: forward pass {self.step_calls}")
        slow = self._faults.at("slow", self.step_calls, self.step_calls)
        return self._costs.pass_ms(rows) + (slow.ms if slow else 0.0)

    def _vocode(self, wishes: Sequence[Vocode], tick: _Tick) -> None:
        if len(wishes) > self.caps.max_vocode:
            raise ValueError(f"{len(wishes)} rows to vocode, at most {self.caps.max_vocode} are possible")
        for wish in wishes:
            if (row := self._find(wish.ref)) is not None:
                self._vocode_row(row, wish.to_step, tick)
        steps = sum(span.end - span.start for span in tick.spans.values())
        if steps:
            self.vocode_calls += 1
            tick.ms += self._costs.vocode_ms(steps)

    def _vocode_row(self, row: _Row, to_step: int, tick: _Tick) -> None:
        if not row.ended and to_step > max(0, row.done - self.caps.lookahead_steps):
            raise ValueError(f"{row.ref} has done {row.done} steps: too few to vocode up to {to_step}")
        if row.ref.row in tick.spans:
            raise ValueError(f"{row.ref} is vocoded twice in one plan")
        to_step = min(to_step, row.steps)
        if to_step > row.vocoded:
            tick.touched[row.ref.row] = row
            tick.spans[row.ref.row] = Span(row.code, row.vocoded, to_step)
            row.vocoded = to_step
            self._forget_if_over(row)

    def _report(self, tick: _Tick, pcm: dict[int, bytes]) -> Report:
        return Report(
            tuple(_row_report(row, number in tick.ended, pcm.get(number)) for number, row in tick.touched.items())
        )

    def _admit(self, join: Join) -> _Row:
        """Gives a row its slot."""
        ref, segment = join.ref, join.segment
        if not 0 <= ref.slot < self.caps.slots or ref.slot in self._holders:
            raise ValueError(f"{ref} cannot join: the slot is held, or there is none of this number")
        if ref.row in self._rows or ref.generation <= self._generations.get(ref.slot, -1):
            raise ValueError(f"{ref} cannot join: its row or generation was used before")
        row = self._make_row(ref, segment)
        self._rows[ref.row] = self._holders[ref.slot] = row
        self._generations[ref.slot] = ref.generation
        return row

    def _make_row(self, ref: RowRef, segment: Segment) -> _Row:
        wanted = self._length(segment)
        steps = min(wanted, self.caps.max_steps)
        fault = self._faults.naming("row", segment.text)
        identity = Identity.of(segment.text, segment.voice, segment.language, segment.seed, segment.index)
        return _Row(
            ref=ref,
            code=row_code(identity, steps),
            prompt_tokens=prompt_tokens(segment.text),
            steps=steps,
            reason=EndReason.COMPLETE if steps == wanted else EndReason.LENGTH,
            fails_at=fault.number if fault and fault.number <= steps else None,
        )

    def _length(self, segment: Segment) -> int:
        """Steps that the row would take if nothing cut it."""
        traced = next(self._trace) if self._trace else None
        if self._faults.naming("empty", segment.text):
            return 0
        if self._faults.naming("long", segment.text):
            return self.caps.max_steps + 1
        return self._costs.steps(segment.text, segment.controls.speed) if traced is None else traced

    def _predict(self, segment: Segment) -> Prediction:
        steps = min(self._costs.likely_steps(segment.text, segment.controls.speed), self.caps.max_steps)
        return Prediction(prompt_tokens(segment.text), steps, min(math.ceil(1.25 * steps), self.caps.max_steps))

    def _check_memory(self, plan: Plan) -> None:
        if not self._faults.given:
            return
        rows = sum(row.ref not in plan.leaves for row in self._holders.values()) + sum(map(len, plan.joins))
        working = bool(rows and (plan.steps or plan.joins))
        if working and any(fault.kind == "oom>" and rows > fault.number for fault in self._faults.given):
            raise EngineOutOfMemoryError(f"injected: {rows} rows")
        fault = self._faults.at("oom", self.step_calls + 1, self.step_calls + plan.steps) if rows else None
        if fault and fault not in self._faults.spent:
            self._faults.spent.add(fault)
            raise EngineOutOfMemoryError(f"injected: step {fault.number}")

    def _find(self, ref: RowRef) -> _Row | None:
        row = self._rows.get(ref.row)
        if row is not None and row.ref != ref:
            raise ValueError(f"{ref} is known as {row.ref}")
        return row

    def _settle(self, row: _Row, tick: _Tick) -> None:
        """Notes that a row has news; frees its slot if it is over."""
        tick.touched[row.ref.row] = row
        if row.ended:
            tick.ended.add(row.ref.row)
        if row.ended or row.error:
            self._free(row)
            self._forget_if_over(row)

    def _free(self, row: _Row) -> None:
        if self._holders.get(row.ref.slot) is row:
            del self._holders[row.ref.slot]

    def _forget_if_over(self, row: _Row) -> None:
        if row.error or (row.ended and row.vocoded == row.steps):
            del self._rows[row.ref.row]

    def _forget_all(self) -> None:
        self._rows.clear()
        self._holders.clear()
        self._generations.clear()


def _widths(passes: Sequence[int]) -> Iterator[int]:
    """Rows in each forward pass, from how many passes each row takes part in."""
    stopping = Counter(passes)
    rows = len(passes)
    for done in range(max(passes, default=0)):
        rows -= stopping[done]
        yield rows


def _row_report(row: _Row, ended: bool, pcm: bytes | None) -> RowReport:
    return RowReport(
        ref=row.ref,
        steps_done=row.done,
        ended=row.reason if ended else None,
        pcm=None if pcm is None else _pcm(row, pcm),
        error=row.error,
    )


def _pcm(row: _Row, data: bytes) -> Pcm:
    start_step = row.vocoded - len(data) // BYTES_PER_STEP
    return Pcm(data=data, start_sample=start_step * SAMPLES_PER_STEP, to_step=row.vocoded)


def _read_trace(path: Path) -> list[int]:
    """A number of steps from each line that has one.

    Raises:
        StartupError: the file cannot be read, or has something else.
    """
    try:
        steps = [int(line) for line in path.read_text().split()]
    except (OSError, ValueError) as error:
        raise StartupError(f"tone.trace: {path} must have one number of steps a line: {error}") from None
    if not steps or min(steps) < 0:
        raise StartupError(f"tone.trace: {path} must have one number of steps a line, none below 0")
    return steps
