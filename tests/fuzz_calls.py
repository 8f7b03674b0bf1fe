"""Throws calls at a gateway: `python -m tests.fuzz_calls --count 100000`.

Random methods, requests, bytes that are no request, metadata, deadlines and cancels. Whatever comes, the answer is one
of the statuses that the README lists, with exactly one ErrorInfo of ours; nothing is left in the gateway afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from common.errors import DOMAIN
from common.mended import mended
from protos.chorus.v1 import tts_pb2
from tests.fuzz_text import text_of
from tests.stack import Server, running_stack
from tests.valkey import running_valkey

SERVICE = "/chorus.v1."
UNARY = {
    "TextToSpeechService/Synthesize": tts_pb2.SynthesizeRequest,
    "TextToSpeechService/NormalizeText": tts_pb2.NormalizeTextRequest,
    "VoiceService/ListVoices": tts_pb2.ListVoicesRequest,
    "VoiceService/GetVoice": tts_pb2.GetVoiceRequest,
    "ServerInfoService/GetServerInfo": tts_pb2.GetServerInfoRequest,
    "JobService/CreateJob": tts_pb2.CreateJobRequest,
}
EXPECTED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.ABORTED,
}
MALFORMED = "MALFORMED_MESSAGE"
"""The only reason for which INTERNAL is an answer: the caller's bytes are no message."""
GRPC_MADE = {grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}
"""May come from the caller's own side, and then without details."""
AT_ONCE = 40
GROWTH_MB = 64.0

NUMBERS = (0, 1, 2, 3, 7, 99, -1, 2**31 - 1, -(2**31), 8000, 16000, 44100)
FLOATS = (0.0, 1.0, 0.5, 2.0, -1.0, 1e-5, 1e30, float("nan"), float("inf"))
NAMES = ("", "female1", "male2", "nobody", "FEMALE1", "\u0000", "好" * 300)
LANGUAGES = ("", "zh-CN", "en", "yue", "tlh", "!", "-" * 400)
METADATA: dict[str, tuple[str, ...]] = {
    "idempotency-key": ("a", "b", "c", "x" * 255, "x" * 256, " ", "a b"),
    "x-request-id": ("r", "r" * 128, "r" * 129, "with blanks in it"),
    "x-chorus-priority": ("interactive", "batch", "high", ""),
    "x-chorus-only-cached": ("1", "true", "no", ""),
    "cache-control": ("no-cache", "no-store", "no-cache, no-store", "max-age=0", "only-if-cached", ",,"),
    "x-api-key": ("wrong", ""),
    "authorization": ("Bearer wrong", "Basic eDp5", "Bearer", ""),
    "x-chorus-internal-tenant": ("somebody",),
    "x-chorus-internal-speech-key": ("00" * 32, "no key"),
    "x-chorus-internal-secret": ("guessed",),
    "traceparent": ("00-nonsense",),
    "grpc-timeout-like": ("1S",),
}


def request_of(chance: random.Random, kind: Any) -> Any:
    """A request whose fields are right, wrong, or at their limits."""
    request = kind()
    for field in kind.DESCRIPTOR.fields:
        if chance.random() < 0.5:
            continue
        match field.name:
            case "text":
                # Few texts come again and again, as they do in life.
                request.text = f"again {chance.randrange(5)}" if chance.random() < 0.5 else text_of(chance)
            case "voice" | "name" | "page_token":
                setattr(request, field.name, chance.choice(NAMES[:5] if chance.random() < 0.8 else NAMES))
            case "language":
                request.language = chance.choice(LANGUAGES)
            case "page_size":
                request.page_size = chance.choice(NUMBERS)
            case "refine_text":
                request.refine_text = True
            case "format" | "controls" | "sampling":
                if chance.random() < 0.5:
                    _fill(chance, getattr(request, field.name))
    return request


def _fill(chance: random.Random, message: Any) -> None:
    for field in message.DESCRIPTOR.fields:
        if chance.random() < 0.6:
            continue
        if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
            setattr(message, field.name, chance.choice(FLOATS))
        elif field.cpp_type == field.CPPTYPE_UINT32:
            setattr(message, field.name, chance.choice([n for n in NUMBERS if n >= 0]))
        else:
            setattr(message, field.name, chance.choice(NUMBERS[:6] if chance.random() < 0.8 else NUMBERS))


def metadata_of(chance: random.Random) -> tuple[tuple[str, str], ...]:
    """Metadata as careful, careless and hostile callers send it."""
    names = chance.sample(sorted(METADATA), chance.choice((0, 0, 1, 2, 4)))
    return tuple((name, chance.choice(METADATA[name])) for name in names)


def written(chance: random.Random) -> list[bytes]:
    """A stream of requests, in an order that may be wrong."""
    messages = [tts_pb2.StreamSynthesizeTextRequest(config=request_of(chance, tts_pb2.StreamConfig))]
    for _ in range(chance.randrange(6)):
        match chance.randrange(6):
            case 0:
                messages.append(tts_pb2.StreamSynthesizeTextRequest(flush=tts_pb2.Flush()))
            case 1:
                messages.append(tts_pb2.StreamSynthesizeTextRequest(cancel=tts_pb2.Cancel()))
            case _:
                messages.append(tts_pb2.StreamSynthesizeTextRequest(text=text_of(chance)))
    if chance.random() < 0.2:
        chance.shuffle(messages)
    return [message.SerializeToString() for message in messages]


def bytes_of(chance: random.Random, kind: Any) -> bytes:
    """A request on the wire, now and then damaged."""
    data = bytearray(request_of(chance, kind).SerializeToString())
    if chance.random() < 0.05:
        data += chance.randbytes(chance.randrange(1, 40))
    return bytes(data)


async def call(channel: Any, chance: random.Random) -> tuple[str, str]:
    """One call, and what became of it: its code and its reason.

    Raises:
        AssertionError: the answer is none that a caller should ever get.
    """
    timeout = chance.choice((30.0, 30.0, 30.0, 5.0, 0.05, 0.001))
    options = {"timeout": timeout, "metadata": metadata_of(chance)}
    kind = chance.randrange(10)
    if kind < 6:
        method, request = chance.choice(sorted(UNARY.items()))
        running = channel.unary_unary(f"{SERVICE}{method}")(bytes_of(chance, request), **options)
    elif kind < 8:
        method = f"{SERVICE}TextToSpeechService/StreamSynthesize"
        running = channel.unary_stream(method)(bytes_of(chance, tts_pb2.StreamSynthesizeRequest), **options)
    elif kind < 9:
        method = f"{SERVICE}TextToSpeechService/StreamSynthesizeText"
        running = mended(channel.stream_stream(method)(iter(written(chance)), **options))
    else:
        method = f"{SERVICE}{chance.choice(('Nothing/Here', 'TextToSpeechService/Sing', ''))}"
        running = channel.unary_unary(method)(chance.randbytes(8), **options)
    leaves_after = chance.choice((None, None, None, 0, 1, 3))
    try:
        if hasattr(running, "read"):
            count = 0
            async for _ in running:
                if count == leaves_after:
                    running.cancel()
                    break
                count += 1
        elif leaves_after is not None and chance.random() < 0.3:
            await asyncio.sleep(0.002 * leaves_after)
            running.cancel()
        else:
            await running
    except grpc.aio.AioRpcError as error:
        return judge(error)
    except asyncio.CancelledError:
        return "CANCELLED", ""
    return "OK", ""


def judge(error: grpc.aio.AioRpcError) -> tuple[str, str]:
    """The code and reason of a failure.

    Raises:
        AssertionError: it is none that a caller should get.
    """
    try:
        status = rpc_status.from_call(cast("grpc.Call", error))
    except ValueError:
        status = None
    infos = []
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            infos.append(info)
    if error.code() in GRPC_MADE and not infos:
        return error.code().name, ""
    assert len(infos) == 1, f"{error.code()} {error.details()!r} has {len(infos)} ErrorInfo"
    assert infos[0].domain == DOMAIN
    assert error.code() in EXPECTED or infos[0].reason == MALFORMED, f"{error.code()} {error.details()!r}"
    assert "Traceback" not in (error.details() or "")
    return error.code().name, infos[0].reason


async def throw(gateway: Server, count: int, seed: int) -> Counter[tuple[str, str]]:
    """So many calls, some of them at once.

    Raises:
        AssertionError: one was answered wrongly; the message names its number.
    """
    channel: Any = gateway.channel()
    outcomes: Counter[tuple[str, str]] = Counter()
    numbers = iter(range(seed, seed + count))

    async def caller() -> None:
        for number in numbers:
            try:
                async with asyncio.timeout(60):
                    outcomes[await call(channel, random.Random(number))] += 1
            except (AssertionError, TimeoutError) as error:
                raise AssertionError(f"call {number}: {error!r}") from error

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(caller())
    return outcomes


def check_calm(servers: list[Server]) -> None:
    """Nothing went wrong inside.

    Raises:
        AssertionError: a log tells of an internal error.
    """
    for server in servers:
        wrong = [line for line in server.log() if line["event"] == "internal error"]
        assert not wrong, f"{server.role}: {wrong[0]}"
        assert "Traceback" not in server.log_path.read_text()


def resident_mb(server: Server) -> float:
    """Memory that a server holds, in MiB."""
    return server.metric("process_resident_memory_bytes") / 2**20


def limits(url: str) -> dict[str, Any]:
    """A store, and limits that some of the calls meet."""
    rates = {
        "limiter_requests_per_second": 400,
        "limiter_requests_burst": 100,
        "limiter_audio_seconds_per_second": 4000,
    }
    return {"store_ledger": url, **rates}


async def run(count: int, seed: int) -> None:
    """All of it, with a report."""
    with tempfile.TemporaryDirectory() as folder:
        async with running_valkey(Path(folder)) as valkey, running_stack(Path(folder)) as stack:
            servers = list(await stack.pair(**limits(valkey.url)))
            outcomes = await throw(servers[1], count // 2, seed)
            half = [resident_mb(server) for server in servers]
            outcomes += await throw(servers[1], count - count // 2, seed + count // 2)
            for server, before in zip(servers, half, strict=True):
                now = resident_mb(server)
                print(f"{server.role}: {before:.0f} MB after half of the calls, {now:.0f} MB after all")
                assert now - before < GROWTH_MB
                await server.until_metric("chorus_calls_active", 0)
            check_calm(servers)
            for (code, reason), number in outcomes.most_common():
                print(f"{number:8d}  {code} {reason}")


def main() -> None:
    """Throws, and reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    asyncio.run(run(args.count, args.seed))


if __name__ == "__main__":
    main()
