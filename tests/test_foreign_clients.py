"""Clients that are not ours: buf, which knows the contract from reflection, and JavaScript, which has the .proto."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf import json_format
from google.rpc import error_details_pb2, status_pb2

from client.client import Client
from protos.chorus.v1 import tts_pb2
from tests.calls import Door, spoken
from tests.stack import ROOT, Server

pytestmark = pytest.mark.asyncio(loop_scope="module")

JS = ROOT / "tests/clients/js"
TEXT = "你好，世界。Bonjour tout le monde! " * 8
SPEECH = "chorus.v1.TextToSpeechService"


async def run(program: str, *arguments: str, cwd: Path = ROOT) -> tuple[int, str, str]:
    """Runs a program that is installed beside Python. Answers its exit code, stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        *(str(Path(sys.executable).with_name(program)), *arguments),
        cwd=cwd,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


def documents(text: str) -> list[dict[str, Any]]:
    """JSON documents that follow each other."""
    found, decoder = [], json.JSONDecoder()
    while text := text.lstrip():
        document, end = decoder.raw_decode(text)
        found.append(document)
        text = text[end:]
    return found


def parsed(documents: list[dict[str, Any]]) -> list[tts_pb2.StreamSynthesizeResponse]:
    return [json_format.ParseDict(document, tts_pb2.StreamSynthesizeResponse()) for document in documents]


# --- buf


@pytest.fixture(params=["gateway", "service"])
def server(pair: tuple[Server, Server], request: pytest.FixtureRequest) -> Server:
    service, gateway = pair
    return gateway if request.param == "gateway" else service


async def buf_curl(server: Server, path: str, *arguments: str) -> tuple[int, str, str]:
    grpc = ("--protocol", "grpc", "--http2-prior-knowledge")
    return await run("buf", "curl", *grpc, *arguments, f"http://{server.address}{path}")


@pytest.mark.parametrize("version", ["grpc-v1", "grpc-v1alpha"])
async def test_buf_lists_what_there_is(server: Server, version: str) -> None:
    code, out, err = await buf_curl(server, "", "--reflect-protocol", version, "--list-methods")
    assert code == 0, err
    served = ["TextToSpeechService", "VoiceService", "ServerInfoService", *["JobService"] * (server.role == "gateway")]
    methods = {
        f"{service.full_name}/{method.name}"
        for service in map(tts_pb2.DESCRIPTOR.services_by_name.__getitem__, served)
        for method in service.methods
    }
    assert {line for line in out.split() if line.startswith("chorus.")} == methods
    assert "grpc.health.v1.Health/Check" in out


async def test_buf_calls(server: Server) -> None:
    code, out, err = await buf_curl(server, f"/{SPEECH}/Synthesize", "-d", json.dumps({"text": TEXT}))
    assert code == 0, err
    whole = json_format.Parse(out, tts_pb2.SynthesizeResponse())
    code, out, err = await buf_curl(server, f"/{SPEECH}/StreamSynthesize", "-d", json.dumps({"text": TEXT}))
    assert code == 0, err
    chunks = [response.chunk.data for response in parsed(documents(out))]
    assert b"".join(chunks)[44:] == whole.audio[44:]
    assert len(whole.audio) == 44 + 2 * whole.end.sample_count


async def test_buf_is_told_what_is_wrong(server: Server) -> None:
    code, _, err = await buf_curl(server, f"/{SPEECH}/Synthesize", "-d", '{"voice": "nobody"}')
    assert code != 0
    error = json.loads(err)
    assert error["code"] == "invalid_argument"
    details = {detail["type"]: base64.b64decode(detail["value"] + "==") for detail in error["details"]}
    bad = error_details_pb2.BadRequest.FromString(details["google.rpc.BadRequest"])
    assert [violation.field for violation in bad.field_violations] == ["text", "voice"]
    assert error_details_pb2.ErrorInfo.FromString(details["google.rpc.ErrorInfo"]).domain == "chorus"


# --- JavaScript


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def js_modules() -> None:
    """What the JavaScript client needs, installed once."""
    lock, installed = JS / "package-lock.json", JS / "node_modules/.package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        code, _, err = await run("npm", "ci", cwd=JS)
        assert code == 0, err


async def js(server: Server, **request: Any) -> list[dict[str, Any]]:
    """What the client printed."""
    code, out, err = await run("node", str(JS / "client.js"), server.address, json.dumps(request))
    assert code == 0, err
    return documents(out)


@pytest.mark.usefixtures("js_modules")
async def test_javascript_hears_what_python_hears(pair: tuple[Server, Server]) -> None:
    _, gateway = pair
    theirs = parsed(await js(gateway, text=TEXT, voice="male2"))
    async with Client(gateway.address) as client:
        ours = [message async for message in client.stream(TEXT, voice="male2")]
    assert facts([getattr(response, response.WhichOneof("message") or "") for response in theirs]) == facts(ours)


def facts(messages: list[Any]) -> tuple[bytes, list[Any]]:
    """The audio, and all that is said of it but what differs from call to call."""
    audio, rest = bytearray(), []
    for message in messages:
        match message:
            case tts_pb2.AudioChunk():
                audio += message.data
            case tts_pb2.StreamStart():
                assert message.request_id
                message.ClearField("request_id")
                message.ClearField("cache_status")
            case tts_pb2.StreamEnd():
                assert message.timings.total_ms > 0
                message.ClearField("timings")
        if not isinstance(message, tts_pb2.AudioChunk):
            rest.append(message)
    return bytes(audio), rest


@pytest.mark.usefixtures("js_modules")
async def test_javascript_sends_every_kind_of_field(pair: tuple[Server, Server]) -> None:
    request = {
        "text": "hi",
        "language": "en-US",
        "format": {"container": "CONTAINER_RAW", "codec": "CODEC_PCM_S16LE", "sample_rate_hertz": 24_000},
        "controls": {"speed": 1.5, "oral": 0},
        "sampling": {"temperature": 0.5, "seed": 2**32 - 1},
        "refine_text": True,
    }
    theirs = parsed(await js(pair[1], **request))
    same = json_format.ParseDict(request, tts_pb2.StreamSynthesizeRequest())
    ours = await spoken(Door(pair[1]).speech.StreamSynthesize(same))
    assert b"".join(response.chunk.data for response in theirs) == ours.audio
    assert theirs[0].start.seed == ours.start.seed == 2**32 - 1


@pytest.mark.usefixtures("js_modules")
async def test_javascript_is_told_what_is_wrong(pair: tuple[Server, Server]) -> None:
    (printed,) = await js(pair[1], text="", voice="nobody")
    assert printed["error"]["code"] == 3
    status = status_pb2.Status.FromString(base64.b64decode(printed["error"]["status"]))
    assert status.message == printed["error"]["details"]
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    assert [violation.field for violation in bad.field_violations] == ["text", "voice"]


async def test_the_lock_file_names_no_registry() -> None:
    assert '"resolved"' not in (JS / "package-lock.json").read_text()
