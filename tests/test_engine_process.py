"""An engine in a process of its own: it does what it does in ours, it fails as ours fails, and either side may die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode
from grpc.aio import EOF

from batcher import runner as runner_module
from batcher.engine import (
    EngineLostError,
    EngineOutOfMemoryError,
    Join,
    Plan,
    Report,
    RowRef,
    Segment,
)
from batcher.errors import StoppedError
from batcher.policy import Policy
from batcher.request import RequestEnded, RequestFailed
from batcher.runner import Runner
from client.cli import EXIT_CONFIG
from common.errors import StartupError
from common.settings import Settings, ToneSettings
from service.engines import process
from service.engines.process import EngineFailedError, EngineProcess, Load
from tests.calls import failure
from tests.elsewhere import Tone, broken, deadly, unloadable
from tests.stack import ROOT, START_SECONDS, Server, Stack, stream_request, text_request

PATIENCE = 30.0
JOINS = Plan(joins=((Join(RowRef(1, 0, 1), Segment("a text", "female1", "en-US")),),))


def settings(**tone: Any) -> Settings:
    return Settings(tone=ToneSettings(**{"slots": 6, "steps_per_character": 8} | tone))


@contextlib.contextmanager
def elsewhere(load: Load = Tone, stall_seconds: float = PATIENCE, **tone: Any) -> Iterator[EngineProcess]:
    engine = EngineProcess(load, settings(**tone), stall_seconds)
    try:
        yield engine
    finally:
        engine.close()


async def speak(runner: Runner, *texts: str, seed: int = 0) -> bytes:
    voice = random.Random(seed).choice(("female1", "male2"))
    segments = [Segment(text, voice, "zh-CN", index, seed) for index, text in enumerate(texts)]
    data = b""
    async with runner.speak(segments, max_rows=2, stream=bool(seed % 2)) as speaking:
        while not isinstance(event := await speaking.get(), RequestEnded):
            if isinstance(event, RequestFailed):
                raise event.error
            data += getattr(event, "data", b"")
    return data


class Recorded(Tone):
    """Remembers what it was asked and what it answered."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.ticks: list[tuple[Plan, Report | type[Exception]]] = []

    def run(self, plan: Plan) -> Report:
        try:
            report = super().run(plan)
        except Exception as error:
            self.ticks.append((plan, type(error)))
            raise
        self.ticks.append((plan, report))
        return report


@pytest.mark.parametrize("faults", ["", "row@3:bad;empty:nothing;long:long", "oom>4;oom@30", "step@20;step@60"])
async def test_it_answers_as_it_does_in_this_process(faults: str) -> None:
    here = Recorded(settings(faults=faults, max_steps=400))
    runner = Runner(here, Policy(recovery_seconds=0.01, first_audio_patience=100.0))
    runner.start()
    texts = ("one two", "bad things", "nothing at all", "so long", "你好，世界", "\U0001f600 é")
    calls = (speak(runner, *texts[n % 3 : n % 3 + 1 + n % 4], seed=n) for n in range(30))
    await asyncio.gather(*calls, return_exceptions=True)
    await runner.stop()
    assert len(here.ticks) > 20
    with elsewhere(faults=faults, max_steps=400) as there:
        for plan, expected in here.ticks:
            if isinstance(expected, Report):
                assert there.run(plan) == expected
                continue
            with pytest.raises(
                EngineOutOfMemoryError if expected is EngineOutOfMemoryError else EngineFailedError, match="injected"
            ):
                there.run(plan)


async def test_it_speaks_under_the_scheduler_and_presents_itself() -> None:
    here, texts = Tone(settings()), ("one two", "three", "四五")
    with elsewhere() as there:
        assert (there.name, there.voices, there.languages, there.notice) == (
            *(here.name, here.voices, here.languages, here.notice),
        )
        assert there.model_revision == here.model_revision
        assert (there.caps.slots, there.caps.samples_per_step) == (here.caps.slots, here.caps.samples_per_step)
        assert there.caps.predict(Segment("x" * 10, "female1", "en-US")) == here.caps.predict(
            Segment("x" * 10, "female1", "en-US")
        )
        sounds = []
        for engine in (here, there):
            runner = Runner(engine, Policy())
            runner.start()
            sounds.append(await asyncio.gather(*(speak(runner, *texts, seed=n) for n in range(8))))
            await runner.stop()
        assert sounds[0] == sounds[1]


def test_a_contradiction_is_told_with_its_traceback_and_the_engine_goes_on() -> None:
    with elsewhere() as engine:
        engine.run(JOINS)
        with pytest.raises(EngineFailedError, match=r"(?s)Traceback.*cannot join"):
            engine.run(JOINS)
        joins = Plan(joins=((Join(RowRef(2, 0, 2), Segment("a text", "female1", "en-US")),),), steps=2)
        assert [row.steps_done for row in engine.run(joins).rows] == [2]


# --- it does not come up


def test_why_it_cannot_be_loaded_is_told() -> None:
    with pytest.raises(StartupError, match="there are no weights; fetch them"):
        EngineProcess(unloadable, settings(), PATIENCE)


def test_it_dies_while_it_loads() -> None:
    with pytest.raises(StartupError, match="ended with code 9 while it loaded"):
        EngineProcess(deadly, settings(), PATIENCE)


def test_it_fails_while_it_loads(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StartupError, match=r"cannot be loaded \(EOFError\); the log says why"):
        EngineProcess(broken, settings(), PATIENCE)
    assert "in broken" in capfd.readouterr().err


def test_it_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(StartupError, match="cannot be started"):
        EngineProcess(Tone, settings(), PATIENCE)


# --- what cannot be sent


def test_an_error_with_characters_that_cannot_be_sent_is_told() -> None:
    with elsewhere() as engine:
        with pytest.raises(EngineFailedError, match=r"what cannot be sent: \\ud800"):
            engine.run(Plan(steps=Tone.SAYS))
        assert len(engine.run(JOINS).rows) == 1


def test_a_report_that_cannot_be_sent_ends_it(capfd: pytest.CaptureFixture[str]) -> None:
    with elsewhere() as engine, pytest.raises(EngineLostError, match="ended with code 1"):
        engine.run(Plan(steps=Tone.COUNTS))
    assert "TypeError" in capfd.readouterr().err


def test_a_plan_that_cannot_be_sent_ends_it() -> None:
    with elsewhere() as engine:
        segment = Segment("a text", "female1", "en-US", seed=2**70)
        with pytest.raises(EngineLostError, match="cannot be sent"):
            engine.run(Plan(joins=((Join(RowRef(1, 0, 1), segment),),)))
        assert not alive(engine.pid)


# --- it dies


def test_it_dies_at_work() -> None:
    with elsewhere() as engine:
        engine.run(JOINS)
        with pytest.raises(EngineLostError, match="ended with code 7"):
            engine.run(Plan(steps=Tone.DIES))
        with pytest.raises(EngineLostError):
            engine.run(Plan(steps=1))


def test_it_hangs_and_is_killed() -> None:
    with elsewhere(stall_seconds=0.3) as engine:
        with pytest.raises(EngineLostError, match=r"said nothing for 0\.3 s, and was killed"):
            engine.run(Plan(steps=Tone.HANGS))
        assert not alive(engine.pid)


def test_it_hangs_up_and_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "END_SECONDS", 0.2)
    with elsewhere() as engine:
        with pytest.raises(EngineLostError, match="ended with code -9"):
            engine.run(Plan(steps=Tone.LEAVES))
        assert not alive(engine.pid)


def test_it_is_stopped_before_it_can_take_a_large_plan() -> None:
    with elsewhere(stall_seconds=0.3) as engine:
        os.kill(engine.pid, signal.SIGSTOP)
        text = "x" * 4_000_000
        with pytest.raises(EngineLostError, match="said nothing"):
            engine.run(Plan(joins=((Join(RowRef(1, 0, 1), Segment(text, "female1", "en-US")),),)))


async def test_a_hang_is_told_as_one() -> None:
    errors: list[BaseException] = []
    with elsewhere(stall_seconds=0.3) as engine:
        runner = Runner(engine, Policy(), on_error=errors.append)
        runner.start()
        engine.watch(runner.lose)
        os.kill(engine.pid, signal.SIGSTOP)
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(StoppedError):
                await speak(runner, "nobody answers")
        await runner.stop()
    assert [str(error) for error in errors] == ["the engine said nothing for 0.3 s, and was killed"]


async def test_a_stop_does_not_wait_for_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "END_SECONDS", 0.2)
    monkeypatch.setattr(runner_module, "STOP_SECONDS", 0.2)
    with elsewhere(stall_seconds=10 * PATIENCE) as engine:
        runner = Runner(engine, Policy())
        runner.start()
        os.kill(engine.pid, signal.SIGSTOP)
        hearing = asyncio.create_task(speak(runner, "nobody answers"))
        while not runner.stats().rows:
            await asyncio.sleep(0.01)
        async with asyncio.timeout(PATIENCE):
            await runner.stop()
            with pytest.raises(StoppedError):
                await hearing
        assert not alive(engine.pid)


async def test_it_dies_while_nothing_is_asked_of_it() -> None:
    errors: list[BaseException] = []
    died = asyncio.Event()
    with elsewhere() as engine:
        runner = Runner(engine, Policy(), on_error=errors.append, on_death=died.set)
        runner.start()
        engine.watch(runner.lose)
        await speak(runner, "before")
        os.kill(engine.pid, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE):
            await died.wait()
        assert runner.dead
        with pytest.raises(StoppedError):
            await speak(runner, "after")
        await runner.stop()
    assert [type(error) for error in errors] == [EngineLostError]


async def test_it_dies_under_callers_and_each_is_told_once() -> None:
    errors: list[BaseException] = []
    died = asyncio.Event()
    with elsewhere(step_base_ms=5.0) as engine:
        runner = Runner(engine, Policy(), on_error=errors.append, on_death=died.set)
        runner.start()
        engine.watch(runner.lose)
        calls = [asyncio.create_task(speak(runner, "a long text" * 20, seed=n)) for n in range(9)]
        async with asyncio.timeout(PATIENCE):
            while runner.stats().rows < 6:
                await asyncio.sleep(0.01)
            os.kill(engine.pid, signal.SIGKILL)
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            await died.wait()
        assert {type(outcome) for outcome in outcomes} == {StoppedError}
        await runner.stop()
    assert [type(error) for error in errors] == [EngineLostError]


def test_a_close_is_no_death() -> None:
    told: list[Exception] = []
    with elsewhere() as engine:
        engine.watch(told.append)
    assert not alive(engine.pid)
    assert not told


def test_signals_that_stop_the_service_do_not_stop_it() -> None:
    with elsewhere() as engine:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(engine.pid, number)
        assert len(engine.run(JOINS).rows) == 1


def test_it_does_not_outlive_its_parent() -> None:
    """Whatever it does when the parent is killed: nothing, a plan that hangs, even with Python's lock, or loading."""
    script = """
import os, signal, sys, threading, time
from batcher.engine import Plan
from common.settings import Settings
from service.engines.process import EngineProcess
from tests.elsewhere import Tone, endless

what = sys.argv[1]
if what == "loading":
    threading.Thread(target=lambda: (sys.stdin.readline(), os.kill(os.getpid(), signal.SIGKILL))).start()
    EngineProcess(endless, Settings(), 30.0)
engine = EngineProcess(Tone, Settings(), 30.0)
print(engine.pid, flush=True)
if what != "resting":
    threading.Thread(target=engine.run, args=(Plan(steps=getattr(Tone, what)),)).start()
    time.sleep(0.3)
os.kill(os.getpid(), signal.SIGKILL)
"""
    for what in ("resting", "HANGS", "HOLDS"):
        command = [sys.executable, "-c", script, what]
        ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=PATIENCE, check=False)
        assert ended.returncode == -signal.SIGKILL
        until_gone(int(ended.stdout))
    with subprocess.Popen(
        [sys.executable, "-c", script, "loading"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdin is not None
        assert parent.stdout.readline() == "loading\n"
        (child,) = children(parent.pid)
        parent.stdin.write("now\n")
        parent.stdin.flush()
        until_gone(child)


# --- the real service


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def until_gone(pid: int) -> None:
    until = time.monotonic() + PATIENCE
    while alive(pid):
        assert time.monotonic() < until, "it lives on"
        time.sleep(0.02)


async def chattts(stack: Stack, checkpoint: Path, **fields: Any) -> tuple[Server, int]:
    """A service with ChatTTS, and the id of its engine's process."""
    service = await stack.service(
        wait=False,
        engine="chattts",
        chattts_folder=checkpoint,
        chattts_check_sums=False,
        chattts_device="cpu",
        chattts_slots=4,
        **fields,
    )
    await service.until_healthy(2 * START_SECONDS)
    (engine,) = children(service.process.pid)
    return service, engine


async def test_the_engine_of_a_real_service_is_killed(stack: Stack, tiny_checkpoint: Path) -> None:
    service, engine = await chattts(stack, tiny_checkpoint)
    assert "torch" not in maps(service.process.pid), "PyTorch is the engine's alone"
    stub = service.stub()
    call = stub.StreamSynthesize(stream_request("Hello there. " * 300), timeout=600)
    await call.read()
    os.kill(engine, signal.SIGKILL)
    told = await failure(_rest(call))
    assert (told.code, told.reason) == (StatusCode.UNAVAILABLE, "STOPPING")
    assert await service.wait() == EXIT_CONFIG
    assert any(line["event"] == "engine error" for line in service.log())
    assert "the engine died; the log says why" in service.log_path.read_text()


async def test_a_service_that_is_killed_or_stopped_takes_its_engine_along(stack: Stack, tiny_checkpoint: Path) -> None:
    service, engine = await chattts(stack, tiny_checkpoint)
    service.signal(signal.SIGKILL)
    await asyncio.to_thread(until_gone, engine)
    service, engine = await chattts(stack, tiny_checkpoint)
    call = asyncio.ensure_future(service.stub().Synthesize(text_request("Hello there."), timeout=PATIENCE))
    await service.until_metric("chorus_batcher_requests", 1)
    # As Ctrl-C at a terminal: it goes to both, and the caller is heard out.
    os.kill(engine, signal.SIGINT)
    service.signal(signal.SIGINT)
    assert (await call).audio
    assert await service.wait() == 0
    assert not alive(engine)


async def test_who_stops_a_service_that_loads_need_not_wait(stack: Stack, tmp_path: Path) -> None:
    """Its weights are fetched from a hub that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as hub, pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        environment.setenv("HF_HOME", str(tmp_path))
        environment.setenv("NO_PROXY", "127.0.0.1")
        environment.delenv("HF_HUB_OFFLINE", raising=False)
        hub.settimeout(START_SECONDS)
        service = await stack.service(wait=False, engine="chattts", chattts_device="cpu")
        asked, _ = await asyncio.to_thread(hub.accept)
        (engine,) = children(service.process.pid)
        service.signal(signal.SIGINT)
        assert await service.wait(5.0) != EXIT_CONFIG, "it did not fail by itself"
        await asyncio.to_thread(until_gone, engine)
        asked.close()


async def _rest(call: Any) -> None:
    while await call.read() is not EOF:
        pass
