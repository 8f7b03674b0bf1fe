"""The ChatTTS engine: rows are decoded by a loop of our own, all in one batch, and vocoded as they come."""

from __future__ import annotations

import hashlib
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from batcher.engine import (
    Caps,
    EndReason,
    EngineOutOfMemoryError,
    Join,
    Pcm,
    Plan,
    Report,
    RowRef,
    RowReport,
    Segment,
    Vocode,
)
from common.errors import StartupError
from common.settings import ChatTTSSettings
from service.engines.chattts.costs import measure, most_vocoded
from service.engines.chattts.decode import ATTEMPTS, Decoder, Drawing, Kind, Launched, Row
from service.engines.chattts.estimates import Costs, Lengths
from service.engines.chattts.graphs import CudaRecorder
from service.engines.chattts.hub import find_checkpoint
from service.engines.chattts.lanes import Fetched, Lane
from service.engines.chattts.load import Weights, load_weights
from service.engines.chattts.memory import choose_slots, is_out_of_memory
from service.engines.chattts.prompt import Prompter
from service.engines.chattts.vocode import Vocoder, VocoderState, VocoderWork
from service.engines.chattts.voices import BUILT_IN, read_voices, speaker_vectors
from service.voices import DEFAULT_VOICE

SAMPLE_RATE_HERTZ = 24_000
BYTES_PER_SAMPLE = 2

PROMPT_TOKENS = 512
"""Tokens that a prompt may have: those of a segment, with oral marks where it is refined."""
SPEAKING = Drawing()
REFINING = Drawing(temperature=0.7, penalty=1.0, max_steps=384)
"""Upstream's defaults for `refine_text` (`core.py`, `RefineTextParams`)."""


@dataclass(slots=True, eq=False)
class _Row:
    """A segment, from its join until its last sample is given."""

    ref: RowRef
    segment: Segment
    decoded: Row
    """What is being decoded: first its text, where that is refined, then its sound."""
    vocoder: VocoderState
    fed: int = 0
    """Steps that the vocoder has taken in."""
    ready: bytearray = field(default_factory=bytearray)
    """Samples that are made and not given."""
    vocoded: int = 0
    """Steps whose samples are given."""
    samples: int = 0
    """Samples given."""
    end_told: bool = False
    cut: bool = False
    """Its text was cut while it was refined."""
    error: str | None = None

    @property
    def done(self) -> int:
        """Steps of sound that are decoded."""
        return self.decoded.done if self.decoded.kind is Kind.SPEECH else 0

    @property
    def ended(self) -> EndReason | None:
        """Why no more sound is decoded."""
        if self.decoded.kind is not Kind.SPEECH or self.decoded.ended is None:
            return None
        return EndReason.LENGTH if self.cut else self.decoded.ended

    @property
    def over(self) -> bool:
        """Nothing more is to be reported of it."""
        return self.error is not None or (self.end_told and self.vocoded == self.done)

    def need(self, to_step: int, lookahead: int) -> _Need | None:
        """What the vocoder needs for the samples up to a step; None if it has it."""
        wanted = min(to_step + lookahead, self.done)
        last = self.ended is not None and wanted == self.done
        if self.vocoder.ended or (wanted <= self.fed and not last):
            return None
        return _Need(self, wanted, last)

    def was_fed(self, to_step: int) -> None:
        """The vocoder has got the steps up to this one."""
        self.fed = to_step
        self.decoded.drop_hidden(to_step)

    def give(self, to_step: int, samples_per_step: int) -> Pcm | None:
        """The samples up to a step; None if they are given."""
        to_step = min(to_step, self.done)
        if to_step <= self.vocoded:
            return None
        whole = self.ended is not None and to_step == self.done
        count = len(self.ready) if whole else BYTES_PER_SAMPLE * (samples_per_step * to_step - self.samples)
        pcm = Pcm(bytes(self.ready[:count]), self.samples, to_step)
        del self.ready[:count]
        self.vocoded = to_step
        self.samples += count // BYTES_PER_SAMPLE
        return pcm

    def report(self, pcm: Pcm | None) -> RowReport:
        """What has become of it."""
        ended = None if self.end_told else self.ended
        self.end_told = self.ended is not None
        return RowReport(self.ref, self.done, ended, pcm, self.error)


class _Stopwatch:
    """Seconds of one thing after the other."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._began = time.monotonic()

    def lap(self, name: str) -> None:
        """What was done since the last one has this name."""
        now = time.monotonic()
        self.laps[name], self._began = round(now - self._began, 3), now


@dataclass(frozen=True, slots=True)
class _Need:
    """A row's steps that the vocoder needs next."""

    row: _Row
    to_step: int
    last: bool

    @property
    def pieces(self) -> list[Tensor]:
        """Their states."""
        return self.row.decoded.pieces(self.row.fed, self.to_step)


@dataclass(frozen=True, slots=True)
class _Vocoding:
    """A pass of the vocoder that the device has been given."""

    rows: Sequence[_Row]
    lengths: Sequence[int]
    """Samples of each."""
    samples: Fetched
    """Of all, one row behind the other."""
    hidden: Tensor
    """What it reads: memory of another lane, to be kept until it is done."""


@dataclass(slots=True)
class _Tick:
    """What a plan had the device do, as far as it has been given to it."""

    launched: Launched | None = None
    vocoding: _Vocoding | None = None
    wishes: Sequence[Vocode] = ()


class ChatTTSEngine:
    """A `SpeechEngine` on ChatTTS's weights.

    On a GPU it answers one plan late: the device works on the next while the last one's results are on their way, and
    the vocoder goes on beside the decoder.

    Args:
        settings: which weights, where, and for how many rows.

    Raises:
        StartupError: there are no weights, they are not what they should be, or there is no room.
    """

    name = "chattts"
    languages: tuple[str, ...] = ("en-US", "zh-CN")
    notice: str | None = "ChatTTS's weights are licensed CC BY-NC 4.0: not for commercial use"

    @torch.inference_mode()
    def __init__(self, settings: ChatTTSSettings) -> None:
        # The event loop keeps a core. With more threads a row's bits depend on its place in the batch.
        torch.set_num_threads(1 if settings.deterministic else settings.threads or max(1, (os.cpu_count() or 1) - 1))
        watch = _Stopwatch()
        folder = find_checkpoint(settings)
        weights = load_weights(folder, settings.device, settings.dtype, check_sums=settings.check_sums)
        watch.lap("load_s")
        length = PROMPT_TOKENS + max(settings.max_steps, REFINING.max_steps)
        if length > weights.dimensions.max_positions:
            most = weights.dimensions.max_positions - PROMPT_TOKENS
            raise StartupError(f"chattts.max_steps is {settings.max_steps}, but the model takes at most {most}")
        self._device = weights.device
        self._decoding, self._vocoding = Lane(self._device, urgent=True), Lane(self._device)
        self._behind = int(self._device.type == "cuda")
        """Plans that may be under way when the next one comes."""
        self._ticks: deque[_Tick] = deque()
        """Those whose results were not taken in, the oldest first."""
        self._max_steps = settings.max_steps
        speakers = _speakers(settings, weights)
        self.voices = tuple(sorted(speakers))
        # There already, so that nobody waits for the device when a row joins.
        self._speakers = {name: vector.to(weights.device, weights.dtype) for name, vector in speakers.items()}
        self._prompter = Prompter(weights.tokenizer)
        slots = choose_slots(settings.slots, length, weights)
        self._decoder = _decoder(settings, weights, slots, length, self._prompter.refine_end)
        self._vocoder = _vocoder(settings, weights)
        watch.lap("record_s")
        self.model_revision = _revision(weights, self._vocoder, speakers)
        self._rows: dict[int, _Row] = {}
        self._owners: dict[Row, _Row] = {}
        self._refined: list[_Row] = []
        """Those whose text is refined: their sound joins next."""
        self._news: dict[int, _Row] = {}
        """Those of which there is something to report."""
        self._reports: list[RowReport] = []
        self.caps = self._make_caps(slots, measure(self._decoder, self._vocoder))
        watch.lap("measure_s")
        self.start_seconds = watch.laps
        """What the start took: reading the weights, packing them and recording passes, measuring what they cost."""

    @property
    def held_slots(self) -> int:
        """Rows that are being decoded."""
        return len(self._decoder.rows) + len(self._refined)

    @property
    def kept_rows(self) -> int:
        """Rows that the engine remembers, with a slot or with samples yet to be given."""
        return len(self._rows)

    @property
    def step_calls(self) -> int:
        """Passes of the transformer, each for all rows."""
        return self._decoder.step_calls

    @torch.inference_mode()
    def run(self, plan: Plan) -> Report:
        """Does the plan.

        When memory runs out, rows that were to join are forgotten. Steps that were done all the same are reported with
        the next plan, as if done by it, and samples that were made are kept until they are asked for again.

        Raises:
            EngineOutOfMemoryError: see above.
            ValueError: the plan contradicts the protocol. All rows are forgotten.
            Exception: the device failed. All rows are forgotten.
        """
        try:
            return self._run(plan)
        except Exception as error:
            if not is_out_of_memory(error):
                self._forget_all()
                raise
            with self._decoding.entered():
                self._leave(join.ref for group in plan.joins for join in group)
            # What the failed calls have made hangs on their frames, which the error keeps.
            traceback.clear_frames(error.__traceback__)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            raise EngineOutOfMemoryError(str(error)) from error

    def watch(self, lost: Callable[[Exception], None]) -> None:
        """It lives in this process."""

    def close(self) -> None:
        """Forgets all rows."""
        self._forget_all()

    def _run(self, plan: Plan) -> Report:
        with self._decoding.entered():
            self._leave(plan.leaves)
            groups = [[self._admit(join) for join in group] for group in plan.joins]
            tick = _Tick()
            self._ticks.append(tick)  # what is launched will be taken in, also if the rest of the plan fails
            # The vocoder first: its states are there, and it would wait for the steps otherwise.
            tick.vocoding = self._vocode(plan.vocode)
            tick.launched = self._decode([*groups, self._refined], plan.steps)
            tick.wishes = plan.vocode
            idle = not (plan.joins or plan.steps or plan.vocode)
            while len(self._ticks) > (0 if idle else self._behind):
                self._take_in(self._ticks.popleft())
        return self._report()

    # -- a plan's parts -----------------------------------------------------------------------------------------------

    def _leave(self, refs: Iterable[RowRef]) -> None:
        for ref in refs:
            if (row := self._find(ref)) is not None:
                self._decoder.leave(row.decoded)
                self._forget(row)

    def _admit(self, join: Join) -> _Row:
        """Gives a segment its prompt."""
        if join.ref.row in self._rows:
            raise ValueError(f"{join.ref} cannot join: its number is in use")
        segment = join.segment
        decoded = self._refining(segment) if segment.refine_text else self._speaking(segment)
        with self._vocoding.entered():
            vocoder = self._vocoder.begin()
        row = self._rows[join.ref.row] = _Row(join.ref, segment, decoded, vocoder)
        self._check_prompt(row)
        return row

    def _decode(self, groups: Sequence[Sequence[_Row]], steps: int) -> Launched:
        joining = [[row for row in group if row.error is None] for group in groups]
        launched = self._decoder.launch([[row.decoded for row in group] for group in joining if group], steps)
        self._owners |= {row.decoded: row for group in joining for row in group}
        self._refined = []
        return launched

    def _settle(self, row: _Row) -> None:
        """Takes in what decoding has come to."""
        decoded = row.decoded
        if decoded.empty:
            self._fail(row, f"the model ended it before its first step, {ATTEMPTS} times")
        elif decoded.kind is Kind.SPEECH:
            self._news[row.ref.row] = row
        elif decoded.ended:
            row.cut = decoded.ended is EndReason.LENGTH
            row.decoded = self._speaking(row.segment, self._prompter.refined(decoded.tokens[:, 0].tolist()))
            self._check_prompt(row)
            if row.error is None:
                self._refined.append(row)

    def _vocode(self, wishes: Sequence[Vocode]) -> _Vocoding | None:
        """Lets the vocoder make what it has not made yet, for all rows in one pass."""
        needs = [each for wish in wishes if (each := self._need(wish)) is not None]
        if not needs:
            return None
        pieces = [each.pieces for each in needs]
        nothing = torch.zeros(0, self._decoder.hidden_size, device=self._device)
        hidden = torch.cat([nothing, *(piece for row in pieces for piece in row)])
        parts = hidden.split([sum(map(len, row)) for row in pieces])
        work = [VocoderWork(each.row.vocoder, part, each.last) for each, part in zip(needs, parts, strict=True)]
        self._vocoding.follow(self._decoding)
        with self._vocoding.entered():
            waveforms = self._vocoder.run(work)
            samples = Fetched(waveforms.int16)
        # Not before all is launched: memory may run out.
        for each in needs:
            each.row.was_fed(each.to_step)
        return _Vocoding([each.row for each in needs], waveforms.lengths, samples, hidden)

    def _need(self, wish: Vocode) -> _Need | None:
        row = self._find(wish.ref)
        if row is None or row.error is not None:
            return None
        if row.ended is None and wish.to_step > max(0, row.done - self._vocoder.lookahead_steps):
            raise ValueError(f"{wish.ref} has done {row.done} steps: too few to vocode up to {wish.to_step}")
        return row.need(wish.to_step, self._vocoder.lookahead_steps)

    # -- what came of it ----------------------------------------------------------------------------------------------

    def _take_in(self, tick: _Tick) -> None:
        """Waits until the device has done it."""
        for decoded in self._decoder.settle(tick.launched) if tick.launched is not None else ():
            row = self._owners.pop(decoded) if decoded.over else self._owners[decoded]
            self._settle(row)
        if tick.vocoding is not None:
            samples = tick.vocoding.samples.numpy().astype("<i2", copy=False).tobytes()
            start = 0
            for row, length in zip(tick.vocoding.rows, tick.vocoding.lengths, strict=True):
                end = start + BYTES_PER_SAMPLE * length
                row.ready += samples[start:end]
                start = end
        for wish in tick.wishes:
            if (row_wished := self._rows.get(wish.ref.row)) is not None:
                self._tell(row_wished, row_wished.give(wish.to_step, self._vocoder.samples_per_step))

    def _tell(self, row: _Row, pcm: Pcm | None = None) -> None:
        self._reports.append(row.report(pcm))
        self._news.pop(row.ref.row, None)
        if row.over:
            self._forget(row)

    def _report(self) -> Report:
        for row in list(self._news.values()):
            self._tell(row)
        reports, self._reports = self._reports, []
        return Report(tuple(reports))

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _speaking(self, segment: Segment, refined: str | None = None) -> Row:
        asked = segment.sampling
        drawing = Drawing(
            temperature=SPEAKING.temperature if asked.temperature is None else asked.temperature,
            top_p=SPEAKING.top_p if asked.top_p is None else asked.top_p,
            top_k=SPEAKING.top_k if asked.top_k is None else asked.top_k,
            penalty=SPEAKING.penalty if asked.repetition_penalty is None else asked.repetition_penalty,
            max_steps=self._max_steps,
            seed=segment.seed,
            segment=segment.index,
        )
        return Row(self._prompter.code(segment, refined), self._speakers[segment.voice], drawing)

    def _refining(self, segment: Segment) -> Row:
        drawing = replace(REFINING, seed=segment.seed, segment=segment.index)
        return Row(self._prompter.refine(segment), None, drawing, Kind.TEXT)

    def _check_prompt(self, row: _Row) -> None:
        if row.decoded.prompt_tokens > PROMPT_TOKENS:
            self._fail(row, f"its prompt has {row.decoded.prompt_tokens} tokens; at most {PROMPT_TOKENS} are taken")

    def _fail(self, row: _Row, error: str) -> None:
        row.error = error
        self._news[row.ref.row] = row

    def _find(self, ref: RowRef) -> _Row | None:
        row = self._rows.get(ref.row)
        if row is not None and row.ref != ref:
            raise ValueError(f"{ref} is known as {row.ref}")
        return row

    def _forget(self, row: _Row) -> None:
        self._rows.pop(row.ref.row, None)
        self._news.pop(row.ref.row, None)
        self._owners.pop(row.decoded, None)
        if row in self._refined:
            self._refined.remove(row)

    def _forget_all(self) -> None:
        with suppress(RuntimeError):  # a device that has failed need not be waited for
            self._decoding.wait()
            self._vocoding.wait()
        self._decoder.clear()
        for rows in (self._rows, self._owners, self._refined, self._news, self._ticks, self._reports):
            rows.clear()

    def _make_caps(self, slots: int, costs: Costs) -> Caps:
        return Caps(
            sample_rate_hertz=SAMPLE_RATE_HERTZ,
            samples_per_step=self._vocoder.samples_per_step,
            slots=slots,
            max_rows=slots,
            max_vocode=most_vocoded(slots),
            max_steps=self._max_steps,
            lookahead_steps=self._vocoder.lookahead_steps,
            predict=Lengths(self._max_steps).predict,
            step_seconds=costs.step_seconds,
            prefill_seconds=costs.prefill_seconds,
        )


def _speakers(settings: ChatTTSSettings, weights: Weights) -> Mapping[str, Tensor]:
    path = settings.voices or BUILT_IN
    voices = read_voices(path)
    if DEFAULT_VOICE not in voices:
        raise StartupError(f"{path} has no voice {DEFAULT_VOICE}, which callers get who name none")
    return speaker_vectors(voices, weights.speaker_std, weights.speaker_mean)


def _decoder(settings: ChatTTSSettings, weights: Weights, slots: int, length: int, refine_end: int) -> Decoder:
    """On a GPU by kernels of our own and recorded, where settings allow it."""
    fast = weights.device.type == "cuda" and not settings.deterministic
    return Decoder(
        weights,
        slots,
        length,
        refine_end,
        deterministic=settings.deterministic,
        kernels=fast and settings.kernels and find_spec("triton") is not None,
        recorder=CudaRecorder(weights.device) if fast and settings.graphs else None,
    )


def _vocoder(settings: ChatTTSSettings, weights: Weights) -> Vocoder:
    try:
        return Vocoder(weights.decoder, weights.vocos, settings.lookahead_steps)
    except ValueError as error:
        raise StartupError(f"chattts.lookahead_steps: {error}") from None


def _revision(weights: Weights, vocoder: Vocoder, speakers: Mapping[str, Tensor]) -> str:
    """Names all that makes the same request sound otherwise."""
    digest = hashlib.sha256(f"{weights.revision} {weights.dtype} {weights.int8} {vocoder.lookahead_steps}".encode())
    for name, vector in speakers.items():
        digest.update(name.encode() + vector.cpu().numpy().tobytes())
    return f"chattts-{digest.hexdigest()[:12]}"
