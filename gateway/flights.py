"""Single flight in a gateway: callers of one speech share one call, and it goes to the backend that speaks it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias, TypeVar, cast

import grpc
import grpc.aio

from common import metrics
from common.errors import FLIGHT_ELSEWHERE, ChorusError, DeadlineExceeded, Unavailable
from common.keys import flight_names
from common.metadata import INTERNAL_REVISION, INTERNAL_RUN_HERE, INTERNAL_SPEECH_KEY, Priority
from common.settings import Settings
from common.speech import SpeechMessage
from common.tape import Abandoned, Tape, is_anothers
from gateway.backends import open_channel
from gateway.masters import Master, Whole
from gateway.pipeline import Turn, forward, forward_stream
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc

M = TypeVar("M")
Stub: TypeAlias = "tts_pb2_grpc.TextToSpeechServiceAsyncStub"
Landed = Callable[[Master], None]
Pay = Callable[[], Awaitable[None]]

MAX_DIRECT = 64
"""Channels to single backends; beyond it the one not used for longest is closed."""


class Wanted:
    """A speech that is asked for under a key."""

    def __init__(self, key: bytes, revision: str, priority: Priority, landed: Landed) -> None:
        """`landed`: hears of it when it is whole, once for all who asked."""
        self.key = key
        self.names = flight_names(key.hex(), priority)
        self.landed = landed
        self.started = False
        """It was this call that asked for it, and pays."""
        self.metadata = ((INTERNAL_SPEECH_KEY, key.hex()), (INTERNAL_REVISION, revision))


class Flights:
    """The flights of a gateway. Whole speeches and streams are different calls, and join where it is the same one."""

    def __init__(self, settings: Settings, channel: grpc.aio.Channel) -> None:
        self._settings = settings
        self._any: Stub = tts_pb2_grpc.TextToSpeechServiceStub(channel)
        self._direct: OrderedDict[str, grpc.aio.Channel] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()
        self._streams: dict[str, Tape[SpeechMessage]] = {}
        self._wholes: dict[str, Tape[Whole]] = {}

    @property
    def full(self) -> bool:
        """There is no room for what others may join: what is asked for now is made for itself."""
        tapes: list[Tape[Any]] = [*self._streams.values(), *self._wholes.values()]
        return sum(tape.bytes for tape in tapes) >= self._settings.flights.bytes

    def goes_on(self, wanted: Wanted) -> bool:
        """Whether others still hear what this call has started."""
        return wanted.started and self.running(wanted)

    def running(self, wanted: Wanted) -> bool:
        """Whether a call for this speech could join another of this gateway."""
        return _joinable(self._streams, wanted) is not None or _joinable(self._wholes, wanted) is not None

    async def whole(
        self, wanted: Wanted, request: tts_pb2.SynthesizeRequest, turn: Turn, pay: Pay
    ) -> tuple[Whole, bool]:
        """A speech as one reply, to be read only, and whether another call had asked for it before.

        `pay`: awaited before it is asked for, and not by who joins.

        Raises:
            ChorusError: what became of it instead.
        """

        async def ask() -> AsyncGenerator[Whole, None]:
            yield Whole.of(await self._ask(request, turn, wanted))

        def landed(tape: Tape[Whole]) -> Master | None:
            return Master.of(tape.messages[0]) if tape.complete else None

        messages = self._follow(self._wholes, wanted, turn, pay, ask, landed, size=lambda reply: reply.audio_bytes)
        async with aclosing(messages):
            async for reply, joined in messages:
                return reply, joined
        raise AssertionError("a unary call has a reply")

    async def stream(
        self, wanted: Wanted, request: tts_pb2.StreamSynthesizeRequest, turn: Turn, pay: Pay
    ) -> AsyncGenerator[tuple[SpeechMessage, bool], None]:
        """A speech as it is made: messages to be read only, and whether another call had asked for it before.

        `pay`: awaited before it is asked for, and not by who joins.

        Raises:
            ChorusError: what became of it instead, perhaps after some of it.
        """

        def ask() -> AsyncGenerator[SpeechMessage, None]:
            return self._ask_for_stream(request, turn, wanted)

        def landed(tape: Tape[SpeechMessage]) -> Master | None:
            return Master.of_messages(tape.messages) if tape.complete else None

        messages = self._follow(self._streams, wanted, turn, pay, ask, landed, size=_audio_bytes)
        async with aclosing(messages):
            async for message, joined in messages:
                yield message, joined

    async def close(self) -> None:
        """Closes what it opened."""
        for channel in self._direct.values():
            await channel.close()

    async def _follow(
        self,
        tapes: dict[str, Tape[M]],
        wanted: Wanted,
        turn: Turn,
        pay: Pay,
        ask: Callable[[], AsyncGenerator[M, None]],
        landed: Callable[[Tape[M]], Master | None],
        *,
        size: Callable[[M], int],
    ) -> AsyncGenerator[tuple[M, bool], None]:
        paid = False
        while True:
            tape = _joinable(tapes, wanted)
            joined = tape is not None
            if tape is None:
                if not paid:
                    await pay()
                    paid = True
                    continue  # somebody else may ask for it by now
                tape = self._start(tapes, wanted, ask, landed, size)
            else:
                metrics.COALESCED.inc()
            heard = False
            try:
                async with asyncio.timeout(turn.timeout), aclosing(tape.follow()) as messages:
                    async for message in messages:
                        heard = True
                        yield message, joined
                return
            except TimeoutError:
                raise DeadlineExceeded("the deadline passed", "DEADLINE_EXCEEDED") from None
            except (Abandoned, ChorusError) as error:
                # Another's deadline, or its leaving, is not ours.
                if joined and not heard and is_anothers(error) and turn.timeout > 0:
                    continue
                if isinstance(error, ChorusError):
                    raise
                raise Unavailable("this gateway is stopping; try again", "STOPPING", retry_after=1.0) from None

    def _start(
        self,
        tapes: dict[str, Tape[M]],
        wanted: Wanted,
        ask: Callable[[], AsyncGenerator[M, None]],
        landed: Callable[[Tape[M]], Master | None],
        size: Callable[[M], int],
    ) -> Tape[M]:
        def done(tape: Tape[M]) -> None:
            if tapes.get(name) is tape:
                del tapes[name]
            master = landed(tape)
            if master is not None:
                wanted.landed(master)

        wanted.started = True
        name = wanted.names[-1]
        tape = tapes[name] = Tape(ask(), size=size, done=done)
        return tape

    # -- one call, to whichever backend it has to be ------------------------------------------------------------------

    async def _ask(self, request: tts_pb2.SynthesizeRequest, turn: Turn, wanted: Wanted) -> tts_pb2.SynthesizeResponse:
        keyed = turn.shared(self._settings.limits.deadline_max).saying(*wanted.metadata)
        try:
            return cast("tts_pb2.SynthesizeResponse", await forward(self._any.Synthesize, request, keyed))
        except ChorusError as error:
            if error.reason != FLIGHT_ELSEWHERE:
                raise
            address = error.metadata["backend"]
        try:
            return cast("tts_pb2.SynthesizeResponse", await forward(self._at(address).Synthesize, request, keyed))
        except ChorusError as error:
            if not _is_gone(error):
                raise
        here = keyed.saying((INTERNAL_RUN_HERE, "1"))
        try:
            return cast("tts_pb2.SynthesizeResponse", await forward(self._any.Synthesize, request, here))
        except ChorusError as error:
            raise (_nowhere() if error.reason == FLIGHT_ELSEWHERE else error) from error

    async def _ask_for_stream(
        self, request: tts_pb2.StreamSynthesizeRequest, turn: Turn, wanted: Wanted
    ) -> AsyncGenerator[SpeechMessage, None]:
        keyed = turn.shared(self._settings.limits.deadline_max).saying(*wanted.metadata)
        attempts: list[Callable[[str], AsyncGenerator[Any, None]]] = [
            lambda _: forward_stream(self._any.StreamSynthesize, request, keyed),
            lambda address: forward_stream(self._at(address).StreamSynthesize, request, keyed),
            lambda _: forward_stream(self._any.StreamSynthesize, request, keyed.saying((INTERNAL_RUN_HERE, "1"))),
        ]
        address, samples, told = "", 0, False
        for number, attempt in enumerate(attempts):
            try:
                async with aclosing(attempt(address)) as replies:
                    async for reply in replies:
                        message = getattr(reply, reply.WhichOneof("message"))
                        if isinstance(message, tts_pb2.AudioChunk):
                            samples = message.start_sample + len(message.data) // 2
                        told = True
                        yield message
                return
            except ChorusError as error:
                if told:
                    raise _cut(error, samples) from error
                last = number == len(attempts) - 1
                if last and error.reason == FLIGHT_ELSEWHERE:
                    raise _nowhere() from error
                if not last and error.reason == FLIGHT_ELSEWHERE:
                    address = error.metadata["backend"]
                elif last or number == 0 or not _is_gone(error):
                    raise

    def _at(self, address: str) -> Stub:
        """A backend by its own address."""
        channel = self._direct.get(address)
        if channel is None:
            channel = self._direct[address] = open_channel(address, self._settings)
            if len(self._direct) > MAX_DIRECT:
                _, oldest = self._direct.popitem(last=False)
                closing = asyncio.create_task(oldest.close(grace=self._settings.limits.deadline_max))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
        self._direct.move_to_end(address)
        stub: Stub = tts_pb2_grpc.TextToSpeechServiceStub(channel)
        return stub


def _joinable(tapes: dict[str, Tape[M]], wanted: Wanted) -> Tape[M] | None:
    for name in wanted.names:
        tape = tapes.get(name)
        if tape is not None and tape.joinable:
            return tape
    return None


def _is_gone(error: ChorusError) -> bool:
    return error.code is grpc.StatusCode.UNAVAILABLE or error.reason == FLIGHT_ELSEWHERE


def _nowhere() -> Unavailable:
    return Unavailable("no backend could answer; try again", "BACKEND_UNAVAILABLE", retry_after=1.0)


def _cut(error: ChorusError, samples: int) -> ChorusError:
    """A speech that ends too early says how much of it is right."""
    if error.code is not grpc.StatusCode.UNAVAILABLE:
        return error
    return Unavailable(
        "the backend was lost while it spoke; what came is right, the rest is missing: ask again for all of it",
        "BACKEND_LOST",
        retry_after=1.0,
        metadata={"valid_samples": str(samples)},
    )


def _audio_bytes(message: SpeechMessage) -> int:
    return len(message.data) if isinstance(message, tts_pb2.AudioChunk) else 0
