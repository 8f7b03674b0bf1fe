"""The ChatTTS engine: rows are decoded by a loop of our own, all in one batch, and vocoded as they come."""

from __future__ import annotations

import hashlib
import math
import os
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

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
from common.settings import ChatTTSSettings
from service.engines.chattts.costs import Costs, measure
from service.engines.chattts.decode import ATTEMPTS, Decoder, Drawing, Kind, Row
from service.engines.chattts.hub import find_checkpoint
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

PROMPT_FRAME = 8
"""Tokens of a prompt besides its text, about."""
CJK_STEPS = 10.4
OTHER_STEPS = 3.1
"""Steps that a character takes: 4.5 Chinese characters a second, or 15 letters. The scheduler learns what is true."""
P90 = 1.3


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

    def work(self, to_step: int, lookahead: int) -> VocoderWork | None:
        """What the vocoder needs for the samples up to a step; None if it has it."""
        wanted = min(to_step + lookahead, self.done)
        last = self.ended is not None and wanted == self.done
        if self.vocoder.ended or (wanted <= self.fed and not last):
            return None
        return VocoderWork(self.vocoder, self.decoded.hidden(self.fed, wanted), last)

    def made(self, work: VocoderWork, samples: bytes) -> None:
        """The vocoder has done its work. Nothing of this needs the device's memory."""
        self.fed += len(work.hidden)
        self.ready += samples

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


class ChatTTSEngine:
    """A `SpeechEngine` on ChatTTS's weights.

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
        folder = find_checkpoint(settings)
        weights = load_weights(folder, settings.device, settings.dtype, check_sums=settings.check_sums)
        length = PROMPT_TOKENS + max(settings.max_steps, REFINING.max_steps)
        if length > weights.dimensions.max_positions:
            most = weights.dimensions.max_positions - PROMPT_TOKENS
            raise StartupError(f"chattts.max_steps is {settings.max_steps}, but the model takes at most {most}")
        self._device = weights.device
        self._max_steps = settings.max_steps
        self._speakers = _speakers(settings, weights)
        self.voices = tuple(sorted(self._speakers))
        self._prompter = Prompter(weights.tokenizer)
        slots = choose_slots(settings.slots, length, weights)
        end = self._prompter.refine_end
        self._decoder = Decoder(weights, slots, length, end, deterministic=settings.deterministic)
        self._vocoder = _vocoder(settings, weights)
        self.model_revision = _revision(weights, self._vocoder, self._speakers)
        self._rows: dict[int, _Row] = {}
        self._owners: dict[Row, _Row] = {}
        self._refined: list[_Row] = []
        """Those whose text is refined: their sound joins next."""
        self._news: dict[int, _Row] = {}
        """Those of which there is something to report."""
        self.caps = self._make_caps(slots, measure(self._decoder, self._vocoder))

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
            self._leave(join.ref for group in plan.joins for join in group)
            # What the failed calls have made hangs on their frames, which the error keeps.
            traceback.clear_frames(error.__traceback__)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            raise EngineOutOfMemoryError(str(error)) from error

    def close(self) -> None:
        """Forgets all rows."""
        self._forget_all()

    def _run(self, plan: Plan) -> Report:
        self._leave(plan.leaves)
        groups = [[self._admit(join) for join in group] for group in plan.joins]
        self._decode([*groups, self._refined], plan.steps)
        self._vocode(plan.vocode)
        return self._report(plan.vocode)

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
        row = self._rows[join.ref.row] = _Row(join.ref, segment, decoded, self._vocoder.begin())
        self._check_prompt(row)
        return row

    def _decode(self, groups: Sequence[Sequence[_Row]], steps: int) -> None:
        joining = [[row for row in group if row.error is None] for group in groups]
        decoding = [[row.decoded for row in group] for group in joining if group]
        news = self._decoder.advance(decoding, steps)
        self._owners |= {row.decoded: row for group in joining for row in group}
        self._refined = []
        for decoded in news:
            row = self._owners.pop(decoded) if decoded.over else self._owners[decoded]
            self._settle(row)

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

    def _vocode(self, wishes: Sequence[Vocode]) -> None:
        """Lets the vocoder make what it has not made yet, for all rows in one pass."""
        works: dict[int, VocoderWork] = {}
        for wish in wishes:
            row = self._find(wish.ref)
            if row is None or row.error is not None:
                continue
            if row.ended is None and wish.to_step > max(0, row.done - self._vocoder.lookahead_steps):
                raise ValueError(f"{wish.ref} has done {row.done} steps: too few to vocode up to {wish.to_step}")
            if (work := row.work(wish.to_step, self._vocoder.lookahead_steps)) is not None:
                works[wish.ref.row] = work
        if not works:
            return
        waveforms = self._vocoder.run(list(works.values()))
        samples = waveforms.int16.cpu().numpy().astype("<i2", copy=False).tobytes()
        start = 0
        for (number, work), length in zip(works.items(), waveforms.lengths, strict=True):
            end = start + BYTES_PER_SAMPLE * length
            self._rows[number].made(work, samples[start:end])
            start = end
        # Not before all rows have their samples: memory may run out here, too.
        for row in map(self._rows.__getitem__, works):
            row.decoded.drop_hidden(row.fed)

    def _report(self, wishes: Sequence[Vocode]) -> Report:
        reports = []
        given = {wish.ref.row: wish.to_step for wish in wishes if wish.ref.row in self._rows}
        for row in {**self._news, **{number: self._rows[number] for number in given}}.values():
            to_step = given.get(row.ref.row, 0)
            reports.append(row.report(row.give(to_step, self._vocoder.samples_per_step)))
            if row.over:
                self._forget(row)
        self._news.clear()
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
        self._decoder.clear()
        for rows in (self._rows, self._owners, self._refined, self._news):
            rows.clear()

    def _make_caps(self, slots: int, costs: Costs) -> Caps:
        return Caps(
            sample_rate_hertz=SAMPLE_RATE_HERTZ,
            samples_per_step=self._vocoder.samples_per_step,
            slots=slots,
            max_rows=slots,
            # In blocks of 24 steps, as many need their turn at each step as are a 24th of all; a few more catch up.
            max_vocode=max(1, slots // 8),
            max_steps=self._max_steps,
            lookahead_steps=self._vocoder.lookahead_steps,
            predict=self._predict,
            step_seconds=costs.step_seconds,
            prefill_seconds=costs.prefill_seconds,
        )

    def _predict(self, segment: Segment) -> Prediction:
        characters = len(segment.text)
        chinese = sum("\u4e00" <= character <= "\u9fff" for character in segment.text)
        steps = (CJK_STEPS * chinese + OTHER_STEPS * (characters - chinese)) / segment.controls.speed
        p50, p90 = (min(max(1, math.ceil(steps * factor)), self._max_steps) for factor in (1, P90))
        return Prediction(PROMPT_FRAME + characters, p50, p90)


def _speakers(settings: ChatTTSSettings, weights: Weights) -> Mapping[str, Tensor]:
    path = settings.voices or BUILT_IN
    voices = read_voices(path)
    if DEFAULT_VOICE not in voices:
        raise StartupError(f"{path} has no voice {DEFAULT_VOICE}, which callers get who name none")
    return speaker_vectors(voices, weights.speaker_std, weights.speaker_mean)


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
