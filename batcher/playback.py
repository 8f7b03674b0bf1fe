"""What a stream's listener hears: when it begins, and the gaps."""

from __future__ import annotations

from batcher.counters import Counters, Observer
from batcher.request import Request

AUDIBLE_SECONDS = 0.001
"""A shorter gap is none."""


class Playback:
    """Follows the listeners, who are taken to hear samples from the moment at which the first are made."""

    def __init__(self, sample_rate_hertz: int, counters: Counters, observer: Observer) -> None:
        self._sample_rate_hertz = sample_rate_hertz
        self._counters = counters
        self._observer = observer

    def more_comes(self, request: Request, now: float) -> None:
        """More samples of a request are there: notes a gap before them. A slow reader's own pauses are none."""
        if request.playback_started is None:
            request.playback_started = now
            if request.stream:
                self._observer.first_audio(now - request.arrived)
            return
        gap = now - request.playback_started - request.samples / self._sample_rate_hertz
        if gap > AUDIBLE_SECONDS:
            request.playback_started += gap
            if request.stream and not request.held_back:
                self._counters.underruns += 1
                self._observer.underrun(gap)
        request.held_back = False
