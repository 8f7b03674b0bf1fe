"""Texts that are spoken while they are being written, and texts that are only read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeAlias

import grpc
import grpc.aio
import pytest

from client.client import CallError, call_error
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc
from service.engines.tone_code import verify
from tests.hearing import LANGUAGE, identities
from tests.stack import ROOT, Server, Stack, stream_request

pytestmark = pytest.mark.asyncio(loop_scope="module")

ARTICLE = (ROOT / "tests/data/article.txt").read_text()
Request = tts_pb2.StreamSynthesizeTextRequest
Call: TypeAlias = "grpc.aio.StreamStreamCall[Request, tts_pb2.StreamSynthesizeTextResponse]"
RAW = tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_RAW)
CONFIG = Request(config=tts_pb2.StreamConfig(language=LANGUAGE, format=RAW, sampling=tts_pb2.Sampling(seed=5)))
FLUSH, CANCEL = Request(flush=tts_pb2.Flush()), Request(cancel=tts_pb2.Cancel())


def said(text: str) -> Request:
    return Request(text=text)


def dialogue(server: Server) -> Call:
    stub: tts_pb2_grpc.TextToSpeechServiceAsyncStub = tts_pb2_grpc.TextToSpeechServiceStub(server.channel())
    return stub.StreamSynthesizeText(timeout=30)


class Heard:
    """What a writer hears."""

    def __init__(self) -> None:
        self.audio = b""
        self.marks: list[tts_pb2.SegmentMark] = []
        self.seed: int | None = None
        self.end: tts_pb2.StreamEnd | None = None

    def take(self, message: tts_pb2.StreamSynthesizeTextResponse) -> None:
        assert self.end is None, "the end is last"
        kind = message.WhichOneof("message")
        if kind == "start":
            assert self.seed is None
            self.seed = message.start.seed
        elif kind == "chunk":
            assert self.seed is not None
            assert message.chunk.start_sample * 2 == len(self.audio)
            self.audio += message.chunk.data
        elif kind == "mark":
            self.marks.append(message.mark)
        else:
            self.end = message.end

    def check(self, text: str) -> None:
        """Whole, its own, and the marks cover what was written."""
        assert self.end is not None
        assert self.seed is not None
        assert self.end.sample_count * 2 == len(self.audio)
        verify(self.audio, identities([mark.spoken_text for mark in self.marks if mark.spoken_text], self.seed))
        ends = [0, *(mark.end_byte for mark in self.marks)]
        assert [mark.start_byte for mark in self.marks] == ends[:-1]
        assert ends[-1] == len(text.encode())


async def hear(call: Call, heard: Heard) -> Heard:
    while isinstance(message := await call.read(), tts_pb2.StreamSynthesizeTextResponse):
        heard.take(message)
    return heard


async def read_all(call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def failure(call: Call) -> CallError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await hear(call, Heard())
    return call_error(caught.value)


@pytest.mark.parametrize("size", [1, 7, 400, 5000])
async def test_a_text_in_pieces_is_the_text(pair: tuple[Server, Server], size: int) -> None:
    text = (
        "It costs $3.50 today. Call 555-1234, or write to me@example.com! Version 1.2.3 is out; see you at 12:30. " * 4
    )
    call = dialogue(pair[1])
    heard = Heard()
    reading = asyncio.create_task(hear(call, heard))
    await call.write(CONFIG)
    for start in range(0, len(text), size):
        await call.write(said(text[start : start + size]))
    await call.done_writing()
    await reading
    heard.check(text)


async def test_audio_leaves_while_text_still_arrives(pair: tuple[Server, Server]) -> None:
    call = dialogue(pair[1])
    heard = Heard()
    await call.write(CONFIG)
    await call.write(said("The first sentence is complete. And the second beg"))
    while not heard.marks:  # nothing more is written before the first is heard whole
        message = await call.read()
        assert isinstance(message, tts_pb2.StreamSynthesizeTextResponse)
        heard.take(message)
    assert heard.marks[0].spoken_text == "The first sentence is complete."
    await call.write(said("an long ago."))
    await call.done_writing()
    await hear(call, heard)
    heard.check("The first sentence is complete. And the second began long ago.")


async def test_a_flush_and_a_pause_both_speak_what_has_come(pair: tuple[Server, Server]) -> None:
    for messages in ([said("no full stop"), FLUSH], [said("no full stop")]):
        call = dialogue(pair[1])
        heard = Heard()
        await call.write(CONFIG)
        for message in messages:
            await call.write(message)
        while not heard.marks:
            reply = await call.read()
            assert isinstance(reply, tts_pb2.StreamSynthesizeTextResponse)
            heard.take(reply)
        await call.done_writing()
        await hear(call, heard)
        heard.check("no full stop")


@pytest.mark.asyncio(loop_scope="function")
async def test_flushed_text_without_sentences_goes_on_for_long(stack: Stack) -> None:
    _, gateway = await stack.pair(tone_steps_per_character=1)
    call = dialogue(gateway)
    heard = Heard()
    reading = asyncio.create_task(hear(call, heard))
    await call.write(CONFIG)
    for _ in range(60):
        await call.write(said("word " * 20))
        await call.write(FLUSH)
    await call.done_writing()
    await reading
    heard.check("word " * 1200)


@pytest.mark.asyncio(loop_scope="function")
async def test_barge_in_frees_everything_at_once(stack: Stack) -> None:
    service, gateway = await stack.pair(tone_step_base_ms=4)
    call = dialogue(gateway)
    heard = Heard()
    await call.write(CONFIG)
    await call.write(said("Many words that nobody wants to hear. " * 30))
    while not heard.audio:
        reply = await call.read()
        assert isinstance(reply, tts_pb2.StreamSynthesizeTextResponse)
        heard.take(reply)
    await call.write(CANCEL)
    await hear(call, heard)
    assert heard.end is not None
    assert heard.end.finish_reason == tts_pb2.FINISH_REASON_CANCELLED
    assert heard.end.sample_count * 2 == len(heard.audio)
    await service.until_metric("chorus_batcher_rows", 0)
    await service.until_metric("chorus_batcher_slots_free", 64)
    assert service.metric("chorus_batcher_cancel_ticks_max") <= 1


@pytest.mark.parametrize("begun", [False, True])
async def test_bytes_that_are_no_message_in_the_middle(pair: tuple[Server, Server], begun: bool) -> None:
    for server in pair:
        method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = server.channel().stream_stream(
            "/chorus.v1.TextToSpeechService/StreamSynthesizeText", bytes, bytes
        )
        call = method(timeout=30)
        await call.write(CONFIG.SerializeToString())
        if begun:
            await call.write(said("This is heard. And this").SerializeToString())
            await call.read()
        await call.write(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_all(call)
        failed = call_error(caught.value)
        assert (failed.code, failed.reason) == (grpc.StatusCode.INTERNAL, "MALFORMED_MESSAGE")


async def test_text_with_nothing_to_speak_is_not_kept_for_ever(pair: tuple[Server, Server]) -> None:
    call = dialogue(pair[1])
    await call.write(CONFIG)
    for _ in range(6):
        await call.write(said("。" * 1000))
    assert list((await failure(call)).fields) == ["text"]


async def test_a_cancel_before_anything_else(pair: tuple[Server, Server]) -> None:
    call = dialogue(pair[1])
    await call.write(CONFIG)
    await call.write(CANCEL)
    heard = await hear(call, Heard())
    assert heard.end is not None
    assert (heard.end.finish_reason, heard.end.sample_count) == (tts_pb2.FINISH_REASON_CANCELLED, 0)


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([said("no config")], "config"),
        ([], "config"),
        ([CONFIG, CONFIG], "config"),
        ([CONFIG, said("Well begun. "), CONFIG], "config"),
        ([CONFIG, Request()], "message"),
        ([CONFIG, said("a" * 5001)], "text"),
        ([CONFIG], "text"),
        ([CONFIG, said("… !")], "text"),
        ([Request(config=tts_pb2.StreamConfig(voice="nobody"))], "config.voice"),
        ([Request(config=tts_pb2.StreamConfig(controls=tts_pb2.Controls(speed=9)))], "config.controls.speed"),
    ],
)
async def test_what_has_no_place(pair: tuple[Server, Server], messages: list[Request], field: str) -> None:
    for server in pair:

        async def write(messages: list[Request] = messages) -> AsyncIterator[Request]:
            for message in messages:
                yield message

        stub: tts_pb2_grpc.TextToSpeechServiceAsyncStub = tts_pb2_grpc.TextToSpeechServiceStub(server.channel())
        failed = await failure(stub.StreamSynthesizeText(write(), timeout=30))
        assert failed.code is grpc.StatusCode.INVALID_ARGUMENT
        assert list(failed.fields) == [field]


@pytest.mark.asyncio(loop_scope="function")
async def test_a_writer_who_vanishes_leaves_nothing_behind(stack: Stack) -> None:
    service, gateway = await stack.pair(tone_step_base_ms=4)
    for _ in range(5):
        call = dialogue(gateway)
        await call.write(CONFIG)
        await call.write(said("Words and words. " * 50))
        await call.read()
        call.cancel()
    await service.until_metric("chorus_batcher_requests", 0)
    await service.until_metric("chorus_calls_active", 0)
    await gateway.until_metric("chorus_calls_active", 0)
    await service.until_metric("chorus_batcher_slots_free", 64)


@pytest.mark.asyncio(loop_scope="function")
async def test_much_text_at_once_is_read_no_further_than_it_is_heard(stack: Stack) -> None:
    service, gateway = await stack.pair(tone_step_base_ms=1)
    call = dialogue(gateway)
    await call.write(CONFIG)
    piece = said("This is one of very many sentences. " * 100)

    async def write() -> None:
        for _ in range(2000):
            await call.write(piece)

    writing = asyncio.create_task(write())
    done, _ = await asyncio.wait({writing}, timeout=3)
    assert not done, "seven megabytes of text went somewhere"
    writing.cancel()
    call.cancel()
    await service.until_metric("chorus_batcher_requests", 0)


async def test_normalize_text_says_what_would_be_spoken(pair: tuple[Server, Server]) -> None:
    _, gateway = pair
    for text in (ARTICLE[:4000], "今天是2024年1月5日，价格¥3,500.50。", "Dr. Smith paid $3.50 \U0001f600 at 12:30."):
        stub = gateway.stub()
        read = await stub.NormalizeText(tts_pb2.NormalizeTextRequest(text=text), timeout=30)
        messages = stub.StreamSynthesize(stream_request(text), timeout=60)
        marks = [message.mark async for message in messages if message.HasField("mark")]
        assert [(s.start_byte, s.end_byte, s.spoken_text) for s in read.segments] == [
            (m.start_byte, m.end_byte, m.spoken_text) for m in marks
        ]
        rejected = [(r.character, r.start_byte) for mark in marks for r in mark.rejected_characters]
        assert [(r.character, r.start_byte) for r in read.rejected_characters] == rejected
        assert read.segments[-1].end_byte == len(text.encode())


async def test_what_no_engine_can_speak_is_reported(pair: tuple[Server, Server]) -> None:
    text = "Nice \U0001f600 day"
    read = await pair[1].stub().NormalizeText(tts_pb2.NormalizeTextRequest(text=text), timeout=10)
    assert [(r.character, r.start_byte) for r in read.rejected_characters] == [("\U0001f600", 5)]


async def test_normalize_text_refuses_what_synthesize_refuses(pair: tuple[Server, Server]) -> None:
    request = tts_pb2.NormalizeTextRequest(text="。", voice="nobody", language="tlh")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await pair[1].stub().NormalizeText(request, timeout=10)
    assert list(call_error(caught.value).fields) == ["text", "voice", "language"]
