"""What the README says to type works as it stands there."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack import ROOT
from tests.test_cli import environment, ports, until_line

README = (ROOT / "README.md").read_text()
VENV = ROOT / ".venv/bin"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def lines(language: str) -> list[str]:
    return [line for block in blocks(language) for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def served() -> Iterator[dict[str, str]]:
    """`make run`, in this checkout; installs into .venv if that was never done."""
    where = ports()
    env = environment(where) | {"PYTHON": sys.executable}
    with subprocess.Popen(
        ["make", "run"], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        printed = "".join(until_line(process, "Ctrl-C stops everything"))
        assert "hello.wav: " in printed
        place = {"XDG_STATE_HOME": env["XDG_STATE_HOME"]}
        yield environment({"CHORUS_ADDRESS": where["CHORUS_GATEWAY_LISTEN"]} | place)
        up = subprocess.run(["pgrep", "-P", str(process.pid), "-a"], capture_output=True, text=True, check=False)
        for line in up.stdout.splitlines():
            os.kill(int(line.split()[0]), signal.SIGINT)
        assert process.wait(60) == 0


def seconds(path: Path) -> float:
    with wave.open(str(path)) as file:
        return float(file.getnframes() / file.getframerate())


@pytest.mark.timeout(600)
def test_make_run_speaks(served: dict[str, str]) -> None:
    assert "make run" in "".join(lines("bash"))
    assert seconds(ROOT / "hello.wav") > 1


def test_the_run_environment_has_no_torch(served: dict[str, str]) -> None:
    done = subprocess.run([VENV / "python", "-c", "import torch"], capture_output=True, text=True, check=False)
    assert "No module named 'torch'" in done.stderr


def test_make_test_is_what_runs_the_tests(served: dict[str, str]) -> None:
    done = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "python -m pytest" in done.stdout


@pytest.mark.parametrize("command", [line for line in lines("bash") if ".venv/bin/chorus" in line])
def test_commands(served: dict[str, str], command: str) -> None:
    done = subprocess.run(command, shell=True, cwd=ROOT, env=served, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    if written := re.search(r"-o (\S+)", command):
        assert (ROOT / written[1]).stat().st_size > 4000


def test_the_client_example(served: dict[str, str], tmp_path: Path) -> None:
    (example,) = blocks("python")
    program = example.replace("127.0.0.1:50051", served["CHORUS_ADDRESS"])
    done = subprocess.run([VENV / "python", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bytes of WAV" in done.stdout
    assert "A longer text." in done.stdout


def test_buf_curl_and_the_line_that_makes_a_file(served: dict[str, str], tmp_path: Path) -> None:
    grpcurl, buf = lines("sh")
    assert grpcurl.startswith("grpcurl ")
    assert buf.startswith("buf curl ")
    # grpcurl itself is in no package registry; what it prints has the form that buf curl prints, from the same library.
    pipeline = grpcurl[grpcurl.index("| sed") :]
    command = buf.replace("localhost:50051", served["CHORUS_ADDRESS"]) + pipeline
    env = served | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(command, shell=True, cwd=tmp_path, env=env, check=True, capture_output=True)
    assert seconds(tmp_path / "hello.wav") > 0.5
    assert shutil.which("base64")


def test_the_table_of_reasons_is_complete() -> None:
    """Each reason that the code gives stands in the README, and no other."""
    sources = [path.read_text() for name in ("common", "gateway", "service") for path in (ROOT / name).glob("*.py")]
    given = {reason for source in sources for reason in reasons(ast.parse(source))}
    table = README[README.index("## Status codes") : README.index("## Speed")]
    assert given == set(re.findall(r"`([A-Z][A-Z_]+)`", table))


def reasons(source: ast.Module) -> Iterator[str]:
    """The second arguments of errors that are made, and the defaults of parameters named `reason`."""
    for node in ast.walk(source):
        if isinstance(node, ast.Call) and len(node.args) > 1:
            candidates = [node.args[1]]
        elif isinstance(node, ast.arguments):
            named = zip(reversed(node.args), reversed(node.defaults), strict=False)
            candidates = [default for argument, default in named if argument.arg == "reason"]
        else:
            continue
        for candidate in candidates:
            if isinstance(candidate, ast.Constant) and re.fullmatch("[A-Z][A-Z_]{3,}", str(candidate.value)):
                yield str(candidate.value)
