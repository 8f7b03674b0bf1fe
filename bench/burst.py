"""A burst of speeches, which Chorus and unmodified upstream get at once, and which end where a trace says.

How each is made to obey: Chorus's rows may draw no end before their last step, and are cut there. Upstream's heads have
hooks that forbid the token which ends a row until its step has come, and then leave nothing else to draw.

Chorus is its scheduler and its engine, without processes and sockets, in the loop of its runner. Upstream is `infer` on
batches of one voice, in the order of the burst: it can't mix voices. On a CPU all times are CPU time of one process, in
seconds: with one thread, what it would take on a machine with nothing else to do.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from batcher.engine import Segment
from batcher.policy import Policy
from batcher.request import Request
from batcher.scheduler import Delivery, Scheduler
from bench.virtual import CHARACTERS_PER_SECOND, STEPS_PER_SECOND, Caller, Speech
from common.settings import ChatTTSSettings, Settings
from service.engines.base import SpeechEngine
from service.engines.chattts.decode import Row
from service.engines.chattts.engine import ChatTTSEngine
from service.engines.chattts.upstream import import_chattts

COUNT = 32
VOICES = ("female1", "female2", "male1", "male2")
SHORTEST_SECONDS, MEDIAN_SECONDS, LONGEST_SECONDS = 1.0, 3.5, 12.0
SIGMA = 0.7
END = 625
CERTAIN = 1e4
"""A logit beside which no other counts."""


@dataclass(frozen=True, slots=True)
class Item:
    """A speech of the burst."""

    voice: str
    text: str
    steps: int


@dataclass(frozen=True, slots=True)
class Spoken:
    """What became of a burst."""

    seconds: float
    first_audio: Sequence[float]
    """Of each speech, since the burst came."""


def burst(scale: float, count: int = COUNT) -> list[Item]:
    """The trace, with lengths (and texts) times `scale`."""
    chance = random.Random(17)
    items = []
    for number in range(count):
        drawn = chance.lognormvariate(math.log(MEDIAN_SECONDS), SIGMA)
        seconds = scale * min(max(drawn, SHORTEST_SECONDS), LONGEST_SECONDS)
        text = "好" * math.ceil(seconds * CHARACTERS_PER_SECOND)
        items.append(Item(VOICES[number % len(VOICES)], text, max(1, round(seconds * STEPS_PER_SECOND))))
    return items


def batches(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """As upstream must take them: of one voice each."""
    voices = [[item for item in items if item.voice == voice] for voice in VOICES]
    return [group[start : start + size] for group in voices for start in range(0, len(group), size)]


def in_row(speak: Callable[[Sequence[Item]], Spoken], groups: Sequence[Sequence[Item]]) -> Spoken:
    """One group after the other."""
    passed, first_audio = 0.0, []
    for group in groups:
        spoken = speak(group)
        first_audio += [passed + seconds for seconds in spoken.first_audio]
        passed += spoken.seconds
    return Spoken(passed, first_audio)


def to_the_longest(groups: Sequence[Sequence[Item]]) -> list[Sequence[Item]]:
    """The same batches, where every row runs as long as the longest."""
    return [[replace(item, steps=max(each.steps for each in group)) for item in group] for group in groups]


class Chorus:
    """The engine under the scheduler.

    Args:
        settings: the engine's, with a slot for each speech.
    """

    def __init__(self, settings: ChatTTSSettings) -> None:
        self._engine = _TracedEngine(settings)

    def speak(self, items: Sequence[Item]) -> Spoken:
        """All at once, each a stream of its own that is read as fast as it comes.

        Raises:
            RuntimeError: a speech failed.
        """
        self._engine.trace = items
        began = time.process_time()
        scheduler = Scheduler(self._engine.caps, Policy(max_delay=math.inf))
        callers = [Caller(Speech(0.0, item.steps, item.steps, stream=True)) for item in items]
        for number, (item, caller) in enumerate(zip(items, callers, strict=True)):
            segment = Segment(item.text, item.voice, "zh-CN", seed=number)
            scheduler.submit(Request([segment], caller, max_rows=1, stream=True), 0.0)
        while not all(caller.ended or caller.error for caller in callers):
            report = self._engine.run(scheduler.plan(time.process_time() - began))
            now = time.process_time() - began
            _deliver(scheduler.apply(report, now), now)
        if failed := [caller.error for caller in callers if caller.error]:
            raise RuntimeError("a speech failed") from failed[0]
        return Spoken(time.process_time() - began, [caller.first_audio or 0.0 for caller in callers])


class _TracedEngine(ChatTTSEngine):
    """Its rows end where the trace says."""

    trace: Sequence[Item] = ()
    """A segment's seed is its place here."""

    def _speaking(self, segment: Segment, refined: str | None = None) -> Row:
        row = super()._speaking(segment, refined)
        steps = self.trace[segment.seed].steps
        row.drawing = replace(row.drawing, min_steps=steps, max_steps=steps)
        return row


class _EndlessEngine(ChatTTSEngine):
    """Its rows go on until they are cut."""

    def _speaking(self, segment: Segment, refined: str | None = None) -> Row:
        row = super()._speaking(segment, refined)
        row.drawing = replace(row.drawing, min_steps=row.drawing.max_steps)
        return row


def load_endless(settings: Settings) -> SpeechEngine:
    """An engine whose rows go on until they are cut, for another process."""
    return _EndlessEngine(settings.chattts)


class Upstream:
    """Unmodified upstream, whose rows end where the trace says.

    Args:
        chat: a loaded `ChatTTS.Chat`.
        clock: seconds.
    """

    def __init__(self, chat: Any, clock: Callable[[], float] = time.process_time) -> None:
        self._chat = chat
        self._clock = clock
        speakers = torch.randn(len(VOICES), chat.speaker.dim, generator=torch.Generator().manual_seed(8)).half()
        self._speakers = {voice: chat.speaker._encode(vector) for voice, vector in zip(VOICES, speakers, strict=True)}
        self._passes = 0

    def speak(self, items: Sequence[Item]) -> Spoken:
        """One batch, of one voice: all is heard when all is done.

        Raises:
            RuntimeError: it did not obey.
        """
        parameters = import_chattts().Chat.InferCodeParams(spk_emb=self._speakers[items[0].voice], show_tqdm=False)
        plain = {"skip_refine_text": True, "do_text_normalization": False, "do_homophone_replacement": False}
        began = self._clock()
        steps = torch.tensor([item.steps for item in items], device=self._chat.device)
        with self._ending_at(steps):
            texts = [item.text for item in items]
            self._chat.infer(texts, split_text=False, params_infer_code=parameters, **plain)
        if self._passes != max(item.steps for item in items) + 1:
            raise RuntimeError(f"upstream took {self._passes} passes")
        seconds = self._clock() - began
        return Spoken(seconds, [seconds] * len(items))

    @contextmanager
    def _ending_at(self, steps: Tensor) -> Iterator[None]:
        self._passes = 0
        heads = self._chat.embed.head_code
        hooks = [head.register_forward_hook(partial(self._bend, steps, n)) for n, head in enumerate(heads)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _bend(self, steps: Tensor, codebook: int, _: object, __: object, logits: Tensor) -> Tensor:
        """Of one codebook, [rows, tokens, vocabulary]. The first one's end ends a row."""
        if codebook == 0:
            logits[:, -1, END] = torch.where(steps <= self._passes, CERTAIN, -CERTAIN)
            self._passes += 1
        else:
            logits[:, -1, END] = -CERTAIN
        return logits


def _deliver(deliveries: Sequence[Delivery], now: float) -> None:
    for request, event in deliveries:
        assert isinstance(request.reader, Caller)
        request.reader.take(event, now)
