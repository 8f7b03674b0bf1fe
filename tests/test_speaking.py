"""The main path inside a service: what it remembers of a speech that goes on for long."""

from __future__ import annotations

import time
import weakref
from functools import partial

from batcher.policy import Policy
from batcher.runner import Runner
from common.calls import Call
from common.settings import ToneSettings
from protos.chorus.v1 import tts_pb2
from service.engines.tone import ToneEngine
from service.flights import Deadline
from service.speaking import MAX_AHEAD, Terms, in_one_request, speak
from service.speech import parse_config
from service.text import TextSegment

SENTENCE = "One more sentence. "
SENTENCES = 1500


class Sentence(TextSegment):
    """A segment that can be watched."""


class Endless:
    """A text of very many sentences, each written when there is room for it."""

    def __init__(self) -> None:
        self.done = False
        self.alive: weakref.WeakSet[Sentence] = weakref.WeakSet()
        self._written = 0

    async def more(self) -> list[TextSegment]:
        if self._written == SENTENCES:
            self.done = True
            return []
        start = self._written * len(SENTENCE)
        sentence = Sentence(start, start + len(SENTENCE), SENTENCE.strip(), "en-US")
        self.alive.add(sentence)
        self._written += 1
        return [sentence]


async def test_of_what_was_heard_nothing_is_kept() -> None:
    engine, script = ToneEngine(ToneSettings()), Endless()
    runner = Runner(engine, Policy())
    runner.start()
    manner = parse_config(tts_pb2.StreamConfig(), engine)
    terms = Terms(max_rows=2, stream=True)
    end = time.monotonic() + 60
    call = Call("", "")
    begin = partial(in_one_request, runner, call, terms, Deadline(end, end))
    messages = speak(begin, engine, manner, script, call)
    marks = 0
    async for message in messages:
        if isinstance(message, tts_pb2.SegmentMark):
            assert message.start_byte == marks * len(SENTENCE)
            marks += 1
            assert len(script.alive) <= MAX_AHEAD + 2
    assert marks == SENTENCES
    await runner.stop()
