"""Settings: where they come from, and how all that is wrong is said at once."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from client.cli import app
from common.errors import StartupError
from common.settings import environment, load_settings, parse_assignments

SECRET = "between-us-alone"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings but those of the test."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.upper().startswith("CHORUS_")]:
        monkeypatch.delenv(name)


def faults(assignments: Sequence[str] = ()) -> str:
    """What a person who starts a process is told."""
    with pytest.raises(StartupError) as caught:
        load_settings(assignments)
    return str(caught.value)


def test_command_line_beats_environment_beats_file_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["message_bytes", "text_characters", "concurrent_calls", "deadline_max"]
    monkeypatch.setenv("CHORUS_LIMITS_MESSAGE_BYTES", "2")
    monkeypatch.setenv("CHORUS_LIMITS_TEXT_CHARACTERS", "2")
    Path("chorus.toml").write_text("[limits]\n" + "".join(f"{name} = 3\n" for name in names[:3]))
    limits = load_settings(["limits.message_bytes=1"]).limits
    assert [getattr(limits, name) for name in names] == [1, 2, 3, 3600]


def test_a_file_of_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("other.toml").write_text('engine = "tone"\n[tone]\nfaults = "oom>3"\n')
    monkeypatch.setenv("CHORUS_CONFIG", "other.toml")
    settings = load_settings()
    assert (settings.engine, settings.tone.faults) == ("tone", "oom>3")


def test_all_faults_of_all_sources_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("chorus.toml").write_text("color = 1\n[batcher]\nmax_wating = 5\n")
    monkeypatch.setenv("CHORUS_LIMITS_MESSAGE_BYTES", "many")
    monkeypatch.setenv("CHORUS_SERVICE_LISTN", ":1")
    told = faults(["engine=choir", "log.level=loud", "gateway.listen=here", "espeak.processes=-1"])
    for name in (
        *("color", "batcher.max_wating", "limits.message_bytes", "service.listn"),
        *("engine", "log.level", "gateway.listen", "espeak.processes"),
    ):
        assert f"\n  {name}: " in told
    assert "chorus config" in told


@pytest.mark.parametrize(
    "assignment",
    [
        "service.listen=50061",
        "service.listen=host:99999",
        "service.listen=host:",
        "service.metrics_listen=unix:/tmp/metrics",
        "limits.deadline_max=nan",
        "limits.deadline_max=0",
        "service.drain_seconds=-1",
        "batcher.max_waiting=0",
        "batcher.max_waiting=1.5",
        "debug=perhaps",
        "secret=",
        "service=x",
        "nothing=1",
        "service.nothing=1",
        "service.listen.nothing=1",
        "=1",
    ],
)
def test_a_wrong_value_is_named(assignment: str) -> None:
    assert f"  {assignment.partition('=')[0].removesuffix('.listen.nothing')}" in faults([assignment])


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::1]:5", "unix:/run/chorus", "unix:relative"])
def test_addresses(address: str) -> None:
    assert load_settings([f"service.listen={address}"]).service.listen == address


@pytest.mark.parametrize("content", [b"engine = = 1", b'engine = "\xff"'])
def test_a_file_that_is_no_toml(content: bytes) -> None:
    Path("chorus.toml").write_bytes(content)
    assert "chorus.toml is not TOML" in faults()


def test_a_section_as_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHORUS_SERVICE", "x")
    assert '"service"' in faults()


def test_assignments() -> None:
    assert parse_assignments(["a.b=1", "a.c=x=y", "d="]) == {"a": {"b": "1", "c": "x=y"}, "d": ""}
    for wrong, word in ((["a.b"], "NAME=VALUE"), (["a=1", "a.b=2"], "a has a value already")):
        with pytest.raises(StartupError, match=word):
            parse_assignments(wrong)


def test_settings_are_frozen() -> None:
    settings = load_settings()
    for section, name in ((settings, "engine"), (settings.limits, "message_bytes")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, name, 1)


@pytest.mark.parametrize(
    "assignments",
    [
        [],
        [f"secret={SECRET}", "debug=true", "engine=tone", "tone.trace=/a file/of rows", "log.format=json"],
        [
            "tone.faults=row@3:你好; oom>2",
            "limits.deadline_max=0.1",
            "gateway.backends=10.0.0.1:1,10.0.0.2:2",
            "tone.slots=3",
        ],
    ],
)
def test_a_process_passes_its_settings_on(monkeypatch: pytest.MonkeyPatch, assignments: list[str]) -> None:
    settings = load_settings(assignments)
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)
    Path("chorus.toml").write_text('engine = "chattts"\n')
    assert load_settings() == settings


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_config_shows_all_but_the_secret(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    printed = io.StringIO()
    monkeypatch.setattr("client.cli.out", Console(file=printed))
    done = CliRunner().invoke(app, ["config", *flags, "--set", f"secret={SECRET}", "--set", "limits.message_bytes=77"])
    assert done.exit_code == 0, done.exception
    shown = printed.getvalue()
    assert SECRET not in shown
    assert "***" in shown
    assert "77" in shown
    if flags:
        assert set(json.loads(shown)) == set(type(load_settings()).model_fields)


def test_a_secret_is_never_shown() -> None:
    settings = load_settings([f"secret={SECRET}"])
    assert SECRET not in f"{settings!r} {settings} {settings.model_dump_json()}"
    assert SECRET not in faults([f"secret={SECRET}", "engine=choir"])
