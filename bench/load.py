"""Load: callers in processes of their own, each with one call at a time, who check what they get."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import random
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import TypeAlias

import grpc.aio
import uvloop

from protos.chorus.v1 import tts_pb2, tts_pb2_grpc

TIMEOUT_SECONDS = 30.0
IDEOGRAPHS = [chr(code) for code in range(0x4E00, 0x9FA6)]
RAW = tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_RAW)

Stub: TypeAlias = "tts_pb2_grpc.TextToSpeechServiceAsyncStub"
Metadata: TypeAlias = tuple[tuple[str, str], ...]
Pipe: TypeAlias = "Connection[Window, Tally]"


@dataclass(frozen=True, slots=True)
class Window:
    """What callers do for a while."""

    address: str
    stream: bool
    callers: int
    seconds: float
    """How long new calls are made; those that run then are waited for, and count."""
    characters: int
    """In each text."""
    audio_bytes: int
    """In each reply. Anything else is an error."""
    keyed: bool = False
    """Each call has an idempotency key."""
    pool: int = 0
    """So many texts, the same in every process, are asked for again and again; 0: each is a new one."""
    rate: float = 0.0
    """Calls a second that all callers make together, evenly; 0: each asks again as soon as it is answered."""

    def text(self) -> str:
        """Of the next call."""
        chance = random.Random(random.randrange(self.pool)) if self.pool else random
        return "".join(chance.choices(IDEOGRAPHS, k=self.characters))

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of the next call."""
        return (("idempotency-key", f"{random.getrandbits(128):x}"),) if self.keyed else ()


@dataclass(slots=True)
class Tally:
    """What came of a window. Times are in seconds; those of calls are of calls without error, from their start."""

    seconds: float = 0.0
    """From the window's start until its last call ended."""
    cpu_seconds: float = 0.0
    """Of the process that made the load."""
    errors: int = 0
    first_audio: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """Calls without error."""
        return len(self.totals)


class LoadGenerator:
    """Processes that share the callers of each window."""

    def __init__(self, stack: ExitStack, processes: int) -> None:
        """`stack`: ends the processes when it closes."""
        self._pipes = [_start(stack) for _ in range(processes)]

    def run(self, window: Window) -> list[Tally]:
        """Does what a window says. One tally from each process that had callers."""
        processes = min(len(self._pipes), window.callers)
        busy = self._pipes[:processes]
        for index, pipe in enumerate(busy):
            callers = len(range(index, window.callers, processes))
            pipe.send(replace(window, callers=callers, rate=window.rate * callers / window.callers))
        return [pipe.recv() for pipe in busy]


def _start(stack: ExitStack) -> Connection[Window, Tally]:
    spawn = multiprocessing.get_context("spawn")  # a forked process could not use gRPC
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    stack.callback(process.join)
    stack.callback(ours.close)
    return ours


def _serve(pipe: Connection[Tally, Window]) -> None:
    """The process: windows come and tallies go, until the pipe is closed."""
    uvloop.run(_answer(pipe))


async def _answer(pipe: Connection[Tally, Window]) -> None:
    while True:
        try:
            window = pipe.recv()  # blocks, while there is nothing else to do
        except EOFError:
            return
        async with grpc.aio.insecure_channel(window.address) as channel:
            await asyncio.wait_for(channel.channel_ready(), TIMEOUT_SECONDS)
            tally = await _run(window, tts_pb2_grpc.TextToSpeechServiceStub(channel))
        pipe.send(tally)


async def _run(window: Window, stub: Stub) -> Tally:
    tally = Tally()
    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(
        *(_call(_moments(window, number, began), stub, window, tally) for number in range(window.callers))
    )
    tally.seconds = time.perf_counter() - began
    tally.cpu_seconds = time.process_time() - cpu
    return tally


async def _moments(window: Window, caller: int, began: float) -> AsyncIterator[float]:
    """When a caller calls. At a given rate a call that had to wait for the one before it began when it should have."""
    if not window.rate:
        while (now := time.perf_counter()) < began + window.seconds:
            yield now
        return
    for number in itertools.count(caller, window.callers):
        due = began + number / window.rate
        if due >= began + window.seconds:
            return
        await asyncio.sleep(due - time.perf_counter())
        yield due


async def _call(moments: AsyncIterator[float], stub: Stub, window: Window, tally: Tally) -> None:
    """One caller."""
    ask = _ask_for_stream if window.stream else _ask
    async for began in moments:
        try:
            first_audio, audio_bytes = await ask(stub, window.text(), window.metadata())
        except grpc.aio.AioRpcError:
            tally.errors += 1
            continue
        if audio_bytes != window.audio_bytes:
            tally.errors += 1
            continue
        tally.first_audio.append(first_audio - began)
        tally.totals.append(time.perf_counter() - began)


async def _ask(stub: Stub, text: str, metadata: Metadata) -> tuple[float, int]:
    """When the first audio came, and how many bytes there were in all."""
    reply = await stub.Synthesize(
        tts_pb2.SynthesizeRequest(text=text, format=RAW), timeout=TIMEOUT_SECONDS, metadata=metadata
    )
    return time.perf_counter(), len(reply.audio)


async def _ask_for_stream(stub: Stub, text: str, metadata: Metadata) -> tuple[float, int]:
    """When the first audio came, and how many bytes there were in all."""
    first_audio, audio_bytes = 0.0, 0
    request = tts_pb2.StreamSynthesizeRequest(text=text, format=RAW)
    async for message in stub.StreamSynthesize(request, timeout=TIMEOUT_SECONDS, metadata=metadata):
        first_audio = first_audio or (time.perf_counter() if message.chunk.data else 0.0)
        audio_bytes += len(message.chunk.data)
    return first_audio, audio_bytes
