"""The processes that are measured: started as the product starts them, on free ports, and ended afterwards."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc

from common.settings import Settings, environment
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc

ROOT = Path(__file__).parents[1]
START_SECONDS = 60.0
SERVER = "from common.settings import load_settings; from {package}.server import main; main(load_settings())"
"""What `python -c` runs for a server of ours: its entry point, with settings from the environment."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs."""

    name: str
    address: str
    process: subprocess.Popen[bytes]

    def cpu_seconds(self) -> float:
        """What it and the processes it started have used so far, all threads, in steps of usually 10 ms."""
        stats = [stat for path in Path("/proc").glob("[0-9]*/stat") if (stat := _stat(path))]
        ticks = sum(int(stat[11]) + int(stat[12]) for stat in stats if stat[3] == str(self.process.pid))
        return ticks / os.sysconf("SC_CLK_TCK")

    def wait_until_it_answers(self) -> None:
        """Asks it to speak until it does.

        Raises:
            RuntimeError: it died or did not speak in time.
        """
        deadline = time.monotonic() + START_SECONDS
        with grpc.insecure_channel(self.address) as channel:
            stub = tts_pb2_grpc.TextToSpeechServiceStub(channel)
            while self.process.poll() is None and time.monotonic() < deadline:
                try:
                    stub.Synthesize(tts_pb2.SynthesizeRequest(text="你好"), wait_for_ready=True, timeout=2.0)
                    return
                except grpc.RpcError:
                    time.sleep(0.05)
        raise RuntimeError(f"{self.name} does not answer; run again with --logs to see why")


class Servers:
    """Starts servers, and kills them all in the end."""

    def __init__(self, stack: ExitStack, logs: bool) -> None:
        """`logs`: show what the servers write; otherwise it goes to /dev/null."""
        self._stack = stack
        self._output = None if logs else subprocess.DEVNULL

    def product(self, package: str, settings: Settings) -> Server:
        """A `gateway` or a `service`."""
        address = settings.gateway.listen if package == "gateway" else settings.service.listen
        others = {name: value for name, value in os.environ.items() if not name.startswith("CHORUS_")}
        command = [sys.executable, "-c", SERVER.format(package=package)]
        return self._start(package, address, command, others | environment(settings))

    def echo(self, options: Sequence[str]) -> Server:
        """The yardstick. `options`: as `bench.echo` takes them, without the address."""
        address = free_address()
        return self._start("echo", address, [sys.executable, "-m", "bench.echo", address, *options], dict(os.environ))

    def rival(self, module: str, options: Sequence[str], settings: Settings) -> Server:
        """Another batcher. `options`: what its module takes, without the address. `settings`: of its engine."""
        address = free_address()
        environ = dict(os.environ) | environment(settings)
        return self._start(module, address, [sys.executable, "-m", module, address, *options], environ)

    def _start(self, name: str, address: str, command: Sequence[str], environ: dict[str, str]) -> Server:
        # A directory of its own: for what is left behind by who is killed, and so that no two share a card.
        temporary = self._stack.enter_context(TemporaryDirectory(ignore_cleanup_errors=True))
        environ = environ | {"TMPDIR": temporary, "XDG_STATE_HOME": temporary}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=self._output, stderr=self._output, start_new_session=True
        )
        self._stack.callback(_end, process)
        return Server(name, address, process)


def free_address() -> str:
    """An address on which nobody listens now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def _stat(path: Path) -> list[str]:
    """The fields of /proc/PID/stat from the state on: its session is the fourth. Empty if the process has ended."""
    try:
        return path.read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills it and what it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
