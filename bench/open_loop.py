"""Open-loop load: calls that begin when the trace says, however long the earlier ones take, from a process of its own.

A caller who wants a whole reply hangs up at its deadline, of which a server hears over gRPC. Who wants a stream hangs
up when there is no sound for too long, and otherwise stays. Time counts from when a call was due, not from when it was
made.
"""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from enum import Enum
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import grpc
import grpc.aio
import uvloop

from bench.offered import COMPRESSION, LISTENER_SECONDS, Arrival
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc
from service.engines.tone import SAMPLE_RATE_HERTZ

RAW = tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_RAW)
BYTES_PER_SECOND = 2 * SAMPLE_RATE_HERTZ
GENEROUS_SECONDS = 60.0
CONNECT_SECONDS = 2.0
EXPIRY_SHARE = 0.95
"""A server that gives up after this share of a deadline has tried; one that says so earlier has refused."""

Chunks: TypeAlias = AsyncIterator[bytes]
Ask: TypeAlias = Callable[[Arrival, float], Chunks]
"""Makes a call that may take so many seconds."""


class End(Enum):
    """How a call ended."""

    COMPLETE = "complete"
    REFUSED = "refused"
    """The server said that it would not, before the deadline."""
    EXPIRED = "expired"
    """The caller hung up, or the server gave up, at the deadline."""
    CUT = "cut"
    """It still ran when the run was over."""
    ERROR = "error"
    """Anything else, also other audio than was asked for."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server. `path`: for those that speak HTTP."""

    address: str
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a server."""

    target: Target
    arrivals: Sequence[Arrival]
    callers: int | None = None
    """Closed loop: so many calls at once, as fast as they are answered, without deadlines, for `seconds`."""
    seconds: float = 0.0
    judged_until: float = math.inf
    """The load goes on behind this, but these calls are not waited for."""
    patience: float = 0.0
    """How long the others are waited for after the last call was due."""


@dataclass(slots=True)
class Outcome:
    """What became of a call. Times are in seconds since it was due."""

    due: float
    """Since the start of the load."""
    end: End = End.CUT
    first: float | None = None
    """Until its first audio."""
    total: float = 0.0
    underrun: float = 0.0
    """The longest gap that a listener heard who began to play at once."""
    heard: float = 0.0
    """Seconds of audio."""
    why: str = ""


@dataclass(slots=True)
class Tally:
    """What came of a load. `outcomes` of an open loop are those of the arrivals, in their order.

    There are none where nobody listens.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    """From the start until the last call ended."""
    cpu_seconds: float = 0.0
    """Of the process that made the load."""
    lag: float = 0.0
    """By how much the latest call began late: the load generator's own fault."""


class OpenLoop:
    """The process. It runs one load at a time."""

    def __init__(self, stack: ExitStack) -> None:
        """`stack`: ends the process when it closes."""
        spawn = multiprocessing.get_context("spawn")  # a forked process could not use gRPC
        self._pipe, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        stack.callback(process.join)
        stack.callback(self._pipe.close)

    def run(self, load: Load) -> Tally:
        """Makes the load."""
        self._pipe.send(load)
        tally: Tally = self._pipe.recv()
        return tally


def _serve(pipe: Connection[Tally, Load]) -> None:
    """The process: loads come and tallies go, until the pipe is closed."""
    uvloop.run(_answer(pipe))


async def _answer(pipe: Connection[Tally, Load]) -> None:
    while True:
        try:
            load = pipe.recv()  # blocks, while there is nothing else to do
        except EOFError:
            return
        async with AsyncExitStack() as stack:
            try:
                ask = await (_grpc(stack, load.target) if load.target.path is None else _http(stack, load.target))
                tally = await _run(load, ask)
            except TimeoutError:
                tally = Tally()
        pipe.send(tally)


async def _run(load: Load, ask: Ask) -> Tally:
    tally = Tally()
    began, cpu = time.perf_counter(), time.process_time()
    await (_open(load, ask, tally, began) if load.callers is None else _closed(load, ask, tally, began))
    tally.seconds = time.perf_counter() - began
    tally.cpu_seconds = time.process_time() - cpu
    return tally


async def _open(load: Load, ask: Ask, tally: Tally, began: float) -> None:
    calls, judged = [], []
    for arrival in load.arrivals:
        due = began + arrival.at
        if (early := due - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        tally.lag = max(tally.lag, time.perf_counter() - due)
        outcome = Outcome(arrival.at)
        tally.outcomes.append(outcome)
        limit = GENEROUS_SECONDS if arrival.stream else arrival.deadline
        listening = _listen if arrival.stream else _call
        calls.append(asyncio.create_task(listening(ask, arrival, due, limit, outcome)))
        if arrival.at < load.judged_until:
            judged.append(calls[-1])
    await asyncio.wait(judged, timeout=load.patience)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def _closed(load: Load, ask: Ask, tally: Tally, began: float) -> None:
    arrivals = iter(load.arrivals)
    end = began + load.seconds

    async def caller() -> None:
        for arrival in arrivals:
            if time.perf_counter() >= end:
                return
            due = time.perf_counter()
            outcome = Outcome(due - began)
            await _call(ask, arrival, due, GENEROUS_SECONDS, outcome)
            tally.outcomes.append(outcome)

    assert load.callers is not None
    async with asyncio.TaskGroup() as group:
        for _ in range(load.callers):
            group.create_task(caller())


async def _listen(ask: Ask, arrival: Arrival, due: float, limit: float, outcome: Outcome) -> None:
    """A call whose caller hangs up when there is no sound for too long."""
    call = asyncio.create_task(_call(ask, arrival, due, limit, outcome))
    try:
        await asyncio.wait({call}, timeout=LISTENER_SECONDS / COMPRESSION)
        if outcome.first is None and not call.done():
            call.cancel()
            outcome.end = End.EXPIRED
        await asyncio.wait({call})
    finally:
        call.cancel()


async def _call(ask: Ask, arrival: Arrival, due: float, limit: float, outcome: Outcome) -> None:
    """One call, and what becomes of it."""
    stalled = 0.0
    try:
        async for chunk in ask(arrival, limit):
            now = time.perf_counter() - due
            if outcome.first is None:
                outcome.first = now
            elif (gap := now - outcome.first - stalled - outcome.heard) > 0:
                outcome.underrun = max(outcome.underrun, gap)
                stalled += gap
            outcome.heard += len(chunk) / BYTES_PER_SECOND
        as_asked = abs(outcome.heard - arrival.audio_seconds) < 1e-6
        outcome.end, outcome.why = (End.COMPLETE, "") if as_asked else (End.ERROR, "not the audio that was asked for")
    except grpc.aio.AioRpcError as error:
        outcome.end, outcome.why = _grpc_end(error, time.perf_counter() - due < EXPIRY_SHARE * limit), f"{error.code()}"
    except TimeoutError:
        outcome.end = End.EXPIRED
    except _HttpError as error:
        outcome.end, outcome.why = error.end, str(error)
    except OSError as error:
        outcome.end, outcome.why = End.ERROR, repr(error)
    finally:
        outcome.total = time.perf_counter() - due


# -- gRPC -------------------------------------------------------------------------------------------------------------


async def _grpc(stack: AsyncExitStack, target: Target) -> Ask:
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(target.address))
    await asyncio.wait_for(channel.channel_ready(), CONNECT_SECONDS)
    stub: tts_pb2_grpc.TextToSpeechServiceAsyncStub = tts_pb2_grpc.TextToSpeechServiceStub(channel)

    async def ask(arrival: Arrival, limit: float) -> Chunks:
        if not arrival.stream:
            request = tts_pb2.SynthesizeRequest(text=arrival.text, format=RAW)
            yield (await stub.Synthesize(request, timeout=limit)).audio
            return
        stream = tts_pb2.StreamSynthesizeRequest(text=arrival.text, format=RAW)
        async for message in stub.StreamSynthesize(stream, timeout=limit):
            if message.chunk.data:
                yield message.chunk.data

    return ask


def _grpc_end(error: grpc.aio.AioRpcError, before_the_deadline: bool) -> End:
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return End.REFUSED if before_the_deadline else End.EXPIRED
    return End.REFUSED if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED else End.ERROR


# -- HTTP -------------------------------------------------------------------------------------------------------------


class _HttpError(Exception):
    """A status other than 200."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.end = {408: End.EXPIRED, 504: End.EXPIRED, 429: End.REFUSED, 503: End.REFUSED}.get(status, End.ERROR)


async def _http(stack: AsyncExitStack, target: Target) -> Ask:
    import aiohttp  # not needed for those that speak gRPC

    session: Any = await stack.enter_async_context(
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"accept-encoding": "identity", "content-type": "application/json"},
        )
    )
    url = f"http://{target.address}{target.path}"

    async def ask(arrival: Arrival, limit: float) -> Chunks:
        body = json.dumps({"text": arrival.text, "stream": arrival.stream})
        async with asyncio.timeout(limit), session.post(url, data=body) as reply:
            if reply.status != 200:
                raise _HttpError(reply.status)
            if not arrival.stream:
                yield await reply.read()
                return
            async for chunk in reply.content.iter_any():
                yield chunk

    return _with_client_errors(ask, aiohttp.ClientError)


def _with_client_errors(ask: Ask, kind: type[Exception]) -> Ask:
    """`ask`, whose broken connections are OSErrors."""

    async def asking(arrival: Arrival, limit: float) -> Chunks:
        try:
            async for chunk in ask(arrival, limit):
                yield chunk
        except kind as error:
            raise OSError(repr(error)) from error

    return asking
