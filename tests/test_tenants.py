"""Who may call: the file of tenants, keys, and a gateway that asks for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from common.errors import StartupError, Unauthenticated
from common.metadata import Metadata
from gateway.tenants import ANYONE, Bucket, Tenant, Tenants, hashed, new_key, read_tenants
from protos.chorus.v1 import tts_pb2
from tests.calls import Door, failure, logged
from tests.stack import Stack, free_port, stream_request, text_request

KEY, OTHER = new_key(), new_key()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def two(path: Path) -> Path:
    return write(
        path,
        f"""
        [tenants.acme]
        keys = ["{hashed(KEY)}", "{hashed(OTHER)}"]
        requests_per_second = 50
        requests_burst = 100
        audio_seconds_per_second = 20
        concurrent = 8
        cache_scope = "tenant"
        [tenants.night]
        keys = ["{hashed("third")}"]
        priority = "batch"
        """,
    )


def test_a_file_with_two_tenants(tmp_path: Path) -> None:
    tenants = Tenants(two(tmp_path / "tenants.toml"))
    assert tenants.all() == (
        Tenant("acme", Bucket(50, 100), Bucket(20, 20), 8, "interactive", "tenant"),
        Tenant("night", priority="batch"),
    )
    assert tenants.get("acme").concurrent == 8
    assert tenants.get("gone") == Tenant("gone")
    for key, name in ((KEY, "acme"), (OTHER, "acme"), ("third", "night")):
        assert tenants.identify((("x-api-key", key),)) == name
        assert tenants.identify((("authorization", f"Bearer {key}"),)) == name
        assert tenants.identify((("authorization", f"bearer  {key} "),)) == name


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), "API_KEY_MISSING"),
        ((("x-api-key", ""),), "API_KEY_MISSING"),
        ((("authorization", "Basic abc"),), "API_KEY_MISSING"),
        ((("x-chorus-internal-tenant", "acme"),), "API_KEY_MISSING"),
        ((("x-api-key", "wrong"),), "API_KEY_WRONG"),
        ((("x-api-key", hashed(KEY)),), "API_KEY_WRONG"),
        ((("x-api-key", KEY[:-1]),), "API_KEY_WRONG"),
        ((("x-api-key", b"\xff"),), "API_KEY_MISSING"),
        ((("authorization", "Bearer é"),), "API_KEY_WRONG"),
    ],
)
def test_who_is_nobody(tmp_path: Path, metadata: Metadata, reason: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        Tenants(two(tmp_path / "tenants.toml")).identify(metadata)
    assert caught.value.reason == reason
    assert KEY[:-1] not in caught.value.message


def test_without_a_file_everybody_is_the_same() -> None:
    assert Tenants(None).identify((("x-api-key", "whatever"),)) == ANYONE


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "tenants"),
        ("tenants = 1", "tenants"),
        ("[tenants]", "tenants"),
        ("nonsense", "not TOML"),
        ("[limits]", "limits"),
        ("[tenants.acme]\nkey = 1", "tenants.acme.key"),
        ("[tenants.acme]\nrequests_per_second = 0", "tenants.acme.requests_per_second"),
        ("[tenants.acme]\nconcurrent = 0", "tenants.acme.concurrent"),
        ("[tenants.acme]\npriority = 'high'", "tenants.acme.priority"),
        ("[tenants.'A b']", "tenants"),
        ("[tenants.acme]\nrequests_burst = 5", "without requests_per_second"),
        ("[tenants.gateway]", "Chorus's own"),
        ("[tenants.acme]\nkeys = ['s3cret']", "never the key itself"),
        (f"[tenants.a]\nkeys = ['{hashed('x')}']\n[tenants.b]\nkeys = ['{hashed('x')}']", "two tenants"),
    ],
)
def test_a_faulty_file_says_where(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(StartupError) as caught:
        read_tenants(write(tmp_path / "tenants.toml", text))
    assert says in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot read"):
        Tenants(tmp_path / "nothing.toml")


def test_a_change_is_seen_and_a_faulty_one_changes_nothing(tmp_path: Path) -> None:
    path = two(tmp_path / "tenants.toml")
    tenants = Tenants(path)
    write(path, "[tenants.acme")
    tenants.refresh()
    assert len(tenants.all()) == 2
    path.unlink()
    tenants.refresh()
    assert len(tenants.all()) == 2
    write(path, f"[tenants.new]\nkeys = ['{hashed(KEY)}']")
    tenants.refresh()
    assert tenants.identify((("x-api-key", KEY),)) == "new"
    with pytest.raises(Unauthenticated):
        tenants.identify((("x-api-key", OTHER),))
    # For calls of it that still run.
    assert tenants.get("acme").cache_scope == "tenant"


async def test_a_gateway_asks_for_a_key_and_tells_it_to_nobody(stack: Stack, tmp_path: Path) -> None:
    path = two(tmp_path / "tenants.toml")
    service, gateway = await stack.pair(gateway_tenants=path, secret="between us")
    door = Door(gateway)
    for metadata in ((), (("x-api-key", "wr0ng-key"),)):
        for call in (
            door.speech.Synthesize(text_request("hello"), metadata=metadata),
            door.voices.ListVoices(tts_pb2.ListVoicesRequest(), metadata=metadata),
        ):
            assert (await failure(call)).code is grpc.StatusCode.UNAUTHENTICATED
    assert await gateway.health() == 1  # needs no key
    await door.speech.Synthesize(text_request("hello"), metadata=(("x-api-key", KEY),))
    async for _ in door.speech.StreamSynthesize(
        stream_request("hello"), metadata=(("authorization", f"Bearer {KEY}"),)
    ):
        pass
    # A key that is withdrawn is of no use within a second or so.
    write(path, f"[tenants.acme]\nkeys = ['{hashed(OTHER)}']")
    async with asyncio.timeout(20):
        while await code_of(door.speech.Synthesize(text_request("hello"), metadata=(("x-api-key", KEY),))) is None:
            await asyncio.sleep(0.05)
    logs = gateway.log_path.read_text() + service.log_path.read_text()
    assert '"tenant":"acme"' in logs
    for secret in (KEY, OTHER, "wr0ng-key", "between us"):
        assert secret not in logs


async def test_a_batch_tenant_makes_no_interactive_calls(stack: Stack, tmp_path: Path) -> None:
    service, gateway = await stack.pair(gateway_tenants=two(tmp_path / "tenants.toml"))
    metadata = (("x-api-key", "third"), ("x-chorus-priority", "interactive"))
    reply = await Door(gateway).speech.Synthesize(text_request("hello"), metadata=metadata)
    line = await logged(service, reply.start.request_id)
    assert (line["tenant"], line["priority"]) == ("night", "batch")


@pytest.mark.parametrize("settings", [{}, {"gateway_reflection": "false", "gateway_allow_anonymous": "true"}])
async def test_a_gateway_is_not_open_to_other_machines_by_mistake(stack: Stack, settings: dict[str, Any]) -> None:
    service = await stack.service()
    address = f"0.0.0.0:{free_port()}"
    gateway = await stack.gateway(service, wait=False, gateway_listen=address, **settings)
    if not settings:
        assert await gateway.wait() == 78
        assert "gateway.tenants" in gateway.log_path.read_text()
        return
    await gateway.until_healthy()
    channel: Any = gateway.channel()
    reflection = channel.stream_unary("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
    assert await code_of(reflection(iter([b""]))) is grpc.StatusCode.UNIMPLEMENTED


async def test_health_and_reflection_may_need_a_key_too(stack: Stack, tmp_path: Path) -> None:
    service = await stack.service()
    settings = {"gateway_health_needs_key": "true", "gateway_reflection_needs_key": "true"}
    gateway = await stack.gateway(
        service, wait=False, gateway_tenants=two(tmp_path / "tenants.toml"), **cast("Any", settings)
    )
    channel: Any = gateway.channel()
    known = {"metadata": (("x-api-key", KEY),), "wait_for_ready": True, "timeout": 20}
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    reflection = channel.stream_unary("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
    assert await code_of(check(b"", **known)) is None
    assert await code_of(check(b"")) is grpc.StatusCode.UNAUTHENTICATED
    assert await code_of(reflection(iter([b""]))) is grpc.StatusCode.UNAUTHENTICATED
    assert await code_of(reflection(iter([b""]), **known)) is not grpc.StatusCode.UNAUTHENTICATED


async def code_of(call: Awaitable[Any]) -> grpc.StatusCode | None:
    """How a call fails, if it does."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return None
