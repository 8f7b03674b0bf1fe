"""The contract changes only on purpose: its baseline is on record, and what breaks it is found."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stack import ROOT

BASELINE = ROOT / "protos/baseline.binpb"


def breaks(folder: Path) -> str:
    """What `buf breaking` finds in a copy of the contract; nothing where it is compatible."""
    buf = Path(sys.executable).with_name("buf")
    done = subprocess.run([buf, "breaking", "--against", BASELINE], cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 100), done.stderr
    assert bool(done.stdout) == (done.returncode != 0)
    return done.stdout


def copy_contract(folder: Path, old: str = "", new: str = "") -> Path:
    """A copy of the contract in which one text stands for another, once."""
    shutil.copy(ROOT / "buf.yaml", folder)
    shutil.copytree(ROOT / "protos", folder / "protos", ignore=shutil.ignore_patterns("*.py*", "*.binpb"))
    proto = folder / "protos/chorus/v1/tts.proto"
    text = proto.read_text()
    assert old in text
    proto.write_text(text.replace(old, new, 1))
    return folder


def test_the_changelog_names_the_baseline() -> None:
    digest = hashlib.sha256(BASELINE.read_bytes()).hexdigest()[:12]
    assert f"Contract baseline: {digest}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_contract_is_compatible_with_its_baseline(tmp_path: Path) -> None:
    assert breaks(copy_contract(tmp_path)) == ""


def test_an_addition_is_compatible(tmp_path: Path) -> None:
    addition = "  bool refine_text = 7;\n  // New.\n  bool loud = 8;"
    assert breaks(copy_contract(tmp_path, "  bool refine_text = 7;", addition)) == ""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  bool refine_text = 7;", ""),
        ("  string voice = 2;", "  string voice = 20;"),
        ("  string voice = 2;", "  bytes voice = 2;"),
        ("CONTAINER_WAV = 1;", "CONTAINER_WAVE = 1;"),
        ("rpc GetVoice(GetVoiceRequest)", "rpc FindVoice(GetVoiceRequest)"),
        ("returns (stream StreamSynthesizeResponse)", "returns (StreamSynthesizeResponse)"),
    ],
)
def test_a_breaking_edit_is_found(tmp_path: Path, old: str, new: str) -> None:
    assert "tts.proto" in breaks(copy_contract(tmp_path, old, new))
