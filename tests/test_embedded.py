"""The stores that `chorus up` brings along: real servers, killed, and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from client.embedded import embedded, url_of
from common.errors import StartupError
from common.settings import Settings, load_settings
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc
from tests.test_cli import chorus, environment, ports, start, until_line


@pytest.fixture
def served(tmp_path: Path) -> Iterator[dict[str, str]]:
    """`chorus up`, with its environment."""
    env = ports() | {"XDG_STATE_HOME": str(tmp_path / "state"), "CHORUS_ENGINE": "tone"}
    with start(["up"], tmp_path, env, subprocess.DEVNULL) as process:
        until_line(process, "Ctrl-C stops everything")
        try:
            yield env
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert not list((tmp_path / "state/chorus").glob("*.url"))


def server(state: Path, name: str) -> list[int]:
    """The process of a store of ours: it works in the store's folder."""
    place = state / "chorus" / name
    found = []
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            if process.name.isdecimal() and (process / "cwd").readlink() == place:
                found.append(int(process.name))
    return found


def ask(env: dict[str, str], key: str) -> tuple[tts_pb2.SynthesizeResponse, str]:
    """A keyed call, and how it was answered."""
    with grpc.insecure_channel(env["CHORUS_GATEWAY_LISTEN"]) as channel:
        stub = tts_pb2_grpc.TextToSpeechServiceStub(channel)
        request = tts_pb2.SynthesizeRequest(text="hello")
        reply, call = stub.Synthesize.with_call(request, metadata=(("idempotency-key", key),), timeout=30)
        return reply, str(dict(call.trailing_metadata())["x-chorus-idempotency"])


@pytest.mark.timeout(180)
def test_what_the_ledger_acknowledged_outlives_its_death(served: dict[str, str], tmp_path: Path) -> None:
    reply, outcome = ask(served, "k")
    assert outcome == "claimed"
    (ledger,) = server(tmp_path / "state", "ledger")
    os.kill(ledger, signal.SIGKILL)
    assert ask(served, "while it is away")[1] in ("unavailable", "claimed")
    deadline = time.monotonic() + 60
    while ask(served, "k")[1] != "replayed":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert ask(served, "k")[0] == reply
    shown = chorus("tenants", cwd=tmp_path, env=served)
    assert "600" in shown.stdout, shown.stderr


def test_two_may_not_use_the_same_folder(tmp_path: Path) -> None:
    settings = load_settings([f"store.folder={tmp_path}"])
    with embedded(settings) as stores, pytest.raises(StartupError, match=r"store\.folder"), embedded(settings):
        assert [store.name for store in stores] == ["ledger", "cache"]


def test_urls_that_are_named_need_no_servers_of_ours(tmp_path: Path) -> None:
    settings = Settings(store={"ledger": "redis://one", "folder": tmp_path})
    with embedded(settings) as stores:
        assert stores == []
    assert url_of(settings, "ledger") == url_of(settings, "cache") == "redis://one"
    assert url_of(load_settings([f"store.folder={tmp_path}"]), "ledger") is None


@pytest.mark.timeout(120)
def test_its_stores_end_with_it_however_it_ends(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux tells a process that its parent died")
    env = environment(ports() | {"XDG_STATE_HOME": str(tmp_path / "state"), "CHORUS_ENGINE": "tone"})
    with start(["up"], tmp_path, env, subprocess.DEVNULL) as process:
        until_line(process, "Ctrl-C stops everything")
        running = [server(tmp_path / "state", name) for name in ("ledger", "cache")]
        process.kill()
    assert [len(found) for found in running] == [1, 1]
    deadline = time.monotonic() + 60
    while any(server(tmp_path / "state", name) for name in ("ledger", "cache")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_waits_for_the_one_before_it(tmp_path: Path) -> None:
    # Of a `chorus up` that was killed, for example: both would write to one append-only file.
    with embedded(load_settings([f"store.folder={tmp_path}"])) as (ledger, _):
        first = subprocess.Popen(ledger.command())
        second = None
        try:
            until_there(ledger.socket)
            ledger.socket.unlink()
            second = subprocess.Popen(ledger.command())
            time.sleep(1.0)
            assert not ledger.socket.exists()
            assert second.poll() is None
            first.terminate()
            first.wait(30)
            until_there(ledger.socket)
        finally:
            for process in filter(None, (first, second)):
                process.terminate()
                process.wait(30)


def until_there(path: Path) -> None:
    """Waits for a file."""
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
