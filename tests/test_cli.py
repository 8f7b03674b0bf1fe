"""The command line, as a person uses it: real processes, the espeak engine, files that can be played."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import wave
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import IO

import pytest

from common.errors import StartupError
from common.settings import load_settings
from tests.stack import ROOT, free_port

_states = TemporaryDirectory()
ARTICLE = ROOT / "tests/data/article.txt"
CHORUS = str(Path(sys.executable).with_name("chorus"))


def ports() -> dict[str, str]:
    """Settings that put every process on free ports."""
    return {
        f"CHORUS_{role}_{what}": f"127.0.0.1:{free_port()}"
        for role in ("SERVICE", "GATEWAY")
        for what in ("LISTEN", "METRICS_LISTEN")
    }


def environment(extra: dict[str, str]) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CHORUS_")}
    # Each run has a place of its own for what it keeps.
    return clean | {"COLUMNS": "200", "XDG_STATE_HOME": mkdtemp(prefix="chorus-test-", dir=_states.name)} | extra


def chorus(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CHORUS, *arguments], cwd=cwd, env=environment(env or {}), capture_output=True, text=True, timeout=60
    )


def start(arguments: list[str], cwd: Path, env: dict[str, str], log: IO[str] | int) -> subprocess.Popen[str]:
    command = [CHORUS, *arguments]
    return subprocess.Popen(command, cwd=cwd, env=environment(env), stdout=subprocess.PIPE, stderr=log, text=True)


def until_line(process: subprocess.Popen[str], wanted: str) -> list[str]:
    """Reads what a process prints, up to a line that has something in it."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if wanted in line:
            return lines
    raise AssertionError("".join(lines))


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """`chorus up --hello`, and the environment in which other commands find it."""
    folder = tmp_path_factory.mktemp("up")
    where = ports()
    with (folder / "log").open("w") as log, start(["up", "--hello"], folder, where, log) as process:
        lines = until_line(process, "Ctrl-C stops everything")
        (folder / "printed").write_text("".join(lines))
        yield folder, {"CHORUS_ADDRESS": where["CHORUS_GATEWAY_LISTEN"]}
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def wav(path: Path) -> tuple[int, bytes]:
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
        return file.getframerate(), file.readframes(file.getnframes())


def test_up_speaks_and_says_what_to_try(up: tuple[Path, dict[str, str]]) -> None:
    folder, env = up
    printed = (folder / "printed").read_text()
    rate, samples = wav(folder / "hello.wav")
    told = re.search(r"hello.wav: ([0-9.]+) s of speech by espeak, first audio after [0-9]+ ms", printed)
    assert told is not None
    assert float(told[1]) == pytest.approx(len(samples) / 2 / rate, abs=0.01)
    assert max(samples) > 0
    for command in ("chorus say", "grpcurl", "buf curl"):
        assert command in printed
    assert env["CHORUS_ADDRESS"] in printed
    assert "ChatTTS is not loaded" in (folder / "log").read_text()


def test_say(up: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    done = chorus("say", "你好，世界", "-o", "a.wav", cwd=tmp_path, env=up[1])
    assert (done.returncode, done.stderr) == (0, "")
    rate, samples = wav(tmp_path / "a.wav")
    assert 0.5 < len(samples) / 2 / rate < 5
    streamed = chorus("say", "你好，世界", "-o", "b.wav", "--stream", cwd=tmp_path, env=up[1])
    assert streamed.returncode == 0
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    other = chorus("say", "你好，世界", "-o", "c.wav", "--voice", "male1", cwd=tmp_path, env=up[1])
    assert other.returncode == 0
    assert (tmp_path / "a.wav").read_bytes() != (tmp_path / "c.wav").read_bytes()


def test_say_speaks_the_whole_article(up: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    done = chorus("say", "-f", str(ARTICLE), "-o", "article.wav", cwd=tmp_path, env=up[1])
    assert done.returncode == 0, done.stderr
    rate, samples = wav(tmp_path / "article.wav")
    ours = len(samples) / 2 / rate
    assert ours == pytest.approx(espeak_seconds(ARTICLE.read_text(), tmp_path), rel=0.10)


ESPEAK_ALONE = """
import ctypes, sys, espeakng_loader
library = ctypes.CDLL(espeakng_loader.get_library_path())
rate = library.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0)
samples = 0
@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
def count(wav, number, events):
    global samples
    samples += number
    return 0
library.espeak_SetSynthCallback(count)
library.espeak_SetVoiceByName(b"cmn+f2")
text = open(sys.argv[1], "rb").read() + b"\\0"
library.espeak_Synth(text, len(text), 0, 1, 0, 1, None, None)
library.espeak_Synchronize()
print(samples / rate)
"""


def espeak_seconds(text: str, folder: Path) -> float:
    """How long espeak-ng itself speaks a text, all of it at once, in its own way."""
    (folder / "text").write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", ESPEAK_ALONE, str(folder / "text")], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def test_voices(up: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    done = chorus("voices", cwd=tmp_path, env=up[1])
    assert done.returncode == 0
    for voice in ("female1", "female2", "male1", "male2"):
        assert voice in done.stdout
    assert "zh-CN" in done.stdout


def test_check(up: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    done = chorus("check", cwd=tmp_path, env=up[1])
    assert done.returncode == 0
    assert done.stdout.startswith("ok: espeak")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["say", "x", "--voice", "nobody"], 1, "known are female1, female2, male1, male2"),
        (["say", "。。。"], 1, "nothing to speak"),
        (["say"], 2, "give a text"),
        (["say", "x", "--format", "doc"], 2, "is not known"),
        (["say", "x", "--language", "tlh"], 1, "served are"),
        (["say", "-f", "missing.txt"], 2, "does not exist"),
        (["say", "x", "-a", "127.0.0.1:1"], 69, "chorus up"),
        (["check", "-a", "127.0.0.1:1"], 69, "chorus up"),
        (["up", "--set", "gateway.listen=nonsense"], 78, "must be HOST:PORT"),
        (["service", "--set", "nonsense=1"], 78, "nonsense"),
        (["service", "--set", "engine=chattts", "--set", "chattts.folder=/nowhere"], 78, "is no folder"),
        (["say", "x", "-o", "/missing/folder/x.wav"], 1, "No such file"),
    ],
)
def test_what_goes_wrong_is_said(
    up: tuple[Path, dict[str, str]], tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    done = chorus(*arguments, cwd=tmp_path, env=up[1])
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr


def test_config_masks_secrets_and_can_be_read_back(tmp_path: Path) -> None:
    env = {"CHORUS_SECRET": "opensesame", "CHORUS_BATCHER_MAX_WAITING": "7"}
    done = chorus("config", "--set", "service.drain_seconds=9", cwd=tmp_path, env=env)
    assert done.returncode == 0
    assert "opensesame" not in done.stdout
    values = json.loads(chorus("config", "--json", cwd=tmp_path, env=env).stdout)
    assert values["batcher"]["max_waiting"] == 7
    (tmp_path / "chorus.toml").write_text(done.stdout)
    again = json.loads(chorus("config", "--json", cwd=tmp_path).stdout)
    assert (again["service"]["drain_seconds"], again["batcher"]["max_waiting"]) == (9, 7)


def test_every_command_explains_itself(tmp_path: Path) -> None:
    commands = ("up", "service", "gateway", "say", "normalize", "voices", "check", "config")
    overview = chorus("--help", cwd=tmp_path).stdout
    for command in commands:
        assert command in overview
        assert chorus(command, "--help", cwd=tmp_path).returncode == 0


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(line) for line in found.split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_up_starts_again_what_dies_and_takes_all_with_it(tmp_path: Path) -> None:
    where = ports() | {"CHORUS_ENGINE": "tone", "CHORUS_LOG_LEVEL": "warning"}
    with start(["up", "--cards", "2"], tmp_path, where, subprocess.DEVNULL) as process:
        until_line(process, "Ctrl-C stops everything")
        before = children_of(process.pid)
        assert len(before) == 5  # two stores, two services, a gateway
        os.kill(before[2], signal.SIGKILL)
        address = {"CHORUS_ADDRESS": where["CHORUS_GATEWAY_LISTEN"]}
        assert chorus("say", "still speaking", cwd=tmp_path, env=address).returncode == 0
        while len(now := children_of(process.pid)) < 5 or before[2] in now:
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    while any(alive(pid) for pid in now):
        time.sleep(0.02)


def test_up_fails_clearly_where_an_address_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = ports() | {"CHORUS_ENGINE": "tone", "CHORUS_GATEWAY_LISTEN": f"127.0.0.1:{taken.getsockname()[1]}"}
        done = chorus("up", cwd=tmp_path, env=where)
    assert done.returncode == 78
    assert "is another process there?" in done.stderr


def test_settings_of_the_shell_are_checked() -> None:
    with pytest.raises(StartupError, match=r"tone\.slots"):
        load_settings(["tone.slots=none"])


@pytest.mark.parametrize(
    ("arguments", "magic", "name"),
    [
        (["-o", "a.mp3"], b"\xff", "a.mp3"),
        (["-o", "a.ogg"], b"OggS", "a.ogg"),
        (["--format", "flac"], b"fLaC", "chorus.flac"),
        (["--format", "opus", "--rate", "16000"], b"OggS", "chorus.ogg"),
        (["--format", "mulaw", "--stream"], b"RIFF", "chorus.wav"),
        (["--format", "aac"], b"\xff", "chorus.aac"),
        (["--rate", "48000"], b"RIFF", "chorus.wav"),
    ],
)
def test_say_in_other_formats(
    up: tuple[Path, dict[str, str]], tmp_path: Path, arguments: list[str], magic: bytes, name: str
) -> None:
    done = chorus("say", "Hello there.", *arguments, cwd=tmp_path, env=up[1])
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / name).read_bytes().startswith(magic)


def test_say_what_is_piped_in(up: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    done = subprocess.run(
        [CHORUS, "say", "-", "-o", "a.wav"],
        cwd=tmp_path,
        env=environment(up[1]),
        input="The first line.\nAnd the second one, without an end",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    rate, samples = wav(tmp_path / "a.wav")
    assert 2 < len(samples) / 2 / rate < 8


def test_say_in_cantonese(up: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    for language in ("zh-CN", "yue"):
        done = chorus("say", "他们没有来。", "--language", language, "-o", f"{language}.wav", cwd=tmp_path, env=up[1])
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "yue.wav").read_bytes() != (tmp_path / "zh-CN.wav").read_bytes()


def test_normalize(up: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    done = chorus("normalize", "价格是¥3,500.50 \U0001f600", cwd=tmp_path, env=up[1])
    assert done.returncode == 0
    assert "三千五百" in done.stdout
    assert "\U0001f600" in done.stderr


def test_up_does_not_speak_through_somebody_else(up: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    env = ports() | {"CHORUS_ENGINE": "tone", "CHORUS_GATEWAY_LISTEN": up[1]["CHORUS_ADDRESS"]}
    done = chorus("up", cwd=tmp_path, env=env)
    assert (done.returncode, "is another process there?" in done.stderr) == (78, True)


def test_a_call_that_fails_leaves_the_old_file(up: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    (tmp_path / "keep.wav").write_text("precious")
    assert chorus("say", "x", "--voice", "nobody", "-o", "keep.wav", cwd=tmp_path, env=up[1]).returncode == 1
    assert [path.name for path in tmp_path.iterdir()] == ["keep.wav"]
    assert (tmp_path / "keep.wav").read_text() == "precious"


def test_waiting_for_typed_text_can_be_interrupted(up: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    with subprocess.Popen(
        [CHORUS, "say", "-", "--voice", "nobody"], cwd=tmp_path, env=environment(up[1]), stdin=subprocess.PIPE
    ) as process:
        assert process.wait(30) == 1  # the error ends it, although nothing was typed
