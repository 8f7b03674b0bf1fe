"""TLS and mutual TLS between callers, gateways and services, with certificates made here."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme

from client.client import CallError, Client, Tls
from common.errors import StartupError
from common.settings import TlsSettings
from common.tls import channel_credentials, server_credentials
from tests.stack import ROOT, Server, Stack, free_port


@dataclass
class Authority:
    """Makes certificates."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self._ca = trustme.CA()
        self.ca = self.folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.ca))

    def pair(self, name: str, *names: str) -> tuple[Path, Path]:
        """A certificate for these names, and its key."""
        made = self._ca.issue_cert(*(names or (name,)))
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))
        key.write_bytes(made.private_key_pem.bytes())
        return certificate, key


def shown(pair: tuple[Path, Path]) -> dict[str, Any]:
    return {"tls_certificate": pair[0], "tls_key": pair[1]}


async def says_hello(client: Client) -> bool:
    """Whether a call gets through."""
    try:
        return bool((await client.synthesize("hello")).audio)
    except CallError as error:
        if error.code is not grpc.StatusCode.UNAVAILABLE:
            raise
        return False


async def healthy(server: Server, ca: Path, pair: tuple[Path, Path] | None = None) -> None:
    """Waits until a server that speaks TLS has a backend."""
    certificate, key = pair or (None, None)
    async with Client(server.address, tls=Tls(ca, certificate, key), attempts=200) as client:
        await client.synthesize("are you there?")


async def test_every_hop_is_encrypted_and_knows_who_is_there(stack: Stack, tmp_path: Path) -> None:
    inside, outside, strangers = (Authority(tmp_path / name) for name in ("inside", "outside", "strangers"))
    inner = inside.pair("service", "127.0.0.1")
    service = await stack.service(wait=False, tls_callers_ca=inside.ca, **shown(inner))
    # The gateway shows one certificate to both sides: its callers know its signer, and so do its services.
    edge = inside.pair("gateway", "127.0.0.1")
    gateway = await stack.gateway(
        service, wait=False, tls_callers_ca=outside.ca, tls_services_ca=inside.ca, **shown(edge)
    )
    mine = outside.pair("caller")
    await healthy(gateway, inside.ca, mine)

    async with Client(gateway.address, tls=Tls(inside.ca, *mine), attempts=1) as known:
        assert await says_hello(known)
    for tls in (
        None,  # no TLS
        Tls(inside.ca),  # nothing shown
        Tls(inside.ca, *strangers.pair("caller")),  # something that nobody knows
        Tls(outside.ca, *mine),  # the gateway is not whom it believes
    ):
        async with Client(gateway.address, tls=tls, attempts=1, timeout=5.0) as stranger:
            assert not await says_hello(stranger)
    # Round the gateway: the callers' certificates open nothing there.
    async with Client(service.address, tls=Tls(inside.ca, *mine), attempts=1, timeout=5.0) as stranger:
        assert not await says_hello(stranger)


async def test_a_new_certificate_is_shown_without_a_restart(stack: Stack, tmp_path: Path) -> None:
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    certificate, key = old.pair("gateway", "127.0.0.1")
    service = await stack.service()
    gateway = await stack.gateway(service, wait=False, tls_certificate=certificate, tls_key=key)
    await healthy(gateway, old.ca)
    for source, target in zip(new.pair("gateway", "127.0.0.1"), (certificate, key), strict=True):
        source.replace(target)
    async with Client(gateway.address, tls=Tls(new.ca), attempts=20) as client:
        assert await says_hello(client)


@pytest.mark.parametrize("given", [{"certificate"}, {"key"}, {"callers_ca"}, {"certificate", "key"}])
def test_what_is_missing_is_told_at_the_start(tmp_path: Path, given: set[str]) -> None:
    with pytest.raises(StartupError):
        server_credentials(TlsSettings(**dict.fromkeys(given, tmp_path / "nothing.pem")))


def test_a_certificate_without_its_key_is_no_identity(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="needs its key"):
        channel_credentials(None, tmp_path / "certificate.pem")


async def what_check_says(address: str, *options: str) -> str:
    """Of a server that it does not reach."""
    command = (sys.executable, "-m", "client.cli", "check", "--address", address, *options)
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    assert process.returncode == 69
    return " ".join(said.decode().split())


async def test_the_command_line_tells_what_is_wrong_with_tls(stack: Stack, tmp_path: Path) -> None:
    ours, others = Authority(tmp_path / "ours"), Authority(tmp_path / "others")
    service = await stack.service()
    plain = await stack.gateway(service)
    secret = await stack.gateway(service, wait=False, **shown(ours.pair("gateway", "127.0.0.1")))
    await healthy(secret, ours.ca)
    assert "--ca FILE" in await what_check_says(secret.address)
    assert "does not believe" in await what_check_says(secret.address, "--ca", str(others.ca))
    assert "speaks none" in await what_check_says(plain.address, "--ca", str(ours.ca))
    assert "chorus up" in await what_check_says(f"127.0.0.1:{free_port()}")
